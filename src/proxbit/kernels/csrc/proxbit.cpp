// The C interface: picks the ISA, cuts a call into parts for the threads.
#include "proxbit.h"

#include <algorithm>

#include "isa.h"

namespace {

using proxbit::Isa;
using proxbit::LinearCall;
using proxbit::LinearKernel;

const Isa *const isas[] = {
#if defined(PROXBIT_X86)
#if defined(PROXBIT_AMX)
    &proxbit::amx_isa,
#endif
    &proxbit::avx512_isa,
    &proxbit::avx512vnni_isa,
    &proxbit::avx2_isa,
#endif
#if defined(PROXBIT_NEON)
    &proxbit::neon_isa,
#endif
    &proxbit::portable_isa,
};
constexpr int64_t isa_count = sizeof(isas) / sizeof(isas[0]);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of parts, each of them whole blocks of rows and of columns.
struct Grid {
    const LinearCall &call;
    const LinearKernel &kernel;
    int64_t row_parts;
    int64_t column_parts;

    void run(int64_t part) const {
        auto cut = [](int64_t size, int64_t block, int64_t parts, int64_t index) {
            return std::min(size, ceil_div(size, block) * index / parts * block);
        };
        const int64_t i = part / column_parts, j = part % column_parts;
        kernel.run(call, cut(call.rows, kernel.row_block, row_parts, i), cut(call.rows, kernel.row_block, row_parts, i + 1),
                   cut(call.outputs, kernel.column_block, column_parts, j),
                   cut(call.outputs, kernel.column_block, column_parts, j + 1));
    }
};

// Work below this many multiply-adds is not worth waking another thread.
constexpr double least_work[3] = {1 << 19, 1 << 20, 1 << 22};

Grid make_grid(const LinearCall &call) {
    const LinearKernel &kernel = isas[call.isa]->linear[call.format];
    Grid grid{call, kernel, 1, 1};
    const double work = static_cast<double>(call.rows) * call.inputs * call.outputs;  // may be beyond 64 bits
    if (!call.parallel_for || call.threads < 2 || work < least_work[call.format]) return grid;
    // Rows first: what is done once a row, its table or its quantisation, is then done by one thread only.
    const int64_t row_blocks = ceil_div(call.rows, kernel.row_block);
    const int64_t column_blocks = ceil_div(call.outputs, kernel.column_block);
    grid.row_parts = row_blocks >= 2 * call.threads ? call.threads : 1;
    grid.column_parts = grid.row_parts > 1 ? 1 : std::min(column_blocks, call.threads);
    return grid;
}

template <class Function>
void for_each(proxbit_parallel_for parallel_for, int64_t count, int64_t grain, const Function &function) {
    auto task = [](int64_t begin, int64_t end, void *context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const Function *>(context))(i);
    };
    void *context = const_cast<void *>(static_cast<const void *>(&function));
    if (parallel_for) {
        parallel_for(0, count, grain, task, context);
    } else {
        task(0, count, context);
    }
}

// Rows of so many numbers in all, which are worth waking another thread for.
int64_t grain(int64_t columns, int64_t numbers) { return std::max<int64_t>(1, numbers / (columns + 1)); }
constexpr int64_t least_signs = 1 << 16, least_floats = 1 << 15;

}  // namespace

extern "C" {

const int64_t *proxbit_interface(void) {
    static const int64_t numbers[] = {
        sizeof(proxbit_linear_call), sizeof(proxbit_latent_call), sizeof(proxbit_activations_call),
        PROXBIT_FORMATS,             PROXBIT_FUNCTIONS,              PROXBIT_KINDS,
        PROXBIT_PART_ROWS,           0,
    };
    return numbers;
}

const char *proxbit_isa_name(int64_t isa) {
    return isa >= 0 && isa < isa_count ? isas[isa]->name : nullptr;
}

int32_t proxbit_isa_runs(int64_t isa) { return isa >= 0 && isa < isa_count && isas[isa]->runs(); }

int64_t proxbit_tile_bytes(int64_t isa, int64_t format, int64_t outputs, int64_t inputs) {
    return isas[isa]->linear[format].tile_bytes(outputs, inputs);
}

void proxbit_repack(int64_t isa, int64_t format, const uint8_t *bits, int64_t outputs, int64_t inputs,
                   uint8_t *tiles) {
    isas[isa]->linear[format].repack(bits, outputs, inputs, tiles);
}

void proxbit_linear(const struct proxbit_linear_call *call) {
    if (call->rows == 0 || call->outputs == 0) return;
    const Grid grid = make_grid(*call);
    const int64_t parts = grid.row_parts * grid.column_parts;
    for_each(parts > 1 ? call->parallel_for : nullptr, parts, 1, [&grid](int64_t part) { grid.run(part); });
}

void proxbit_pack_signs(int64_t isa, int64_t dtype, const void *values, int64_t rows, int64_t columns,
                        int64_t stride, uint8_t *bits, proxbit_parallel_for parallel_for) {
    const int64_t width = ceil_div(columns, 8), size = dtype == PROXBIT_FLOAT32 ? 4 : 2;
    for_each(parallel_for, rows, grain(columns, least_signs), [=](int64_t row) {
        const void *from = static_cast<const uint8_t *>(values) + row * stride * size;
        isas[isa]->signs.pack(dtype, from, columns, bits + row * width);
    });
}

void proxbit_unpack_signs(int64_t isa, const uint8_t *bits, int64_t rows, int64_t columns, float *values,
                          proxbit_parallel_for parallel_for) {
    const int64_t width = ceil_div(columns, 8);
    for_each(parallel_for, rows, grain(columns, least_signs), [=](int64_t row) {
        isas[isa]->signs.unpack(bits + row * width, columns, values + row * columns);
    });
}

void proxbit_quantize(const struct proxbit_latent_call *call) {
    for_each(call->parallel_for, call->rows, grain(call->columns, least_floats),
             [call](int64_t row) { isas[call->isa]->elementwise.quantize(*call, row); });
}

void proxbit_gradient(const struct proxbit_latent_call *call) {
    for_each(call->parallel_for, call->rows, grain(call->columns, least_floats),
             [call](int64_t row) { isas[call->isa]->elementwise.gradient(*call, row); });
}

void proxbit_activations(const struct proxbit_activations_call *call) {
    for_each(call->parallel_for, ceil_div(call->rows, PROXBIT_PART_ROWS),
             grain(call->columns * PROXBIT_PART_ROWS, least_floats),
             [call](int64_t part) { isas[call->isa]->elementwise.activations(*call, part); });
}

}  // extern "C"
