// What the ISAs with AVX-512 share: the layout, the look-up of W1, the blocks of W1A1.
//
// Tiles are made of words: 30 weights in 32 bits for W1. Words come in chunks; in a chunk, one tile of columns after
// the other; in a tile, word j of its columns side by side.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // both of gcc 12 about its own header, bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "linear/row.h"
#include "signs/avx512.h"

namespace {

using proxbit::LinearCall;

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }
inline void store(void *p, __m512i v) { _mm512_storeu_si512(p, v); }

// ---- layout
//
// A format of words says in its type: rows of a block; columns of a tile; column_block, of whole tiles; Word; weights
// of a word; most_words of a chunk; word_multiple, of which the words of a column are one; is_prefix: a word holds the
// xor of all up to it.

template <class Format>
int64_t words_of(int64_t inputs) {
    return round_up(ceil_div(inputs, Format::weights), Format::word_multiple);
}

// Words in a chunk: all chunks nearly as long.
template <class Format>
int64_t chunk_of(int64_t words) {
    return ceil_div(words, std::max<int64_t>(1, ceil_div(words, Format::most_words)));
}

template <class Format>
int64_t tile_bytes(int64_t outputs, int64_t inputs) {
    return round_up(outputs, Format::column_block) * words_of<Format>(inputs) * sizeof(typename Format::Word);
}

template <class Format>
void repack(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
    using Word = typename Format::Word;
    constexpr int64_t columns = Format::columns;
    const int64_t width = ceil_div(inputs, 8), words = words_of<Format>(inputs), chunk = chunk_of<Format>(words);
    const int64_t padded = round_up(outputs, Format::column_block), row_bytes = words * Format::weights / 8 + 9;
    Workspace workspace(row_bytes + 64);
    uint8_t *row = workspace.take<uint8_t>(row_bytes);
    std::memset(row, 0, row_bytes);
    std::memset(tiles, 0, tile_bytes<Format>(outputs, inputs));
    for (int64_t n = 0; n < outputs; ++n) {
        std::memcpy(row, bits + n * width, width);
        Word prefix = 0;
        for (int64_t first = 0; first < words; first += chunk) {
            const int64_t count = std::min(chunk, words - first);
            uint8_t *to = tiles + (first * padded + n / columns * columns * count + n % columns) * sizeof(Word);
            for (int64_t j = 0; j < count; ++j) {
                const int64_t bit = (first + j) * Format::weights;
                uint64_t part;
                std::memcpy(&part, row + bit / 8, 8);
                Word word = static_cast<Word>((part >> (bit % 8)) & ((uint64_t(1) << Format::weights) - 1));
                if constexpr (Format::is_prefix) word = prefix ^= word;
                std::memcpy(to + j * columns * sizeof(Word), &word, sizeof(Word));
            }
        }
    }
}

// ---- look-up
//
// A group of weights is the index to a table of the sums of as many activations. A table is two registers, 128 bytes;
// the permutation ignores the bits above the index, so the next group only has to be shifted down. A block is 4 rows by
// 4 registers of columns; the tables of a chunk stay in the first cache while all columns pass.
//
// Sums are named variables and their additions asm on values: gcc 12 keeps arrays of sums in memory, regroups and
// spills sums that it can see through, and stores sums that asm gets by reference.

struct Registers {
    __m512i a, b, c, d;
};

template <class Format, int registers>
inline void look_up(Registers &sums, const uint8_t *table, const Registers &indices) {
    const __m512i low = load(table), high = load(table + 64);
    sums.a = Format::template look_up<false>(sums.a, low, indices.a, high);
    sums.b = Format::template look_up<true>(sums.b, low, indices.b, high);
    if constexpr (registers > 2) {
        sums.c = Format::template look_up<false>(sums.c, low, indices.c, high);
        sums.d = Format::template look_up<true>(sums.d, low, indices.d, high);
    }
}

template <class Format, int registers>
inline void add_registers_to(typename Format::Sum *to, const Registers &sums) {
    Format::add_to(to, sums.a);
    Format::add_to(to + Format::columns, sums.b);
    if constexpr (registers > 2) {
        Format::add_to(to + 2 * Format::columns, sums.c);
        Format::add_to(to + 3 * Format::columns, sums.d);
    }
}

