// NEON of plain armv8-a: tables of 16 bytes in registers for W1A8, bit counts for W1A1, 16 columns in a register; tables
// in memory for W1, 4 rows in a register. Blocks of sums are 4 rows by 2 registers, all in the 32 registers.
//
// W1A8 and W1A1 read tiles from front to back. Bytes of weights come in chunks; in a chunk, one tile of 32 columns after
// the other; in a tile, byte j of its columns side by side. W1 reads the checkpoint's own order.
#include <arm_neon.h>

#include "rows.h"

namespace {

using proxbit::Call;

bool runs() { return true; }

// ---- signs to bits and back

// All ones where x >= 0, of 8 numbers in 16 bits each.
inline uint16x8_t are_positive(const float *x) {
    return vuzp1q_u16(vreinterpretq_u16_u32(vcgezq_f32(vld1q_f32(x))), vreinterpretq_u16_u32(vcgezq_f32(vld1q_f32(x + 4))));
}
inline uint16x8_t are_positive(const uint16_t *x) {
    const uint16x8_t bits = vld1q_u16(x);
    const uint16x8_t is_zero = vceqzq_u16(vshlq_n_u16(bits, 1)), is_below_nan = vcleq_u16(bits, vdupq_n_u16(0x7f80));
    return vorrq_u16(is_zero, is_below_nan);  // with a sign, bits are above any number's without
}

// 16 signs.
template <class Value>
inline void pack_two_bytes(const Value *x, uint8_t *bits) {
    const uint8x16_t is_positive = vuzp1q_u8(vreinterpretq_u8_u16(are_positive(x)), vreinterpretq_u8_u16(are_positive(x + 8)));
    const uint8x16_t places = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    uint8x16_t sum = vandq_u8(is_positive, places);
    for (int i = 0; i < 3; ++i) sum = vpaddq_u8(sum, sum);
    vst1q_lane_u16(reinterpret_cast<uint16_t *>(bits), vreinterpretq_u16_u8(sum), 0);
}

template <class Value>
void pack_signs_of(const Value *x, int64_t columns, uint8_t *bits) {
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) pack_two_bytes(x + k, bits + k / 8);
    if (k == columns) return;
    Value last[16];
    uint8_t of_last[2];
    std::fill(last, last + 16, static_cast<Value>(0xbf80));  // -1 as bfloat16
    if (sizeof(Value) == 4) std::fill(last, last + 16, static_cast<Value>(-1));
    std::copy(x + k, x + columns, last);
    pack_two_bytes(last, of_last);
    std::memcpy(bits + k / 8, of_last, ceil_div(columns - k, 8));
}

void pack_signs(int64_t dtype, const void *values, int64_t columns, uint8_t *bits) {
    if (dtype == PROXBIT_FLOAT32) return pack_signs_of(static_cast<const float *>(values), columns, bits);
    pack_signs_of(static_cast<const uint16_t *>(values), columns, bits);
}

void unpack_signs(const uint8_t *bits, int64_t columns, float *values) {
    const uint32_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const float32x4_t one = vdupq_n_f32(1.0f), minus_one = vdupq_n_f32(-1.0f);
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
        const uint32x4_t byte = vdupq_n_u32(bits[k / 8]);
        vst1q_f32(values + k, vbslq_f32(vtstq_u32(byte, vld1q_u32(places)), one, minus_one));
        vst1q_f32(values + k + 4, vbslq_f32(vtstq_u32(byte, vld1q_u32(places + 4)), one, minus_one));
    }
    for (; k < columns; ++k) values[k] = (bits[k / 8] >> (k % 8)) & 1 ? 1.0f : -1.0f;
}

// ---- W1A8 and W1A1: layout, rows
//
// A format says in its type: bytes in a chunk, a multiple of 4; bytes of tables and of activations for a row and a byte
// of weights; factor, see run_block; is_prefix, see W1A1.

constexpr int most_rows = 4, tile_columns = 32;

int64_t padded_bytes(int64_t inputs) { return round_up(ceil_div(inputs, 8), 4); }

int64_t tile_bytes(int64_t outputs, int64_t inputs) { return round_up(outputs, tile_columns) * padded_bytes(inputs); }

