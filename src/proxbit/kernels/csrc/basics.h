// What the kernels of every operation use: sizes, bfloat16, memory of a call, sums and polynomials in a fixed order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"

// Every ISA is compiled with other flags: what they share must not be merged by the linker.
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Memory of a thread for the length of a call, kept for the next one. Each size is in bytes.
class Workspace {
   public:
    explicit Workspace(int64_t bytes) {
        if (static_cast<int64_t>(memory().size()) < bytes + 64) memory().resize(bytes + 64);
        const auto address = reinterpret_cast<uintptr_t>(memory().data());
        next_ = memory().data() + (64 - address % 64) % 64;
    }
    template <class T>
    T *take(int64_t count) {
        T *result = reinterpret_cast<T *>(next_);
        next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return result;
    }

   private:
    static std::vector<uint8_t> &memory() {
        static thread_local std::vector<uint8_t> bytes;
        return bytes;
    }
    uint8_t *next_;
};

// Sum of f(k), in 16 parts, so that every ISA adds in the same order.
template <class Function>
inline float sum_of(int64_t count, const Function &f) {
    constexpr int64_t parts = 16;
    float sums[parts] = {};
    int64_t k = 0;
    for (; k + parts <= count; k += parts)
        for (int64_t i = 0; i < parts; ++i) sums[i] += f(k + i);
    for (int64_t i = 0; k + i < count; ++i) sums[i] += f(k + i);
    float total = 0.0f;
    for (int64_t i = 0; i < parts; ++i) total += sums[i];
    return total;
}

// a b + c, rounded once where the processor does that at no cost
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// The coefficients from the constant up.
template <class... Rest>
inline float polynomial(float x, float first, Rest... rest) {
    if constexpr (sizeof...(Rest) == 0) {
        return first;
    } else {
        return multiply_add(polynomial(x, rest...), x, first);
    }
}

}  // namespace
