// RMSNorm, forward and backward: one pass over memory each. Everything is float32.
#pragma once

#include <math.h>

#include "simd.h"

namespace deltaproduct {
namespace DP_ARCH {

constexpr int64_t NORM_BLOCK = 256;  // rows whose part of the weight's gradient is summed by itself

// f(j, lanes) for the whole vectors of a row and then for what is left, number by number
template <class F>
DP_INLINE void along_row(int64_t columns, F f) {
    int64_t j = 0;
    for (; j + width<float> <= columns; j += width<float>) f(j, Count<width<float>>{});
    for (; j < columns; ++j) f(j, Count<1>{});
}

// a number or a vector of them
template <int LANES>
DP_INLINE auto take(const float* p) {
    if constexpr (LANES == 1)
        return *p;
    else
        return load(p);
}
template <class V>
DP_INLINE void put(float* p, V x) {
    if constexpr (sizeof(V) == sizeof(float))
        *p = x;
    else
        store(p, x);
}

// Σ f(j) along a row, f as above
template <class F>
DP_INLINE float sum_along_row(int64_t columns, F f) {
    Vec<float> sum{};
    float rest = 0;
    along_row(columns, [&](int64_t j, auto lanes) {
        if constexpr (lanes == 1)
            rest += f(j, lanes);
        else
            sum += f(j, lanes);
    });
    return sum_of<float>(sum) + rest;
}

inline float norm_factor(const Instruction& i, const float* x) {
    const float squares = sum_along_row(i.columns, [&](int64_t j, auto lanes) {
        const auto part = take<lanes>(x + j);
        return part * part;
    });
    return 1 / sqrtf(squares / float(i.columns) + float(i.a));
}

// Rows [from, to) of y = x / √(mean x² + a) · w, each of so many columns
inline void run_norm(const Instruction& i, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
        const float* x = i.x + row * i.columns;
        float* y = i.y + row * i.columns;
        const float factor = norm_factor(i, x);
        along_row(
            i.columns, [&](int64_t j, auto lanes) { put(y + j, take<lanes>(x + j) * factor * take<lanes>(i.w + j)); });
    }
}

// With d the gradient of the rows' result: blocks [from, to) of rows of the gradient y of x, and each block's part of
// the weight's, z [blocks, columns]
inline void run_norm_backward(const Instruction& i, int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
        float* d_w = i.z + block * i.columns;
        along_row(i.columns, [&](int64_t j, auto lanes) { put(d_w + j, take<lanes>(i.w + j) * 0); });
        const int64_t last = (block + 1) * NORM_BLOCK;
        for (int64_t row = block * NORM_BLOCK; row < (last < i.rows ? last : i.rows); ++row) {
            const float *x = i.x + row * i.columns, *d = i.u + row * i.columns;
            float* d_x = i.y + row * i.columns;
            const float factor = norm_factor(i, x);
            const float along = sum_along_row(i.columns, [&](int64_t j, auto lanes) {
                return take<lanes>(d + j) * take<lanes>(i.w + j) * (take<lanes>(x + j) * factor);
            });
            const float mean = along / float(i.columns);
            along_row(i.columns, [&](int64_t j, auto lanes) {
                const auto normal = take<lanes>(x + j) * factor, d_y = take<lanes>(d + j);
                put(d_x + j, (d_y * take<lanes>(i.w + j) - normal * mean) * factor);
                put(d_w + j, take<lanes>(d_w + j) + d_y * normal);
            });
        }
    }
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
