// A row of activations, before and after the sums: plain loops that the compiler vectorises for each level.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "level.h"

// Every level is compiled with other flags: what they share must not be merged by the linker.
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Memory of a thread for the length of a call, kept for the next one. Each size is in bytes.
class Workspace {
   public:
    explicit Workspace(int64_t bytes) {
        if (static_cast<int64_t>(memory().size()) < bytes + 64) memory().resize(bytes + 64);
        const auto address = reinterpret_cast<uintptr_t>(memory().data());
        next_ = memory().data() + (64 - address % 64) % 64;
    }
    template <class T>
    T *take(int64_t count) {
        T *result = reinterpret_cast<T *>(next_);
        next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return result;
    }

   private:
    static std::vector<uint8_t> &memory() {
        static thread_local std::vector<uint8_t> bytes;
        return bytes;
    }
    uint8_t *next_;
};

// Sum of f(k), in 16 parts, so that every level adds in the same order.
template <class Function>
inline float sum_of(int64_t count, const Function &f) {
    constexpr int64_t parts = 16;
    float sums[parts] = {};
    int64_t k = 0;
    for (; k + parts <= count; k += parts)
        for (int64_t i = 0; i < parts; ++i) sums[i] += f(k + i);
    for (int64_t i = 0; k + i < count; ++i) sums[i] += f(k + i);
    float total = 0.0f;
    for (int64_t i = 0; i < parts; ++i) total += sums[i];
    return total;
}

inline void normalize(const proxbit::Call &call, const float *x, float *to) {
    const int64_t count = call.inputs;
    const float mean = sum_of(count, [x](int64_t k) { return x[k]; }) / static_cast<float>(count);
    const float squares = sum_of(count, [x, mean](int64_t k) { return (x[k] - mean) * (x[k] - mean); });
    const float eps = static_cast<float>(call.norm_eps);
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(count) + eps);
    for (int64_t k = 0; k < count; ++k) to[k] = (x[k] - mean) * inverse * call.norm_weight[k] + call.norm_bias[k];
}

// Row `row` of x as fp32, normalized if the call asks for that, with zeros up to `width`; the row itself where it can be
// read in place.
inline const float *load_row(const proxbit::Call &call, int64_t row, int64_t width, float *buffer) {
    const float *x = buffer;
    if (call.dtype == PROXBIT_FLOAT32) {
        x = static_cast<const float *>(call.x) + row * call.x_stride;
    } else {
        const uint16_t *narrow = static_cast<const uint16_t *>(call.x) + row * call.x_stride;
        for (int64_t k = 0; k < call.inputs; ++k) buffer[k] = from_bfloat16(narrow[k]);
    }
    if (call.norm_weight) {
        normalize(call, x, buffer);
    } else if (x != buffer) {
        if (width == call.inputs) return x;
        std::copy(x, x + call.inputs, buffer);
    }
    std::fill(buffer + call.inputs, buffer + width, 0.0f);
    return buffer;
}

// Row `row` of x, as numbers whose signs are those of x - threshold, the levels of W1A1.
inline const float *load_centred_row(const proxbit::Call &call, int64_t row, float *buffer) {
    const float *x = load_row(call, row, call.inputs, buffer);
    if (!call.levels) return x;
    for (int64_t k = 0; k < call.inputs; ++k) buffer[k] = x[k] >= call.levels[k] ? 1.0f : -1.0f;
    return buffer;
}

// q = round(clip(x / step)) to even, with zeros from the inputs up to `count`; returns step, or NaN if a quotient is one.
inline float quantize_on_grid(const proxbit::Call &call, const float *x, int64_t count, int8_t *q) {
    const float step = call.levels[0];
    const float lowest = std::min(0.0f, std::max(-127.0f, call.levels[1]));
    const float highest = std::max(0.0f, std::min(127.0f, call.levels[2]));
    const int64_t inputs = call.inputs;
    int32_t nans = 0;
    for (int64_t k = 0; k < inputs; ++k) {
        const float units = x[k] / step;
        nans |= units != units;
        // In this order, the larger of NaN and a number is the number.
        const float clipped = std::min(highest, std::max(lowest, units));
        q[k] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(clipped)));
    }
    std::fill(q + inputs, q + count, static_cast<int8_t>(0));
    return nans ? NAN : step;
}