// sums[r][columns of the registers] += sum_k s a for a chunk; 128 bytes of tables for each group and row.
template <class Format, int rows, int registers>
inline void add_chunk(const uint8_t *tile, const uint8_t *tables, const __m512i *starts, int64_t words,
                      typename Format::Sum *sums, int64_t stride) {
    const auto start = [starts](int r) { return Registers{starts[r], starts[r], starts[r], starts[r]}; };
    Registers p = start(0), q = start(1), r = start(2), s = start(3), indices = p;
    for (int64_t j = 0; j < words; ++j, tile += 64) {
        indices.a = load(tile);
        indices.b = load(tile + 64 * words);
        if constexpr (registers > 2) indices.c = load(tile + 128 * words), indices.d = load(tile + 192 * words);
        for (int i = 0; i < Format::weights / Format::group; ++i, tables += 128 * rows) {
            look_up<Format, registers>(p, tables, indices);
            if constexpr (rows > 1) look_up<Format, registers>(q, tables + 128, indices);
            if constexpr (rows > 2) look_up<Format, registers>(r, tables + 256, indices);
            if constexpr (rows > 3) look_up<Format, registers>(s, tables + 384, indices);
            indices.a = Format::next(indices.a), indices.b = Format::next(indices.b);
            if constexpr (registers > 2) indices.c = Format::next(indices.c), indices.d = Format::next(indices.d);
        }
    }
    add_registers_to<Format, registers>(sums, p);
    if constexpr (rows > 1) add_registers_to<Format, registers>(sums + stride, q);
    if constexpr (rows > 2) add_registers_to<Format, registers>(sums + 2 * stride, r);
    if constexpr (rows > 3) add_registers_to<Format, registers>(sums + 3 * stride, s);
}

template <class Format, int rows>
void look_up_block(const LinearCall &call, int64_t row, int64_t begin, int64_t end) {
    using Sum = typename Format::Sum;
    constexpr int64_t groups = Format::weights / Format::group, block = Format::column_block;
    const int64_t words = words_of<Format>(call.inputs), chunk = chunk_of<Format>(words), weights = Format::weights;
    const int64_t width = words * weights, columns = round_up(end - begin, block);
    const int64_t row_floats = round_up(width + ceil_div(width, 4), 16), table_bytes = rows * 128 * groups * chunk;
    Workspace workspace(4 * rows * (row_floats + columns) + table_bytes + 192);
    float *buffer = workspace.take<float>(rows * row_floats);
    Sum *sums = workspace.take<Sum>(rows * columns);
    uint8_t *tables = workspace.take<uint8_t>(table_bytes);
    const typename Format::Activation *a[rows];
    float factor[rows];
    for (int r = 0; r < rows; ++r) a[r] = Format::load_row_of(call, row + r, width, buffer + r * row_floats, factor[r]);
    std::memset(sums, 0, rows * columns * sizeof(Sum));
    for (int64_t first = 0; first < words; first += chunk) {
        const int64_t count = std::min(chunk, words - first);
        __m512i starts[Format::rows] = {};
        for (int r = 0; r < rows; ++r) {
            const auto *part = a[r] + first * weights;
            starts[r] = Format::start(part, count * weights);
            for (int64_t i = 0; i < groups * count; ++i)
                Format::fill_table(part + i * Format::group, tables + (i * rows + r) * 128);
        }
        const int64_t words_before = first * round_up(call.outputs, block) + begin * count;
        const uint8_t *tile = call.tiles + words_before * sizeof(typename Format::Word);
        int64_t n = 0;
        for (; n + 2 * block <= columns; n += 2 * block, tile += 256 * count)
            add_chunk<Format, rows, 4>(tile, tables, starts, count, sums + n, columns);
        if (n < columns) add_chunk<Format, rows, 2>(tile, tables, starts, count, sums + n, columns);
    }
    for (int r = 0; r < rows; ++r) store_row(call, row + r, begin, end, factor[r], sums + r * columns);
}

// What the formats that look sums up have in common.
template <class Format>
struct LookUp {
    static constexpr int word_multiple = 1;
    static constexpr bool is_prefix = false;

    template <int rows>
    static void block(const LinearCall &call, int64_t row, int64_t begin, int64_t end) {
        look_up_block<Format, rows>(call, row, begin, end);
    }
};

struct Signs {
    // For 32-bit lane e: the sign bit where bit b of e is 0.
    alignas(64) uint32_t bits[4][16];
    constexpr Signs() : bits() {
        for (int b = 0; b < 4; ++b)
            for (int e = 0; e < 16; ++e) bits[b][e] = e >> b & 1 ? 0 : 0x80000000u;
    }
};
constexpr Signs sign_bits;

