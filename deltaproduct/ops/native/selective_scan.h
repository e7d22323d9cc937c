// Mamba's selective scan, forward and backward: nothing of size tokens × I × N is written to memory. All is float32.
//
// Lanes of a vector are channels. Transition and state of a channel do not touch those of another, so a work item is a
// sequence and a block of channels; only the gradients of B and C are sums over channels, and what each block finds
// is added up by the caller. Blocks and chunks do not depend on the threads, and so no bit of any result does.
#pragma once

#include "interface.h"
#include "simd.h"

namespace deltaproduct {
namespace DP_ARCH {

// A state that nothing is written to decays into numbers below 1e-38, with which x86 computes many times more slowly.
// They are 0 as long as this object lives.
struct TinyIsZero {
#ifdef __SSE__
    const unsigned before = __builtin_ia32_stmxcsr();
    DP_INLINE TinyIsZero() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    DP_INLINE ~TinyIsZero() { __builtin_ia32_ldmxcsr(before); }
#else
    DP_INLINE TinyIsZero() {}
#endif
};

// The decay a = exp(z), or 2 exp(z) − 1 where SIGNED, not rounded to one number: near 1 and −1 that would take away a
// good part of 1 − |a|, which says how long a state lasts.
template <bool SIGNED>
struct Decay {
    Vec<float> whole, rest;  // their sum is da/dz = exp(z), or 2 exp(z); `whole` is a power of 2, or both are 0

    DP_INLINE static Decay of(Vec<float> z) {
        typedef typename LaneNumbers<float>::type Bits;
        constexpr float LOWEST = -80, HIGHEST = 80;
        const auto low = z < LOWEST;
        z = low ? Vec<float>{} + LOWEST : z;
        z = z > HIGHEST ? Vec<float>{} + HIGHEST : z;
        // z = k ln 2 + r with k whole, |r| ≤ ln 2 / 2; a sum with 1.5·2²³ has k in its last bits
        const Vec<float> shifted = z * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
        const Vec<float> r = (z - k * 0.693359375f) + k * 2.12194440e-4f;
        // exp(r) − 1 = r + r² p(r), p through the Chebyshev nodes of that range: within 1e-8
        Vec<float> p = r * P4 + P3;
        p = p * r + P2;
        p = p * r + P1;
        p = p * r + P0;
        p = (r * r) * p + r;
        Bits bits;
        memcpy(&bits, &shifted, sizeof bits);
        bits = (bits << 23) + (SIGNED ? 128 << 23 : 127 << 23);
        Vec<float> whole;
        memcpy(&whole, &bits, sizeof whole);
        whole = low ? Vec<float>{} : whole;
        return {whole, whole * p};
    }

    // a x + y
    DP_INLINE Vec<float> times(Vec<float> x, Vec<float> y) const {
        if constexpr (SIGNED)
            return (whole - 1) * x + (rest * x + y);
        else
            return whole * x + (rest * x + y);
    }

private:
    static constexpr float P0 = 0.5f, P1 = 0.16666578f, P2 = 0.041666556f, P3 = 8.3631733e-3f, P4 = 1.3926176e-3f;
};

// One work item: a sequence and the channels [first, last)
struct ScanItem {
    Sequence tokens;
    int64_t sequence, block, first, last;

