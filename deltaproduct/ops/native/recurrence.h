// The recurrence in chunks, forward and backward, for one value head at a time.
//
// The derivation, with these names, is in ops/README.md: the errors E of a chunk solve (I + L) E = V − K̃ S, then
// S ← exp(G) S + W̃ᵀ E and O = scale (Q̃ S + P E). The keys and queries of a chunk are the rows of one matrix, and so are
// L and P, and the gradients of values and outputs: most products serve both at once.
#pragma once

#include <cmath>
#include <type_traits>

#include "convert.h"

namespace deltaproduct {
namespace DP_ARCH {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int at_most(int64_t n, int64_t limit) { return int(n < limit ? n : limit); }

// What a work item covers: one sequence, value head, block of V columns and segment of time.
struct Item {
    Sequence sequence;
    int64_t number, head, key_head, part;  // number of the sequence; part: which head of the summed gradients
    int64_t column, columns;
    int64_t segment, first_span, last_span;  // in spans of chunks_per_state chunks from the sequence's start

    Item(const Problem& p, int64_t item) {
        const int64_t block = item % p.value_blocks;
        item /= p.value_blocks;
        head = item % p.value_heads;
        item /= p.value_heads;
        number = item % p.sequences;
        segment = item / p.sequences;
        sequence = sequence_of(p, number);
        key_head = head / (p.value_heads / p.heads);
        part = head * p.value_blocks + block;
        // Blocks begin at whole vectors, as far as there are any.
        const int64_t each = round_up((p.value_dim + p.value_blocks - 1) / p.value_blocks, 16);
        column = at_most(block * each, p.value_dim);
        columns = at_most(each, p.value_dim - column);
        const int64_t span = int64_t(p.chunk_tokens) * p.chunks_per_state;
        const int64_t spans = (sequence.last - sequence.first + span - 1) / span;
        first_span = segment * spans / p.segments;
        last_span = (segment + 1) * spans / p.segments;
    }
};

// Sizes in elements. Rows of keys are rounded up to the blocks of the triangular solve; the queries' rows follow them.
template <class T>
struct Sizes {
    int key, value;          // K, and this block's V
    int steps, rows;         // of a full chunk: its steps, rounded up, and with the tokens' queries below
    int key_vectors, value_vectors, step_vectors;
    int64_t ldk, ldv, lds;   // between rows of K, of V and of steps

    Sizes(const Problem& p, int64_t columns) {
        constexpr int W = width<T>;
        key = int(p.key_dim);
        value = int(columns);
        steps = int(round_up(p.chunk_tokens * p.steps, W > solve_rows ? W : solve_rows));
        rows = steps + p.chunk_tokens;
        key_vectors = int(round_up(key, W) / W);
        value_vectors = int(round_up(value, W) / W);
        step_vectors = steps / W;
        // One vector more than needed: rows a power of two apart would share the sets of the nearest cache.
        ldk = (key_vectors + 1) * W;
        ldv = (value_vectors + 1) * W;
        lds = steps;
    }
    // Bound on the cache lines of a chunk's inputs and results.
    int64_t lines() const { return rows * 2 * ((key + value) * int64_t(sizeof(T)) / 64 + 4); }
    int64_t state() const { return round_up(key, width<T>) * ldv; }
};

// Hands out the calling thread's memory piece by piece; of nothing, it only adds up.
class Pieces {
public:
    explicit Pieces(void* memory) : start_(static_cast<char*>(memory)) {}
    template <class T>
    T* take(int64_t count) {
        T* piece = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
        used_ += round_up(count * int64_t(sizeof(T)), 64);
        return piece;
    }
    int64_t used() const { return used_; }

private:
    char* start_;
    int64_t used_ = 0;
};

// One chunk: its inputs, and what follows from them and from the state at its start. Unused rows are zero.
template <class T>
struct Chunk {
    int64_t token;      // its first
    int tokens, steps;  // how many it really has
    T* rows;            // [steps + tokens, K] keys, then queries
    T* norms;           // [steps + tokens] what they were multiplied by to be normalised
    T* scaled;          // [steps, K] W = β k
    T* pairs;           // [steps + tokens, steps] L, then P
    T* error;           // [steps, V] V, then E
    T* state;           // [K, V] at the chunk's start
    // With a gate; without one `seen` is `rows`, `write` is `scaled` and the others are null.
    T* seen;        // [steps + tokens, K] K̃ and Q̃
    T* write;       // [steps, K] W̃
    T* from_start;  // [steps + tokens] decay since the chunk's start
    T* to_end;      // [steps] decay until its end
    T* decay;       // [tokens, steps] from a step to a later token
    T whole;        // over the chunk

