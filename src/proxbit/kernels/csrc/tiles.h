// The order of weights that the byte look-ups read: bytes of weights come in chunks; in a chunk, one block of columns
// after the other; in a block, byte j (or word j) of its columns side by side.
#pragma once

#include "rows.h"

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
void relay(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
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

}  // namespace
