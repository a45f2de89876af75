// AVX-512 with VNNI and without VPOPCNTDQ: byte products for W1A8, carry-save counts with a byte shuffle for W1A1.
#pragma once

#include "linear/avx512.h"

namespace {

// ---- W1A8
//
// A product of bytes adds 4 inputs of 16 columns at once; sum s q = 2 sum e q - sum q, e the bits. In a tile of 64
// columns are registers of 16 columns and 32 inputs: bit b of byte 4 c + i is that of column c and input 4 b + i, so
// that a shift and an and make the factors of 4 inputs. That is done once for all rows of a pass, some inputs at a
// time, which stay in the first cache.

struct W1A8 {
    static constexpr int rows = 6, few_rows = 2, column_block = 64, registers = 4;
    static constexpr int64_t word = 32, most_words = 12, pass_bytes = 1 << 18;
    static constexpr int64_t word_bytes = 64 * registers;  // of a tile
};

inline int64_t w1a8_words(int64_t inputs) { return ceil_div(inputs, W1A8::word); }

int64_t w1a8_bytes(int64_t outputs, int64_t inputs) {
    return ceil_div(outputs, W1A8::column_block) * w1a8_words(inputs) * W1A8::word_bytes;
}

void repack_w1a8(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
    const int64_t width = ceil_div(inputs, 8), words = w1a8_words(inputs);
    std::memset(tiles, 0, w1a8_bytes(outputs, inputs));
    for (int64_t n = 0; n < outputs; ++n) {
        uint8_t *to = tiles + n / W1A8::column_block * words * W1A8::word_bytes + n % W1A8::column_block * 4;
        for (int64_t j = 0; j < words; ++j, to += W1A8::word_bytes) {
            uint32_t word = 0;
            std::memcpy(&word, bits + n * width + 4 * j, std::min<int64_t>(4, width - 4 * j));
            for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(_pext_u32(word, 0x11111111u << i));
        }
    }
}

inline __m512i four_of(const int8_t *q) {
    int32_t four;
    std::memcpy(&four, q, 4);
    return _mm512_set1_epi32(four);
}

// sum + e q, 4 inputs a lane. Asm: gcc 12 moves sums that it can see through from register to register.
inline __m512i add_products(__m512i sum, __m512i e, __m512i q) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(e), "v"(q));
    return sum;
}

// sums[r][64 columns] += sum_k e q for some rows; factors are bytes, those of 4 inputs and 64 columns side by side.
template <int rows>
inline void multiply(const uint8_t *factors, const int8_t *q, int64_t width, int64_t fours, int32_t *sums) {
    constexpr int registers = W1A8::registers;
    __m512i part[rows * registers];
#pragma GCC unroll 32
    for (int i = 0; i < rows * registers; ++i) part[i] = load(sums + 16 * i);
    for (int64_t j = 0; j < fours; ++j, factors += 64 * registers, q += 4) {
        __m512i e[registers];
#pragma GCC unroll 8
        for (int c = 0; c < registers; ++c) e[c] = load(factors + 64 * c);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const __m512i activations = four_of(q + r * width);
#pragma GCC unroll 8
            for (int c = 0; c < registers; ++c) {
                __m512i &sum = part[r * registers + c];
                sum = add_products(sum, e[c], activations);
            }
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < rows * registers; ++i) store(sums + 16 * i, part[i]);
}

template <int rows = W1A8::rows>
inline void multiply_rows(const uint8_t *factors, const int8_t *q, int64_t width, int64_t fours, int32_t *sums,
                          int64_t count) {
    for (; count >= rows; count -= rows, q += rows * width, sums += rows * W1A8::column_block)
        multiply<rows>(factors, q, width, fours, sums);
    if constexpr (rows > 1) multiply_rows<rows - 1>(factors, q, width, fours, sums, count);
}