    Ahead* ahead;  // what to fetch while this chunk is worked on

    bool gated() const { return decay != nullptr; }

    void lay_out(Pieces& pieces, const Sizes<T>& z, bool gated, Ahead* fetched) {
        ahead = fetched;
        rows = pieces.take<T>(z.rows * z.ldk);
        norms = pieces.take<T>(z.rows);
        scaled = pieces.take<T>(z.steps * z.ldk);
        pairs = pieces.take<T>(z.rows * z.lds);
        error = pieces.take<T>(z.steps * z.ldv);
        state = pieces.take<T>(z.state());
        seen = gated ? pieces.take<T>(z.rows * z.ldk) : rows;
        write = gated ? pieces.take<T>(z.steps * z.ldk) : scaled;
        from_start = gated ? pieces.take<T>(z.rows) : nullptr;
        to_end = gated ? pieces.take<T>(z.steps) : nullptr;
        decay = gated ? pieces.take<T>((z.rows - z.steps) * z.lds) : nullptr;
        whole = 1;
    }
};

// The rows of queries (or of what belongs to outputs) in a matrix that has those of keys above.
template <class T>
DP_INLINE T* queries(T* x, int64_t ld, const Sizes<std::remove_const_t<T>>& z) {
    return x + z.steps * ld;
}

template <class T>
DP_INLINE void zero_rows(T* x, int64_t ld, int from, int to) {
    if (from < to) memset(x + from * ld, 0, sizeof(T) * (to - from) * ld);
}

// The state of an item between local memory (rows ldv apart) and a contiguous tensor [..., HV, K, V]; null is zero.
template <class T>
void read_state(const Problem& p, const Item& item, const Sizes<T>& z, const void* states, int64_t index, T* to) {
    memset(to, 0, sizeof(T) * z.state());
    if (!states) return;
    const T* from = static_cast<const T*>(states) + (index * p.value_heads + item.head) * p.key_dim * p.value_dim + item.column;
    for (int i = 0; i < z.key; ++i) memcpy(to + i * z.ldv, from + i * p.value_dim, sizeof(T) * z.value);
}

template <class T>
void write_state(const Problem& p, const Item& item, const Sizes<T>& z, const T* from, void* states, int64_t index) {
    T* to = static_cast<T*>(states) + (index * p.value_heads + item.head) * p.key_dim * p.value_dim + item.column;
    for (int i = 0; i < z.key; ++i) memcpy(to + i * p.value_dim, from + i * z.ldv, sizeof(T) * z.value);
}

// to = factors from, row by row, for whole vectors.
template <class T>
void scale_rows(int rows, int vectors, const T* factors, const T* from, int64_t ld, T* to) {
    with_count(vectors, [=](auto count) {
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < count; ++j)
                store(to + i * ld + j * width<T>, load(from + i * ld + j * width<T>) * factors[i]);
    });
}

template <class T>
void scale_state(const Sizes<T>& z, int64_t ld, T factor, T* state) {
    for (int64_t i = 0; i < z.key * ld; i += width<T>) store(state + i, load(state + i) * factor);
}

// Decays within a chunk, as products of the tokens' gates. Products in double keep each to a rounding of the type that
// is computed in, and unlike differences of sums they need no care where a gate is −∞.
template <class T>
void read_gates(const Problem& p, const Item& item, const Sizes<T>& z, Chunk<T>& c) {
    const int n = int(p.steps);
    double gate[MAX_CHUNK_TOKENS];
    read_rows(p.g, item.sequence.batch, c.token, item.head, 0, c.tokens, 1, 1, gate, 1);
    for (int t = 0; t < c.tokens; ++t) gate[t] = exp(gate[t]);
    double total = 1;
    for (int t = 0; t < c.tokens; ++t) {
        total *= gate[t];
        c.from_start[z.steps + t] = T(total);
        for (int j = 0; j < n; ++j) c.from_start[t * n + j] = T(total);
        double between = 1;
        for (int r = t; r >= 0; --r) {
            for (int j = 0; j < n; ++j) c.decay[t * z.lds + r * n + j] = T(between);
            between *= gate[r];
        }
    }
    c.whole = T(total);
    double after = 1;
    for (int t = c.tokens - 1; t >= 0; --t) {
        for (int j = 0; j < n; ++j) c.to_end[t * n + j] = T(after);
        after *= gate[t];
    }
    for (int s = c.steps; s < z.steps; ++s) c.from_start[s] = c.to_end[s] = 0;
}

// Rows of interactions (times decay) up to the diagonal, zero beyond it: L strictly, P with a token's own steps.
template <class T>
void finish_pairs(const Problem& p, const Sizes<T>& z, const Chunk<T>& c, T* pairs) {
    const int n = int(p.steps);
    with_count(z.step_vectors, [&](auto vectors) {
        const auto finish = [&](T* row, int token, int keep) {
            const T* decay = c.gated() ? c.decay + token * z.lds : nullptr;
            for (int j = 0; j < vectors; ++j) {
                Vec<T> x = load(row + j * width<T>);
                if (decay) x *= load(decay + j * width<T>);
                store(row + j * width<T>, first_lanes<T>(x, keep - j * width<T>));
            }
        };
        for (int t = 0; t < c.tokens; ++t) {
            for (int s = t * n; s < (t + 1) * n; ++s) finish(pairs + s * z.lds, t, s);
            finish(pairs + (z.steps + t) * z.lds, t, (t + 1) * n);
        }
    });
    zero_rows(pairs, z.lds, c.steps, z.steps);
}

// a b for the rows of keys, on and below the diagonal in blocks of a vector's width, and for those of queries.
template <class T>
void lower_product(const Sizes<T>& z, const Chunk<T>& c, int terms, const T* a, int64_t lda, const T* b, T* pairs) {
    for (int i = 0; i < c.steps; i += width<T>)
        product<false, false>(
            *c.ahead, at_most(c.steps - i, width<T>), i / width<T> + 1, AllTerms{terms}, a + i * lda, lda, b, z.lds, pairs + i * z.lds,
            z.lds, false);
    product<false, false>(
        *c.ahead, c.tokens, z.step_vectors, AllTerms{terms}, queries(a, lda, z), lda, b, z.lds, queries(pairs, z.lds, z), z.lds, false);
}

template <class N, class T>
DP_INLINE T dot(N vectors, const T* a, const T* b) {
    Vec<T> sum{};
    for (int j = 0; j < vectors; ++j) sum += load(a + j * width<T>) * load(b + j * width<T>);
    return sum_of<T>(sum);
}

// x ← x / √(Σx² + ε) for every row, and the factor
template <class T>
void normalise_rows(double eps, int rows, int vectors, T* x, int64_t ld, T* norms) {
    with_count(vectors, [=](auto count) {
        for (int i = 0; i < rows; ++i) {
            T* row = x + i * ld;
            const T norm = T(1 / sqrt(dot(count, row, row) + T(eps)));
            for (int j = 0; j < count; ++j) store(row + j * width<T>, load(row + j * width<T>) * norm);
            norms[i] = norm;
        }
    });
}

// The gradient in x of the above, in the place of the one in x̂ = x·norm: dx = norm (dx̂ − x̂ (x̂·dx̂))
template <class T>
void denormalise_rows(int rows, int vectors, const T* x, const T* norms, int64_t ld, T* d) {
    with_count(vectors, [=](auto count) {
        for (int i = 0; i < rows; ++i) {
            const T *row = x + i * ld;
            T* d_row = d + i * ld;
            const T along = dot(count, row, d_row);
            for (int j = 0; j < count; ++j)
                store(d_row + j * width<T>, (load(d_row + j * width<T>) - load(row + j * width<T>) * along) * norms[i]);
        }
    });
}

// Everything about a chunk that no state enters. `columns` [K, steps] is room to work in.
template <class T>
void read_chunk(const Problem& p, const Item& item, const Sizes<T>& z, int64_t token, T* columns, Chunk<T>& c) {
    const int n = int(p.steps);
    c.token = token;
    c.tokens = at_most(item.sequence.last - token, p.chunk_tokens);
    c.steps = c.tokens * n;
    const int64_t batch = item.sequence.batch;
    T* beta = columns;  // not needed yet
    read_rows(p.beta, batch, token, item.head, 0, c.tokens, n, 1, beta, 1);
    read_rows(p.k, batch, token, item.key_head, 0, c.tokens, n, z.key, c.rows, z.ldk);
    read_rows(p.q, batch, token, item.key_head, 0, c.tokens, 1, z.key, queries(c.rows, z.ldk, z), z.ldk);
    read_rows(p.v, batch, token, item.head, item.column, c.tokens, n, z.value, c.error, z.ldv);
    if (p.norm_eps != 0) {
        normalise_rows(p.norm_eps, c.steps, z.key_vectors, c.rows, z.ldk, c.norms);
        normalise_rows(p.norm_eps, c.tokens, z.key_vectors, queries(c.rows, z.ldk, z), z.ldk, c.norms + z.steps);
    }
    scale_rows(c.steps, z.key_vectors, beta, c.rows, z.ldk, c.scaled);
    zero_rows(c.scaled, z.ldk, c.steps, z.steps);
    zero_rows(c.error, z.ldv, c.steps, z.steps);
    if (c.gated()) {
        read_gates(p, item, z, c);
        scale_rows(c.steps, z.key_vectors, c.to_end, c.scaled, z.ldk, c.write);
        scale_rows(c.steps, z.key_vectors, c.from_start, c.rows, z.ldk, c.seen);
        scale_rows(c.tokens, z.key_vectors, c.from_start + z.steps, queries(c.rows, z.ldk, z), z.ldk, queries(c.seen, z.ldk, z));
    }
    transpose(z.steps, z.key_vectors * width<T>, c.scaled, z.ldk, columns, z.lds);
    lower_product(z, c, z.key, c.rows, z.ldk, columns, c.pairs);
    finish_pairs(p, z, c, c.pairs);
}

// Plan to fetch what the chunk at `token` reads first.
template <class T>
void fetch_inputs(const Problem& p, const Item& item, const Sizes<T>& z, int64_t token, Ahead& ahead) {
    if (token < item.sequence.first || token >= item.sequence.last) return;
    const int n = int(p.steps), tokens = at_most(item.sequence.last - token, p.chunk_tokens);
    const int64_t batch = item.sequence.batch;
    add_rows(ahead, false, p.k, batch, token, item.key_head, 0, tokens, n, z.key);
    add_rows(ahead, false, p.q, batch, token, item.key_head, 0, tokens, 1, z.key);
    add_rows(ahead, false, p.v, batch, token, item.head, item.column, tokens, n, z.value);
}

// Plan to fetch what the chunk at `token` reads and writes in the second half of its backward.
template <class T>
void fetch_results(const Problem& p, const Item& item, const Sizes<T>& z, int64_t token, Ahead& ahead) {
    const int n = int(p.steps), tokens = at_most(item.sequence.last - token, p.chunk_tokens);
    const int64_t batch = item.sequence.batch;
    add_rows(ahead, false, p.d_o, batch, token, item.head, item.column, tokens, 1, z.value);
    add_rows(ahead, true, p.d_v, batch, token, item.head, item.column, tokens, n, z.value);
    add_rows(ahead, true, p.d_k, batch, token, item.part, 0, tokens, n, z.key);
    add_rows(ahead, true, p.d_q, batch, token, item.part, 0, tokens, 1, z.key);
}

// E = (I + L)⁻¹ (V − K̃ S), in the place of V.
template <class T>
void find_errors(const Sizes<T>& z, const Chunk<T>& c, const T* state, int vectors, int64_t ldv, T* error) {
    product<false, true>(*c.ahead, c.steps, vectors, AllTerms{z.key}, c.seen, z.ldk, state, ldv, error, ldv, true);
    solve<false>(*c.ahead, c.steps, vectors, c.pairs, z.lds, error, ldv);
}

// S ← exp(G_C) S + W̃ᵀ E
template <class T>
void advance(const Sizes<T>& z, const Chunk<T>& c, const T* error, int vectors, int64_t ldv, T* state) {
    if (c.gated()) scale_state(z, ldv, c.whole, state);
    product<true, false>(*c.ahead, z.key, vectors, AllTerms{c.steps}, c.write, z.ldk, error, ldv, state, ldv, true);
}

template <class T>
void forward(const Problem& p, int64_t number, const void* segment_states) {
    const Item item(p, number);
    const Sizes<T> z(p, item.columns);
    Chunk<T> c;
    Ahead ahead;
    T *columns, *out;
    const auto lay_out = [&](void* memory) {
        Pieces pieces(memory);
        c.lay_out(pieces, z, p.g.data != nullptr, &ahead);
        ahead = {pieces.take<const char*>(z.lines()), 0, 0};
        columns = pieces.take<T>(z.key_vectors * width<T> * z.lds);
        out = pieces.take<T>(p.chunk_tokens * z.ldv);
        return pieces.used();
    };
    lay_out(scratch(lay_out(nullptr)));
    T* state = c.state;

    if (segment_states && item.segment > 0)
        read_state(p, item, z, segment_states, item.segment * p.sequences + item.number, state);
    else
        read_state(p, item, z, p.initial_state, item.number, state);
    for (int64_t span = item.first_span; span < item.last_span; ++span) {
        if (p.states) write_state(p, item, z, state, p.states, item.sequence.first_slot + span);
        for (int64_t n = 0; n < p.chunks_per_state; ++n) {
            const int64_t token = item.sequence.first + (span * p.chunks_per_state + n) * p.chunk_tokens;
            if (token >= item.sequence.last) break;
            ahead.forget();
            fetch_inputs(p, item, z, token + p.chunk_tokens, ahead);
            read_chunk(p, item, z, token, columns, c);
            find_errors(z, c, state, z.value_vectors, z.ldv, c.error);
            product<false, false>(
                *c.ahead, c.tokens, z.value_vectors, AllTerms{z.key}, queries(c.seen, z.ldk, z), z.ldk, state, z.ldv, out, z.ldv, false);
            const auto own_and_earlier = [&](int, int end) { return Terms{0, int(end * p.steps)}; };
            product<false, false>(
                *c.ahead, c.tokens, z.value_vectors, own_and_earlier, queries(c.pairs, z.lds, z), z.lds, c.error, z.ldv, out, z.ldv, true);
            write_rows(p.o, item.sequence.batch, token, item.head, item.column, c.tokens, 1, z.value, out, z.ldv, T(p.scale));
            advance(z, c, c.error, z.value_vectors, z.ldv, state);
        }
    }
    if (item.segment == p.segments - 1) {
        write_state(p, item, z, state, p.final_state, item.number);
        if (p.states && p.cu_seqlens) {  // slots that this sequence does not fill
            memset(state, 0, sizeof(T) * z.state());
            for (int64_t slot = item.sequence.first_slot + item.last_span; slot < item.sequence.end_slot; ++slot)
                write_state(p, item, z, state, p.states, slot);
        }
    }
}

// What the backward of one chunk works in.
template <class T>
struct Adjoint {
    T* values;     // [steps + tokens, V] −dV, then scale · dO
    T* error;      // [V, steps] E transposed
    T* pairs;      // [steps + tokens, steps] dL, then dP
    T* state;      // [V, K] S transposed, then dS transposed
    T* rows;       // [steps + tokens, K] dK and dQ
    T* write;      // [steps, K] dW
    T* beta;       // [steps]
    T* seen;       // [steps + tokens] Σ over K of a gradient times its value, for the gates

