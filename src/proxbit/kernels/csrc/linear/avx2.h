// AVX2: tables of 16 entries in registers, looked up with a byte shuffle, 32 columns at once.
//
// Tiles (see byte_look_up.h): of W1A8 and W1A1 32 bytes are 8 weights of 32 columns; the low half of a byte is the index
// for 4 activations, the high half the one for the next 4.
#pragma once

#include <immintrin.h>

#include "linear/avx2_lanes.h"
#include "linear/avx2_few.h"
#include "linear/byte_look_up.h"
#include "signs/avx2.h"

namespace {

using proxbit::LinearCall;

// ---- layout

// to[32 * c + r] = from[r * stride + c] for 16 rows of 8 bytes
inline void transpose(const uint8_t *from, int64_t stride, uint8_t *to) {
    __m128i columns[8];
    transpose_bytes(from, stride, columns);
    for (int c = 0; c < 8; ++c) _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 32 * c), columns[c]);
}

inline __m256i load(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline void store(void *p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }
inline __m256i table(const void *p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i *>(p)));
}

// Sums are named variables and these additions asm: gcc 12 keeps arrays of sums in memory, and regroups and spills sums
// that it can see through.
inline void add_bytes(__m256i &sum, __m256i v) { asm("vpaddb %1, %0, %0" : "+x"(sum) : "x"(v)); }

// Indices for the first or the second 4 of 8 weights, of 64 columns.
struct Indices {
    __m256i left, right;
};
inline Indices first_half(const uint8_t *left, const uint8_t *right) {
    const __m256i nibble = _mm256_set1_epi8(15);
    return {_mm256_and_si256(load(left), nibble), _mm256_and_si256(load(right), nibble)};
}
inline Indices second_half(const uint8_t *left, const uint8_t *right) {
    const __m256i nibble = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(load(left), 4), nibble),
            _mm256_and_si256(_mm256_srli_epi16(load(right), 4), nibble)};
}

// ---- W1A8
//
// Of 4 activations all 16 sums are at most 508 in size. A table holds sum + 512 in two bytes, 5 low bits and the rest;
// 8 of each can be added in a byte before lo + 32 * hi goes to 16 bits, where 256 weights fit.

struct SplitSums {
    __m256i low_left, high_left, low_right, high_right;
};

inline void look_up(SplitSums &sums, const uint8_t *tables, const Indices &indices) {
    const __m256i low = table(tables), high = table(tables + 32);
    add_bytes(sums.low_left, _mm256_shuffle_epi8(low, indices.left));
    add_bytes(sums.high_left, _mm256_shuffle_epi8(high, indices.left));
    add_bytes(sums.low_right, _mm256_shuffle_epi8(low, indices.right));
    add_bytes(sums.high_right, _mm256_shuffle_epi8(high, indices.right));
}

inline void widen(int16_t *words, __m256i low, __m256i high) {
    const __m256i weights = _mm256_set1_epi16(0x2001);  // 1 for low, 32 for high
    const __m256i even = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), weights);
    const __m256i odd = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), weights);
    store(words, _mm256_add_epi16(load(words), even));
    store(words + 16, _mm256_add_epi16(load(words + 16), odd));
}

inline void add_words(int32_t *to, __m128i words) {
    store(to, _mm256_add_epi32(load(to), _mm256_cvtepi16_epi32(words)));
}

struct W1A8 {
    static constexpr int rows = 2, columns = 64, multiple = 4, chunk = 32;
    static constexpr int activation_bytes = 8, table_bytes = 64, factor = 2;
    static constexpr auto load_row_of = load_int8;