// The same for one row and words as they are: bit b counts 2^b times in a sum of its own.
inline void multiply_words(const uint8_t *tile, const int8_t *q, int64_t words, int32_t *sums) {
    for (int c = 0; c < W1A8::registers; ++c) {
        __m512i part[8];
#pragma GCC unroll 8
        for (int b = 0; b < 8; ++b) part[b] = _mm512_setzero_si512();
        for (int64_t j = 0; j < words; ++j) {
            const __m512i word = load(tile + j * W1A8::word_bytes + 64 * c);
#pragma GCC unroll 8
            for (int b = 0; b < 8; ++b) {
                const __m512i e = word & _mm512_set1_epi8(static_cast<char>(1 << b));
                part[b] = add_products(part[b], e, four_of(q + j * W1A8::word + 4 * b));
            }
        }
        __m512i sum = load(sums + 16 * c);
#pragma GCC unroll 8
        for (int b = 0; b < 8; ++b) sum = _mm512_add_epi32(sum, _mm512_srai_epi32(part[b], b));
        store(sums + 16 * c, sum);
    }
}

inline void make_factors(const uint8_t *tile, int64_t words, uint8_t *factors) {
    const __m512i one = _mm512_set1_epi8(1);
    for (int64_t j = 0; j < words; ++j, tile += W1A8::word_bytes)
        for (int b = 0; b < 8; ++b)
            for (int c = 0; c < W1A8::registers; ++c, factors += 64)
                store(factors, _mm512_srli_epi16(load(tile + 64 * c), b) & one);
}

inline int32_t sum_of_bytes(const int8_t *q, int64_t count) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += 64) sum = add_products(sum, _mm512_set1_epi8(1), load(q + k));
    return _mm512_reduce_add_epi32(sum);
}

void run_w1a8(const LinearCall &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    constexpr int64_t columns = W1A8::column_block;
    const int64_t words = w1a8_words(call.inputs), width = std::max<int64_t>(64, round_up(call.inputs, 64));
    const int64_t whole = std::max<int64_t>(1, W1A8::pass_bytes / width / W1A8::rows) * W1A8::rows;
    const int64_t pass = std::min(row_end - row, whole), factor_bytes = 8 * W1A8::word_bytes * W1A8::most_words;
    Workspace workspace(4 * width + pass * (width + 8 + 4 * columns) + factor_bytes + 512);
    float *buffer = workspace.take<float>(width), *steps = workspace.take<float>(pass);
    int8_t *q = workspace.take<int8_t>(pass * width);
    int32_t *totals = workspace.take<int32_t>(pass), *sums = workspace.take<int32_t>(pass * columns);
    uint8_t *factors = workspace.take<uint8_t>(factor_bytes);
    for (; row < row_end; row += pass) {
        const int64_t count = std::min(pass, row_end - row);
        for (int64_t r = 0; r < count; ++r) {
            steps[r] = quantize_row(call, load_row(call, row + r, width, buffer), width, q + r * width);
            totals[r] = sum_of_bytes(q + r * width, width);
        }
        for (int64_t n = begin; n < end; n += columns) {
            const uint8_t *tile = call.tiles + n / columns * words * W1A8::word_bytes;
            std::memset(sums, 0, 4 * count * columns);
            for (int64_t first = 0; first < words; first += W1A8::most_words) {
                const int64_t some = std::min(W1A8::most_words, words - first);
                const int8_t *part = q + first * W1A8::word;
                if (count <= W1A8::few_rows) {
                    for (int64_t r = 0; r < count; ++r)
                        multiply_words(tile, part + r * width, some, sums + r * columns);
                } else {
                    make_factors(tile, some, factors);
                    multiply_rows(factors, part, width, 8 * some, sums, count);
                }
                tile += some * W1A8::word_bytes;
            }
            for (int64_t r = 0; r < count; ++r) {
                int32_t *sum = sums + r * columns;
                const __m512i total = _mm512_set1_epi32(totals[r]);
                for (int64_t i = 0; i < columns; i += 16)
                    store(sum + i, _mm512_sub_epi32(_mm512_slli_epi32(load(sum + i), 1), total));
                store_row(call, row + r, n, std::min(n + columns, end), steps[r], sum);
            }
        }
    }
}

