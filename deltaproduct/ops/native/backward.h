// The backward pass: spans of chunks in reverse; each is run forwards again from its kept state, then its chunks
// backwards.
#pragma once

#include "forward.h"

namespace deltaproduct {
namespace DP_ARCH {

// What the backward of one chunk works in.
template <class T>
struct Adjoint {
    T* values;   // [steps + tokens, V] −dV, then scale · dO
    T* error;    // [V, steps] E transposed
    T* pairs;    // [steps + tokens, steps] dL, then dP
    T* state;    // [V, K] S transposed
    T* adjoint;  // [V, K] dS transposed
    T* rows;     // [steps + tokens, K] dK and dQ
    T* write;    // [steps, K] dW
    T* beta;     // [steps]

    void lay_out(Pieces& pieces, const Sizes<T>& z) {
        values = pieces.take<T>(z.rows * z.ldv);
        error = pieces.take<T>(z.value_vectors * width<T> * z.lds);
        pairs = pieces.take<T>(z.rows * z.lds);
        state = pieces.take<T>(z.value_vectors * width<T> * z.ldk);
        adjoint = pieces.take<T>(z.value_vectors * width<T> * z.ldk);
        rows = pieces.take<T>(z.rows * z.ldk);
        write = pieces.take<T>(z.steps * z.ldk);
        beta = pieces.take<T>(z.steps);
    }
};

// −dE = −Pᵀ dO − W̃ dS, then −dV = (I + L)⁻ᵀ (−dE), in the first rows of x; dO (none: null) is in the rows below.
template <class T>
void find_d_values(
    const EngineCall& p, const Sizes<T>& z, const Chunk<T>& c, const T* d_o, const T* d_state, int vectors, int64_t ldv,
    T* x) {
    const auto write = times(c.write, z.ldk, d_state, ldv, AllTerms{z.key});
    if (d_o) {
        const int n = int(p.steps);
        const auto own_and_later = [&](int first, int) { return Terms{first / n, c.tokens}; };
        product<true>(
            *c.ahead, c.steps, vectors, x, ldv, false, write,
            transposed_times(queries(c.pairs, z.lds, z), z.lds, d_o, ldv, own_and_later));
    } else {
        product<true>(*c.ahead, c.steps, vectors, x, ldv, false, write);
    }
    zero_rows(x, ldv, c.steps, z.steps);
    solve<true>(*c.ahead, c.steps, vectors, c.pairs, z.lds, x, ldv);
}

// dS ← exp(G_C) dS + Q̃ᵀ dO − K̃ᵀ dV; x holds −dV, and dO in the rows below where there are `outputs`.
template <class T>
void advance_adjoint(
    const Sizes<T>& z, const Chunk<T>& c, bool outputs, const T* x, int vectors, int64_t ldv, T* d_state) {
    if (c.gated()) scale_state(z, vectors, ldv, c.whole, d_state);
    const auto steps_and_tokens = [&](int, int) {
        return Terms{0, c.steps, z.steps, z.steps + (outputs ? c.tokens : 0)};
    };
    product<false>(
        *c.ahead, z.key, vectors, d_state, ldv, true, transposed_times(c.seen, z.ldk, x, ldv, steps_and_tokens));
}

template <class T>
void read_d_o(const EngineCall& p, const Item& item, const Sizes<T>& z, const Chunk<T>& c, T* to) {
    read_rows(p.d_o, item.sequence.batch, c.token, item.head, item.column, c.tokens, 1, z.value, to, z.ldv, T(p.scale));
}

// dg_t: every decay that spans gate t, its gradient times its value, summed as the rectangle that it is
// (ops/README.md).
template <class T>
void write_d_gates(
    const EngineCall& p, const Item& item, const Sizes<T>& z, const Chunk<T>& c, const Adjoint<T>& d, double whole) {
    const int n = int(p.steps);
    double spans[MAX_CHUNK_TOKENS + 1];  // columns: the chunk's start, then its tokens; summed over rows s ≥ t
    spans[0] = whole;
    for (int r = 0; r < c.tokens; ++r) {
        spans[r + 1] = 0;
        for (int s = r * n; s < (r + 1) * n; ++s)
            spans[r + 1] += dot(z.key_vectors, d.write + s * z.ldk, c.write + s * z.ldk);
    }
    double d_g[MAX_CHUNK_TOKENS];
    for (int t = c.tokens - 1; t >= 0; --t) {
        for (int j = 0; j <= n; ++j) {  // the token's steps, then its query
            const int row = j < n ? t * n + j : z.steps + t;
            spans[0] += dot(z.key_vectors, d.rows + row * z.ldk, c.seen + row * z.ldk);
            const T *d_pair = d.pairs + row * z.lds, *pair = c.pairs + row * z.lds;
            for (int r = 0; r < t; ++r)
                for (int s = r * n; s < (r + 1) * n; ++s) spans[r + 1] += double(d_pair[s]) * pair[s];
        }
        d_g[t] = 0;
        for (int r = 0; r <= t; ++r) d_g[t] += spans[r];
    }
    write_rows(p.d_g, item.sequence.batch, c.token, item.part, 0, c.tokens, 1, 1, d_g, 1);
}

template <class T>
void backward_chunk(
    const EngineCall& p, const Item& item, const Sizes<T>& z, const Chunk<T>& c, Adjoint<T>& d, T* d_state) {
    constexpr int W = width<T>;
    const int n = int(p.steps);
    const int64_t batch = item.sequence.batch;
    T* d_o = queries(d.values, z.ldv, z);
    read_d_o(p, item, z, c, d_o);
    find_d_values(p, z, c, d_o, d_state, z.value_vectors, z.ldv, d.values);
    write_rows(p.d_v, batch, c.token, item.head, item.column, c.tokens, n, z.value, d.values, z.ldv, T(-1));

    const int padded_key = z.key_vectors * W, padded_value = z.value_vectors * W;
    transpose(z.steps, padded_value, c.error, z.ldv, d.error, z.lds);
    lower_product(z, c, z.value, d.values, z.ldv, d.error, d.pairs);
    query_product(z, c, z.value, d.values, z.ldv, d.error, d.pairs);
    transpose(padded_key, padded_value, c.state, z.ldv, d.state, z.ldk);
    transpose(padded_key, padded_value, d_state, z.ldv, d.adjoint, z.ldk);

    // dK and dQ from the state at the start, dW from the gradient of the one at the end; and what the interactions add:
    // to dK and dQ from L and P as rows, to dW from them as columns. In one go, unless a gate stands between.
    const int rows = z.steps + c.tokens;
    const auto from_state = [&](AllTerms terms) { return times(d.values, z.ldv, d.state, z.ldk, terms); };
    const auto from_adjoint = [&](AllTerms terms) { return times(c.error, z.ldv, d.adjoint, z.ldk, terms); };
    AllTerms all{z.value};
    if (c.gated()) {
        product<false>(*c.ahead, rows, z.key_vectors, d.rows, z.ldk, false, from_state(all));
        product<false>(*c.ahead, c.steps, z.key_vectors, d.write, z.ldk, false, from_adjoint(all));
        all.count = 0;
        double whole = 0;
        for (int i = 0; i < z.key; ++i) whole += dot(z.value_vectors, c.state + i * z.ldv, d_state + i * z.ldv);
        write_d_gates(p, item, z, c, d, whole * c.whole);
        scale_rows(rows, z.key_vectors, c.from_start, d.rows, z.ldk, d.rows);
        scale_rows(c.steps, z.key_vectors, c.to_end, d.write, z.ldk, d.write);
    }
    finish_pairs(p, z, c, d.pairs);
    const auto earlier = [&](int, int end) { return Terms{0, end <= z.steps ? end : (end - z.steps) * n}; };
    const auto later = [&](int first, int) { return Terms{first, c.steps, z.steps + first / n, z.steps + c.tokens}; };
    product<false>(
        *c.ahead, rows, z.key_vectors, d.rows, z.ldk, c.gated(), from_state(all),
        times(d.pairs, z.lds, c.scaled, z.ldk, earlier));
    product<false>(
        *c.ahead, c.steps, z.key_vectors, d.write, z.ldk, c.gated(), from_adjoint(all),
        transposed_times(d.pairs, z.lds, c.rows, z.ldk, later));

    with_count(z.key_vectors, [&](auto vectors) {
        for (int s = 0; s < c.steps; ++s) {
            T *d_w = d.write + s * z.ldk, *d_k = d.rows + s * z.ldk;
            d.beta[s] = dot(vectors, d_w, c.rows + s * z.ldk);
            for (int j = 0; j < vectors; ++j) store(d_k + j * W, load(d_k + j * W) + load(d_w + j * W) * c.beta[s]);
        }
    });
    if (p.norm_eps != 0) {
        denormalise_rows(c.steps, z.key_vectors, c.rows, c.norms, z.ldk, d.rows);
        denormalise_rows(
            c.tokens, z.key_vectors, queries(c.rows, z.ldk, z), c.norms + z.steps, z.ldk, queries(d.rows, z.ldk, z));
    }
    write_rows(p.d_k, batch, c.token, item.part, 0, c.tokens, n, z.key, d.rows, z.ldk);
    write_rows(p.d_q, batch, c.token, item.part, 0, c.tokens, 1, z.key, queries(d.rows, z.ldk, z), z.ldk);
    write_rows(p.d_beta, batch, c.token, item.part, 0, c.tokens, n, 1, d.beta, 1);
    advance_adjoint(z, c, true, d.values, z.value_vectors, z.ldv, d_state);
}

template <class T>
void backward(const EngineCall& p, int64_t number, const void* segment_states) {
    const Item item(p, number);
    const Sizes<T> z(p, item.columns);
    const int64_t each = p.chunks_per_state;
    Chunk<T> chunks[MAX_CHUNKS_PER_STATE];
    Adjoint<T> d;
    Ahead ahead;
    Room<T> room;
    T* d_state;
    const auto lay_out = [&](void* memory) {
        Pieces pieces(memory);
        for (int64_t i = 0; i < each; ++i) chunks[i].lay_out(pieces, z, p.g.data != nullptr, &ahead);
        d.lay_out(pieces, z);
        room.lay_out(pieces, z);
        d_state = pieces.take<T>(z.state());
        return pieces.used();
    };
    lay_out(scratch(lay_out(nullptr)));

    if (segment_states && item.segment < p.segments - 1)
        read_state(p, item, z, segment_states, item.segment * p.sequences + item.number, d_state);
    else
        read_state(p, item, z, p.d_final_state, item.number, d_state);
    for (int64_t span = item.last_span - 1; span >= item.first_span; --span) {
        read_state(p, item, z, p.states, item.sequence.first_slot + span, chunks[0].state);
        int64_t count = 0;
        for (; count < each; ++count) {
            const int64_t token = item.sequence.first + (span * each + count) * p.chunk_tokens;
            if (token >= item.sequence.last) break;
            Chunk<T>& c = chunks[count];
            if (count > 0) {
                const Chunk<T>& before = chunks[count - 1];
                memcpy(c.state, before.state, sizeof(T) * z.state());
                advance(z, before, before.error, z.ldv, z.value_vectors, c.state, z.ldv);
            }
            ahead.forget();
            if (count + 1 < each)
                fetch_inputs(p, item, z, token + p.chunk_tokens, ahead);
            else
                fetch_results(p, item, z, token, ahead);
            read_chunk(p, item, z, token, room, c);
            find_errors(z, c, c.state, z.ldv, z.value_vectors, c.error, z.ldv);
        }
        while (count-- > 0) {
            ahead.forget();
            if (count > 0)
                fetch_results(p, item, z, chunks[count - 1].token, ahead);
            else
                fetch_inputs(p, item, z, chunks[0].token - each * p.chunk_tokens, ahead);
            backward_chunk(p, item, z, chunks[count], d, d_state);
        }
    }
    if (item.segment == 0 && p.d_initial_state) write_state(p, item, z, d_state, p.d_initial_state, item.number);
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
