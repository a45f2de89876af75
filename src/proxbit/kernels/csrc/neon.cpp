// NEON (any aarch64): byte look-ups for W1A8, as in avx2.cpp with 16 columns a register, and bit counts for W1A1.
#include <arm_neon.h>

#include "tiles.h"

namespace {

using proxbit::Call;

bool runs() { return true; }

// ---- W1A8
//
// Of 4 activations all 16 sums are at most 508 in size. A table holds sum + 512 in two bytes, the 5 low bits and the rest;
// 8 of each can be added in a byte before lo + 32 * hi goes to 16 bits, where 256 weights fit.

constexpr int w1a8_chunk = 32, w1a8_rows = 2;

// Tables for 4 activations: 16 bytes of low parts, 16 of high ones.
inline void fill_tables(const int8_t *q, uint8_t *tables) {
    int16_t sums[16];
    sums[0] = 512;
    for (int b = 0; b < 4; ++b)
        for (int e = 0; e < 1 << b; ++e) sums[(1 << b) + e] = static_cast<int16_t>(sums[e] + q[b]);
    for (int e = 0; e < 16; ++e) {
        tables[e] = static_cast<uint8_t>(sums[e] & 31);
        tables[16 + e] = static_cast<uint8_t>(sums[e] >> 5);
    }
}

struct SplitSums {
    uint8x16_t low_left, high_left, low_right, high_right;
};

inline void look_up(SplitSums &sums, const uint8_t *tables, uint8x16_t left, uint8x16_t right) {
    const uint8x16_t low = vld1q_u8(tables), high = vld1q_u8(tables + 16);
    sums.low_left = vaddq_u8(sums.low_left, vqtbl1q_u8(low, left));
    sums.high_left = vaddq_u8(sums.high_left, vqtbl1q_u8(high, left));
    sums.low_right = vaddq_u8(sums.low_right, vqtbl1q_u8(low, right));
    sums.high_right = vaddq_u8(sums.high_right, vqtbl1q_u8(high, right));
}

// Sums of 16 columns in 16 bits, modulo 2^16.
struct Words {
    uint16x8_t first, second;
};

inline void widen(Words &words, uint8x16_t low, uint8x16_t high) {
    const uint8x8_t weight = vdup_n_u8(32);
    words.first = vmlal_u8(vaddw_u8(words.first, vget_low_u8(low)), vget_low_u8(high), weight);
    words.second = vmlal_u8(vaddw_high_u8(words.second, low), vget_high_u8(high), weight);
}

inline void add_words(int32_t *to, const Words &words, uint16_t bias) {
    const auto add = [bias](int32_t *to, uint16x8_t unsigned_words) {
        const int16x8_t sums = vreinterpretq_s16_u16(vsubq_u16(unsigned_words, vdupq_n_u16(bias)));
        vst1q_s32(to, vaddw_s16(vld1q_s32(to), vget_low_s16(sums)));
        vst1q_s32(to + 4, vaddw_high_s16(vld1q_s32(to + 4), sums));
    };
    add(to, words.first);
    add(to + 8, words.second);
}

// sums[r][32 columns] += sum_k e a for a chunk; 64 bytes of tables for each row and byte of weights.
template <int rows>
inline void add_chunk_w1a8(const uint8_t *tile, const uint8_t *tables, int64_t bytes, int32_t *sums, int64_t stride) {
    const uint8_t *right = tile + 16 * bytes;
    const uint8x16_t zero = vdupq_n_u8(0), nibble = vdupq_n_u8(15);
    Words a = {vdupq_n_u16(0), vdupq_n_u16(0)}, b = a, c = a, d = a;
    for (int64_t j = 0; j < bytes; j += 4) {
        SplitSums first = {zero, zero, zero, zero}, second = first;
        for (int64_t i = j; i < j + 4; ++i) {
            const uint8_t *entry = tables + i * rows * 64;
            const uint8x16_t raw_left = vld1q_u8(tile + 16 * i), raw_right = vld1q_u8(right + 16 * i);
            look_up(first, entry, vandq_u8(raw_left, nibble), vandq_u8(raw_right, nibble));
            if constexpr (rows > 1) look_up(second, entry + 64, vandq_u8(raw_left, nibble), vandq_u8(raw_right, nibble));
            look_up(first, entry + 32, vshrq_n_u8(raw_left, 4), vshrq_n_u8(raw_right, 4));
            if constexpr (rows > 1) look_up(second, entry + 96, vshrq_n_u8(raw_left, 4), vshrq_n_u8(raw_right, 4));
        }
        widen(a, first.low_left, first.high_left);
        widen(b, first.low_right, first.high_right);
        if constexpr (rows > 1) {
            widen(c, second.low_left, second.high_left);
            widen(d, second.low_right, second.high_right);
        }
    }
    const uint16_t bias = static_cast<uint16_t>(2 * bytes * 512);
    add_words(sums, a, bias);
    add_words(sums + 16, b, bias);
    if constexpr (rows > 1) {
        add_words(sums + stride, c, bias);
        add_words(sums + stride + 16, d, bias);
    }
}

template <int rows>
void run_rows_w1a8(const Call &call, int64_t row, int64_t begin, int64_t end) {
    const int64_t bytes = round_up(ceil_div(call.inputs, 8), 4), width = bytes * 8;
    const int64_t columns = round_up(end - begin, 32);
    Workspace workspace(4 * width + rows * (width + columns * 4 + 64) + rows * w1a8_chunk * 64 + 256);
    float *buffer = workspace.take<float>(width);
    int8_t *q = workspace.take<int8_t>(rows * width);
    int32_t *sums = workspace.take<int32_t>(rows * columns);
    uint8_t *tables = workspace.take<uint8_t>(rows * w1a8_chunk * 64);
    float step[rows];
    int32_t total[rows];
    for (int r = 0; r < rows; ++r) {
        step[r] = quantize_row(load_row(call, row + r, width, buffer), width, q + r * width);
        total[r] = 0;
        for (int64_t k = 0; k < width; ++k) total[r] += q[r * width + k];
    }
    std::memset(sums, 0, rows * columns * sizeof(int32_t));
    for (int64_t first = 0; first < bytes; first += w1a8_chunk) {
        const int64_t count = std::min<int64_t>(w1a8_chunk, bytes - first);
        for (int64_t j = 0; j < count; ++j) {
            for (int r = 0; r < rows; ++r) {
                const int8_t *from = q + r * width + 8 * (first + j);
                fill_tables(from, tables + (j * rows + r) * 64);
                fill_tables(from + 4, tables + (j * rows + r) * 64 + 32);
            }
        }
        const uint8_t *tile = call.tiles + first * round_up(call.outputs, 32) + begin * count;
        for (int64_t n = 0; n < columns; n += 32) add_chunk_w1a8<rows>(tile + n * count, tables, count, sums + n, columns);
    }
    for (int r = 0; r < rows; ++r) {
        int32_t *of_row = sums + r * columns;
        for (int64_t n = 0; n < end - begin; ++n) of_row[n] = 2 * of_row[n] - total[r];
        store_row(call, row + r, begin, end, step[r], of_row);
    }
}

void run_w1a8(const Call &call, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    int64_t row = row_begin;
    for (; row + w1a8_rows <= row_end; row += w1a8_rows) run_rows_w1a8<w1a8_rows>(call, row, begin, end);
    for (; row < row_end; ++row) run_rows_w1a8<1>(call, row, begin, end);
}

// ---- W1A1
//
// A byte of activation signs against the same byte of 16 columns: exclusive or, count, add; 128 weights for 3 operations,
// where a look-up does 64 for 2.

constexpr int w1a1_chunk = 24, w1a1_rows = 4;  // at most 8 * 24 differences in a byte

inline uint8x16_t add_differences(uint8x16_t count, const uint8_t *sign, uint8x16_t weights) {
    return vaddq_u8(count, vcntq_u8(veorq_u8(weights, vld1q_dup_u8(sign))));
}

inline void add_counts(int32_t *to, uint8x16_t bytes) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    const auto add = [](int32_t *to, uint32x4_t counts) {
        vst1q_s32(to, vaddq_s32(vld1q_s32(to), vreinterpretq_s32_u32(counts)));
    };
    add(to, vmovl_u16(vget_low_u16(low)));
    add(to + 4, vmovl_high_u16(low));
    add(to + 8, vmovl_u16(vget_low_u16(high)));
    add(to + 12, vmovl_high_u16(high));
}

