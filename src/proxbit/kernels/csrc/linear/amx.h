// AMX: products of tiles for many rows of W1A8 and W1, the look-ups of the ISA `avx512` for few.
//
// A product of tiles adds 64 inputs of 16 rows and 16 columns as bytes, or 32 in bf16. The signs of the weights become
// +1 and -1 before it, for all rows of a pass at once. W1 splits a float into three numbers in bf16 that add up to it,
// so that products are exact, and sums those of fp32 in another order.
#pragma once

#include "linear/avx512_vbmi.h"

namespace {

// ---- tiles

constexpr int64_t tile_rows = 16, tile_size = 1024, pair_columns = 32, registers_width = 64;

// Of all eight registers: 16 rows of 64 bytes.
struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// This thread has the registers of tiles as long as it lives.
struct TileRegisters {
    TileRegisters() {
        const Configuration configuration;
        asm volatile("ldtilecfg %0" : : "m"(configuration));
    }
    ~TileRegisters() { asm volatile("tilerelease" : : : "memory"); }
    TileRegisters(const TileRegisters &) = delete;
    TileRegisters &operator=(const TileRegisters &) = delete;
};

// The header of gcc 12 does not say that these read and write memory.
template <int tile>
inline void load_tile(const uint8_t *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(uint8_t *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// sums (of 16 or 32 rows and of 32 columns, `stride` bytes from row to row) += a times b. Tiles of a lie side by side,
// those of the second 16 rows `row_tile_bytes` behind; those of b in pairs, one a step.
template <class Format, int row_tiles>
void multiply(const uint8_t *a, int64_t row_tile_bytes, const uint8_t *b, int64_t steps, uint8_t *sums, int64_t stride,
              bool is_first) {
    constexpr int64_t width = registers_width;
    uint8_t *below = sums + tile_rows * stride;
    if (is_first) {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    } else {
        load_tile<0>(sums, stride), load_tile<1>(sums + width, stride);
        if constexpr (row_tiles > 1) load_tile<2>(below, stride), load_tile<3>(below + width, stride);
    }
    for (int64_t i = 0; i < steps; ++i, b += 2 * tile_size) {
        load_tile<6>(b, width);
        load_tile<7>(b + tile_size, width);
        for (int p = 0; p < Format::parts; ++p, a += tile_size) {
            load_tile<4>(a, width);
            if constexpr (row_tiles > 1) load_tile<5>(a + row_tile_bytes, width);
            Format::template add_product<0, 4, 6>();
            Format::template add_product<1, 4, 7>();
            if constexpr (row_tiles > 1) Format::template add_product<2, 5, 6>(), Format::template add_product<3, 5, 7>();
        }
    }
    store_tile<0>(sums, stride), store_tile<1>(sums + width, stride);
    if constexpr (row_tiles > 1) store_tile<2>(below, stride), store_tile<3>(below + width, stride);
}

// ---- formats
//
// A format says: Few, the format of few rows; parts, tiles of a number; lanes, inputs of a column in a row of a tile of
// weights, and with them inputs, those of a tile; how to lay out a row of activations, and how to make a tile of bits.

template <int lanes_>
struct TileFormat {
    static constexpr int lanes = lanes_;
    static constexpr int64_t inputs = tile_rows * lanes, bit_bytes = tile_rows * lanes * 2;  // of a tile
};

struct Bytes : TileFormat<4> {
    using Few = W1A8;
    using Sum = int32_t;
    static constexpr int parts = 1, most_few = 8;

    static __m512i row_of(const uint8_t *bits) {
        uint64_t mask;
        std::memcpy(&mask, bits, 8);
        return _mm512_mask_blend_epi8(_cvtu64_mask64(mask), _mm512_set1_epi8(-1), _mm512_set1_epi8(1));
    }
    template <int sum, int a, int b>
    static void add_product() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
    }
    static float lay_out(const LinearCall &call, int64_t row, int64_t steps, float *buffer, uint8_t *to) {
        const int64_t width = steps * inputs;
        int8_t *q = reinterpret_cast<int8_t *>(buffer + width);
        const float step = quantize_row(call, load_row(call, row, width, buffer), width, q);
        for (int64_t i = 0; i < steps; ++i) store(to + i * tile_size, load(q + i * inputs));
        return step;
    }
};

// In three parts, or in the first of them if the inputs are bf16.
template <int parts_>
struct Floats : TileFormat<2> {
    using Few = W1;
    using Sum = float;
    static constexpr int parts = parts_, most_few = 24;

    static __m512i row_of(const uint8_t *bits) {
        uint32_t mask;
        std::memcpy(&mask, bits, 4);
        const __m512i minus = _mm512_set1_epi16(static_cast<int16_t>(0xbf80)), plus = _mm512_set1_epi16(0x3f80);
        return _mm512_mask_blend_epi16(_cvtu32_mask32(mask), minus, plus);
    }
    template <int sum, int a, int b>
    static void add_product() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
    }
    // The first, second and third 8 bits of 16 numbers. What is not finite has no second and third; NaN stays one.
    static void split(__m512 x, __m256i *pieces) {
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000)), bits = _mm512_castps_si512(x);
        const __mmask16 is_finite = ~_mm512_fpclass_ps_mask(x, 0x99), is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i first = _mm512_mask_or_epi32(bits, is_nan, bits, _mm512_set1_epi32(1 << 22)) & high;
        const __m512 rest = _mm512_maskz_sub_ps(is_finite, x, _mm512_castsi512_ps(first));
        const __m512i second = _mm512_castps_si512(rest) & high;
        const __m512i third = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(second)));
        pieces[0] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(first, 16));
        pieces[1] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(second, 16));
        pieces[2] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(third, 16));
    }
    static float lay_out(const LinearCall &call, int64_t row, int64_t steps, float *buffer, uint8_t *to) {
        const float *x = load_row(call, row, steps * inputs, buffer);
        for (int64_t i = 0; i < steps; ++i, x += inputs) {
            __m256i left[3], right[3];
            split(_mm512_loadu_ps(x), left);
            split(_mm512_loadu_ps(x + 16), right);
            for (int p = 0; p < parts; ++p, to += tile_size)
                store(to, _mm512_inserti64x4(_mm512_castsi256_si512(left[p]), right[p], 1));
        }
        return 1.0f;
    }
};

