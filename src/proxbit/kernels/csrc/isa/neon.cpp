// NEON of plain armv8-a.
#include "linear/neon.h"
#include "elementwise/activations.h"

namespace {

bool runs() { return true; }

}  // namespace

const proxbit::Isa proxbit::neon_isa = {
    "neon",
    runs,
    {{most_rows, tile_columns, no_tiles, no_repack, run_w1},
     {most_rows, tile_columns, tile_bytes<32, 4>, repack<32, 32, 1, 4, W1A8::chunk>, run_look_up<W1A8>},
     {most_rows, tile_columns, tile_bytes<32, 4>, repack_w1a1, run_look_up<W1A1>}},
    signs,
    elementwise,
};
