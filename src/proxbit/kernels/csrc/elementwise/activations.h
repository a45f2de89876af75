// Rows of activations on quantization levels, and their gradient: plain loops that the compiler vectorises for each ISA.
#pragma once

#include "elementwise/latents.h"
#include "linear/row.h"

namespace {

// y = step q: what W1A8 multiplies, as floats.
inline void round_row(const float *x, int64_t count, float *y) {
    proxbit::LinearCall call{};
    call.inputs = count;
    Workspace workspace(count + 64);
    int8_t *q = workspace.take<int8_t>(count);
    const float step = quantize_row(call, x, count, q);
    for (int64_t k = 0; k < count; ++k) y[k] = static_cast<float>(q[k]) * step;
}

struct Levels {
    float code[columns_at_once];   // the level, in units of the scale
    float slope[columns_at_once];  // B
    float place[columns_at_once];  // x in units of the scale, where the code moves with it
    float units[columns_at_once];  // the argument of F and B
};

inline void on_grid(const proxbit::ActivationsCall &call, const float *__restrict x, int64_t count, Levels &to) {
    const float step = *call.scale;
    const float lowest = static_cast<float>(call.lowest), highest = static_cast<float>(call.highest);
    for (int64_t k = 0; k < count; ++k) {
        const float units = x[k] / step;
        // In this order NaN stays.
        const float clipped = units < lowest ? lowest : (units > highest ? highest : units);
        to.code[k] = __builtin_rintf(clipped);
        to.slope[k] = units == clipped ? 1.0f : 0.0f;
        to.place[k] = units;
    }
}

// Of two levels: where F and B see an input, and from where on the upper level is taken.
struct Boundary {
    float gain;
    float *shift;     // [columns]
    float *boundary;  // [columns]
};

inline Boundary boundary_of(const proxbit::ActivationsCall &call, Workspace &workspace) {
    const bool one_sided = call.kind == PROXBIT_ZERO_OR_ONE;
    const float unit = one_sided ? *call.scale / 2.0f : *call.scale;
    const float below = one_sided ? 1.0f : 0.0f, above = one_sided ? unit : 0.0f;
    const Boundary result = {1.0f / unit, workspace.take<float>(call.columns), workspace.take<float>(call.columns)};
    for (int64_t k = 0; k < call.columns; ++k) {
        result.shift[k] = -call.threshold[k] / unit - below;
        result.boundary[k] = call.threshold[k] + above;
    }
    return result;
}

inline void on_two_levels(const proxbit::ActivationsCall &call, const Boundary &of, const float *__restrict x,
                          int64_t first, int64_t count, Levels &to) {
    const float *__restrict shift = of.shift + first;
    const float *__restrict boundary = of.boundary + first;
    const float mu = static_cast<float>(*call.mu);
    const bool is_hard = call.forward < 0;
    if (!is_hard || call.grad) {
        for (int64_t k = 0; k < count; ++k) to.units[k] = x[k] * of.gain + shift[k];
    }
    if (is_hard) {
        for (int64_t k = 0; k < count; ++k) to.code[k] = x[k] >= boundary[k] ? 1.0f : -1.0f;
    } else {
        apply_of(call.forward)(to.units, count, 1.0f, mu, to.code);
    }
    if (call.grad) apply_of(call.backward)(to.units, count, 1.0f, mu, to.slope);
    if (call.kind != PROXBIT_ZERO_OR_ONE) return;
    for (int64_t k = 0; k < count; ++k) to.code[k] = (to.code[k] + 1.0f) * 0.5f;
    if (!call.grad) return;
    for (int64_t k = 0; k < count; ++k) to.place[k] = (to.units[k] + 1.0f) * 0.5f;
}

// dL/dx in place of dL/dvalue, added to its column; returns dL/dscale.
inline float levels_gradient(const Levels &of, bool moves, int64_t count, float *__restrict grad,
                             float *__restrict columns) {
    float terms[columns_at_once];
    if (moves) {
        for (int64_t k = 0; k < count; ++k) terms[k] = grad[k] * (of.code[k] - of.slope[k] * of.place[k]);
    } else {
        for (int64_t k = 0; k < count; ++k) terms[k] = grad[k] * of.code[k];
    }
    for (int64_t k = 0; k < count; ++k) {
        grad[k] *= of.slope[k];
        columns[k] += grad[k];
    }
    return sum_of(count, [&terms](int64_t k) { return terms[k]; });
}

// PROXBIT_PART_ROWS rows, or the rest.
void activations_part(const proxbit::ActivationsCall &call, int64_t part) {
    const int64_t columns = call.columns, begin = part * PROXBIT_PART_ROWS;
    const int64_t end = std::min<int64_t>(call.rows, begin + PROXBIT_PART_ROWS);
    if (call.kind == PROXBIT_INT8) {
        for (int64_t row = begin; row < end; ++row) round_row(call.x + row * columns, columns, call.values + row * columns);
        return;
    }
    Workspace workspace(2 * columns * static_cast<int64_t>(sizeof(float)) + 128);
    const Boundary boundary = call.threshold ? boundary_of(call, workspace) : Boundary{};
    const float scale = *call.scale;
    float *const sums = call.grad ? call.sums + part * (columns + 1) : nullptr;
    if (sums) std::fill(sums, sums + columns + 1, 0.0f);
    double of_scale = 0.0;
    Levels levels;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t first = 0; first < columns; first += columns_at_once) {
            const int64_t count = std::min(columns_at_once, columns - first), place = row * columns + first;
            if (call.kind == PROXBIT_GRID) {
                on_grid(call, call.x + place, count, levels);
            } else {
                on_two_levels(call, boundary, call.x + place, first, count, levels);
            }
            float *__restrict values = call.values + place;
            for (int64_t k = 0; k < count; ++k) values[k] = levels.code[k] * scale;
            if (!sums) continue;
            of_scale += levels_gradient(levels, call.kind != PROXBIT_SIGNS, count, call.grad + place, sums + first);
        }
    }
    if (sums) sums[columns] = static_cast<float>(of_scale);
}

constexpr proxbit::Elementwise elementwise = {quantize_latent, latent_gradient, activations_part};

}  // namespace
