// What an instruction level has to offer. One source file a level, compiled with its own flags.
#pragma once

#include "proxbit.h"

namespace proxbit {

using Call = proxbit_linear_call;
using QuantizerCall = proxbit_quantizer_call;
using ActivationsCall = proxbit_activations_call;

// One format at one level. `run` computes the rows and columns of y that it is given; both begin at a multiple of their
// block and end at one, or at the end. It may be called from several threads at once.
struct Format {
    int64_t row_block;
    int64_t column_block;
    int64_t (*tile_bytes)(int64_t outputs, int64_t inputs);
    void (*relay)(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles);
    void (*run)(const Call &call, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end);
};

struct Level {
    const char *name;
    bool (*runs)();
    Format formats[3];  // by proxbit_format
    void (*pack_signs)(int64_t dtype, const void *values, int64_t columns, uint8_t *bits);  // one row
    void (*unpack_signs)(const uint8_t *bits, int64_t columns, float *values);              // one row
    void (*quantize)(const QuantizerCall &call, int64_t row);
    void (*gradient)(const QuantizerCall &call, int64_t row);
    void (*activations)(const ActivationsCall &call, int64_t part);
};

extern const Level amx_level;
extern const Level avx512_level;
extern const Level avx512vnni_level;
extern const Level avx2_level;
extern const Level neon_level;
extern const Level portable_level;

}  // namespace proxbit