// q = round(x / step) to even, in -127..127; returns step.
inline float quantize_row(const proxbit::Call &call, const float *x, int64_t count, int8_t *q) {
    if (call.levels) return quantize_on_grid(call, x, count, q);
    int32_t peak_bits = 0;  // of |x|, whose order as integers is that of floats, with NaN above infinity
    for (int64_t k = 0; k < count; ++k) {
        int32_t bits;
        std::memcpy(&bits, x + k, 4);
        peak_bits = std::max(peak_bits, bits & 0x7fffffff);
    }
    float peak;
    std::memcpy(&peak, &peak_bits, 4);
    const bool is_finite = peak_bits < 0x7f800000;
    const float inverse = is_finite && peak >= 1e-30f ? 127.0f / peak : 0.0f;
    if (inverse == 0.0f) {
        for (int64_t k = 0; k < count; ++k) q[k] = 0;
        return is_finite ? 0.0f : NAN;
    }
    for (int64_t k = 0; k < count; ++k) q[k] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(x[k] * inverse)));
    return peak / 127.0f;
}

// y = step q: what W1A8 multiplies, as floats.
inline void round_row(const float *x, int64_t count, float *y) {
    proxbit::Call call{};
    call.inputs = count;
    Workspace workspace(count + 64);
    int8_t *q = workspace.take<int8_t>(count);
    const float step = quantize_row(call, x, count, q);
    for (int64_t k = 0; k < count; ++k) y[k] = static_cast<float>(q[k]) * step;
}

inline void pack_signs_row(const float *x, int64_t count, uint8_t *bits) {
    for (int64_t j = 0; j < count / 8; ++j) {
        uint32_t byte = 0;
        for (int b = 0; b < 8; ++b) byte |= static_cast<uint32_t>(x[8 * j + b] >= 0.0f) << b;
        bits[j] = static_cast<uint8_t>(byte);
    }
    if (count % 8) {
        uint32_t byte = 0;
        for (int b = 0; b < count % 8; ++b) byte |= static_cast<uint32_t>(x[count / 8 * 8 + b] >= 0.0f) << b;
        bits[count / 8] = static_cast<uint8_t>(byte);
    }
}

// a b + c, rounded once where the processor does that at no cost
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// x Phi(x), Phi the normal distribution, to 7e-8 |x|. Phi(-|x|) = 2^-q, where q is fitted by a polynomial up to |x| = 9;
// the same loop without calls for every level, so that it is vectorised.
// The coefficients from the constant up.
template <class... Rest>
inline float polynomial(float x, float first, Rest... rest) {
    if constexpr (sizeof...(Rest) == 0) {
        return first;
    } else {
        return multiply_add(polynomial(x, rest...), x, first);
    }
}

inline float gelu(float x) {
    const float a = std::min(9.0f, std::fabs(x));  // in this order 9 for NaN, which has no exponent
    const float q = polynomial(a, 0.999999972f, 1.15110615f, 4.59200473e-01f, 5.25217847e-02f, -7.10516849e-03f,
                               1.73261746e-04f, 1.69092234e-04f, -3.5303185e-05f, 2.45096224e-06f);
    const float whole = __builtin_rintf(-q), rest = -q - whole;
    float power = polynomial(rest, 1.0f, 6.93147199e-01f, 2.40226474e-01f, 5.55034215e-02f, 9.61849172e-03f,
                             1.3394761e-03f, 1.53324388e-04f);
    int32_t bits;
    std::memcpy(&bits, &power, 4);
    bits += static_cast<int32_t>(whole) * (1 << 23);
    std::memcpy(&power, &bits, 4);
    return x * (x < 0 ? power : 1.0f - power);
}

// y[row, begin..end] = sums * factor * scale + bias, and GELU of it if the call asks for that.
template <class Sum>
inline void store_row(const proxbit::Call &call, int64_t row, int64_t begin, int64_t end, float factor,
                      const Sum *__restrict sums) {
    constexpr int64_t at_once = 256;
    float part[at_once];
    for (int64_t first = begin; first < end; first += at_once, sums += at_once) {
        const int64_t count = std::min(at_once, end - first), place = row * call.outputs + first;
        const bool is_float = call.dtype == PROXBIT_FLOAT32;
        const float *__restrict scale = call.scale + first;
        float *__restrict to = is_float ? static_cast<float *>(call.y) + place : part;
        if (call.bias) {
            const float *__restrict bias = call.bias + first;
            for (int64_t n = 0; n < count; ++n) to[n] = static_cast<float>(sums[n]) * (factor * scale[n]) + bias[n];
        } else {
            for (int64_t n = 0; n < count; ++n) to[n] = static_cast<float>(sums[n]) * (factor * scale[n]);
        }
        if (call.gelu) {
            for (int64_t n = 0; n < count; ++n) to[n] = gelu(to[n]);
        }
        if (!is_float) {
            uint16_t *y = static_cast<uint16_t *>(call.y) + place;
            for (int64_t n = 0; n < count; ++n) y[n] = to_bfloat16(part[n]);
        }
    }
}

}  // namespace
