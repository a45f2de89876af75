// Signs to bits and back, in plain C++.
#pragma once

#include "basics.h"

namespace {

inline void pack_signs_row(const float *x, int64_t count, uint8_t *bits) {
    for (int64_t j = 0; j < count / 8; ++j) {
        uint32_t byte = 0;
        for (int b = 0; b < 8; ++b) byte |= static_cast<uint32_t>(x[8 * j + b] >= 0.0f) << b;
        bits[j] = static_cast<uint8_t>(byte);
    }
    if (count % 8) {
        uint32_t byte = 0;
        for (int b = 0; b < count % 8; ++b) byte |= static_cast<uint32_t>(x[count / 8 * 8 + b] >= 0.0f) << b;
        bits[count / 8] = static_cast<uint8_t>(byte);
    }
}

void pack_signs(int64_t dtype, const void *values, int64_t columns, uint8_t *bits) {
    if (dtype == PROXBIT_FLOAT32) {
        pack_signs_row(static_cast<const float *>(values), columns, bits);
        return;
    }
    const uint16_t *x = static_cast<const uint16_t *>(values);
    float part[512];
    for (int64_t begin = 0; begin < columns; begin += 512) {
        const int64_t count = std::min<int64_t>(512, columns - begin);
        for (int64_t k = 0; k < count; ++k) part[k] = from_bfloat16(x[begin + k]);
        pack_signs_row(part, count, bits + begin / 8);
    }
}

void unpack_signs(const uint8_t *bits, int64_t columns, float *values) {
    for (int64_t i = 0; i < columns; ++i) values[i] = (bits[i / 8] >> (i % 8)) & 1 ? 1.0f : -1.0f;
}

constexpr proxbit::Signs signs = {pack_signs, unpack_signs};

}  // namespace
