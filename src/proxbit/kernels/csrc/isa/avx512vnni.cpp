// AVX-512 with VNNI and without VPOPCNTDQ.
#include "linear/avx512vnni.h"
#include "elementwise/activations.h"
#include "isa/avx512_runs.h"

namespace {

bool runs() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }

}  // namespace

const proxbit::Isa proxbit::avx512vnni_isa = {
    "avx512vnni",
    runs,
    {kernels<W1>, {W1A8::rows, W1A8::column_block, w1a8_bytes, repack_w1a8, run_w1a8}, kernels<W1A1>},
    signs,
    elementwise,
};
