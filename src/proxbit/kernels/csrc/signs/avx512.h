// Signs to bits and back, with AVX-512.
#pragma once

#include <immintrin.h>

#include "basics.h"

namespace {

inline uint32_t signs_of(__m512 x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ); }
inline uint32_t signs_of(const float *x) { return signs_of(_mm512_loadu_ps(x)); }
inline uint32_t signs_of(const uint16_t *x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
    return signs_of(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}

template <class Value>
void pack_signs_of(const Value *x, int64_t columns, uint8_t *bits) {
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) {
        const uint32_t mask = signs_of(x + k);
        std::memcpy(bits + k / 8, &mask, 2);
    }
    if (k == columns) return;
    Value last[16] = {};
    std::copy(x + k, x + columns, last);
    const uint32_t mask = signs_of(last) & ((1u << (columns - k)) - 1);
    std::memcpy(bits + k / 8, &mask, ceil_div(columns - k, 8));
}

void pack_signs(int64_t dtype, const void *values, int64_t columns, uint8_t *bits) {
    if (dtype == PROXBIT_FLOAT32) return pack_signs_of(static_cast<const float *>(values), columns, bits);
    pack_signs_of(static_cast<const uint16_t *>(values), columns, bits);
}

void unpack_signs(const uint8_t *bits, int64_t columns, float *values) {
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) {
        __mmask16 mask;
        std::memcpy(&mask, bits + k / 8, 2);
        _mm512_storeu_ps(values + k, _mm512_mask_blend_ps(mask, _mm512_set1_ps(-1.0f), _mm512_set1_ps(1.0f)));
    }
    for (; k < columns; ++k) values[k] = (bits[k / 8] >> (k % 8)) & 1 ? 1.0f : -1.0f;
}

constexpr proxbit::Signs signs = {pack_signs, unpack_signs};

}  // namespace
