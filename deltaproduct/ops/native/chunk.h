// One chunk of one value head: where its data lie, and all that follows from its inputs before any state enters.
//
// Names as in ops/README.md. The keys and queries of a chunk are the rows of one matrix, and so are L and P, and the
// gradients of values and outputs: most products serve both at once.
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

    Item(const EngineCall& p, int64_t item) {
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
    int key, value;   // K, and this block's V
    int steps, rows;  // of a full chunk: its steps, rounded up, and with the tokens' queries below
    int key_vectors, value_vectors, step_vectors;
    int64_t ldk, ldv, lds;  // between rows of K, of V and of steps

    Sizes(const EngineCall& p, int64_t columns) {
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
    T* beta;            // [steps]
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
        beta = pieces.take<T>(z.steps);
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
void read_state(const EngineCall& p, const Item& item, const Sizes<T>& z, const void* states, int64_t index, T* to) {
    memset(to, 0, sizeof(T) * z.state());
    if (!states) return;
    const T* from =
        static_cast<const T*>(states) + (index * p.value_heads + item.head) * p.key_dim * p.value_dim + item.column;
    for (int i = 0; i < z.key; ++i) memcpy(to + i * z.ldv, from + i * p.value_dim, sizeof(T) * z.value);
}

template <class T>
void write_state(const EngineCall& p, const Item& item, const Sizes<T>& z, const T* from, void* states, int64_t index) {
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
void scale_state(const Sizes<T>& z, int vectors, int64_t ld, T factor, T* state) {
    with_count(vectors, [&](auto count) {
        for (int i = 0; i < z.key; ++i)
            for (int j = 0; j < count; ++j)
                store(state + i * ld + j * width<T>, load(state + i * ld + j * width<T>) * factor);
    });
}

// Decays within a chunk, as products of the tokens' gates. Products in double keep each to a rounding of the type that
// is computed in, and unlike differences of sums they need no care where a gate is −∞.
template <class T>
void read_gates(const EngineCall& p, const Item& item, const Sizes<T>& z, Chunk<T>& c) {
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
void finish_pairs(const EngineCall& p, const Sizes<T>& z, const Chunk<T>& c, T* pairs) {
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

// a b for the rows of keys, on and below the diagonal in blocks of a vector's width.
template <class T>
void lower_product(const Sizes<T>& z, const Chunk<T>& c, int terms, const T* a, int64_t lda, const T* b, T* pairs) {
    for (int i = 0; i < c.steps; i += width<T>)
        product<false>(
            *c.ahead, at_most(c.steps - i, width<T>), i / width<T> + 1, pairs + i * z.lds, z.lds, false,
            times(a + i * lda, lda, b, z.lds, AllTerms{terms}));
}

// a b for the rows of queries.
template <class T>
void query_product(const Sizes<T>& z, const Chunk<T>& c, int terms, const T* a, int64_t lda, const T* b, T* pairs) {
    product<false>(
        *c.ahead, c.tokens, z.step_vectors, queries(pairs, z.lds, z), z.lds, false,
        times(queries(a, lda, z), lda, b, z.lds, AllTerms{terms}));
}

template <class T>
void scale_columns(int rows, int vectors, const T* factors, T* x, int64_t ld) {
    with_count(vectors, [=](auto count) {
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < count; ++j)
                store(x + i * ld + j * width<T>, load(x + i * ld + j * width<T>) * load(factors + j * width<T>));
    });
}

template <class To, class From>
DP_INLINE void convert_row(int count, const From* __restrict__ from, To* __restrict__ to) {
    constexpr int W = width<double>;
    typedef From Some __attribute__((vector_size(W * sizeof(From)), aligned(sizeof(From)), may_alias));
    typedef To Other __attribute__((vector_size(W * sizeof(To)), aligned(sizeof(To)), may_alias));
    for (int i = 0; i < count; i += W)
        *reinterpret_cast<Other*>(to + i) = __builtin_convertvector(*reinterpret_cast<const Some*>(from + i), Other);
}

// What the interactions are computed in.
template <class T>
struct Room {
    T* columns;            // [K, steps] keys transposed
    double* wide_columns;  // the same
    double* wide_beta;     // [steps]
    double* wide_pairs;    // [width, steps]

    void lay_out(Pieces& pieces, const Sizes<T>& z) {
        columns = pieces.take<T>(z.key_vectors * width<T> * z.lds);
        if constexpr (sizeof(T) == sizeof(double)) return;
        wide_columns = pieces.take<double>(z.key * z.lds);
        wide_beta = pieces.take<double>(z.steps);
        wide_pairs = pieces.take<double>(width<double> * z.lds);
    }
};

// K Kᵀ β on and below the diagonal: always in double, and then rounded. Where keys are almost parallel, an error e_s is
// the end of a long sum of L_sr e_r that nearly cancels; a product's own rounding in each L_sr would be the largest
// error of all, several times that of the plain loop (docs/LOG.md).
template <class T>
void key_interactions(const Sizes<T>& z, const Chunk<T>& c, const Room<T>& room) {
    if constexpr (sizeof(T) == sizeof(double)) {
        lower_product(z, c, z.key, c.rows, z.ldk, room.columns, c.pairs);
        scale_columns(c.steps, z.step_vectors, c.beta, c.pairs, z.lds);
    } else {
        constexpr int W = width<double>;
        convert_row(int(z.key * z.lds), room.columns, room.wide_columns);
        convert_row(z.steps, c.beta, room.wide_beta);
        for (int i = 0; i < c.steps; i += W) {
            const int rows = at_most(c.steps - i, W), vectors = i / W + 1;
            product<false>(
                *c.ahead, rows, vectors, room.wide_pairs, z.lds, false,
                transposed_times(room.wide_columns + i, z.lds, room.wide_columns, z.lds, AllTerms{z.key}));
            scale_columns(rows, vectors, room.wide_beta, room.wide_pairs, z.lds);
            for (int r = 0; r < rows; ++r)
                convert_row(vectors * W, room.wide_pairs + r * z.lds, c.pairs + (i + r) * z.lds);
        }
    }
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
            const T* row = x + i * ld;
            T* d_row = d + i * ld;
            const T along = dot(count, row, d_row);
            for (int j = 0; j < count; ++j)
                store(d_row + j * width<T>, (load(d_row + j * width<T>) - load(row + j * width<T>) * along) * norms[i]);
        }
    });
}

// Everything about a chunk that no state enters.
template <class T>
void read_chunk(
    const EngineCall& p, const Item& item, const Sizes<T>& z, int64_t token, const Room<T>& room, Chunk<T>& c) {
    const int n = int(p.steps);
    c.token = token;
    c.tokens = at_most(item.sequence.last - token, p.chunk_tokens);
    c.steps = c.tokens * n;
    const int64_t batch = item.sequence.batch;
    read_rows(p.beta, batch, token, item.head, 0, c.tokens, n, 1, c.beta, 1);
    read_rows(p.k, batch, token, item.key_head, 0, c.tokens, n, z.key, c.rows, z.ldk);
    read_rows(p.q, batch, token, item.key_head, 0, c.tokens, 1, z.key, queries(c.rows, z.ldk, z), z.ldk);
    read_rows(p.v, batch, token, item.head, item.column, c.tokens, n, z.value, c.error, z.ldv);
    if (p.norm_eps != 0) {
        normalise_rows(p.norm_eps, c.steps, z.key_vectors, c.rows, z.ldk, c.norms);
        normalise_rows(p.norm_eps, c.tokens, z.key_vectors, queries(c.rows, z.ldk, z), z.ldk, c.norms + z.steps);
    }
    scale_rows(c.steps, z.key_vectors, c.beta, c.rows, z.ldk, c.scaled);
    zero_rows(c.scaled, z.ldk, c.steps, z.steps);
    zero_rows(c.error, z.ldv, c.steps, z.steps);
    if (c.gated()) {
        read_gates(p, item, z, c);
        scale_rows(c.steps, z.key_vectors, c.to_end, c.scaled, z.ldk, c.write);
        scale_rows(c.steps, z.key_vectors, c.from_start, c.rows, z.ldk, c.seen);
        scale_rows(
            c.tokens, z.key_vectors, c.from_start + z.steps, queries(c.rows, z.ldk, z), z.ldk,
            queries(c.seen, z.ldk, z));
    }
    transpose(z.steps, z.key_vectors * width<T>, c.rows, z.ldk, room.columns, z.lds);
    key_interactions(z, c, room);
    query_product(z, c, z.key, c.rows, z.ldk, room.columns, c.pairs);
    scale_columns(c.tokens, z.step_vectors, c.beta, queries(c.pairs, z.lds, z), z.lds);
    finish_pairs(p, z, c, c.pairs);
}

// Plan to fetch what the chunk at `token` reads first.
template <class T>
void fetch_inputs(const EngineCall& p, const Item& item, const Sizes<T>& z, int64_t token, Ahead& ahead) {
    if (token < item.sequence.first || token >= item.sequence.last) return;
    const int n = int(p.steps), tokens = at_most(item.sequence.last - token, p.chunk_tokens);
    const int64_t batch = item.sequence.batch;
    add_rows(ahead, false, p.k, batch, token, item.key_head, 0, tokens, n, z.key);
    add_rows(ahead, false, p.q, batch, token, item.key_head, 0, tokens, 1, z.key);
    add_rows(ahead, false, p.v, batch, token, item.head, item.column, tokens, n, z.value);
}

// Plan to fetch what the chunk at `token` reads and writes in the second half of its backward.
template <class T>
void fetch_results(const EngineCall& p, const Item& item, const Sizes<T>& z, int64_t token, Ahead& ahead) {
    const int n = int(p.steps), tokens = at_most(item.sequence.last - token, p.chunk_tokens);
    const int64_t batch = item.sequence.batch;
    add_rows(ahead, false, p.d_o, batch, token, item.head, item.column, tokens, 1, z.value);
    add_rows(ahead, true, p.d_v, batch, token, item.head, item.column, tokens, n, z.value);
    add_rows(ahead, true, p.d_k, batch, token, item.part, 0, tokens, n, z.key);
    add_rows(ahead, true, p.d_q, batch, token, item.part, 0, tokens, 1, z.key);
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
