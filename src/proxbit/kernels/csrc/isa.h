// What an ISA (instruction set) has to offer. One source file an ISA, compiled with its own flags.
#pragma once

#include "proxbit.h"

namespace proxbit {

using LinearCall = proxbit_linear_call;
using LatentCall = proxbit_latent_call;
using ActivationsCall = proxbit_activations_call;

// A linear layer on one format of activations. `run` computes the rows and columns of y that it is given; both begin at
// a multiple of their block and end at one, or at the end. It may be called from several threads at once.
struct LinearKernel {
    int64_t row_block;
    int64_t column_block;
    int64_t (*tile_bytes)(int64_t outputs, int64_t inputs);
    void (*repack)(const uint8_t *bits, int64_t outputs, int64_t inputs, uint8_t *tiles);
    void (*run)(const LinearCall &call, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end);
};

// One row of signs to bits and back.
struct Signs {
    void (*pack)(int64_t dtype, const void *values, int64_t columns, uint8_t *bits);
    void (*unpack)(const uint8_t *bits, int64_t columns, float *values);
};

// One row of latent weights, and PROXBIT_PART_ROWS rows of activations.
struct Elementwise {
    void (*quantize)(const LatentCall &call, int64_t row);
    void (*gradient)(const LatentCall &call, int64_t row);
    void (*activations)(const ActivationsCall &call, int64_t part);
};

struct Isa {
    const char *name;
    bool (*runs)();
    LinearKernel linear[3];  // by proxbit_format
    Signs signs;
    Elementwise elementwise;
};

extern const Isa amx_isa;
extern const Isa avx512_isa;
extern const Isa avx512vnni_isa;
extern const Isa avx2_isa;
extern const Isa neon_isa;
extern const Isa portable_isa;

}  // namespace proxbit
