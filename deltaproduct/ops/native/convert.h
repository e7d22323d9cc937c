// Rows of tensors in and out of the type that is computed in.
#pragma once

#include "interface.h"
#include "simd.h"

namespace deltaproduct {
namespace DP_ARCH {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

DP_INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
DP_INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

DP_INLINE float widen(float x) { return x; }
DP_INLINE double widen(double x) { return x; }
DP_INLINE float widen(Bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
DP_INLINE float widen(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    const uint32_t finite =
        bits_of(float_of(rest) * 0x1p112f);  // moves the exponent's bias; exact, subnormals included
    return float_of(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : finite));
}

// To the nearest, ties to even, as PyTorch does.
DP_INLINE void narrow(float& to, double x) { to = float(x); }
DP_INLINE void narrow(float& to, float x) { to = x; }
DP_INLINE void narrow(double& to, double x) { to = x; }
DP_INLINE void narrow(double& to, float x) { to = x; }
DP_INLINE void narrow(Bfloat16& to, float x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    to.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
DP_INLINE void narrow(Float16& to, float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, size = u & 0x7fffffff;
    uint32_t h;
    if (size > 0x7f800000)
        h = 0x7e00;
    else if (size >= 0x47800000)  // 2^16 and above
        h = 0x7c00;
    else if (size < 0x38800000)  // subnormal: adding ½ rounds at the last place that is kept
        h = bits_of(float_of(size) + 0.5f) - 0x3f000000;
    else
        h = (size + 0xc8000fff + ((size >> 13) & 1)) >> 13;
    to.bits = uint16_t(sign | h);
}
DP_INLINE void narrow(Bfloat16& to, double x) { narrow(to, float(x)); }
DP_INLINE void narrow(Float16& to, double x) { narrow(to, float(x)); }

template <class S, class T>
void read_rows_of(const S* from, const Tensor& x, int tokens, int steps, int columns, T* to, int64_t ld, T factor) {
    constexpr int W = width<T>;
    if (ld == 1) {  // one number a row
        for (int t = 0; t < tokens; ++t)
            for (int j = 0; j < steps; ++j) *to++ = T(widen(from[t * x.token + j * x.step])) * factor;
        return;
    }
    with_count(columns / W, [&](auto vectors) {
        for (int t = 0; t < tokens; ++t) {
            const S* row = from + t * x.token;
            for (int j = 0; j < steps; ++j, row += x.step, to += ld) {
                for (int n = 0; n < vectors; ++n) {
                    if constexpr (sizeof(S) == sizeof(T))
                        store(to + n * W, load(reinterpret_cast<const T*>(row + n * W)) * factor);
                    else
                        for (int lane = 0; lane < W; ++lane) to[n * W + lane] = T(widen(row[n * W + lane])) * factor;
                }
                if (vectors * W < columns) {
                    store(to + vectors * W, Vec<T>{});
                    for (int i = vectors * W; i < columns; ++i) to[i] = T(widen(row[i])) * factor;
                }
            }
        }
    });
}

template <class S, class T>
void write_rows_of(S* to, const Tensor& x, int tokens, int steps, int columns, const T* from, int64_t ld, T factor) {
    constexpr int W = width<T>;
    with_count(columns / W, [&](auto vectors) {
        for (int t = 0; t < tokens; ++t) {
            S* row = to + t * x.token;
            for (int j = 0; j < steps; ++j, row += x.step, from += ld) {
                for (int n = 0; n < vectors; ++n) {
                    if constexpr (sizeof(S) == sizeof(T))
                        store(reinterpret_cast<T*>(row + n * W), load(from + n * W) * factor);
                    else
                        for (int lane = 0; lane < W; ++lane) narrow(row[n * W + lane], from[n * W + lane] * factor);
                }
                for (int i = vectors * W; i < columns; ++i) narrow(row[i], from[i] * factor);
            }
        }
    });
}

// Plan to fetch such rows.
inline void add_rows(
    Ahead& ahead, bool write, const Tensor& x, int64_t batch, int64_t token, int64_t head, int64_t column, int tokens,
    int steps, int columns) {
    const int64_t size = x.dtype == FLOAT64 ? 8 : x.dtype == FLOAT32 ? 4 : 2;
    const int64_t first = (batch * x.batch + token * x.token + head * x.head + column) * size;
    ahead.add(
        static_cast<const char*>(x.data) + first, tokens, x.token * size, steps, x.step * size, columns * size, write);
}

// Calls f with a value of the tensor's element type.
template <class F>
DP_INLINE void with_dtype(int32_t dtype, F f) {
    switch (dtype) {
        case FLOAT64: return f(double{});
        case BFLOAT16: return f(Bfloat16{});
        case FLOAT16: return f(Float16{});
        default: return f(float{});
    }
}

// [tokens·steps, columns] of a tensor, times `factor`, from its `token` on. Where rows are padded to whole vectors
// (ld > 1), what lies beyond `columns` in the last of them becomes zero.
template <class T>
void read_rows(
    const Tensor& x, int64_t batch, int64_t token, int64_t head, int64_t column, int tokens, int steps, int columns,
    T* to, int64_t ld, T factor = 1) {
    const int64_t offset = batch * x.batch + token * x.token + head * x.head + column;
    with_dtype(x.dtype, [&](auto element) {
        read_rows_of(static_cast<const decltype(element)*>(x.data) + offset, x, tokens, steps, columns, to, ld, factor);
    });
}

// The inverse of `read_rows`.
template <class T>
void write_rows(
    const Tensor& x, int64_t batch, int64_t token, int64_t head, int64_t column, int tokens, int steps, int columns,
    const T* from, int64_t ld, T factor = 1) {
    const int64_t offset = batch * x.batch + token * x.token + head * x.head + column;
    with_dtype(x.dtype, [&](auto element) {
        write_rows_of(static_cast<decltype(element)*>(x.data) + offset, x, tokens, steps, columns, from, ld, factor);
    });
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