// ---- W1A1
//
// The majorities of pairs count twice. Three words of one weight, of which one is left from before, add up to one of
// that weight and a carry of twice that; only the bits of the carries that count 8 times are counted, by a shuffle.

struct W1A1 : SignWords<W1A1> {
    static constexpr int rows = 8;

    template <int rows>
    static void count(const uint8_t *tile, const uint32_t *signs, int64_t words, int64_t inputs, int32_t *sums,
                      int64_t stride);
};

// Of a row and 16 columns: differences so far, the last word, and what is left of the majorities and their carries.
struct Counter {
    __m512i count, last, twos, fours;
};

inline __m512i majority(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0xe8); }
inline __m512i odd(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }

// sum + weight * popcount(word)
inline __m512i add_bits(__m512i sum, __m512i word, int weight) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i counts = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i low = _mm512_shuffle_epi8(counts, word & nibble);
    const __m512i high = _mm512_shuffle_epi8(counts, _mm512_srli_epi16(word, 4) & nibble);
    return add_products(sum, _mm512_add_epi8(low, high), _mm512_set1_epi8(static_cast<char>(weight)));
}

template <int rows>
inline __m512i count_pair(Counter &counter, const uint8_t *tile, const uint32_t *signs) {
    const __m512i even = load(tile) ^ _mm512_set1_epi32(static_cast<int>(signs[0]));
    const __m512i next = load(tile + 128) ^ _mm512_set1_epi32(static_cast<int>(signs[rows]));
    const __m512i found = _mm512_ternarylogic_epi32(even, counter.last, next, 0x5c);
    counter.last = next;
    return found;
}

template <int rows>
inline __m512i count_four(Counter &counter, const uint8_t *tile, const uint32_t *signs) {
    const __m512i first = count_pair<rows>(counter, tile, signs);
    const __m512i second = count_pair<rows>(counter, tile + 256, signs + 2 * rows);
    const __m512i carry = majority(counter.twos, first, second);
    counter.twos = odd(counter.twos, first, second);
    return carry;
}

template <int rows>
inline void count_eight(Counter &counter, const uint8_t *tile, const uint32_t *signs) {
    const __m512i first = count_four<rows>(counter, tile, signs);
    const __m512i second = count_four<rows>(counter, tile + 512, signs + 4 * rows);
    counter.count = add_bits(counter.count, majority(counter.fours, first, second), 8);
    counter.fours = odd(counter.fours, first, second);
}

inline void store_counts(int32_t *to, const Counter &counter, int64_t inputs) {
    __m512i differences = add_bits(counter.count, counter.fours, 4);
    differences = add_bits(add_bits(differences, counter.twos, 2), counter.last, 1);
    store(to, _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(inputs)), _mm512_slli_epi32(differences, 1)));
}

template <int rows>
void W1A1::count(const uint8_t *tile, const uint32_t *signs, int64_t words, int64_t inputs, int32_t *sums,
                 int64_t stride) {
    const __m512i zero = _mm512_setzero_si512();
    for (int r = 0; r < rows; ++r) {
        Counter left = {zero, zero, zero, zero}, right = left;
        int64_t j = 0;
        for (; j + 8 <= words; j += 8) {
            count_eight<rows>(left, tile + 128 * j, signs + j * rows + r);
            count_eight<rows>(right, tile + 128 * j + 64, signs + j * rows + r);
        }
        for (; j < words; j += 2) {
            left.count = add_bits(left.count, count_pair<rows>(left, tile + 128 * j, signs + j * rows + r), 2);
            right.count = add_bits(right.count, count_pair<rows>(right, tile + 128 * j + 64, signs + j * rows + r), 2);
        }
        store_counts(sums + r * stride, left, inputs);
        store_counts(sums + r * stride + 16, right, inputs);
    }
}

}  // namespace