// ---- order of the weights
//
// What the few rows read comes first. Then: columns in pairs of 16, and tiles of the inputs of a pair one after the
// other; in row r of a tile, bit lanes c + i is that of column c and input lanes r + i.

template <class Format>
int64_t steps_of(int64_t inputs) {
    return ceil_div(inputs, Format::inputs);
}

template <class Format>
int64_t few_bytes(int64_t outputs, int64_t inputs) {
    return round_up(tile_bytes<typename Format::Few>(outputs, inputs), 64);
}

template <class Format>
int64_t pair_bytes(int64_t outputs, int64_t inputs) {
    return ceil_div(outputs, pair_columns) * steps_of<Format>(inputs) * 2 * Format::bit_bytes;
}

template <class Format>
int64_t all_bytes(int64_t outputs, int64_t inputs) {
    return few_bytes<Format>(outputs, inputs) + pair_bytes<Format>(outputs, inputs);
}

template <class Format>
void repack_all(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles) {
    constexpr int lanes = Format::lanes, input_bytes = Format::inputs / 8, row_bytes = 2 * lanes;
    repack<typename Format::Few>(bits, outputs, inputs, tiles);
    tiles += few_bytes<Format>(outputs, inputs);
    std::memset(tiles, 0, pair_bytes<Format>(outputs, inputs));
    const int64_t width = ceil_div(inputs, 8), steps = steps_of<Format>(inputs);
    for (int64_t n = 0; n < outputs; ++n) {
        const int64_t place = n % 16 * lanes;
        uint8_t *to = tiles + n / pair_columns * steps * 2 * Format::bit_bytes + n % pair_columns / 16 * Format::bit_bytes;
        for (int64_t j = 0; j < steps; ++j, to += 2 * Format::bit_bytes) {
            uint64_t word = 0;
            std::memcpy(&word, bits + n * width + j * input_bytes, std::min<int64_t>(input_bytes, width - j * input_bytes));
            for (int r = 0; r < tile_rows; ++r, word >>= lanes)
                to[r * row_bytes + place / 8] |= (word & ((1u << lanes) - 1)) << place % 8;
        }
    }
}

