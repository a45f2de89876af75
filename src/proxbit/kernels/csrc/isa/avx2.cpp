// AVX2, FMA and BMI2.
#include "linear/avx2.h"
#include "elementwise/activations.h"

namespace {

bool runs() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }

}  // namespace

const proxbit::Isa proxbit::avx2_isa = {
    "avx2",
    runs,
    {format<lanes::W1, tile_bytes<16, 4>, repack<8, 16, 4, 4, w1_chunk>, run_few_w1>,
     format<lanes::W1A8, tile_bytes<64, 4>, repack<32, 64, 1, 4, W1A8::chunk, transpose>, run_look_up<W1A8>>,
     format<lanes::W1A1, tile_bytes<64, 1>, repack<32, 64, 1, 1, W1A1::chunk, transpose>, run_look_up<W1A1>>},
    signs,
    elementwise,
};
