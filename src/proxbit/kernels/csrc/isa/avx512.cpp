// AVX-512 with VBMI and VPOPCNTDQ.
#include "linear/avx512_vbmi.h"
#include "elementwise/activations.h"
#include "isa/avx512_runs.h"

const proxbit::Isa proxbit::avx512_isa = {
    "avx512",
    runs_vbmi,
    {kernels<W1>, kernels<W1A8>, kernels<W1A1>},
    signs,
    elementwise,
};