// Groups of 5 in 32-bit lanes; a table holds signed sums.
struct W1 : LookUp<W1> {
    using Word = uint32_t;
    using Activation = float;
    using Sum = float;
    static constexpr int rows = 4, columns = 16, column_block = 32;
    static constexpr int weights = 30, group = 5, most_words = 6;

    static const float *load_row_of(const LinearCall &call, int64_t row, int64_t width, float *buffer, float &factor) {
        factor = 1.0f;
        return load_row(call, row, width, buffer);
    }
    static void fill_table(const float *x, uint8_t *table) {
        const auto times = [x](int i) {
            return _mm512_xor_ps(_mm512_load_ps(sign_bits.bits[i]), _mm512_set1_ps(x[i]));
        };
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(times(0), times(1)), _mm512_add_ps(times(2), times(3)));
        const __m512 last = _mm512_set1_ps(x[4]);
        _mm512_storeu_ps(table, _mm512_sub_ps(sum, last));
        _mm512_storeu_ps(table + 64, _mm512_add_ps(sum, last));
    }
    static __m512i start(const float *, int64_t) { return _mm512_setzero_si512(); }
    static __m512i next(__m512i indices) { return _mm512_srli_epi32(indices, group); }
    // Adds by multiplying with 1 if told so, for processors that multiply in other units than they add and permute in.
    template <bool multiply>
    static __m512i look_up(__m512i sum, __m512i low, __m512i index, __m512i high) {
        const __m512i entry = _mm512_permutex2var_epi32(low, index, high);  // vpermi2ps is the same
        if constexpr (multiply) asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(entry), "v"(_mm512_set1_ps(1.0f)));
        else asm("vaddps %1, %0, %0" : "+v"(sum) : "v"(entry));
        return sum;
    }
    static void add_to(float *to, __m512i sums) {
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_castsi512_ps(sums)));
    }
};

// ---- W1A1
//
// Words of tiles and of activations are prefix xors: y_j, the xor of both, is the parity of the differences x_0 .. x_j
// in each bit. Of a pair of words, y_2j-1 + x_2j + x_2j+1 = 2 * majority + y_2j+1, and the majority is one ternary
// operation on the three y. The differences are 2 * sum popcount(majority) + popcount(last y).

// The format counts into sums[r][32 columns]; words of activations come with their rows side by side.
template <class Format, int rows>
void count_block(const LinearCall &call, int64_t row, int64_t begin, int64_t end) {
    const int64_t words = words_of<Format>(call.inputs), columns = round_up(end - begin, Format::columns);
    Workspace workspace(4 * call.inputs + 4 * words * (rows + 1) + 4 * rows * columns + 256);
    float *buffer = workspace.take<float>(call.inputs);
    uint32_t *bits = workspace.take<uint32_t>(words);
    uint32_t *signs = workspace.take<uint32_t>(words * rows);
    int32_t *sums = workspace.take<int32_t>(rows * columns);
    std::memset(bits, 0, 4 * words);
    for (int r = 0; r < rows; ++r) {
        pack_signs_of(load_centred_row(call, row + r, buffer), call.inputs, reinterpret_cast<uint8_t *>(bits));
        uint32_t prefix = 0;
        for (int64_t j = 0; j < words; ++j) signs[j * rows + r] = prefix ^= bits[j];
    }
    const uint8_t *tile = call.tiles + begin * words * 4;
    for (int64_t n = 0; n < columns; n += Format::columns)
        Format::template count<rows>(tile + n * words * 4, signs, words, call.inputs, sums + n, columns);
    for (int r = 0; r < rows; ++r) store_row(call, row + r, begin, end, 1.0f, sums + r * columns);
}

template <class Format>
struct SignWords {
    using Word = uint32_t;
    static constexpr int columns = 32, column_block = 32, weights = 32, word_multiple = 2;
    static constexpr int64_t most_words = int64_t(1) << 62;
    static constexpr bool is_prefix = true;

    template <int rows>
    static void block(const LinearCall &call, int64_t row, int64_t begin, int64_t end) {
        count_block<Format, rows>(call, row, begin, end);
    }
};

// ---- all rows

// y for blocks of `rows` rows, then for one of the rest.
template <class Format, int rows = Format::rows>
void run(const LinearCall &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    for (; row + rows <= row_end; row += rows) Format::template block<rows>(call, row, begin, end);
    if constexpr (rows > 1) run<Format, rows - 1>(call, row, row_end, begin, end);
}

template <class T>
constexpr proxbit::LinearKernel kernels = {T::rows, T::column_block, tile_bytes<T>, repack<T>, run<T>};

}  // namespace
