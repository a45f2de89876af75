// Many rows with AVX2: a row of x is a lane of the registers, all 64 sums of 6 activations lie in memory. One addition
// does 6 weights for every lane: 8 rows of floats, 16 of W1A8, 32 of W1A1. A part of avx2.h.
//
// Passes of 48 weights: their 8 tables, 16 KB, stay in the first cache while all columns go by. Tiles: for every pass,
// for every column, 8 bytes, 4 times the index of each table.
#pragma once

#include <algorithm>
#include <cfloat>

#include <immintrin.h>

#include "linear/row.h"

namespace {

// to[c] = byte c of 16 rows: every round moves one bit of the row to where one of the column was.
inline void transpose_bytes(const uint8_t *from, int64_t stride, __m128i to[8]) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; ++i) {
        const auto row = [&](int r) { return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + r * stride)); };
        a[i] = _mm_unpacklo_epi8(row(i), row(i + 8));
    }
    const auto shuffle = [](const __m128i *in, __m128i *out) {
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = _mm_unpacklo_epi8(in[i], in[i + 4]);
            out[2 * i + 1] = _mm_unpackhi_epi8(in[i], in[i + 4]);
        }
    };
    shuffle(a, b);
    shuffle(b, a);
    shuffle(a, to);
}

namespace lanes {

using proxbit::LinearCall;

constexpr int group = 6, entries = 1 << group, groups = 8, pass = group * groups;
constexpr int register_bytes = 32, table_bytes = entries * register_bytes;

inline __m256i load(const void *p) { return _mm256_load_si256(static_cast<const __m256i *>(p)); }
inline void store(void *p, __m256i v) { _mm256_store_si256(static_cast<__m256i *>(p), v); }

// ---- layout

int64_t tile_bytes(int64_t outputs, int64_t inputs) { return ceil_div(inputs, pass) * outputs * groups; }

void repack(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
    const int64_t width = ceil_div(inputs, 8), passes = ceil_div(inputs, pass);
    for (int64_t p = 0; p < passes; ++p) {
        const int64_t first = pass / 8 * p, count = std::min<int64_t>(pass / 8, width - first);
        for (int64_t n = 0; n < outputs; ++n, tiles += groups) {
            uint64_t word = 0;
            std::memcpy(&word, bits + n * width + first, count);
            word = _pdep_u64(word, 0xfcfcfcfcfcfcfcfc);
            std::memcpy(tiles, &word, groups);
        }
    }
}

// Transposes 8 x 8 numbers of 4 bytes in place.
inline void transpose_numbers(__m256i r[8]) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// ---- formats: what a lane holds, how rows come into lanes, how lanes are added up

struct W1 {
    using Sum = float;
    using Value = float;
    static constexpr int rows = 8, fewest = 4, passes = 8;
    static constexpr int64_t most_inputs = INT64_MAX;
    static __m256i add(__m256i a, __m256i b) {
        return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
    }
    static __m256i of_minus(__m256i a) {
        return _mm256_castps_si256(_mm256_sub_ps(_mm256_setzero_ps(), _mm256_castsi256_ps(a)));
    }
    static __m256i from_minus_to_plus(__m256i a) { return add(a, a); }
    // Whether twice each of the numbers, and any sum of them, is finite.
    static bool is_moderate(const __m256i *a) {
        const __m256 most = _mm256_set1_ps(FLT_MAX / 16), sign = _mm256_set1_ps(-0.0f);
        __m256 large = _mm256_setzero_ps();
        for (int b = 0; b < group; ++b) {
            const __m256 size = _mm256_andnot_ps(sign, _mm256_castsi256_ps(a[b]));
            large = _mm256_or_ps(large, _mm256_cmp_ps(size, most, _CMP_NLE_UQ));
        }
        return _mm256_movemask_ps(large) == 0;
    }
    static float load_values(const LinearCall &call, int64_t row, float *, float *to) {
        const float *from = load_row(call, row, call.inputs, to);
        if (from != to) std::copy_n(from, call.inputs, to);
        return 1.0f;
    }
    // lanes[c] = values[lane][c] for 8 values of every row
    static void gather(const float *values, int64_t stride, __m256i lanes[8]) {
        for (int r = 0; r < 8; ++r) lanes[r] = load(values + r * stride);
        transpose_numbers(lanes);
    }
    static void flush(float *sums, __m256i narrow) { store(sums, add(load(sums), narrow)); }
    static __m256i widen(const float *sums, int64_t) { return load(sums); }
};

struct W1A8 {
    using Sum = int32_t;
    using Value = int8_t;
    static constexpr int rows = 16, fewest = 11, passes = 5;  // 5 * 48 * 127 fits in 16 bits
    static constexpr int64_t most_inputs = INT64_MAX;
    static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
    static __m256i of_minus(__m256i a) { return _mm256_sub_epi16(_mm256_setzero_si256(), a); }
    static __m256i from_minus_to_plus(__m256i a) { return add(a, a); }
    static bool is_moderate(const __m256i *) { return true; }
    static float load_values(const LinearCall &call, int64_t row, float *buffer, int8_t *to) {
        return quantize_row(call, load_row(call, row, call.inputs, buffer), call.inputs, to);
    }
    static void gather(const int8_t *values, int64_t stride, __m256i lanes[8]) {
        __m128i bytes[8];
        transpose_bytes(reinterpret_cast<const uint8_t *>(values), stride, bytes);
        for (int c = 0; c < 8; ++c) lanes[c] = _mm256_cvtepi8_epi16(bytes[c]);
    }
    // sums[16] of one column += a register of 16
    static void flush(int32_t *sums, __m256i narrow) {
        store(sums, _mm256_add_epi32(load(sums), _mm256_cvtepi16_epi32(_mm256_castsi256_si128(narrow))));
        store(sums + 8, _mm256_add_epi32(load(sums + 8), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(narrow, 1))));
    }
    static __m256i widen(const int32_t *sums, int64_t) { return load(sums); }
};