// ---- all rows

// Activations of a pass, and the factors of a pair of columns, some inputs of them at a time, stay in the second cache.
template <class Format>
void run_tiles(const LinearCall &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    using Sum = typename Format::Sum;
    constexpr int64_t panel = 128, pass_bytes = 3 << 19, factor_bytes = 3 << 16, step_bytes = 2 * tile_size;
    constexpr int64_t stride = panel * sizeof(Sum), activation_bytes = Format::parts * tile_size;
    const int64_t steps = steps_of<Format>(call.inputs), row_tile_bytes = steps * activation_bytes;
    const int64_t chunk = std::min(steps, factor_bytes / step_bytes);
    const int64_t all = ceil_div(row_end - row, tile_rows);
    const int64_t most = std::max<int64_t>(2, pass_bytes / std::max<int64_t>(1, row_tile_bytes));
    const int64_t pass = ceil_div(all, ceil_div(all, most)) * tile_rows, row_floats = 2 * steps * Format::inputs;
    Workspace workspace(4 * row_floats + pass / tile_rows * row_tile_bytes + pass * (stride + 4) + factor_bytes + 512);
    float *buffer = workspace.take<float>(row_floats), *factor = workspace.take<float>(pass);
    uint8_t *activations = workspace.take<uint8_t>(pass / tile_rows * row_tile_bytes);
    uint8_t *factors = workspace.take<uint8_t>(factor_bytes), *sums = workspace.take<uint8_t>(pass * stride);
    const TileRegisters registers;
    for (; row < row_end; row += pass) {
        const int64_t count = std::min(pass, row_end - row), row_tiles = ceil_div(count, tile_rows);
        if (count % tile_rows) std::memset(activations + (row_tiles - 1) * row_tile_bytes, 0, row_tile_bytes);
        for (int64_t r = 0; r < count; ++r) {
            uint8_t *to = activations + r / tile_rows * row_tile_bytes + r % tile_rows * registers_width;
            factor[r] = Format::lay_out(call, row + r, steps, buffer, to);
        }
        for (int64_t first = begin; first < end; first += panel) {
            const int64_t last = std::min(first + panel, end);
            for (int64_t n = first; n < last; n += pair_columns) {
                const uint8_t *bits = call.tiles + few_bytes<Format>(call.outputs, call.inputs) +
                                      n / pair_columns * steps * 2 * Format::bit_bytes;
                for (int64_t j = 0; j < std::max<int64_t>(1, steps); j += std::max<int64_t>(1, chunk)) {
                    const int64_t some = std::min(chunk, steps - j);
                    // Of each step, 16 rows of the first tile and 16 of the second.
                    for (int64_t i = 0; i < some * 2 * tile_rows; ++i, bits += 2 * Format::lanes)
                        store(factors + i * registers_width, Format::row_of(bits));
                    for (int64_t t = 0; t < row_tiles; t += 2) {
                        const uint8_t *a = activations + t * row_tile_bytes + j * activation_bytes;
                        uint8_t *to = sums + t * tile_rows * stride + (n - first) * sizeof(Sum);
                        const auto product = t + 1 < row_tiles ? multiply<Format, 2> : multiply<Format, 1>;
                        product(a, row_tile_bytes, factors, some, to, stride, j == 0);
                    }
                }
            }
            for (int64_t r = 0; r < count; ++r)
                store_row(call, row + r, first, last, factor[r], reinterpret_cast<const Sum *>(sums + r * stride));
        }
    }
}

template <class Format>
void run_all(const LinearCall &call, int64_t row, int64_t row_end, int64_t begin, int64_t end) {
    if (row_end - row <= Format::most_few) return run<typename Format::Few>(call, row, row_end, begin, end);
    if constexpr (Format::parts > 1) {
        if (call.dtype == PROXBIT_BFLOAT16 && !call.norm_weight) return run_tiles<Floats<1>>(call, row, row_end, begin, end);
    }
    run_tiles<Format>(call, row, row_end, begin, end);
}

template <class Format>
constexpr proxbit::LinearKernel tiled = {tile_rows, 64, all_bytes<Format>, repack_all<Format>, run_all<Format>};

}  // namespace
