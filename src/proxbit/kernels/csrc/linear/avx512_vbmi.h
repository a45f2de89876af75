// What the ISAs with VBMI and VPOPCNTDQ share: tables of 64 entries in two registers for W1A8, popcounts for W1A1.
//
// Words (see avx512.h) hold 12 weights in 16 bits for W1A8 and 32 in 32 bits for W1A1.
#pragma once

#include "linear/avx512.h"

namespace {

// ---- W1A8

struct Patterns {
    // For 16-bit lane e: bits 0 and 1 of e, bits 2 and 3, bit 4 and 0, bit 4 and 1, each times 2 and a byte.
    alignas(64) uint8_t bytes[4][64];
    constexpr Patterns() : bytes() {
        for (int e = 0; e < 32; ++e) {
            for (int b = 0; b < 4; ++b) bytes[b / 2][2 * e + b % 2] = e >> b & 1 ? 2 : 0;
            bytes[2][2 * e] = bytes[3][2 * e] = e >> 4 ? 2 : 0, bytes[3][2 * e + 1] = 2;
        }
    }
};
constexpr Patterns patterns;

// Groups of 6 in 16-bit lanes. A table holds 2 sum e q (e the bits) and the sums of a chunk start at -sum q, so that
// they end as sum s q: at most 21 * 12 * 127, which fits; what wraps around on the way does no harm.
struct W1A8 : LookUp<W1A8> {
    using Word = uint16_t;
    using Activation = int8_t;
    using Sum = int32_t;
    static constexpr int rows = 4, columns = 32, column_block = 64;
    static constexpr int weights = 12, group = 6, most_words = 21;

    static const int8_t *load_row_of(const LinearCall &call, int64_t row, int64_t width, float *buffer, float &factor) {
        int8_t *q = reinterpret_cast<int8_t *>(buffer + width);
        factor = quantize_row(call, load_row(call, row, width, buffer), width, q);
        return q;
    }
    static void fill_table(const int8_t *q, uint8_t *table) {
        const auto times = [q](int i, int pattern) {
            int16_t pair;
            std::memcpy(&pair, q + i, 2);
            return _mm512_maddubs_epi16(load(patterns.bytes[pattern]), _mm512_set1_epi16(pair));
        };
        const __m512i sum = _mm512_add_epi16(times(0, 0), times(2, 1));
        store(table, _mm512_add_epi16(sum, times(4, 2)));
        store(table + 64, _mm512_add_epi16(sum, times(4, 3)));
    }
    static __m512i start(const int8_t *q, int64_t count) {
        int32_t sum = 0;
        for (int64_t k = 0; k < count; ++k) sum += q[k];
        return _mm512_set1_epi16(static_cast<int16_t>(-sum));
    }
    static __m512i next(__m512i indices) { return _mm512_srli_epi16(indices, group); }
    template <bool>
    static __m512i look_up(__m512i sum, __m512i low, __m512i index, __m512i high) {
        const __m512i entry = _mm512_permutex2var_epi16(low, index, high);
        asm("vpaddw %1, %0, %0" : "+v"(sum) : "v"(entry));
        return sum;
    }
    static void add_to(int32_t *to, __m512i sums) {
        const __m256i first = _mm512_castsi512_si256(sums), second = _mm512_extracti64x4_epi64(sums, 1);
        store(to, _mm512_add_epi32(load(to), _mm512_cvtepi16_epi32(first)));
        store(to + 16, _mm512_add_epi32(load(to + 16), _mm512_cvtepi16_epi32(second)));
    }
};

// ---- W1A1
//
struct W1A1 : SignWords<W1A1> {
    static constexpr int rows = 5;

    template <int rows>
    static void count(const uint8_t *tile, const uint32_t *signs, int64_t words, int64_t inputs, int32_t *sums,
                      int64_t stride);
};

struct Counter {
    __m512i left, right, last_left, last_right;
};

inline __m512i count_majority(__m512i sum, __m512i last, __m512i even, __m512i odd) {
    asm("vpternlogd $0x5c, %2, %1, %0" : "+v"(even) : "v"(last), "v"(odd));
    asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(_mm512_popcnt_epi32(even)));
    return sum;
}

inline void count_pair(Counter &counter, uint32_t even, uint32_t odd, const Registers &words) {
    const __m512i first = _mm512_set1_epi32(static_cast<int>(even)), second = _mm512_set1_epi32(static_cast<int>(odd));
    const __m512i left = words.c ^ second, right = words.d ^ second;
    counter.left = count_majority(counter.left, counter.last_left, words.a ^ first, left);
    counter.right = count_majority(counter.right, counter.last_right, words.b ^ first, right);
    counter.last_left = left, counter.last_right = right;
}

inline void store_counts(int32_t *to, const Counter &counter, int64_t inputs) {
    const auto sum = [inputs](__m512i majorities, __m512i last) {
        const __m512i differences = _mm512_add_epi32(_mm512_slli_epi32(majorities, 1), _mm512_popcnt_epi32(last));
        return _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(inputs)), _mm512_slli_epi32(differences, 1));
    };
    store(to, sum(counter.left, counter.last_left));
    store(to + 16, sum(counter.right, counter.last_right));
}

// sums[r][32 columns]; words of activations come with their rows side by side.
template <int rows>
void W1A1::count(const uint8_t *tile, const uint32_t *signs, int64_t words, int64_t inputs, int32_t *sums,
                 int64_t stride) {
    const __m512i zero = _mm512_setzero_si512();
    Counter a = {zero, zero, zero, zero}, b = a, c = a, d = a, e = a;
    for (int64_t j = 0; j < words; j += 2, tile += 256, signs += 2 * rows) {
        const Registers pair = {load(tile), load(tile + 64), load(tile + 128), load(tile + 192)};
        count_pair(a, signs[0], signs[rows], pair);
        if constexpr (rows > 1) count_pair(b, signs[1], signs[rows + 1], pair);
        if constexpr (rows > 2) count_pair(c, signs[2], signs[rows + 2], pair);
        if constexpr (rows > 3) count_pair(d, signs[3], signs[rows + 3], pair);
        if constexpr (rows > 4) count_pair(e, signs[4], signs[rows + 4], pair);
    }
    store_counts(sums, a, inputs);
    if constexpr (rows > 1) store_counts(sums + stride, b, inputs);
    if constexpr (rows > 2) store_counts(sums + 2 * stride, c, inputs);
    if constexpr (rows > 3) store_counts(sums + 3 * stride, d, inputs);
    if constexpr (rows > 4) store_counts(sums + 4 * stride, e, inputs);
}

}  // namespace