struct W1A1 {
    using Sum = int16_t;
    using Value = int8_t;
    static constexpr int rows = 32, fewest = 24, passes = 5;  // of equal signs: 5 * 48 fit in 8 bits, `most_inputs` in 16
    static constexpr int64_t most_inputs = 32767;
    static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi8(a, b); }
    static __m256i of_minus(__m256i a) {
        return _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), a), _mm256_set1_epi8(1));
    }
    static __m256i from_minus_to_plus(__m256i a) { return a; }
    static bool is_moderate(const __m256i *) { return true; }
    static float load_values(const LinearCall &call, int64_t row, float *buffer, int8_t *to) {
        const float *x = load_centred_row(call, row, buffer);
        const auto is_plus = [](const float *x) {
            return _mm256_castps_si256(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_GE_OQ));
        };
        const __m256i one = _mm256_set1_epi8(1), in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        int64_t k = 0;
        for (; k + 32 <= call.inputs; k += 32) {
            const __m256i low = _mm256_packs_epi32(is_plus(x + k), is_plus(x + k + 8));
            const __m256i high = _mm256_packs_epi32(is_plus(x + k + 16), is_plus(x + k + 24));
            const __m256i plus = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), in_order);
            const __m256i minus = _mm256_cmpeq_epi8(plus, _mm256_setzero_si256());
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + k), _mm256_or_si256(minus, one));
        }
        for (; k < call.inputs; ++k) to[k] = x[k] >= 0.0f ? 1 : -1;
        return 1.0f;
    }
    static void gather(const int8_t *values, int64_t stride, __m256i lanes[8]) {
        __m128i first[8], second[8];
        transpose_bytes(reinterpret_cast<const uint8_t *>(values), stride, first);
        transpose_bytes(reinterpret_cast<const uint8_t *>(values) + 16 * stride, stride, second);
        for (int c = 0; c < 8; ++c) lanes[c] = _mm256_setr_m128i(first[c], second[c]);
    }
    static void flush(int16_t *sums, __m256i narrow) {
        store(sums, _mm256_add_epi16(load(sums), _mm256_cvtepu8_epi16(_mm256_castsi256_si128(narrow))));
        store(sums + 16, _mm256_add_epi16(load(sums + 16), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(narrow, 1))));
    }
    static __m256i widen(const int16_t *sums, int64_t inputs) {
        const __m256i equal = _mm256_cvtepi16_epi32(_mm_load_si128(reinterpret_cast<const __m128i *>(sums)));
        return _mm256_sub_epi32(_mm256_add_epi32(equal, equal), _mm256_set1_epi32(static_cast<int32_t>(inputs)));
    }
};

// ---- the sums

// table[e] = sum of +a for the bits of e that are set, -a for the others; of W1A1 how many signs are equal
template <class Format>
inline void fill_table(const __m256i *a, uint8_t *table) {
    if (!Format::is_moderate(a)) {  // -a + 2 a of an infinity would be no number
        store(table, _mm256_setzero_si256());
        for (int b = 0; b < group; ++b) {
            const int size = register_bytes << b;
            for (int e = 0; e < size; e += register_bytes) {
                const __m256i sum = load(table + e);
                store(table + size + e, Format::add(sum, a[b]));
                store(table + e, Format::add(sum, Format::of_minus(a[b])));
            }
        }
        return;
    }
    __m256i sum = _mm256_setzero_si256();
    for (int b = 0; b < group; ++b) sum = Format::add(sum, Format::of_minus(a[b]));
    store(table, sum);
    for (int b = 0; b < group; ++b) {
        const __m256i step = Format::from_minus_to_plus(a[b]);
        const int size = register_bytes << b;
        for (int e = 0; e < size; e += register_bytes) store(table + size + e, Format::add(load(table + e), step));
    }
}

