// Plain C++, for any processor.
#include "linear/portable.h"
#include "elementwise/activations.h"

namespace {

bool runs() { return true; }

}  // namespace

const proxbit::Isa proxbit::portable_isa = {
    "portable",
    runs,
    {{1, 32, no_tiles, no_repack, run_w1},
     {1, 32, no_tiles, no_repack, run_w1a8},
     {1, 32, no_tiles, no_repack, run_w1a1}},
    signs,
    elementwise,
};
