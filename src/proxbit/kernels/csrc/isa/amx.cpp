// AMX, and all that `avx512` has.
#include "linear/amx.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "elementwise/activations.h"
#include "isa/avx512_runs.h"

namespace {

bool runs() {
    constexpr unsigned tiles = 1u << 24, bytes = 1u << 25, bfloats = 1u << 22, needed = tiles | bytes | bfloats;
    unsigned a, b, c, d;
    if (!runs_vbmi() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return false;
    // The system gives the registers of tiles to a process that asks: ARCH_REQ_XCOMP_PERM, XTILEDATA.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace

const proxbit::Isa proxbit::amx_isa = {
    "amx",
    runs,
    {tiled<Floats<3>>, tiled<Bytes>, kernels<W1A1>},
    signs,
    elementwise,
};