// Padding differs in no bit.
template <class Format>
void relay(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
    const int64_t width = ceil_div(inputs, 8), padded = padded_bytes(inputs), rows = round_up(outputs, tile_columns);
    std::memset(tiles, 0, rows * padded);
    for (int64_t first = 0; first < padded; first += Format::chunk) {
        const int64_t count = std::min<int64_t>(Format::chunk, padded - first);
        for (int64_t n = 0; n < outputs; ++n) {
            uint8_t *tile = tiles + first * rows + n / tile_columns * tile_columns * count + n % tile_columns;
            uint8_t byte = 0;
            for (int64_t j = 0; j < count; ++j) {
                const uint8_t next = first + j < width ? bits[n * width + first + j] : 0;
                byte = Format::is_prefix ? byte ^ next : next;
                tile[j * tile_columns] = byte;
            }
        }
    }
}

struct Columns {
    uint8x16_t left, right;
};

inline Columns load(const uint8_t *tile) { return {vld1q_u8(tile), vld1q_u8(tile + 16)}; }

inline void add_words(int32_t *to, int16x8_t words) {
    vst1q_s32(to, vaddw_s16(vld1q_s32(to), vget_low_s16(words)));
    vst1q_s32(to + 4, vaddw_high_s16(vld1q_s32(to + 4), words));
}

// What a row is besides its activations: y = step * (factor * sum + offset).
struct Row {
    float step;
    int32_t offset;
};

template <class Format, int rows>
void run_block(const Call &call, int64_t row, int64_t begin, int64_t end) {
    constexpr int64_t part = Format::activation_bytes, table_bytes = Format::table_bytes;
    const int64_t bytes = padded_bytes(call.inputs), columns = round_up(end - begin, tile_columns);
    Workspace workspace(32 * bytes + rows * (part * bytes + 4 * columns + table_bytes * Format::chunk) + 256);
    float *buffer = workspace.take<float>(8 * bytes);
    uint8_t *activations = workspace.take<uint8_t>(rows * part * bytes);
    int32_t *sums = workspace.take<int32_t>(rows * columns);
    uint8_t *tables = workspace.take<uint8_t>(rows * table_bytes * Format::chunk);
    Row heads[rows];
    for (int r = 0; r < rows; ++r)
        heads[r] = Format::load_row_of(call, row + r, bytes, buffer, activations + r * part * bytes);
    std::memset(sums, 0, rows * columns * sizeof(int32_t));
    for (int64_t first = 0; first < bytes; first += Format::chunk) {
        const int64_t count = std::min<int64_t>(Format::chunk, bytes - first);
        for (int64_t j = 0; j < count; ++j)
            for (int r = 0; r < rows; ++r)
                Format::fill_tables(activations + part * (r * bytes + first + j), tables + table_bytes * (j * rows + r));
        const uint8_t *tile = call.tiles + first * round_up(call.outputs, tile_columns) + begin * count;
        for (int64_t n = 0; n < columns; n += tile_columns)
            Format::template add_chunk<rows>(tile + n * count, tables, count, sums + n, columns);
    }
    for (int r = 0; r < rows; ++r) {
        int32_t *of_row = sums + r * columns;
        for (int64_t n = 0; n < end - begin; ++n) of_row[n] = Format::factor * of_row[n] + heads[r].offset;
        store_row(call, row + r, begin, end, heads[r].step, of_row);
    }
}

// y for blocks of `rows` rows, then for one of the rest.
template <class Format, int rows = most_rows>
void run(const Call &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    for (; row + rows <= row_end; row += rows) run_block<Format, rows>(call, row, begin, end);
    if constexpr (rows > 1) run<Format, rows - 1>(call, row, row_end, begin, end);
}

// ---- W1A8
//
// Of 4 activations all 16 sums are at most 508 in size. A table holds sum + 512 in two bytes, the 5 low bits and the rest;
// 8 of each can be added in a byte before low + 32 * high goes to 16 bits, where 256 weights fit.

struct SplitSums {
    Columns low, high;
};

inline void look_up(SplitSums &sums, const uint8_t *table, const Columns &indices) {
    const uint8x16_t low = vld1q_u8(table), high = vld1q_u8(table + 16);
    sums.low.left = vaddq_u8(sums.low.left, vqtbl1q_u8(low, indices.left));
    sums.low.right = vaddq_u8(sums.low.right, vqtbl1q_u8(low, indices.right));
    sums.high.left = vaddq_u8(sums.high.left, vqtbl1q_u8(high, indices.left));
    sums.high.right = vaddq_u8(sums.high.right, vqtbl1q_u8(high, indices.right));
}

