// NEON of plain armv8-a: tables of 16 bytes in registers for W1A8, bit counts for W1A1, 16 columns in a register;
// tables in memory for W1, 4 rows in a register.
//
// Tiles of W1A8 and W1A1 (see byte_look_up.h): 32 bytes are 8 weights of 32 columns. W1 reads the checkpoint's own
// order.
#pragma once

#include <arm_neon.h>

#include "linear/byte_look_up.h"
#include "signs/neon.h"

namespace {

using proxbit::LinearCall;

// ---- W1A8 and W1A1: blocks of 4 rows and 2 registers of columns; see byte_look_up.h

constexpr int most_rows = 4, tile_columns = 32;

struct Blocked {
    static constexpr int rows = most_rows, columns = tile_columns, multiple = 4;
};

// The sums of every row: variables with names, as gcc 12 keeps arrays of them in memory.
template <class Sums>
struct Block {
    Sums a, b, c, d;

    template <int rows, class Function>
    void for_each(const Function &function) {
        function(a, 0);
        if constexpr (rows > 1) function(b, 1), function(c, 2), function(d, 3);
    }
};

// asm, as gcc 12 regroups and spills sums that it can see through; volatile, as it else loads too early and spills too.
inline void add(uint8x16_t &sum, uint8x16_t v) { asm volatile("add %0.16b, %0.16b, %1.16b" : "+w"(sum) : "w"(v)); }
inline void subtract(uint8x16_t &sum, uint8x16_t v) { asm volatile("sub %0.16b, %0.16b, %1.16b" : "+w"(sum) : "w"(v)); }

inline void add_words(int32_t *to, uint16x8_t words) {
    const int16x8_t v = vreinterpretq_s16_u16(words);
    vst1q_s32(to, vaddw_s16(vld1q_s32(to), vget_low_s16(v)));
    vst1q_s32(to + 4, vaddw_high_s16(vld1q_s32(to + 4), v));
}

// ---- W1A8
//
// Of 4 activations all 16 sums are at most 508 in size. A table holds sum + 512 in two bytes, the 5 low bits and the
// rest; 8 of each can be added in a byte before low + 32 * high goes to 16 bits, where 256 weights fit.

struct SplitSums {
    uint8x16_t low_left, low_right, high_left, high_right;
};

inline void widen(uint16_t *words, uint8x16_t low, uint8x16_t high) {
    const uint16x8_t first = vaddw_u8(vld1q_u16(words), vget_low_u8(low));
    const uint16x8_t second = vaddw_high_u8(vld1q_u16(words + 8), low);
    vst1q_u16(words, vmlal_u8(first, vget_low_u8(high), vdup_n_u8(32)));
    vst1q_u16(words + 8, vmlal_high_u8(second, high, vdupq_n_u8(32)));
}

struct W1A8 : Blocked {
    static constexpr int chunk = 32, activation_bytes = 8, table_bytes = 64, factor = 2;

    static constexpr auto load_row_of = load_int8;

    // The table of 4 of 8 activations: 16 low bytes, 16 high bytes.
    template <int first>
    static void fill_table(int16x8_t q, uint8_t *table) {
        // For entries 0..7: whether the first, the second, the third of the activations is in the sum.
        const int16x8_t a = {0, 1, 0, 1, 0, 1, 0, 1}, b = {0, 0, 1, 1, 0, 0, 1, 1}, c = {0, 0, 0, 0, 1, 1, 1, 1};
        const int16x8_t with_a = vmlaq_laneq_s16(vdupq_n_s16(512), a, q, first);
        const int16x8_t sum = vmlaq_laneq_s16(vmlaq_laneq_s16(with_a, b, q, first + 1), c, q, first + 2);
        const uint16x8_t without = vreinterpretq_u16_s16(sum);
        const uint16x8_t with = vreinterpretq_u16_s16(vaddq_s16(sum, vdupq_laneq_s16(q, first + 3)));
        const uint8x16_t low = vuzp1q_u8(vreinterpretq_u8_u16(without), vreinterpretq_u8_u16(with));
        vst1q_u8(table, vandq_u8(low, vdupq_n_u8(31)));
        vst1q_u8(table + 16, vshrn_high_n_u16(vshrn_n_u16(without, 5), with, 5));
    }
    static void fill_tables(const uint8_t *activations, uint8_t *tables) {
        const int16x8_t q = vmovl_s8(vreinterpret_s8_u8(vld1_u8(activations)));
        fill_table<0>(q, tables);
        fill_table<4>(q, tables + 32);
    }

