// Rows of latent weights through a forward or backward quantizer: plain loops that the compiler vectorises for each
// ISA. A row stays in the cache between two of them.
#pragma once

#include "basics.h"

namespace {

// t = tanh(a / 2) and c = s(a) (1 - s(a)), s the logistic function, for 0 <= a <= 60: to a few units in the last place.
struct Logistic {
    float t;
    float c;
};

inline Logistic logistic(float a) {
    // e^-a = 2^n e^r: adding 1.5 * 2^23 rounds, and leaves n in the lowest bits. ln 2 comes in two parts, the first of
    // which times n is exact.
    const float shifted = multiply_add(a, -1.44269504f, 12582912.0f);
    const float n = shifted - 12582912.0f;
    const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, -a));
    const float rest = r * polynomial(r, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040);
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    // e^-a - 1, exact near zero too, where the power is 1.
    const float less_one = multiply_add(power, rest, power - 1.0f);
    const float inverse = 1.0f / (2.0f + less_one);
    return {-less_one * inverse, multiply_add(power, rest, power) * inverse * inverse};
}

// sin(y) for |y| <= pi / 4.
inline float sine(float y) {
    return y * polynomial(y * y, 1.0f, -1.0f / 6, 1.0f / 120, -1.0f / 5040, 1.0f / 362880);
}

// Beyond 60 nothing changes any more. In this order NaN stays, here and below.
inline float size_of(float x) { return std::min(std::fabs(x), 60.0f); }
inline float bounded(float x) { return x > 1.0f ? 1.0f : (x < -1.0f ? -1.0f : x); }

// F_mu(u) or B_mu(u), by the enum proxbit_function, but for the series.
template <int function>
inline float value_of(float u, float mu) {
    if constexpr (function == PROXBIT_ONE) {
        return 1.0f;
    } else if constexpr (function == PROXBIT_BOX) {
        return std::fabs(u) <= 1.0f ? 1.0f : 0.0f;
    } else if constexpr (function == PROXBIT_SIGN) {
        return u >= 0.0f ? 1.0f : -1.0f;
    } else if constexpr (function == PROXBIT_CLIP) {
        return bounded(mu * u);
    } else if constexpr (function == PROXBIT_POLYNOMIAL) {
        const float x = bounded(mu * u);
        return x * (2.0f - std::fabs(x));
    } else if constexpr (function == PROXBIT_POLYNOMIAL_SLOPE) {
        const float left = 2.0f - 2.0f * std::fabs(mu * u);
        return (left < 0.0f ? 0.0f : left) * mu;
    } else if constexpr (function == PROXBIT_TANH) {
        return std::copysign(logistic(size_of(2.0f * mu * u)).t, u);
    } else if constexpr (function == PROXBIT_TANH_SLOPE) {
        return 4.0f * mu * logistic(size_of(2.0f * mu * u)).c;
    } else if constexpr (function == PROXBIT_SIGN_SWISH) {
        const float a = size_of(mu * u);
        const Logistic of = logistic(a);
        return std::copysign(of.t + 2.0f * a * of.c, u);
    } else if constexpr (function == PROXBIT_SIGN_SWISH_SLOPE) {
        const float a = size_of(mu * u);
        const Logistic of = logistic(a);
        return 2.0f * mu * of.c * (2.0f - a * of.t);
    } else if constexpr (function == PROXBIT_DECAY) {
        return std::max(1.0f / mu, 1.0f) * value_of<PROXBIT_TANH>(u, mu);
    } else {
        static_assert(function == PROXBIT_DECAY_SLOPE, "a function without a formula");
        return std::max(1.0f / mu, 1.0f) * value_of<PROXBIT_TANH_SLOPE>(u, mu);
    }
}

// The two functions that are sums of sines and cosines, of some numbers at once, so that each term is a loop.
constexpr int series_terms = 32, series_at_once = 64;