inline void widen(uint16_t *words, uint8x16_t low, uint8x16_t high) {
    const uint8x16_t times = vdupq_n_u8(32);
    const uint16x8_t first = vaddw_u8(vld1q_u16(words), vget_low_u8(low));
    const uint16x8_t second = vaddw_high_u8(vld1q_u16(words + 8), low);
    vst1q_u16(words, vmlal_u8(first, vget_low_u8(high), vget_low_u8(times)));
    vst1q_u16(words + 8, vmlal_high_u8(second, high, times));
}

inline void widen(uint16_t *words, const SplitSums &sums) {
    widen(words, sums.low.left, sums.high.left);
    widen(words + 16, sums.low.right, sums.high.right);
}

struct W1A8 {
    static constexpr int chunk = 32, table_bytes = 64, activation_bytes = 8, factor = 2;
    static constexpr bool is_prefix = false;

    static Row load_row_of(const Call &call, int64_t row, int64_t bytes, float *buffer, uint8_t *activations) {
        int8_t *q = reinterpret_cast<int8_t *>(activations);
        const float step = quantize_row(load_row(call, row, 8 * bytes, buffer), 8 * bytes, q);
        int32_t total = 0;
        for (int64_t k = 0; k < 8 * bytes; ++k) total += q[k];
        return {step, -total};
    }

    // The table of 4 of the 8 activations: 16 low bytes, 16 high bytes.
    template <int first>
    static void fill_table(int16x8_t q, uint8_t *table) {
        // For entries 0..7: whether the first, the second, the third of the activations is in the sum.
        const int16x8_t a = {0, 1, 0, 1, 0, 1, 0, 1}, b = {0, 0, 1, 1, 0, 0, 1, 1}, c = {0, 0, 0, 0, 1, 1, 1, 1};
        int16x8_t sum = vmlaq_laneq_s16(vdupq_n_s16(512), a, q, first);
        sum = vmlaq_laneq_s16(sum, b, q, first + 1);
        sum = vmlaq_laneq_s16(sum, c, q, first + 2);
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
        const uint8x16_t zero = vdupq_n_u8(0), nibble = vdupq_n_u8(15);
        for (int64_t j = 0; j < bytes; j += 4) {
            SplitSums a = {{zero, zero}, {zero, zero}}, b = a, c = a, d = a;
            for (int i = 0; i < 4; ++i, tile += 32, tables += 64 * rows) {
                const Columns weights = load(tile);
                Columns indices = {vandq_u8(weights.left, nibble), vandq_u8(weights.right, nibble)};
                look_up(a, tables, indices);
                if constexpr (rows > 1) look_up(b, tables + 64, indices);
                if constexpr (rows > 2) look_up(c, tables + 128, indices);
                if constexpr (rows > 3) look_up(d, tables + 192, indices);
                indices = {vshrq_n_u8(weights.left, 4), vshrq_n_u8(weights.right, 4)};
                look_up(a, tables + 32, indices);
                if constexpr (rows > 1) look_up(b, tables + 96, indices);
                if constexpr (rows > 2) look_up(c, tables + 160, indices);
                if constexpr (rows > 3) look_up(d, tables + 224, indices);
            }
            widen(words, a);
            if constexpr (rows > 1) widen(words + 32, b);
            if constexpr (rows > 2) widen(words + 64, c);
            if constexpr (rows > 3) widen(words + 96, d);
        }
        const uint16x8_t bias = vdupq_n_u16(static_cast<uint16_t>(2 * bytes * 512));
        for (int i = 0; i < 4 * rows; ++i) {
            const uint16x8_t without = vsubq_u16(vld1q_u16(words + 8 * i), bias);
            add_words(sums + i / 4 * stride + i % 4 * 8, vreinterpretq_s16_u16(without));
        }
    }
};

// ---- W1A1
//
// xor, count and add are 3 operations for 8 weights, where tables of 4 differences would take 4 and those of the indices.
// Prefix xors, started anew in every chunk, make it 5 for 16. y_j, the xor of the bytes of weights and of activations, is
// the parity of the differences x_0 .. x_j in each bit, and of a pair of bytes y_2j-1 + x_2j + x_2j+1 = 2 * majority +
// y_2j+1, where the majority is ~y_2j+1 if y_2j, else y_2j-1. The differences are 2 * sum count(majority) + count(last y).
//
// In place of the first, third, .. y_2j+1 there is its complement, so that ~ is not needed: then every second selection
// is the complement of a majority, which counts as 8 - count.

struct Counter {
    Columns count, last;
};