    // sums[r][32 columns] += sum_k e a for a chunk, e the bits.
    template <int rows>
    static void add_chunk(const uint8_t *tile, const uint8_t *tables, int64_t bytes, int32_t *sums, int64_t stride) {
        uint16_t words[rows * tile_columns] = {};
        for (int64_t j = 0; j < bytes; j += 4) {
            Block<SplitSums> block = {};
            for (int i = 0; i < 4; ++i, tile += tile_columns, tables += 64 * rows) {
                const uint8x16_t left = vld1q_u8(tile), right = vld1q_u8(tile + 16), nibble = vdupq_n_u8(15);
                const auto look_up = [&block](uint8x16_t left, uint8x16_t right, const uint8_t *of_rows) {
                    block.template for_each<rows>([=](SplitSums &sums, int r) {
                        const uint8x16_t low = vld1q_u8(of_rows + 64 * r), high = vld1q_u8(of_rows + 64 * r + 16);
                        add(sums.low_left, vqtbl1q_u8(low, left));
                        add(sums.low_right, vqtbl1q_u8(low, right));
                        add(sums.high_left, vqtbl1q_u8(high, left));
                        add(sums.high_right, vqtbl1q_u8(high, right));
                    });
                };
                look_up(vandq_u8(left, nibble), vandq_u8(right, nibble), tables);
                look_up(vshrq_n_u8(left, 4), vshrq_n_u8(right, 4), tables + 32);
            }
            block.template for_each<rows>([&words](const SplitSums &sums, int r) {
                widen(words + tile_columns * r, sums.low_left, sums.high_left);
                widen(words + tile_columns * r + 16, sums.low_right, sums.high_right);
            });
        }
        const uint16x8_t bias = vdupq_n_u16(static_cast<uint16_t>(2 * bytes * 512));
        for (int i = 0; i < 4 * rows; ++i)
            add_words(sums + i / 4 * stride + i % 4 * 8, vsubq_u16(vld1q_u16(words + 8 * i), bias));
    }
};

// ---- W1A1
//
// xor, count and add are 3 operations for 8 weights; tables of 4 differences would take 4 and those of the indices.
// Prefix xors, begun anew in every chunk, make it 5 for 16: y_j, the xor of all bytes of weights and activations so
// far, is the parity of the differences x_0 .. x_j in each bit, so y_2j-1 + x_2j + x_2j+1 = 2 * majority + y_2j+1; the
// majority is ~y_2j+1 if y_2j, else y_2j-1. The differences are 2 * sum count(majority) + count(last y).
//
// Of y_1, y_5, .. the activations hold the complement, which saves the ~: every second selection is then the complement
// of a majority, and that one's count is 8 - count.

struct Counter {
    uint8x16_t count_left, count_right, last_left, last_right;
};

template <bool is_complement>
inline void count_majority(uint8x16_t &count, uint8x16_t &last, uint8x16_t even, uint8x16_t odd) {
    const uint8x16_t bits = vcntq_u8(vbslq_u8(even, odd, last));
    if constexpr (is_complement) subtract(count, bits);
    else add(count, bits);
    last = odd;
}

template <bool is_complement, int rows>
inline void count_pair(Block<Counter> &block, const uint8_t *tile, const uint8_t *tables) {
    const uint8x16_t even_left = vld1q_u8(tile), even_right = vld1q_u8(tile + 16);
    const uint8x16_t odd_left = vld1q_u8(tile + 32), odd_right = vld1q_u8(tile + 48);
    block.template for_each<rows>([=](Counter &sums, int r) {
        const uint8x16_t even = vld1q_u8(tables + 16 * r), odd = vld1q_u8(tables + 16 * (rows + r));
        count_majority<is_complement>(sums.count_left, sums.last_left, even_left ^ even, odd_left ^ odd);
        count_majority<is_complement>(sums.count_right, sums.last_right, even_right ^ even, odd_right ^ odd);
    });
}

inline void add_counts(int32_t *to, uint8x16_t count, uint8x16_t last) {
    const uint8x16_t rest = vcntq_u8(last);
    add_words(to, vaddw_u8(vshll_n_u8(vget_low_u8(count), 1), vget_low_u8(rest)));
    add_words(to + 8, vaddw_high_u8(vshll_high_n_u8(count, 1), rest));
}

struct W1A1 : Blocked {
    static constexpr int chunk = 60, activation_bytes = 1, table_bytes = 16, factor = -2;  // 30 pairs: at most 240

