// Look-ups by bytes of weights, for AVX2 and NEON: the order of the weights, and sums of whole numbers for a few rows.
//
// Bytes of weights come in chunks; in a chunk, one block of columns after the other; in a block, byte j (or word j) of
// its columns side by side.
#pragma once

#include "linear/row.h"

namespace {

template <int padded_columns, int multiple>
int64_t tile_bytes(int64_t outputs, int64_t inputs) {
    return round_up(outputs, padded_columns) * round_up(ceil_div(inputs, 8), multiple);
}

// to[columns * c + r] = from[r * stride + c] for 16 rows of 8 bytes
template <int columns>
inline void transpose_plainly(const uint8_t *from, int64_t stride, uint8_t *to) {
    for (int c = 0; c < 8; ++c)
        for (int r = 0; r < 16; ++r) to[columns * c + r] = from[r * stride + c];
}

template <int columns, int padded_columns, int word, int multiple, int chunk,
          void transpose(const uint8_t *, int64_t, uint8_t *) = transpose_plainly<columns>>
void repack(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
    const int64_t width = ceil_div(inputs, 8), padded = round_up(width, multiple);
    const int64_t rows = round_up(outputs, padded_columns);
    std::memset(tiles, 0, rows * padded);
    for (int64_t first = 0; first < width; first += chunk) {
        const int64_t count = std::min<int64_t>(chunk, padded - first), used = std::min<int64_t>(chunk, width - first);
        for (int64_t n = 0; n < outputs; ++n) {
            uint8_t *tile = tiles + first * rows + n / columns * columns * count + n % columns * word;
            const uint8_t *row = bits + n * width + first;
            int64_t j = 0;
            if constexpr (word == 1) {
                const int64_t whole = used / 8 * 8;
                if (n % 16 == 0 && n + 16 <= outputs)
                    for (int64_t c = 0; c < whole; c += 8) transpose(row + c, width, tile + c * columns);
                if (n / 16 * 16 + 16 <= outputs) j = whole;
                for (; j < used; ++j) tile[j * columns] = row[j];
            } else {
                for (; j + word <= used; j += word) std::memcpy(tile + j * columns, row + j, word);
                if (j < used) std::memcpy(tile + j * columns, row + j, used - j);
            }
        }
    }
}

// y of some rows. A format says in its type: rows and columns of a block; multiple, of which the bytes of a row are one;
// bytes of a chunk; bytes of activations and of tables for a row and a byte of weights; how to load a row, to fill its
// tables and to add up a chunk; factor: y = step * (factor * sum + offset), where `load_row_of` gives step and offset.
template <class Format, int rows>
void look_up_block(const proxbit::LinearCall &call, int64_t row, int64_t begin, int64_t end) {
    constexpr int64_t part = Format::activation_bytes, table_bytes = Format::table_bytes;
    const int64_t bytes = round_up(ceil_div(call.inputs, 8), Format::multiple);
    const int64_t columns = round_up(end - begin, Format::columns);
    Workspace workspace(32 * bytes + rows * (part * bytes + 4 * columns + table_bytes * Format::chunk) + 256);
    float *buffer = workspace.take<float>(8 * bytes), step[rows];
    uint8_t *activations = workspace.take<uint8_t>(rows * part * bytes);
    int32_t *sums = workspace.take<int32_t>(rows * columns), offset[rows];
    uint8_t *tables = workspace.take<uint8_t>(rows * table_bytes * Format::chunk);
    for (int r = 0; r < rows; ++r)
        step[r] = Format::load_row_of(call, row + r, bytes, buffer, activations + r * part * bytes, offset[r]);
    std::memset(sums, 0, rows * columns * sizeof(int32_t));
    for (int64_t first = 0; first < bytes; first += Format::chunk) {
        const int64_t count = std::min<int64_t>(Format::chunk, bytes - first);
        for (int64_t j = 0; j < count; ++j)
            for (int r = 0; r < rows; ++r)
                Format::fill_tables(activations + part * (r * bytes + first + j), tables + table_bytes * (j * rows + r));
        const uint8_t *tile = call.tiles + first * round_up(call.outputs, Format::columns) + begin * count;
        for (int64_t n = 0; n < columns; n += Format::columns)
            Format::template add_chunk<rows>(tile + n * count, tables, count, sums + n, columns);
    }
    for (int r = 0; r < rows; ++r) {
        int32_t *of_row = sums + r * columns;
        for (int64_t n = 0; n < end - begin; ++n) of_row[n] = Format::factor * of_row[n] + offset[r];
        store_row(call, row + r, begin, end, step[r], of_row);
    }
}

template <class Format>
void run_look_up(const proxbit::LinearCall &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    for (; row + Format::rows <= row_end; row += Format::rows) look_up_block<Format, Format::rows>(call, row, begin, end);
    for (; row < row_end; ++row) look_up_block<Format, 1>(call, row, begin, end);
}

// Activations as int8 with zeros up to a whole number of bytes of weights; offset: minus their sum.
inline float load_int8(const proxbit::LinearCall &call, int64_t row, int64_t bytes, float *buffer, uint8_t *to,
                       int32_t &offset) {
    int8_t *q = reinterpret_cast<int8_t *>(to);
    const float step = quantize_row(call, load_row(call, row, 8 * bytes, buffer), 8 * bytes, q);
    offset = 0;
    for (int64_t k = 0; k < 8 * bytes; ++k) offset -= q[k];
    return step;
}

}  // namespace
