// Signs to bits and back, with AVX2.
#pragma once

#include <immintrin.h>

#include "basics.h"

namespace {

inline __m256 load_floats(const float *x) { return _mm256_loadu_ps(x); }
inline __m256 load_floats(const uint16_t *x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

template <class Value>
void pack_signs_of(const Value *x, int64_t columns, uint8_t *bits) {
    int64_t j = 0;
    for (; 8 * j + 8 <= columns; ++j) {
        const __m256 positive = _mm256_cmp_ps(load_floats(x + 8 * j), _mm256_setzero_ps(), _CMP_GE_OQ);
        bits[j] = static_cast<uint8_t>(_mm256_movemask_ps(positive));
    }
    if (8 * j == columns) return;
    Value last[8] = {};
    std::copy(x + 8 * j, x + columns, last);
    const int padding = 8 - static_cast<int>(columns % 8);
    const __m256 positive = _mm256_cmp_ps(load_floats(last), _mm256_setzero_ps(), _CMP_GE_OQ);
    bits[j] = static_cast<uint8_t>(_mm256_movemask_ps(positive)) & (0xff >> padding);
}

void pack_signs(int64_t dtype, const void *values, int64_t columns, uint8_t *bits) {
    if (dtype == PROXBIT_FLOAT32) {
        pack_signs_of(static_cast<const float *>(values), columns, bits);
    } else {
        pack_signs_of(static_cast<const uint16_t *>(values), columns, bits);
    }
}

void unpack_signs(const uint8_t *bits, int64_t columns, float *values) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256 minus = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    int64_t j = 0;
    for (; 8 * j + 8 <= columns; ++j) {
        const __m256i present = _mm256_and_si256(_mm256_set1_epi32(bits[j]), bit);
        const __m256i absent = _mm256_cmpeq_epi32(present, _mm256_setzero_si256());
        _mm256_storeu_ps(values + 8 * j, _mm256_or_ps(one, _mm256_and_ps(minus, _mm256_castsi256_ps(absent))));
    }
    for (int64_t i = 8 * j; i < columns; ++i) values[i] = (bits[j] >> (i % 8)) & 1 ? 1.0f : -1.0f;
}

constexpr proxbit::Signs signs = {pack_signs, unpack_signs};

}  // namespace
