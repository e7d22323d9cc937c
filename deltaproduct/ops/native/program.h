// Decoding: a program of instructions, which all threads run from beginning to end.
//
// With few sequences a token of a whole model is a few hundred small pieces of work, whose sum takes as long as it
// takes to read the weights once, if nothing comes between them. So they are written down once (ops/engine_program.py)
// and run in one call for every token. Everything is float32.
#pragma once

#include <math.h>

#include "forward.h"
#include "norm.h"

namespace deltaproduct {
namespace DP_ARCH {

inline float silu(float x) { return x / (1 + expf(-x)); }
inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
inline float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }
inline float activation(int32_t kind, float x) { return kind == SILU ? silu(x) : kind == RELU && x < 0 ? 0 : x; }

// R consecutive rows of w times x
template <int R>
DP_INLINE void dot_rows(int64_t columns, const float* w, const float* x, float* sums) {
    constexpr int W = width<float>, EACH = R >= 4 ? 1 : 4;
    Vec<float> sum[R][EACH]{};
    int64_t j = 0;
    for (; j + W * EACH <= columns; j += W * EACH)
#pragma GCC unroll 4
        for (int e = 0; e < EACH; ++e) {
            const Vec<float> part = load(x + j + e * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r][e] += load(w + r * columns + j + e * W) * part;
        }
    for (int r = 0; r < R; ++r) {
        for (int e = 1; e < EACH; ++e) sum[r][0] += sum[r][e];
        sums[r] = sum_of<float>(sum[r][0]);
        for (int64_t i = j; i < columns; ++i) sums[r] += w[r * columns + i] * x[i];
    }
}

// Rows [from, to) of y = W x (+ bias) (+ y), for every sequence
inline void run_product(const Instruction& i, int64_t from, int64_t to) {
    constexpr int R = 4;
    for (int64_t row = from; row < to;) {
        const int64_t rows = to - row >= R ? R : 1;
        const float* w = i.w + row * i.columns;
        for (int64_t b = 0; b < i.batch; ++b) {
            float sums[R];
            if (rows == R)
                dot_rows<R>(i.columns, w, i.x + b * i.columns, sums);
            else
                dot_rows<1>(i.columns, w, i.x + b * i.columns, sums);
            float* y = i.y + b * i.rows + row;
            for (int64_t r = 0; r < rows; ++r)
                y[r] = sums[r] + (i.u ? i.u[row + r] : 0) + (i.kind == PRODUCT_ADDED ? y[r] : 0);
        }
        row += rows;
    }
}

// Channels [from, to) of a causal convolution of so many columns, and its history z [batch, columns − 1, rows] moved
// on; only the activation where there are no weights
inline void run_convolution(const Instruction& i, int64_t from, int64_t to) {
    const int64_t past = i.w ? i.columns - 1 : 0;
    for (int64_t b = 0; b < i.batch; ++b) {
        const float* x = i.x + b * i.rows;
        float *y = i.y + b * i.rows, *history = i.z + b * past * i.rows;
        for (int64_t c = from; c < to; ++c) {
            float sum = i.w ? i.w[c * i.columns + past] * x[c] : x[c];
            for (int64_t j = 0; j < past; ++j) sum += i.w[c * i.columns + j] * history[j * i.rows + c];
            y[c] = activation(i.activation, sum);
        }
        for (int64_t j = 0; j < past; ++j)
            for (int64_t c = from; c < to; ++c)
                history[j * i.rows + c] = j + 1 < past ? history[(j + 1) * i.rows + c] : x[c];
    }
}

inline Units units_of(const Instruction& i) {
    switch (i.kind) {
        case PRODUCT:
        case PRODUCT_ADDED: {
            const int64_t rows = (int64_t(1) << 15) / (i.columns > 1 ? i.columns : 1) / 4 * 4;  // 128 KiB of weights
            return {i.rows, rows < 4 ? 4 : rows};
        }
        case NORM: {
            const int64_t rows = (int64_t(1) << 14) / (i.columns > 1 ? i.columns : 1);
            return {i.rows, rows < 1 ? 1 : rows};
        }
        case NORM_BACKWARD: return {(i.rows + NORM_BLOCK - 1) / NORM_BLOCK, 1};
        case TOKEN: return {i.call->sequences * i.call->value_heads, 1};
        default: return {i.rows, 1024};
    }
}

inline void run_units(const Instruction& i, int64_t from, int64_t to) {
    switch (i.kind) {
        case PRODUCT:
        case PRODUCT_ADDED: return run_product(i, from, to);
        case NORM: return run_norm(i, from, to);
        case NORM_BACKWARD: return run_norm_backward(i, from, to);
        case CONVOLUTION: return run_convolution(i, from, to);
        case SILU_TIMES:
            for (int64_t n = from; n < to; ++n) i.y[n] = silu(i.x[n]) * i.u[n];
            return;
        case SIGMOID:
            for (int64_t n = from; n < to; ++n) i.y[n] = i.a * sigmoid(i.x[n]);
            return;
        case GATE:
            for (int64_t n = from; n < to; ++n) {
                const int64_t head = n % i.columns;
                i.y[n] = -expf(i.w[head]) * softplus(i.x[n] + i.u[head]);
            }
            return;
        case TOKEN:
            for (int64_t n = from; n < to; ++n) forward<float>(*i.call, n, nullptr);
            return;
    }
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