// sums[r][16 columns] += differences in a chunk
template <int rows>
inline void add_chunk_w1a1(const uint8_t *tile, const uint8_t *signs, int64_t width, int64_t bytes, int32_t *sums,
                           int64_t stride) {
    uint8x16_t a = vdupq_n_u8(0), b = a, c = a, d = a;
    for (int64_t i = 0; i < bytes; ++i) {
        const uint8x16_t weights = vld1q_u8(tile + 16 * i);
        a = add_differences(a, signs + i, weights);
        if constexpr (rows > 1) {
            b = add_differences(b, signs + width + i, weights);
            c = add_differences(c, signs + 2 * width + i, weights);
            d = add_differences(d, signs + 3 * width + i, weights);
        }
    }
    add_counts(sums, a);
    if constexpr (rows > 1) {
        add_counts(sums + stride, b);
        add_counts(sums + 2 * stride, c);
        add_counts(sums + 3 * stride, d);
    }
}

template <int rows>
void run_rows_w1a1(const Call &call, int64_t row, int64_t begin, int64_t end) {
    const int64_t bytes = ceil_div(call.inputs, 8), columns = round_up(end - begin, 16);
    Workspace workspace(4 * call.inputs + rows * (bytes + 4 * columns) + 256);
    float *buffer = workspace.take<float>(call.inputs);
    uint8_t *signs = workspace.take<uint8_t>(rows * bytes);
    int32_t *sums = workspace.take<int32_t>(rows * columns);
    for (int r = 0; r < rows; ++r) pack_signs_row(load_centred_row(call, row + r, buffer), call.inputs, signs + r * bytes);
    std::memset(sums, 0, rows * columns * sizeof(int32_t));
    for (int64_t first = 0; first < bytes; first += w1a1_chunk) {
        const int64_t count = std::min<int64_t>(w1a1_chunk, bytes - first);
        const uint8_t *tile = call.tiles + first * round_up(call.outputs, 32) + begin * count;
        for (int64_t n = 0; n < columns; n += 16)
            add_chunk_w1a1<rows>(tile + n * count, signs + first, bytes, count, sums + n, columns);
    }
    for (int r = 0; r < rows; ++r) {
        int32_t *of_row = sums + r * columns;
        for (int64_t n = 0; n < end - begin; ++n) of_row[n] = static_cast<int32_t>(call.inputs) - 2 * of_row[n];
        store_row(call, row + r, begin, end, 1.0f, of_row);
    }
}

void run_w1a1(const Call &call, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    int64_t row = row_begin;
    for (; row + w1a1_rows <= row_end; row += w1a1_rows) run_rows_w1a1<w1a1_rows>(call, row, begin, end);
    for (; row < row_end; ++row) run_rows_w1a1<1>(call, row, begin, end);
}

}  // namespace

// Sums of floats: a table in memory gives 8 weights for a load and an addition, more than 4 lanes of multiply-adds do.
const proxbit::Level proxbit::neon_level = {
    "neon",
    runs,
    {portable_level.formats[0],
     {w1a8_rows, 32, tile_bytes<32, 4>, relay<16, 32, 1, 4, w1a8_chunk>, run_w1a8},
     {w1a1_rows, 32, tile_bytes<32, 1>, relay<16, 32, 1, 1, w1a1_chunk>, run_w1a1}},
    portable_level.pack_signs,
    portable_level.unpack_signs,
};
