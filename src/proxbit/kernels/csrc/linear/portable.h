// Plain C++, for any processor: sums of 8 activations, for every byte of weights, in a table.
#pragma once

#include "linear/row.h"
#include "signs/portable.h"

namespace {

using proxbit::LinearCall;

// table[e] = sum of +a[b] for the bits of e that are set, -a[b] for the others
template <class Value, class Entry>
void fill_table(const Value *a, Entry *table) {
    table[0] = 0;
    for (int b = 0; b < 8; ++b) {
        for (int e = 0; e < 1 << b; ++e) {
            table[(1 << b) + e] = static_cast<Entry>(table[e] + a[b]);
            table[e] = static_cast<Entry>(table[e] - a[b]);
        }
    }
}

// sums[n] = sum_k s[n, k] a[k]; a is padded with zeros to a whole number of bytes.
template <class Value, class Entry, class Sum>
void sum_by_table(const LinearCall &call, const Value *a, int64_t begin, int64_t end, Sum *sums) {
    constexpr int64_t bytes_at_once = 16;  // their tables stay in the first cache
    Entry tables[bytes_at_once][256];
    const int64_t width = ceil_div(call.inputs, 8);
    std::fill(sums, sums + (end - begin), Sum(0));
    for (int64_t first = 0; first < width; first += bytes_at_once) {
        const int64_t count = std::min(bytes_at_once, width - first);
        for (int64_t j = 0; j < count; ++j) fill_table(a + 8 * (first + j), tables[j]);
        for (int64_t n = begin; n < end; ++n) {
            const uint8_t *bits = call.tiles + n * width + first;
            Sum sum = 0;
            for (int64_t j = 0; j < count; ++j) sum += tables[j][bits[j]];
            sums[n - begin] += sum;
        }
    }
}

void run_w1(const LinearCall &call, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    const int64_t width = round_up(call.inputs, 8);
    Workspace workspace(4 * width + 4 * (end - begin) + 128);
    float *buffer = workspace.take<float>(width);
    float *sums = workspace.take<float>(end - begin);
    for (int64_t row = row_begin; row < row_end; ++row) {
        sum_by_table<float, float>(call, load_row(call, row, width, buffer), begin, end, sums);
        store_row(call, row, begin, end, 1.0f, sums);
    }
}

void run_w1a8(const LinearCall &call, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    const int64_t width = round_up(call.inputs, 8);
    Workspace workspace(5 * width + 4 * (end - begin) + 192);
    float *buffer = workspace.take<float>(width);
    int8_t *q = workspace.take<int8_t>(width);
    int32_t *sums = workspace.take<int32_t>(end - begin);
    for (int64_t row = row_begin; row < row_end; ++row) {
        const float step = quantize_row(call, load_row(call, row, width, buffer), width, q);
        sum_by_table<int8_t, int16_t>(call, q, begin, end, sums);
        store_row(call, row, begin, end, step, sums);
    }
}

int64_t count_differences(const uint8_t *a, const uint8_t *b, int64_t bytes) {
    int64_t count = 0, j = 0;
    for (; j + 8 <= bytes; j += 8) {
        uint64_t left, right;
        std::memcpy(&left, a + j, 8);
        std::memcpy(&right, b + j, 8);
        count += __builtin_popcountll(left ^ right);
    }
    for (; j < bytes; ++j) count += __builtin_popcount(a[j] ^ b[j]);
    return count;
}

void run_w1a1(const LinearCall &call, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    const int64_t width = ceil_div(call.inputs, 8);
    Workspace workspace(4 * call.inputs + width + 4 * (end - begin) + 192);
    float *buffer = workspace.take<float>(call.inputs);
    uint8_t *signs = workspace.take<uint8_t>(width);
    int32_t *sums = workspace.take<int32_t>(end - begin);
    for (int64_t row = row_begin; row < row_end; ++row) {
        pack_signs_row(load_centred_row(call, row, buffer), call.inputs, signs);
        for (int64_t n = begin; n < end; ++n) {
            sums[n - begin] = static_cast<int32_t>(call.inputs - 2 * count_differences(signs, call.tiles + n * width, width));
        }
        store_row(call, row, begin, end, 1.0f, sums);
    }
}

}  // namespace