    static void to_prefixes(uint8_t *bits, int64_t bytes) {
        for (int64_t j = 0; j < bytes; ++j) bits[j] ^= j % chunk ? bits[j - 1] : 0;
    }
    static float load_row_of(const LinearCall &call, int64_t row, int64_t bytes, float *buffer, uint8_t *to, int32_t &offset) {
        std::memset(to, 0, bytes);
        pack_signs_of(load_centred_row(call, row, buffer), call.inputs, to);
        to_prefixes(to, bytes);
        for (int64_t j = 1; j < bytes; j += 4) to[j] = static_cast<uint8_t>(~to[j]);
        offset = static_cast<int32_t>(call.inputs);
        return 1.0f;
    }
    static void fill_tables(const uint8_t *activations, uint8_t *tables) { vst1q_u8(tables, vdupq_n_u8(*activations)); }

    // sums[r][32 columns] += differences in a chunk.
    template <int rows>
    static void add_chunk(const uint8_t *tile, const uint8_t *tables, int64_t bytes, int32_t *sums, int64_t stride) {
        const uint8x16_t zero = vdupq_n_u8(0), eights = vdupq_n_u8(static_cast<uint8_t>(8 * (bytes / 4)));
        const Counter start = {eights, eights, zero, zero};
        Block<Counter> block = {start, start, start, start};
        for (int64_t j = 0; j < bytes; j += 4, tile += 4 * tile_columns, tables += 64 * rows) {
            count_pair<false, rows>(block, tile, tables);
            count_pair<true, rows>(block, tile + 2 * tile_columns, tables + 32 * rows);
        }
        block.template for_each<rows>([=](const Counter &counter, int r) {
            add_counts(sums + r * stride, counter.count_left, counter.last_left);
            add_counts(sums + r * stride + 16, counter.count_right, counter.last_right);
        });
    }
};

void repack_w1a1(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
    const int64_t width = ceil_div(inputs, 8), padded = round_up(width, 4);
    std::vector<uint8_t> prefixes(outputs * padded);
    for (int64_t n = 0; n < outputs; ++n) {
        std::memcpy(prefixes.data() + n * padded, bits + n * width, width);
        W1A1::to_prefixes(prefixes.data() + n * padded, padded);
    }
    repack<tile_columns, tile_columns, 1, 4, W1A1::chunk>(prefixes.data(), outputs, 8 * padded, tiles);
}

// ---- W1
//
// A byte of weights is the index to a table, in memory, of the sums of 8 activations: of 4 rows side by side, so that a
// load and an addition are 32 weights, where a multiplication by signs would be 4. A single row has tables of floats.

// table[e] = sum of +a for the bits of e that are set, -a for the others
template <int bits, class Value>
inline void fill_by_doubling(const Value *a, Value *table) {
    if constexpr (bits == 0) {
        table[0] = Value{};
    } else {
        constexpr int size = 1 << (bits - 1);
        fill_by_doubling<bits - 1>(a, table);
        for (int e = 0; e < size; ++e) table[size + e] = table[e] + a[bits - 1], table[e] = table[e] - a[bits - 1];
    }
}

template <class Value>
inline void fill_table(const Value *a, Value *table) {
    Value low[16], high[16];
    fill_by_doubling<4>(a, low);
    fill_by_doubling<4>(a + 4, high);
    for (int h = 0; h < 16; ++h) {
        if constexpr (sizeof(Value) == sizeof(float)) {  // gcc 12 does not vectorise it
            const float32x4_t part = vdupq_n_f32(high[h]);
            for (int e = 0; e < 16; e += 4) vst1q_f32(table + 16 * h + e, vaddq_f32(part, vld1q_f32(low + e)));
        } else {
            for (int e = 0; e < 16; ++e) table[16 * h + e] = high[h] + low[e];
        }
    }
}

template <class Value>
inline Value sum_entries(const Value *tables, const uint8_t *bits, int64_t bytes) {
    Value sum = {};
    int64_t j = 0;
    for (; j + 4 <= bytes; j += 4, tables += 1024) {
        uint32_t word;  // one load for 4 indices
        std::memcpy(&word, bits + j, 4);
        sum = sum + ((tables[word & 255] + tables[256 + (word >> 8 & 255)]) +
                     (tables[512 + (word >> 16 & 255)] + tables[768 + (word >> 24)]));
    }
    for (; j < bytes; ++j, tables += 256) sum = sum + tables[bits[j]];
    return sum;
}

// A row, or up to 4 as the lanes of a Value.
template <class Value>
void run_rows_w1(const LinearCall &call, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    constexpr int64_t lanes = sizeof(Value) / 4, at_once = 16 / lanes;  // bytes whose tables stay in the first cache
    const int64_t bytes = ceil_div(call.inputs, 8), columns = end - begin;
    Workspace workspace(4 * ((lanes + 1) * (8 * bytes + columns) + lanes * columns + 16 * 256) + 384);
    float *buffer = workspace.take<float>(8 * bytes), *of_row = workspace.take<float>(columns);
    Value *a = workspace.take<Value>(8 * bytes), *tables = workspace.take<Value>(256 * at_once);
    Value *totals = workspace.take<Value>(columns), *sums = workspace.take<Value>(columns);
    std::fill(a, a + 8 * bytes, Value{});
    std::fill(totals, totals + columns, Value{});
    for (int64_t r = 0; r < rows; ++r) {
        const float *x = load_row(call, row + r, 8 * bytes, buffer);
        for (int64_t k = 0; k < 8 * bytes; ++k) reinterpret_cast<float *>(a)[k * lanes + r] = x[k];
    }
    for (int64_t first = 0; first < bytes; first += at_once) {
        const int64_t count = std::min(at_once, bytes - first), part = first / at_once % 16;
        for (int64_t j = 0; j < count; ++j) fill_table(a + 8 * (first + j), tables + 256 * j);
        if (part == 0) std::fill(sums, sums + columns, Value{});
        const auto add_to_sums = [=, bits = call.tiles + begin * bytes + first](int64_t count) {
            for (int64_t n = 0; n < columns; ++n) sums[n] = sums[n] + sum_entries(tables, bits + n * bytes, count);
        };
        if (count == at_once) add_to_sums(at_once);  // a constant: unrolled
        else add_to_sums(count);
        if (part < 15 && first + at_once < bytes) continue;
        for (int64_t n = 0; n < columns; ++n) totals[n] = totals[n] + sums[n];  // in parts, for less rounding
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < columns; ++n) of_row[n] = reinterpret_cast<const float *>(totals)[n * lanes + r];
        store_row(call, row + r, begin, end, 1.0f, of_row);
    }
}

void run_w1(const LinearCall &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    for (; row + 1 < row_end; row += 4)
        run_rows_w1<float32x4_t>(call, row, std::min<int64_t>(4, row_end - row), begin, end);
    if (row < row_end) run_rows_w1<float>(call, row, 1, begin, end);
}

}  // namespace