// Clenshaw's sum of a_i sin((2 i + 1) z) and of cosines, in the form of Reinsch, which keeps its digits near zero: from
// the last term down, d_i = a_i + d_(i+1) + c b_(i+1) and b_i = b_(i+1) + d_i, where c = -4 sin(z)^2. Beyond y = pi / 4
// z is pi / 2 - y, where sines and cosines change places, and every other term its sign.
template <bool of_slope>
void series(const float *a, float *__restrict u) {
    constexpr float pi = 3.14159265f;
    float s[series_at_once], c[series_at_once], b[series_at_once] = {}, d[series_at_once] = {}, odd[series_at_once];
    for (int k = 0; k < series_at_once; ++k) {
        const float size = std::fabs(u[k]), y = 0.5f * (size > pi ? pi : size);
        odd[k] = y > pi / 4 ? -1.0f : 1.0f;
        s[k] = sine(y > pi / 4 ? pi / 2 - y : y);
        c[k] = -4.0f * s[k] * s[k];
    }
    for (int term = series_terms - 2; term >= 0; term -= 2) {
        for (int k = 0; k < series_at_once; ++k) {
            d[k] = multiply_add(c[k], b[k], multiply_add(odd[k], a[term + 1], d[k]));
            b[k] += d[k];
            d[k] = multiply_add(c[k], b[k], d[k] + a[term]);
            b[k] += d[k];
        }
    }
    for (int k = 0; k < series_at_once; ++k) {
        const float sines = s[k] * (2.0f * b[k] - d[k]), cosines = std::sqrt(1.0f + 0.25f * c[k]) * d[k];
        const float sum = (odd[k] > 0.0f) == of_slope ? cosines : sines;
        u[k] = of_slope ? 2.0f / pi * sum : std::copysign(4.0f / pi * sum, u[k]);
    }
}

template <bool of_slope>
void apply_series(const float *w, int64_t count, float divisor, float mu, float *to) {
    float a[series_terms];
    for (int term = 0; term < series_terms; ++term) {
        const float share = std::min(std::max(mu + static_cast<float>(1 - term), 0.0f), 1.0f);
        a[term] = of_slope ? share : share / static_cast<float>(2 * term + 1);
    }
    for (int64_t first = 0; first < count; first += series_at_once) {
        const int64_t some = std::min<int64_t>(series_at_once, count - first);
        float u[series_at_once] = {};
        for (int64_t k = 0; k < some; ++k) u[k] = w[first + k] / divisor;
        series<of_slope>(a, u);
        std::memcpy(to + first, u, some * sizeof(float));
    }
}

// to[k] = f(w[k] / divisor); the sign is that of w[k], whose quotient may underflow to zero.
template <int function>
void apply(const float *__restrict w, int64_t count, float divisor, float mu, float *__restrict to) {
    if constexpr (function == PROXBIT_SERIES || function == PROXBIT_SERIES_SLOPE) {
        apply_series<function == PROXBIT_SERIES_SLOPE>(w, count, divisor, mu, to);
    } else {
        for (int64_t k = 0; k < count; ++k) {
            to[k] = value_of<function>(function == PROXBIT_SIGN ? w[k] : w[k] / divisor, mu);
        }
    }
}

using Apply = void (*)(const float *w, int64_t count, float divisor, float mu, float *to);
template <int... functions>
inline Apply apply_of(int64_t function, std::integer_sequence<int, functions...>) {
    constexpr Apply all[] = {apply<functions>...};
    return all[function];
}
inline Apply apply_of(int64_t function) {
    return apply_of(function, std::make_integer_sequence<int, PROXBIT_FUNCTIONS>());
}

inline float dot(const float *x, const float *y, int64_t count) {
    return sum_of(count, [x, y](int64_t k) { return x[k] * y[k]; });
}

// At least the smallest normal number, and NaN where it is NaN.
inline float at_least_tiny(float x) { return x < 1.17549435e-38f ? 1.17549435e-38f : x; }

// Some numbers of a row, which stay in the first cache between two loops.
constexpr int64_t columns_at_once = 256;

void quantize_latent(const proxbit::LatentCall &call, int64_t row) {
    const int64_t count = call.columns;
    const float *__restrict w = call.latent + row * count;
    float *__restrict to = call.result + row * count;
    const float mu = static_cast<float>(*call.mu);
    if (call.find_divisor) {
        const float sum = sum_of(count, [w](int64_t k) { return std::fabs(w[k]); });
        call.divisor[row] = at_least_tiny(sum / static_cast<float>(count));
    }
    apply_of(call.function)(w, count, call.divisor[row], mu, to);
    if (call.find_factor) call.factor[row] = dot(to, w, count) / at_least_tiny(dot(to, to, count));
    const float factor = call.factor[row];
    for (int64_t k = 0; k < count; ++k) to[k] *= factor;
}

void latent_gradient(const proxbit::LatentCall &call, int64_t row) {
    const float divisor = call.divisor[row], gain = call.factor[row] / divisor, mu = static_cast<float>(*call.mu);
    float part[columns_at_once];
    for (int64_t first = 0; first < call.columns; first += columns_at_once) {
        const int64_t count = std::min(columns_at_once, call.columns - first), place = row * call.columns + first;
        const float *__restrict grad = call.grad + place;
        apply_of(call.function)(call.latent + place, count, divisor, mu, part);
        for (int64_t k = 0; k < count; ++k) part[k] = part[k] * gain * grad[k];
        std::memcpy(call.result + place, part, count * sizeof(float));
    }
}

}  // namespace