    ScanItem(const SelectiveScan& p, int64_t item) {
        const int64_t blocks = p.blocks();
        sequence = item / blocks, block = item % blocks;
        first = block * SCAN_CHANNELS;
        last = first + SCAN_CHANNELS < p.channels ? first + SCAN_CHANNELS : p.channels;
        tokens = sequence_of(p, sequence);
    }
};

DP_INLINE const float* row(const Tensor& x, const ScanItem& item, int64_t token) {
    return static_cast<const float*>(x.data) + item.tokens.batch * x.batch + token * x.token;
}
DP_INLINE float* row_to(const Tensor& x, const ScanItem& item, int64_t token) {
    return static_cast<float*>(x.data) + item.tokens.batch * x.batch + token * x.token;
}

// The first `lanes` numbers from p on, and zeros: no memory beyond them is read.
DP_INLINE Vec<float> load_lanes(const float* p, int lanes) {
    if (lanes == width<float>) return load(p);
    Vec<float> x{};
    memcpy(&x, p, lanes * sizeof(float));
    return x;
}
DP_INLINE void store_lanes(float* p, Vec<float> x, int lanes) {
    if (lanes == width<float>)
        store(p, x);
    else
        memcpy(p, &x, lanes * sizeof(float));
}

// A state [channels,N] and one of as many vectors of channels as N: a transpose.
inline void state_in(const float* from, int lanes, int n, float* to) {
    constexpr int W = width<float>;
    if (lanes == W && n % W == 0) return transpose(W, n, from, n, to, W);
    for (int i = 0; i < n; ++i)
        for (int lane = 0; lane < W; ++lane) to[i * W + lane] = lane < lanes ? from[lane * n + i] : 0;
}
inline void state_out(const float* from, int lanes, int n, float* to) {
    constexpr int W = width<float>;
    if (lanes == W && n % W == 0) return transpose(n, W, from, W, to, n);
    for (int lane = 0; lane < lanes; ++lane)
        for (int i = 0; i < n; ++i) to[lane * n + i] = from[i * W + lane];
}

template <bool SIGNED>
void scan_forward(const SelectiveScan& p, int64_t number) {
    constexpr int W = width<float>;
    const TinyIsZero tiny_is_zero;
    const ScanItem item(p, number);
    const int n = int(p.state_size);
    float* a = static_cast<float*>(scratch(2 * int64_t(n) * sizeof(Vec<float>)));
    float* h = a + n * W;
    for (int64_t channel = item.first; channel < item.last; channel += W) {
        const int lanes = int(item.last - channel < W ? item.last - channel : W);
        const int64_t state = (item.sequence * p.channels + channel) * n;
        for (int i = 0; i < n; ++i) store(a + i * W, load_lanes(p.a + i * p.channels + channel, lanes));
        if (p.initial_state)
            state_in(p.initial_state + state, lanes, n, h);
        else
            memset(h, 0, n * sizeof(Vec<float>));
        float* kept = p.states ? p.states + item.tokens.first_slot * n * p.channels + channel : nullptr;
        for (int64_t t = item.tokens.first; t < item.tokens.last; ++t) {
            if (kept && (t - item.tokens.first) % SCAN_TOKENS == 0)
                for (int i = 0; i < n; ++i, kept += p.channels) store_lanes(kept, load(h + i * W), lanes);
            const Vec<float> dt = load_lanes(row(p.dt, item, t) + channel, lanes);
            const Vec<float> write = dt * load_lanes(row(p.x, item, t) + channel, lanes);
            const float *b = row(p.b, item, t), *c = row(p.c, item, t);
            Vec<float> y{};
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) {
                const Vec<float> now = Decay<SIGNED>::of(dt * load(a + i * W)).times(load(h + i * W), write * b[i]);
                store(h + i * W, now);
                y += now * c[i];
            }
            store_lanes(row_to(p.y, item, t) + channel, y, lanes);
        }
        state_out(h, lanes, n, p.final_state + state);
    }
}

template <bool SIGNED>
void scan_backward(const SelectiveScan& p, int64_t number) {
    constexpr int W = width<float>, MOST = SCAN_CHANNELS / W;
    const TinyIsZero tiny_is_zero;
    const ScanItem item(p, number);
    const int n = int(p.state_size), one = n * W, vectors = int((item.last - item.first + W - 1) / W);
    float* const memory = static_cast<float*>(scratch((3 * MOST + 5 * SCAN_TOKENS + 2) * one * sizeof(float)));
    float* const a = memory;  // [vectors,n], as the next two
    float* const d_a = a + MOST * one;
    float* const d_h = d_a + MOST * one;
    float* const d_b = d_h + MOST * one;  // [SCAN_TOKENS,n] of a chunk, as all that follow; lanes are not yet summed
    float* const d_c = d_b + SCAN_TOKENS * one;
    float* const whole = d_c + SCAN_TOKENS * one;
    float* const rest = whole + SCAN_TOKENS * one;
    float* const h = rest + SCAN_TOKENS * one;        // before every token, and after the last
    float* const part = h + (SCAN_TOKENS + 1) * one;  // [n], what the chunk adds to d_a: many small numbers to a few
    const auto channel_of = [&](int v) { return item.first + v * W; };
    const auto lanes_of = [&](int v) {
        const int64_t left = item.last - channel_of(v);
        return int(left < W ? left : W);
    };
    for (int v = 0; v < vectors; ++v) {
        for (int i = 0; i < n; ++i)
            store(a + v * one + i * W, load_lanes(p.a + i * p.channels + channel_of(v), lanes_of(v)));
        if (p.d_final_state)
            state_in(p.d_final_state + (item.sequence * p.channels + channel_of(v)) * n, lanes_of(v), n, d_h + v * one);
        else
            memset(d_h + v * one, 0, one * sizeof(float));
    }
    memset(d_a, 0, vectors * one * sizeof(float));

    const int64_t length = item.tokens.last - item.tokens.first;
    for (int64_t chunk = (length + SCAN_TOKENS - 1) / SCAN_TOKENS - 1; chunk >= 0; --chunk) {
        const int64_t start = item.tokens.first + chunk * SCAN_TOKENS;
        const int count = int(item.tokens.last - start < SCAN_TOKENS ? item.tokens.last - start : SCAN_TOKENS);
        const float* kept = p.states + (item.tokens.first_slot + chunk) * n * p.channels;
        memset(d_b, 0, 2 * SCAN_TOKENS * one * sizeof(float));
        for (int v = 0; v < vectors; ++v) {
            const int64_t channel = channel_of(v);
            const int lanes = lanes_of(v);
            const float* rates = a + v * one;
            for (int i = 0; i < n; ++i) store(h + i * W, load_lanes(kept + i * p.channels + channel, lanes));
            for (int t = 0; t < count; ++t) {  // the states once more
                const Vec<float> dt = load_lanes(row(p.dt, item, start + t) + channel, lanes);
                const Vec<float> write = dt * load_lanes(row(p.x, item, start + t) + channel, lanes);
                const float* b = row(p.b, item, start + t);
#pragma GCC unroll 4
                for (int i = 0; i < n; ++i) {
                    const int at = t * one + i * W;
                    const auto decay = Decay<SIGNED>::of(dt * load(rates + i * W));
                    store(whole + at, decay.whole);
                    store(rest + at, decay.rest);
                    store(h + at + one, decay.times(load(h + at), write * b[i]));
                }
            }
            memset(part, 0, one * sizeof(float));
            for (int t = count - 1; t >= 0; --t) {
                const Vec<float> dt = load_lanes(row(p.dt, item, start + t) + channel, lanes);
                const Vec<float> x = load_lanes(row(p.x, item, start + t) + channel, lanes);
                const Vec<float> d_y = load_lanes(row(p.d_y, item, start + t) + channel, lanes), write = dt * x;
                const float *b = row(p.b, item, start + t), *c = row(p.c, item, start + t);
                Vec<float> d_write{}, d_dt{};
#pragma GCC unroll 4
                for (int i = 0; i < n; ++i) {
                    const int at = t * one + i * W;
                    float *to_h = d_h + v * one + i * W, *to_a = part + i * W;
                    const Decay<SIGNED> decay{load(whole + at), load(rest + at)};
                    const Vec<float> d = load(to_h) + d_y * c[i];  // of the state after this token
                    store(d_c + at, load(d_c + at) + d_y * load(h + at + one));
                    store(d_b + at, load(d_b + at) + d * write);
                    d_write += d * b[i];
                    const Vec<float> d_z = d * load(h + at) * (decay.whole + decay.rest);
                    d_dt += d_z * load(rates + i * W);
                    store(to_a, load(to_a) + d_z * dt);
                    store(to_h, decay.times(d, Vec<float>{}));
                }
                store_lanes(row_to(p.d_x, item, start + t) + channel, d_write * dt, lanes);
                store_lanes(row_to(p.d_dt, item, start + t) + channel, d_write * x + d_dt, lanes);
            }
            for (int i = 0; i < one; i += W) store(d_a + v * one + i, load(d_a + v * one + i) + load(part + i));
        }
        for (int t = 0; t < count; ++t) {
            const int64_t at = ((item.block * p.batch + item.tokens.batch) * p.length + start + t) * n;
            for (int i = 0; i < n; ++i) {
                p.d_b[at + i] = sum_of<float>(load(d_b + t * one + i * W));
                p.d_c[at + i] = sum_of<float>(load(d_c + t * one + i * W));
            }
        }
    }
    for (int v = 0; v < vectors; ++v) {
        const int64_t state = (item.sequence * p.channels + channel_of(v)) * n;
        state_out(d_a + v * one, lanes_of(v), n, p.d_a + state);
        state_out(d_h + v * one, lanes_of(v), n, p.d_initial_state + state);
    }
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
