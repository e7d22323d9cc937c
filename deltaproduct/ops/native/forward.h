// The forward pass: E = (I + L)⁻¹ (V − K̃ S), then O = scale (Q̃ S + P E) and S ← exp(G) S + W̃ᵀ E, chunk by chunk.
#pragma once

#include "chunk.h"

namespace deltaproduct {
namespace DP_ARCH {

// E = (I + L)⁻¹ (V − K̃ S), in the place of V. So many vectors of columns, of a state with rows lds apart.
template <class T>
void find_errors(
    const Sizes<T>& z, const Chunk<T>& c, const T* state, int64_t lds, int vectors, T* error, int64_t lde) {
    product<true>(*c.ahead, c.steps, vectors, error, lde, true, times(c.seen, z.ldk, state, lds, AllTerms{z.key}));
    solve<false>(*c.ahead, c.steps, vectors, c.pairs, z.lds, error, lde);
}

// S ← exp(G_C) S + W̃ᵀ E
template <class T>
void advance(const Sizes<T>& z, const Chunk<T>& c, const T* error, int64_t lde, int vectors, T* state, int64_t lds) {
    if (c.gated()) scale_state(z, vectors, lds, c.whole, state);
    product<false>(
        *c.ahead, z.key, vectors, state, lds, true, transposed_times(c.write, z.ldk, error, lde, AllTerms{c.steps}));
}

// All of a chunk for so many vectors of columns, from column `first` on, of which `state` begins with the first.
template <class T>
void run_columns(
    const EngineCall& p, const Sizes<T>& z, const Chunk<T>& c, int first, int vectors, T* state, int64_t lds, T* out) {
    T* error = c.error + first;
    find_errors(z, c, state, lds, vectors, error, z.ldv);
    const auto own_and_earlier = [&](int, int end) { return Terms{0, end * int(p.steps)}; };
    product<false>(
        *c.ahead, c.tokens, vectors, out + first, z.ldv, false,
        times(queries(c.seen, z.ldk, z), z.ldk, state, lds, AllTerms{z.key}),
        times(queries(c.pairs, z.lds, z), z.lds, error, z.ldv, own_and_earlier));
    advance(z, c, error, z.ldv, vectors, state, lds);
}

// The whole of a short sequence, where its columns are whole vectors: the state goes from tensor to tensor, a few
// columns at a time, which stay in the nearest cache while they are read, used and moved on. A token costs little more
// than that.
template <class T>
void run_in_place(const EngineCall& p, const Item& item, const Sizes<T>& z, const Chunk<T>& c, T* out) {
    constexpr int AT_ONCE = 4;
    const int64_t ld = p.value_dim, offset = (item.number * p.value_heads + item.head) * p.key_dim * ld + item.column;
    const T* from = p.initial_state ? static_cast<const T*>(p.initial_state) + offset : nullptr;
    T* state = static_cast<T*>(p.final_state) + offset;
    for (int j = 0; j < z.value_vectors; j += AT_ONCE) {
        const int first = j * width<T>, vectors = at_most(z.value_vectors - j, AT_ONCE);
        for (int i = 0; i < z.key && from != state; ++i) {
            if (from)
                memcpy(state + i * ld + first, from + i * ld + first, sizeof(T) * vectors * width<T>);
            else
                memset(state + i * ld + first, 0, sizeof(T) * vectors * width<T>);
        }
        run_columns(p, z, c, first, vectors, state + first, ld, out);
    }
}

template <class T>
void forward(const EngineCall& p, int64_t number, const void* segment_states) {
    const Item item(p, number);
    const Sizes<T> z(p, item.columns);
    Chunk<T> c;
    Ahead ahead;
    Room<T> room;
    T* out;
    const auto lay_out = [&](void* memory) {
        Pieces pieces(memory);
        c.lay_out(pieces, z, p.g.data != nullptr, &ahead);
        room.lay_out(pieces, z);
        out = pieces.take<T>(p.chunk_tokens * z.ldv);
        return pieces.used();
    };
    lay_out(scratch(lay_out(nullptr)));
    T* state = c.state;
    const auto write_outputs = [&] {
        write_rows(
            p.o, item.sequence.batch, c.token, item.head, item.column, c.tokens, 1, z.value, out, z.ldv, T(p.scale));
    };

    const int64_t length = item.sequence.last - item.sequence.first;
    const bool one_chunk = 0 < length && length <= p.chunk_tokens && p.segments == 1;  // segments would write the same
    if (one_chunk && !p.states && z.value % width<T> == 0) {
        read_chunk(p, item, z, item.sequence.first, room, c);
        run_in_place(p, item, z, c, out);
        write_outputs();
        return;
    }
    if (segment_states && item.segment > 0)
        read_state(p, item, z, segment_states, item.segment * p.sequences + item.number, state);
    else
        read_state(p, item, z, p.initial_state, item.number, state);
    for (int64_t span = item.first_span; span < item.last_span; ++span) {
        if (p.states) write_state(p, item, z, state, p.states, item.sequence.first_slot + span);
        for (int64_t i = 0; i < p.chunks_per_state; ++i) {
            const int64_t token = item.sequence.first + (span * p.chunks_per_state + i) * p.chunk_tokens;
            if (token >= item.sequence.last) break;
            ahead.forget();
            fetch_inputs(p, item, z, token + p.chunk_tokens, ahead);
            read_chunk(p, item, z, token, room, c);
            run_columns(p, z, c, 0, z.value_vectors, state, z.ldv, out);
            write_outputs();
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

}  // namespace DP_ARCH
}  // namespace deltaproduct
