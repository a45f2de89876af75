// A row of a linear layer, before and after the sums: plain loops that the compiler vectorises for each ISA.
#pragma once

#include "basics.h"

namespace {

// Of kernels that read the checkpoint's own order.
inline int64_t no_tiles(int64_t, int64_t) { return 0; }
inline void no_repack(const uint8_t *, int64_t, int64_t, uint8_t *) {}

inline void normalize(const proxbit::LinearCall &call, const float *x, float *to) {
    const int64_t count = call.inputs;
    const float mean = sum_of(count, [x](int64_t k) { return x[k]; }) / static_cast<float>(count);
    const float squares = sum_of(count, [x, mean](int64_t k) { return (x[k] - mean) * (x[k] - mean); });
    const float eps = static_cast<float>(call.norm_eps);
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(count) + eps);
    for (int64_t k = 0; k < count; ++k) to[k] = (x[k] - mean) * inverse * call.norm_weight[k] + call.norm_bias[k];
}

// Row `row` of x as fp32, normalized if the call asks for that, with zeros up to `width`; the row itself where it can be
// read in place.
inline const float *load_row(const proxbit::LinearCall &call, int64_t row, int64_t width, float *buffer) {
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
inline const float *load_centred_row(const proxbit::LinearCall &call, int64_t row, float *buffer) {
    const float *x = load_row(call, row, call.inputs, buffer);
    if (!call.levels) return x;
    for (int64_t k = 0; k < call.inputs; ++k) buffer[k] = x[k] >= call.levels[k] ? 1.0f : -1.0f;
    return buffer;
}

// q = round(clip(x / step)) to even, with zeros from the inputs up to `count`; returns step, or NaN if a quotient is one.
inline float quantize_on_grid(const proxbit::LinearCall &call, const float *x, int64_t count, int8_t *q) {
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
inline float quantize_row(const proxbit::LinearCall &call, const float *x, int64_t count, int8_t *q) {
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

// x Phi(x), Phi the normal distribution, to 7e-8 |x|. Phi(-|x|) = 2^-q, where q is fitted by a polynomial up to |x| = 9;
// the same loop without calls for every ISA, so that it is vectorised.
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
inline void store_row(const proxbit::LinearCall &call, int64_t row, int64_t begin, int64_t end, float factor,
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