// The sum of one column over a pass.
template <class Format>
inline __m256i look_up(const uint8_t *tile, const uint8_t *tables) {
    uint64_t indices;
    std::memcpy(&indices, tile, groups);
    const auto entry = [&](int g) { return load(tables + g * table_bytes + 8 * ((indices >> (8 * g)) & 255)); };
    __m256i even = entry(0), odd = entry(1);
#pragma GCC unroll 8
    for (int g = 2; g < groups; g += 2) {
        even = Format::add(even, entry(g));
        odd = Format::add(odd, entry(g + 1));
    }
    return Format::add(even, odd);
}

template <class Format>
void run_rows(const LinearCall &call, const uint8_t *tiles, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    using Value = typename Format::Value;
    using Sum = typename Format::Sum;
    constexpr int64_t block = 4096 / Format::rows;  // columns that are finished at once
    using Finished = std::conditional_t<std::is_same_v<Sum, float>, float, int32_t>;
    const int64_t passes = ceil_div(call.inputs, pass), width = passes * pass;
    const int64_t columns = round_up(end - begin, 8);
    Workspace workspace(4 * width + Format::rows * (sizeof(Value) * width + sizeof(Sum) * columns + 4 * block) +
                        groups * table_bytes + register_bytes * (pass + columns) + 512);
    float *buffer = workspace.take<float>(width);
    Value *values = workspace.take<Value>(Format::rows * width);
    uint8_t *tables = workspace.take<uint8_t>(groups * table_bytes);
    __m256i *lanes = workspace.take<__m256i>(pass);
    uint8_t *narrow = workspace.take<uint8_t>(register_bytes * columns);
    Sum *sums = workspace.take<Sum>(Format::rows * columns);
    Finished *finished = workspace.take<Finished>(Format::rows * block);
    float factor[Format::rows];
    std::memset(values, 0, sizeof(Value) * Format::rows * width);
    for (int64_t r = 0; r < rows; ++r) factor[r] = Format::load_values(call, row + r, buffer, values + r * width);
    std::memset(sums, 0, sizeof(Sum) * Format::rows * columns);
    for (int64_t p = 0; p < passes; ++p) {
        for (int k = 0; k < pass; k += 8) Format::gather(values + pass * p + k, width, lanes + k);
        for (int g = 0; g < groups; ++g) fill_table<Format>(lanes + group * g, tables + g * table_bytes);
        const uint8_t *tile = tiles + (p * call.outputs + begin) * groups;
        const bool is_first = p % Format::passes == 0, is_last = p + 1 == passes || (p + 1) % Format::passes == 0;
        for (int64_t n = 0; n < end - begin; ++n) {
            __m256i sum = look_up<Format>(tile + groups * n, tables);
            if (!is_first) sum = Format::add(load(narrow + register_bytes * n), sum);
            if (is_last) {
                Format::flush(sums + Format::rows * n, sum);
            } else {
                store(narrow + register_bytes * n, sum);
            }
        }
    }
    for (int64_t first = 0; first < end - begin; first += block) {
        const int64_t count = std::min(block, end - begin - first);
        for (int64_t n = 0; n < count; n += 8) {
            for (int r = 0; r < Format::rows; r += 8) {
                __m256i square[8];
                for (int c = 0; c < 8; ++c) square[c] = Format::widen(sums + Format::rows * (first + n + c) + r, call.inputs);
                transpose_numbers(square);
                for (int c = 0; c < 8; ++c) store(finished + (r + c) * block + n, square[c]);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            store_row(call, row + r, begin + first, begin + first + count, factor[r], finished + r * block);
    }
}

// All rows from `row` on for which it pays to fill the tables; returns where the others begin. Which those are does not
// depend on how a call is cut for the threads.
template <class Format>
int64_t run(const LinearCall &call, const uint8_t *tiles, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    if (call.outputs < 2 * entries || call.inputs > Format::most_inputs) return row;
    for (; row_end - row >= Format::fewest; row = std::min<int64_t>(row_end, row + Format::rows))
        run_rows<Format>(call, tiles, row, std::min<int64_t>(Format::rows, row_end - row), begin, end);
    return row;
}

}  // namespace lanes

}  // namespace