    // Tables for 8 activations: [low of the first 4, low of the next 4, high of ..., high of ...], 16 bytes each.
    static void fill_tables(const uint8_t *q, uint8_t *tables) {
        const __m256i ab = _mm256_setr_m128i(_mm_set1_epi16(0x0100), _mm_set1_epi16(0x0504));
        const __m256i cd = _mm256_add_epi8(ab, _mm256_set1_epi8(2));
        // For entries 0..7, then 8..15: which of a and b, of c and d, are in the sum.
        const __m256i low_ab = _mm256_set1_epi64x(0x0101010000010000);
        const __m256i low_cd = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0001000100010001, 0));
        const __m256i high_cd = _mm256_or_si256(low_cd, _mm256_set1_epi16(0x0100));
        const __m256i activations = _mm256_set1_epi64x(*reinterpret_cast<const int64_t *>(q));
        const __m256i first = _mm256_shuffle_epi8(activations, ab), second = _mm256_shuffle_epi8(activations, cd);
        const __m256i with_ab = _mm256_add_epi16(_mm256_maddubs_epi16(low_ab, first), _mm256_set1_epi16(512));
        const __m256i low = _mm256_add_epi16(with_ab, _mm256_maddubs_epi16(low_cd, second));
        const __m256i high = _mm256_add_epi16(with_ab, _mm256_maddubs_epi16(high_cd, second));
        const __m256i mask = _mm256_set1_epi16(31);
        store(tables, _mm256_packus_epi16(_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)));
        store(tables + 32, _mm256_packus_epi16(_mm256_srli_epi16(low, 5), _mm256_srli_epi16(high, 5)));
    }

    // sums[r][64 columns] += sum_k e a for a chunk; 64 bytes of tables for each row and byte of weights.
    template <int rows>
    static void add_chunk(const uint8_t *tile, const uint8_t *tables, int64_t bytes, int32_t *sums, int64_t stride) {
        alignas(32) int16_t words[rows * 64] = {};
        const uint8_t *right = tile + 32 * bytes;
        const __m256i zero = _mm256_setzero_si256();
        for (int64_t j = 0; j < bytes; j += 4) {
            SplitSums first = {zero, zero, zero, zero}, second = first;
            for (int64_t i = j; i < j + 4; ++i) {
                const uint8_t *entry = tables + i * rows * 64;
                Indices indices = first_half(tile + 32 * i, right + 32 * i);
                look_up(first, entry, indices);
                if constexpr (rows > 1) look_up(second, entry + 64, indices);
                indices = second_half(tile + 32 * i, right + 32 * i);
                look_up(first, entry + 16, indices);
                if constexpr (rows > 1) look_up(second, entry + 80, indices);
            }
            widen(words, first.low_left, first.high_left);
            widen(words + 32, first.low_right, first.high_right);
            if constexpr (rows > 1) {
                widen(words + 64, second.low_left, second.high_left);
                widen(words + 96, second.low_right, second.high_right);
            }
        }
        const __m256i bias = _mm256_set1_epi16(static_cast<int16_t>(2 * bytes * 512));
        for (int i = 0; i < 2 * rows; ++i) {
            // Unpacking works in halves of a register: columns 0-7 and 16-23, then 8-15 and 24-31.
            const __m256i even = _mm256_sub_epi16(load(words + 32 * i), bias);
            const __m256i odd = _mm256_sub_epi16(load(words + 32 * i + 16), bias);
            int32_t *to = sums + i / 2 * stride + i % 2 * 32;
            add_words(to, _mm256_castsi256_si128(even));
            add_words(to + 8, _mm256_castsi256_si128(odd));
            add_words(to + 16, _mm256_extracti128_si256(even, 1));
            add_words(to + 24, _mm256_extracti128_si256(odd, 1));
        }
    }
};

// ---- W1A1
//
// The table of 4 activation signs a counts the differences of a and the index: there are 16 such tables.

struct Differences {
    alignas(64) uint8_t table[16][16];
    constexpr Differences() : table() {
        for (int a = 0; a < 16; ++a)
            for (int w = 0; w < 16; ++w)
                for (int b = 0; b < 4; ++b) table[a][w] += ((a ^ w) >> b) & 1;
    }
};
constexpr Differences differences;

struct Counts {
    __m256i left, right;
};

inline void look_up(Counts &counts, const uint8_t *tables, const Indices &indices) {
    const __m256i entry = table(tables);
    add_bytes(counts.left, _mm256_shuffle_epi8(entry, indices.left));
    add_bytes(counts.right, _mm256_shuffle_epi8(entry, indices.right));
}