template <bool is_complement>
inline uint8x16_t count_pair(uint8x16_t count, uint8x16_t last, uint8x16_t even, uint8x16_t odd) {
    const uint8x16_t bits = vcntq_u8(vbslq_u8(even, odd, last));
    return is_complement ? vsubq_u8(count, bits) : vaddq_u8(count, bits);
}

template <bool is_complement>
inline void count_pair(Counter &sums, const Columns &even, const Columns &odd, const uint8_t *signs, int64_t stride) {
    const uint8x16_t first = vld1q_u8(signs), second = vld1q_u8(signs + stride);
    const Columns next = {veorq_u8(odd.left, second), veorq_u8(odd.right, second)};
    sums.count.left = count_pair<is_complement>(sums.count.left, sums.last.left, veorq_u8(even.left, first), next.left);
    sums.count.right = count_pair<is_complement>(sums.count.right, sums.last.right, veorq_u8(even.right, first), next.right);
    sums.last = next;
}

inline void add_counts(int32_t *to, uint8x16_t count, uint8x16_t last) {
    const uint8x16_t rest = vcntq_u8(last);
    add_words(to, vreinterpretq_s16_u16(vaddw_u8(vshll_n_u8(vget_low_u8(count), 1), vget_low_u8(rest))));
    add_words(to + 8, vreinterpretq_s16_u16(vaddw_high_u8(vshll_high_n_u8(count, 1), rest)));
}

inline void add_counts(int32_t *to, const Counter &sums) {
    add_counts(to, sums.count.left, sums.last.left);
    add_counts(to + 16, sums.count.right, sums.last.right);
}

struct W1A1 {
    static constexpr int chunk = 60, table_bytes = 16, activation_bytes = 1, factor = -2;  // 30 pairs: at most 240
    static constexpr bool is_prefix = true;

    static Row load_row_of(const Call &call, int64_t row, int64_t bytes, float *buffer, uint8_t *signs) {
        std::memset(signs + bytes - 4, 0, 4);
        pack_signs_of(load_centred_row(call, row, buffer), call.inputs, signs);
        for (int64_t j = 0; j < bytes; ++j) signs[j] ^= j % chunk ? signs[j - 1] : 0;
        for (int64_t j = 1; j < bytes; j += 4) signs[j] = static_cast<uint8_t>(~signs[j]);
        return {1.0f, static_cast<int32_t>(call.inputs)};
    }

    static void fill_tables(const uint8_t *signs, uint8_t *table) { vst1q_u8(table, vdupq_n_u8(*signs)); }

    // The next two bytes of weights.
    template <bool is_complement, int rows>
    static void count_rows(Counter &a, Counter &b, Counter &c, Counter &d, const uint8_t *tile, const uint8_t *signs) {
        const Columns even = load(tile), odd = load(tile + 32);
        count_pair<is_complement>(a, even, odd, signs, 16 * rows);
        if constexpr (rows > 1) count_pair<is_complement>(b, even, odd, signs + 16, 16 * rows);
        if constexpr (rows > 2) count_pair<is_complement>(c, even, odd, signs + 32, 16 * rows);
        if constexpr (rows > 3) count_pair<is_complement>(d, even, odd, signs + 48, 16 * rows);
    }

    // sums[r][32 columns] += differences in a chunk.
    template <int rows>
    static void add_chunk(const uint8_t *tile, const uint8_t *signs, int64_t bytes, int32_t *sums, int64_t stride) {
        const uint8x16_t zero = vdupq_n_u8(0), start = vdupq_n_u8(static_cast<uint8_t>(8 * (bytes / 4)));
        Counter a = {{start, start}, {zero, zero}}, b = a, c = a, d = a;
        for (int64_t j = 0; j < bytes; j += 4, tile += 128, signs += 64 * rows) {
            count_rows<false, rows>(a, b, c, d, tile, signs);
            count_rows<true, rows>(a, b, c, d, tile + 64, signs + 32 * rows);
        }
        add_counts(sums, a);
        if constexpr (rows > 1) add_counts(sums + stride, b);
        if constexpr (rows > 2) add_counts(sums + 2 * stride, c);
        if constexpr (rows > 3) add_counts(sums + 3 * stride, d);
    }
};

// ---- W1
//
// A byte of weights is the index to a table, in memory, of the sums of 8 activations: of 4 rows side by side, so that one
// load and one addition are 32 weights, where a multiplication by signs would be 4. A single row has tables of floats.

template <class Value>
inline Value get(const float *from) {
    Value value;
    std::memcpy(&value, from, sizeof(Value));
    return value;
}
template <class Value>
inline void put(float *to, Value value) { std::memcpy(to, &value, sizeof(Value)); }

