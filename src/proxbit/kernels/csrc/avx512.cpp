// AVX-512 with VBMI and VPOPCNTDQ.
#include "avx512_vbmi.h"
#include "activations.h"

const proxbit::Level proxbit::avx512_level = {
    "avx512",
    runs_vbmi,
    {kernels<W1>, kernels<W1A8>, kernels<W1A1>},
    pack_signs,
    unpack_signs,
    quantize_latent,
    latent_gradient,
    activations_part,
};