inline void add_counts(int32_t *to, const Counts &counts) {
    const auto add = [](int32_t *to, __m128i bytes) {
        store(to, _mm256_add_epi32(load(to), _mm256_cvtepu8_epi32(bytes)));
    };
    const auto add_register = [&](int32_t *to, __m256i bytes) {
        const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
        add(to, low);
        add(to + 8, _mm_srli_si128(low, 8));
        add(to + 16, high);
        add(to + 24, _mm_srli_si128(high, 8));
    };
    add_register(to, counts.left);
    add_register(to + 32, counts.right);
}

struct W1A1 {
    static constexpr int rows = 4, columns = 64, multiple = 1, chunk = 24;  // at most 4 * 2 * 24 differences in a byte
    static constexpr int activation_bytes = 1, table_bytes = 32, factor = -2;
    static float load_row_of(const LinearCall &call, int64_t row, int64_t, float *buffer, uint8_t *to, int32_t &offset) {
        pack_signs_of(load_centred_row(call, row, buffer), call.inputs, to);
        offset = static_cast<int32_t>(call.inputs);
        return 1.0f;
    }
    static void fill_tables(const uint8_t *signs, uint8_t *tables) {
        std::memcpy(tables, differences.table[*signs & 15], 16);
        std::memcpy(tables + 16, differences.table[*signs >> 4], 16);
    }

    // sums[r][64 columns] += differences in a chunk; 32 bytes of tables for each row and byte of weights.
    template <int rows>
    static void add_chunk(const uint8_t *tile, const uint8_t *tables, int64_t bytes, int32_t *sums, int64_t stride) {
        const __m256i zero = _mm256_setzero_si256();
        const uint8_t *right = tile + 32 * bytes;
        Counts a = {zero, zero}, b = a, c = a, d = a;
        for (int64_t i = 0; i < bytes; ++i) {
            const uint8_t *entry = tables + i * rows * 32;
            Indices indices = first_half(tile + 32 * i, right + 32 * i);
            look_up(a, entry, indices);
            if constexpr (rows > 1) {
                look_up(b, entry + 32, indices);
                look_up(c, entry + 64, indices);
                look_up(d, entry + 96, indices);
            }
            indices = second_half(tile + 32 * i, right + 32 * i);
            look_up(a, entry + 16, indices);
            if constexpr (rows > 1) {
                look_up(b, entry + 48, indices);
                look_up(c, entry + 80, indices);
                look_up(d, entry + 112, indices);
            }
        }
        add_counts(sums, a);
        if constexpr (rows > 1) {
            add_counts(sums + stride, b);
            add_counts(sums + 2 * stride, c);
            add_counts(sums + 3 * stride, d);
        }
    }
};

// ---- few rows and many: each has tiles of its own

template <int64_t few_bytes(int64_t, int64_t)>
int64_t both_bytes(int64_t outputs, int64_t inputs) {
    return few_bytes(outputs, inputs) + lanes::tile_bytes(outputs, inputs);
}

template <int64_t few_bytes(int64_t, int64_t), void repack_few(const uint8_t *, int64_t, int64_t, uint8_t *)>
void repack_both(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
    repack_few(bits, outputs, inputs, tiles);
    lanes::repack(bits, outputs, inputs, tiles + few_bytes(outputs, inputs));
}

template <class Many, int64_t few_bytes(int64_t, int64_t),
          void run_few(const LinearCall &, int64_t, int64_t, int64_t, int64_t)>
void run_both(const LinearCall &call, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    const uint8_t *tiles = call.tiles + few_bytes(call.outputs, call.inputs);
    run_few(call, lanes::run<Many>(call, tiles, row_begin, row_end, begin, end), row_end, begin, end);
}

template <class Many, int64_t few_bytes(int64_t, int64_t), void repack_few(const uint8_t *, int64_t, int64_t, uint8_t *),
          void run_few(const LinearCall &, int64_t, int64_t, int64_t, int64_t)>
constexpr proxbit::LinearKernel format = {Many::rows, 64, both_bytes<few_bytes>, repack_both<few_bytes, repack_few>,
                                    run_both<Many, few_bytes, run_few>};

}  // namespace