// table[e] = sum of +a for the bits of e that are set, -a for the others
template <class Value>
inline void fill_sixteen(const float *a, Value *table) {
    constexpr int lanes = sizeof(Value) / 4;
    table[0] = Value{};
    for (int b = 0; b < 4; ++b) {
        for (int e = 0; e < 1 << b; ++e) {
            table[(1 << b) + e] = table[e] + get<Value>(a + b * lanes);
            table[e] = table[e] - get<Value>(a + b * lanes);
        }
    }
}

template <class Value>
inline void fill_table(const float *a, float *table) {
    constexpr int lanes = sizeof(Value) / 4;
    Value low[16], high[16];
    fill_sixteen(a, low);
    fill_sixteen(a + 4 * lanes, high);
    for (int h = 0; h < 16; ++h)
        for (int e = 0; e < 16; ++e) put(table + (16 * h + e) * lanes, high[h] + low[e]);
}

template <class Value>
inline Value sum_entries(const float *tables, const uint8_t *bits, int64_t bytes) {
    const auto entry = [tables](int64_t j, uint32_t index) { return get<Value>(tables + (256 * j + index) * (sizeof(Value) / 4)); };
    Value sum = {};
    int64_t j = 0;
    for (; j + 4 <= bytes; j += 4) {
        uint32_t word;
        std::memcpy(&word, bits + j, 4);
        const Value first = entry(j, word & 255) + entry(j + 1, word >> 8 & 255);
        sum = sum + (first + (entry(j + 2, word >> 16 & 255) + entry(j + 3, word >> 24)));
    }
    for (; j < bytes; ++j) sum = sum + entry(j, bits[j]);
    return sum;
}

// A row, or up to 4 as the lanes of a Value.
template <class Value>
void run_rows_w1(const Call &call, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    constexpr int64_t lanes = sizeof(Value) / 4, bytes_at_once = 16 / lanes;  // their tables stay in the first cache
    const int64_t width = ceil_div(call.inputs, 8), columns = end - begin;
    Workspace workspace(4 * (8 * width * (lanes + 1) + columns * (lanes + 1) + 16 * 256) + 320);
    float *buffer = workspace.take<float>(8 * width);
    float *a = workspace.take<float>(8 * width * lanes);
    float *sums = workspace.take<float>(columns * lanes);
    float *of_row = workspace.take<float>(columns);
    float *tables = workspace.take<float>(16 * 256);
    std::memset(a, 0, 8 * width * lanes * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
        const float *x = load_row(call, row + r, 8 * width, buffer);
        for (int64_t k = 0; k < 8 * width; ++k) a[k * lanes + r] = x[k];
    }
    std::memset(sums, 0, columns * lanes * sizeof(float));
    for (int64_t first = 0; first < width; first += bytes_at_once) {
        const int64_t count = std::min(bytes_at_once, width - first);
        for (int64_t j = 0; j < count; ++j) fill_table<Value>(a + 8 * (first + j) * lanes, tables + 256 * j * lanes);
        const uint8_t *bits = call.tiles + begin * width + first;
        const auto add = [=](int64_t bytes) {
            for (int64_t n = 0; n < columns; ++n) {
                float *sum = sums + n * lanes;
                put(sum, get<Value>(sum) + sum_entries<Value>(tables, bits + n * width, bytes));
            }
        };
        if (count == bytes_at_once) add(bytes_at_once);  // with a constant, to be unrolled
        else add(count);
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < columns; ++n) of_row[n] = sums[n * lanes + r];
        store_row(call, row + r, begin, end, 1.0f, of_row);
    }
}

void run_w1(const Call &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    for (; row + 1 < row_end; row += 4)
        run_rows_w1<float32x4_t>(call, row, std::min<int64_t>(4, row_end - row), begin, end);
    if (row < row_end) run_rows_w1<float>(call, row, 1, begin, end);
}

int64_t no_tiles(int64_t, int64_t) { return 0; }
void no_relay(const uint8_t *, int64_t, int64_t, uint8_t *) {}

}  // namespace

const proxbit::Level proxbit::neon_level = {
    "neon",
    runs,
    {{most_rows, tile_columns, no_tiles, no_relay, run_w1},
     {most_rows, tile_columns, tile_bytes, relay<W1A8>, run<W1A8>},
     {most_rows, tile_columns, tile_bytes, relay<W1A1>, run<W1A1>}},
    pack_signs,
    unpack_signs,
};
