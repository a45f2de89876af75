// Signs to bits and back, with NEON.
#pragma once

#include <arm_neon.h>

#include "basics.h"

namespace {

inline float32x4_t load_floats(const float *x) { return vld1q_f32(x); }
inline float32x4_t load_floats(const uint16_t *x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }

template <class Value>
inline uint8_t signs_of(const Value *x) {
    const uint16x8_t places = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint32x4_t first = vcgezq_f32(load_floats(x)), second = vcgezq_f32(load_floats(x + 4));
    const uint16x8_t both = vuzp1q_u16(vreinterpretq_u16_u32(first), vreinterpretq_u16_u32(second));
    return static_cast<uint8_t>(vaddvq_u16(vandq_u16(both, places)));
}

template <class Value>
void pack_signs_of(const Value *x, int64_t columns, uint8_t *bits) {
    const int64_t j = columns / 8;
    for (int64_t i = 0; i < j; ++i) bits[i] = signs_of(x + 8 * i);
    if (columns % 8 == 0) return;
    Value last[8] = {};
    std::copy(x + 8 * j, x + columns, last);
    bits[j] = signs_of(last) & (0xff >> (8 - columns % 8));
}

void pack_signs(int64_t dtype, const void *values, int64_t columns, uint8_t *bits) {
    if (dtype == PROXBIT_FLOAT32) return pack_signs_of(static_cast<const float *>(values), columns, bits);
    pack_signs_of(static_cast<const uint16_t *>(values), columns, bits);
}

void unpack_signs(const uint8_t *bits, int64_t columns, float *values) {
    const uint32x4_t places = {1, 2, 4, 8};
    const float32x4_t one = vdupq_n_f32(1.0f), minus_one = vdupq_n_f32(-1.0f);
    int64_t k = 0;
    for (; k + 4 <= columns; k += 4) {
        const uint32x4_t half = vdupq_n_u32(bits[k / 8] >> (k % 8));
        vst1q_f32(values + k, vbslq_f32(vtstq_u32(half, places), one, minus_one));
    }
    for (; k < columns; ++k) values[k] = (bits[k / 8] >> (k % 8)) & 1 ? 1.0f : -1.0f;
}

constexpr proxbit::Signs signs = {pack_signs, unpack_signs};

}  // namespace