    void lay_out(Pieces& pieces, const Sizes<T>& z) {
        values = pieces.take<T>(z.rows * z.ldv);
        error = pieces.take<T>(z.value_vectors * width<T> * z.lds);
        pairs = pieces.take<T>(z.rows * z.lds);
        state = pieces.take<T>(z.value_vectors * width<T> * z.ldk);
        rows = pieces.take<T>(z.rows * z.ldk);
        write = pieces.take<T>(z.steps * z.ldk);
        beta = pieces.take<T>(z.steps);
        seen = pieces.take<T>(z.rows);
    }
};

// −dE = −Pᵀ dO − W̃ dS, then −dV = (I + L)⁻ᵀ (−dE), in the first rows of x; dO (none: null) is in the rows below.
template <class T>
void find_d_values(
    const Problem& p, const Sizes<T>& z, const Chunk<T>& c, const T* d_o, const T* d_state, int vectors, int64_t ldv, T* x) {
    product<false, true>(*c.ahead, c.steps, vectors, AllTerms{z.key}, c.write, z.ldk, d_state, ldv, x, ldv, false);
    if (d_o) {
        const auto own_and_later = [&](int first, int) { return Terms{int(first / p.steps), c.tokens}; };
        product<true, true>(*c.ahead, c.steps, vectors, own_and_later, queries(c.pairs, z.lds, z), z.lds, d_o, ldv, x, ldv, true);
    }
    zero_rows(x, ldv, c.steps, z.steps);
    solve<true>(*c.ahead, c.steps, vectors, c.pairs, z.lds, x, ldv);
}

// dS ← exp(G_C) dS + Q̃ᵀ dO − K̃ᵀ dV; x holds −dV, d_o (none: null) dO.
template <class T>
void advance_adjoint(const Sizes<T>& z, const Chunk<T>& c, const T* x, const T* d_o, int vectors, int64_t ldv, T* d_state) {
    if (c.gated()) scale_state(z, ldv, c.whole, d_state);
    product<true, false>(*c.ahead, z.key, vectors, AllTerms{c.steps}, c.seen, z.ldk, x, ldv, d_state, ldv, true);
    if (d_o)
        product<true, false>(*c.ahead, z.key, vectors, AllTerms{c.tokens}, queries(c.seen, z.ldk, z), z.ldk, d_o, ldv, d_state, ldv, true);
}

template <class T>
void read_d_o(const Problem& p, const Item& item, const Sizes<T>& z, const Chunk<T>& c, T* to) {
    read_rows(p.d_o, item.sequence.batch, c.token, item.head, item.column, c.tokens, 1, z.value, to, z.ldv, T(p.scale));
}

// dg_t: every decay that spans gate t, its gradient times its value, summed as the rectangle that it is (ops/README.md).
template <class T>
void write_d_gates(const Problem& p, const Item& item, const Sizes<T>& z, const Chunk<T>& c, const Adjoint<T>& d, double whole) {
    const int n = int(p.steps);
    double spans[MAX_CHUNK_TOKENS + 1];  // columns: the chunk's start, then its tokens; summed over rows s ≥ t
    spans[0] = whole;
    for (int r = 0; r < c.tokens; ++r) {
        spans[r + 1] = 0;
        for (int s = r * n; s < (r + 1) * n; ++s) spans[r + 1] += dot(z.key_vectors, d.write + s * z.ldk, c.write + s * z.ldk);
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
void backward_chunk(const Problem& p, const Item& item, const Sizes<T>& z, const Chunk<T>& c, Adjoint<T>& d, T* d_state) {
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
    transpose(padded_key, padded_value, c.state, z.ldv, d.state, z.ldk);
    product<false, false>(*c.ahead, c.steps, z.key_vectors, AllTerms{z.value}, d.values, z.ldv, d.state, z.ldk, d.rows, z.ldk, false);
    product<false, false>(
        *c.ahead, c.tokens, z.key_vectors, AllTerms{z.value}, d_o, z.ldv, d.state, z.ldk, queries(d.rows, z.ldk, z), z.ldk, false);
    transpose(padded_key, padded_value, d_state, z.ldv, d.state, z.ldk);
    product<false, false>(*c.ahead, c.steps, z.key_vectors, AllTerms{z.value}, c.error, z.ldv, d.state, z.ldk, d.write, z.ldk, false);
    if (c.gated()) {
        double whole = 0;
        for (int i = 0; i < z.key; ++i) whole += dot(z.value_vectors, c.state + i * z.ldv, d_state + i * z.ldv);
        write_d_gates(p, item, z, c, d, whole * c.whole);
        T* d_q = queries(d.rows, z.ldk, z);
        scale_rows(c.steps, z.key_vectors, c.from_start, d.rows, z.ldk, d.rows);
        scale_rows(c.tokens, z.key_vectors, c.from_start + z.steps, d_q, z.ldk, d_q);
        scale_rows(c.steps, z.key_vectors, c.to_end, d.write, z.ldk, d.write);
    }
    finish_pairs(p, z, c, d.pairs);

    // What the interactions add: dK and dQ from L and P as rows, dW from them as columns.
    const auto earlier = [&](int, int end) { return Terms{0, end}; };
    const auto later = [&](int first, int) { return Terms{first, c.steps}; };
    const auto own_and_earlier = [&](int, int end) { return Terms{0, int(end * p.steps)}; };
    const auto own_and_later = [&](int first, int) { return Terms{int(first / p.steps), c.tokens}; };
    product<false, false>(*c.ahead, c.steps, z.key_vectors, earlier, d.pairs, z.lds, c.scaled, z.ldk, d.rows, z.ldk, true);
    product<false, false>(
        *c.ahead, c.tokens, z.key_vectors, own_and_earlier, queries(d.pairs, z.lds, z), z.lds, c.scaled, z.ldk,
        queries(d.rows, z.ldk, z), z.ldk, true);
    product<true, false>(*c.ahead, c.steps, z.key_vectors, later, d.pairs, z.lds, c.rows, z.ldk, d.write, z.ldk, true);
    product<true, false>(
        *c.ahead, c.steps, z.key_vectors, own_and_later, queries(d.pairs, z.lds, z), z.lds, queries(c.rows, z.ldk, z), z.ldk, d.write,
        z.ldk, true);

    T* beta = d.seen;
    read_rows(p.beta, batch, c.token, item.head, 0, c.tokens, n, 1, beta, 1);
    with_count(z.key_vectors, [&](auto vectors) {
        for (int s = 0; s < c.steps; ++s) {
            T *d_w = d.write + s * z.ldk, *d_k = d.rows + s * z.ldk;
            d.beta[s] = dot(vectors, d_w, c.rows + s * z.ldk);
            for (int j = 0; j < vectors; ++j) store(d_k + j * W, load(d_k + j * W) + load(d_w + j * W) * beta[s]);
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
    advance_adjoint(z, c, d.values, d_o, z.value_vectors, z.ldv, d_state);
}

template <class T>
void backward(const Problem& p, int64_t number, const void* segment_states) {
    const Item item(p, number);
    const Sizes<T> z(p, item.columns);
    const int64_t each = p.chunks_per_state;
    Chunk<T> chunks[MAX_CHUNKS_PER_STATE];
    Adjoint<T> d;
    Ahead ahead;
    T *columns, *d_state;
    const auto lay_out = [&](void* memory) {
        Pieces pieces(memory);
        for (int64_t i = 0; i < each; ++i) chunks[i].lay_out(pieces, z, p.g.data != nullptr, &ahead);
        d.lay_out(pieces, z);
        ahead = {pieces.take<const char*>(z.lines()), 0, 0};
        columns = pieces.take<T>(z.key_vectors * width<T> * z.lds);
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
                advance(z, before, before.error, z.value_vectors, z.ldv, c.state);
            }
            ahead.forget();
            if (count + 1 < each)
                fetch_inputs(p, item, z, token + p.chunk_tokens, ahead);
            else
                fetch_results(p, item, z, token, ahead);
            read_chunk(p, item, z, token, columns, c);
            find_errors(z, c, c.state, z.value_vectors, z.ldv, c.error);
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

// A segment as one step, S ↦ A S + B: A is the segment run on the identity without values, B on zero with them. In
// reverse, dS ↦ A dS + B, where A is the transpose of the other.
template <class T>
void summary(const Problem& p, int64_t number, bool reverse, void* a_out, void* b_out) {
    const Item item(p, number);
    const Sizes<T> z(p, item.columns);
    Chunk<T> c;
    Ahead ahead;
    T *columns, *a, *a_error, *values;
    const auto lay_out = [&](void* memory) {
        Pieces pieces(memory);
        c.lay_out(pieces, z, p.g.data != nullptr, &ahead);
        ahead = {pieces.take<const char*>(z.lines()), 0, 0};
        columns = pieces.take<T>(z.key_vectors * width<T> * z.lds);
        a = pieces.take<T>(z.key * z.ldk);
        a_error = pieces.take<T>(z.steps * z.ldk);
        values = pieces.take<T>(z.rows * z.ldv);
        return pieces.used();
    };
    lay_out(scratch(lay_out(nullptr)));

    T* b = c.state;
    memset(b, 0, sizeof(T) * z.state());
    memset(a, 0, sizeof(T) * z.key * z.ldk);
    for (int i = 0; i < z.key; ++i) a[i * z.ldk + i] = 1;
    const int64_t each = p.chunks_per_state;
    const int64_t first = item.first_span * each, last = item.last_span * each;
    for (int64_t i = 0; i < last - first; ++i) {
        const int64_t chunk = reverse ? last - 1 - i : first + i;
        const int64_t token = item.sequence.first + chunk * p.chunk_tokens;
        if (token >= item.sequence.last) continue;
        read_chunk(p, item, z, token, columns, c);
        if (reverse) {
            T* d_o = queries(values, z.ldv, z);
            read_d_o(p, item, z, c, d_o);
            find_d_values<T>(p, z, c, d_o, b, z.value_vectors, z.ldv, values);
            advance_adjoint<T>(z, c, values, d_o, z.value_vectors, z.ldv, b);
            find_d_values<T>(p, z, c, nullptr, a, z.key_vectors, z.ldk, a_error);
            advance_adjoint<T>(z, c, a_error, nullptr, z.key_vectors, z.ldk, a);
        } else {
            find_errors(z, c, b, z.value_vectors, z.ldv, c.error);
            advance(z, c, c.error, z.value_vectors, z.ldv, b);
            memset(a_error, 0, sizeof(T) * z.steps * z.ldk);
            find_errors(z, c, a, z.key_vectors, z.ldk, a_error);
            advance(z, c, a_error, z.key_vectors, z.ldk, a);
        }
    }
    for (int i = 0; i < z.key; ++i) memcpy(static_cast<T*>(a_out) + i * p.key_dim, a + i * z.ldk, sizeof(T) * z.key);
    for (int i = 0; i < z.key; ++i)
        memcpy(static_cast<T*>(b_out) + i * p.value_dim + item.column, b + i * z.ldv, sizeof(T) * z.value);
}

// out = a state + b
template <class T>
void compose(const Problem& p, const void* a_in, const void* b_in, const void* state_in, void* out_in) {
    const T *a = static_cast<const T*>(a_in), *b = static_cast<const T*>(b_in), *state = static_cast<const T*>(state_in);
    for (int64_t i = 0; i < p.key_dim; ++i) {
        T* __restrict__ out = static_cast<T*>(out_in) + i * p.value_dim;
        for (int64_t j = 0; j < p.value_dim; ++j) out[j] = b[i * p.value_dim + j];
        for (int64_t k = 0; k < p.key_dim; ++k)
            for (int64_t j = 0; j < p.value_dim; ++j) out[j] += a[i * p.key_dim + k] * state[k * p.value_dim + j];
    }
}

void any_forward(const Problem& p, int64_t item, const void* states) {
    p.wide ? forward<double>(p, item, states) : forward<float>(p, item, states);
}
void any_backward(const Problem& p, int64_t item, const void* states) {
    p.wide ? backward<double>(p, item, states) : backward<float>(p, item, states);
}
void any_summary(const Problem& p, int64_t item, bool reverse, void* a, void* b) {
    p.wide ? summary<double>(p, item, reverse, a, b) : summary<float>(p, item, reverse, a, b);
}
void any_compose(const Problem& p, const void* a, const void* b, const void* state, void* out) {
    p.wide ? compose<double>(p, a, b, state, out) : compose<float>(p, a, b, state, out);
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
