// W1 with AVX2, few rows: sums of floats, looked up in registers. A part of avx2.cpp.
#pragma once

#include <immintrin.h>

#include "linear/byte_look_up.h"

namespace {

using proxbit::LinearCall;

inline void add_floats(__m256 &sum, __m256 v) { asm("vaddps %1, %0, %0" : "+x"(sum) : "x"(v)); }

// A table of the 4 signed sums of 2 activations in a register. Words of 32 weights are
// shifted by 2 from one table to the next.

constexpr int w1_chunk = 32, w1_rows = 4;

inline __m256i load_words(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

struct WordIndices {
    __m256i left, right;
};

struct Sums {
    __m256 left, right;
};

inline void look_up(Sums &sums, const float *tables, const WordIndices &indices) {
    const __m256 entry = _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(tables));
    add_floats(sums.left, _mm256_permutevar_ps(entry, indices.left));
    add_floats(sums.right, _mm256_permutevar_ps(entry, indices.right));
}

inline void add_sums(float *to, const Sums &sums) {
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sums.left));
    _mm256_storeu_ps(to + 8, _mm256_add_ps(_mm256_loadu_ps(to + 8), sums.right));
}

// sums[r][16 columns] += sum_k s a for a chunk; 4 floats of tables for each row and 2 weights.
template <int rows>
inline void add_chunk_w1(const uint8_t *tile, const float *tables, int64_t words, float *sums, int64_t stride) {
    const __m256 zero = _mm256_setzero_ps();
    const uint8_t *right = tile + 32 * words;
    Sums a = {zero, zero}, b = a, c = a, d = a;
    for (int64_t i = 0; i < words; ++i) {
        WordIndices indices = {load_words(tile + 32 * i), load_words(right + 32 * i)};
        for (int group = 0; group < 16; ++group, tables += 4 * rows) {
            look_up(a, tables, indices);
            if constexpr (rows > 1) {
                look_up(b, tables + 4, indices);
                look_up(c, tables + 8, indices);
                look_up(d, tables + 12, indices);
            }
            indices = {_mm256_srli_epi32(indices.left, 2), _mm256_srli_epi32(indices.right, 2)};
        }
    }
    add_sums(sums, a);
    if constexpr (rows > 1) {
        add_sums(sums + stride, b);
        add_sums(sums + 2 * stride, c);
        add_sums(sums + 3 * stride, d);
    }
}

template <int rows>
void run_rows_w1(const LinearCall &call, int64_t row, int64_t begin, int64_t end) {
    const int64_t bytes = round_up(ceil_div(call.inputs, 8), 4), width = bytes * 8, columns = round_up(end - begin, 16);
    Workspace workspace(4 * rows * (width + columns + 2 * 8 * w1_chunk) + 256);
    float *buffer = workspace.take<float>(rows * width);
    float *sums = workspace.take<float>(rows * columns);
    float *tables = workspace.take<float>(rows * 2 * 8 * w1_chunk);
    const float *x[rows];
    for (int r = 0; r < rows; ++r) x[r] = load_row(call, row + r, width, buffer + r * width);
    std::memset(sums, 0, rows * columns * sizeof(float));
    for (int64_t first = 0; first < bytes; first += w1_chunk) {
        const int64_t count = std::min<int64_t>(w1_chunk, bytes - first);
        for (int64_t k = 0; k < 8 * count; k += 2) {
            for (int r = 0; r < rows; ++r) {
                const float a = x[r][8 * first + k], b = x[r][8 * first + k + 1];
                float *to = tables + (k / 2 * rows + r) * 4;
                to[0] = -a - b, to[1] = a - b, to[2] = b - a, to[3] = a + b;
            }
        }
        const uint8_t *tile = call.tiles + first * round_up(call.outputs, 16) + begin * count;
        for (int64_t n = 0; n < columns; n += 16)
            add_chunk_w1<rows>(tile + n * count, tables, count / 4, sums + n, columns);
    }
    for (int r = 0; r < rows; ++r) store_row(call, row + r, begin, end, 1.0f, sums + r * columns);
}

void run_few_w1(const LinearCall &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    for (; row + w1_rows <= row_end; row += w1_rows) run_rows_w1<w1_rows>(call, row, begin, end);
    for (; row < row_end; ++row) run_rows_w1<1>(call, row, begin, end);
}

}  // namespace
