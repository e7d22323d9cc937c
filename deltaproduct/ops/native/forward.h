// The forward pass: E = (I + L)⁻¹ (V − K̃ S), then O = scale (Q̃ S + P E) and S ← exp(G) S + W̃ᵀ E, chunk by chunk.
#pragma once

#include "chunk.h"

namespace deltaproduct {
namespace DP_ARCH {

// E = (I + L)⁻¹ (V − K̃ S), in the place of V.
template <class T>
void find_errors(const Sizes<T>& z, const Chunk<T>& c, const T* state, int vectors, int64_t ldv, T* error) {
    product<true>(*c.ahead, c.steps, vectors, error, ldv, true, times(c.seen, z.ldk, state, ldv, AllTerms{z.key}));
    solve<false>(*c.ahead, c.steps, vectors, c.pairs, z.lds, error, ldv);
}

// S ← exp(G_C) S + W̃ᵀ E
template <class T>
void advance(const Sizes<T>& z, const Chunk<T>& c, const T* error, int vectors, int64_t ldv, T* state) {
    if (c.gated()) scale_state(z, ldv, c.whole, state);
    product<false>(
        *c.ahead, z.key, vectors, state, ldv, true, transposed_times(c.write, z.ldk, error, ldv, AllTerms{c.steps}));
}

template <class T>
void forward(const Problem& p, int64_t number, const void* segment_states) {
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
    const int n = int(p.steps);

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
            find_errors(z, c, state, z.value_vectors, z.ldv, c.error);
            const auto own_and_earlier = [&](int, int end) { return Terms{0, end * n}; };
            product<false>(
                *c.ahead, c.tokens, z.value_vectors, out, z.ldv, false,
                times(queries(c.seen, z.ldk, z), z.ldk, state, z.ldv, AllTerms{z.key}),
                times(queries(c.pairs, z.lds, z), z.lds, c.error, z.ldv, own_and_earlier));
            write_rows(
                p.o, item.sequence.batch, token, item.head, item.column, c.tokens, 1, z.value, out, z.ldv, T(p.scale));
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

}  // namespace DP_ARCH
}  // namespace deltaproduct
