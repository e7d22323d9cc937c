// Segments of time as single steps, so that several can be worked on at once.
#pragma once

#include "backward.h"

namespace deltaproduct {
namespace DP_ARCH {

// A segment as one step, S ↦ A S + B: A is the segment run on the identity without values, B on zero with them. In
// reverse, dS ↦ A dS + B, where A is the transpose of the other.
template <class T>
void summary(const EngineCall& p, int64_t number, bool reverse, void* a_out, void* b_out) {
    const Item item(p, number);
    const Sizes<T> z(p, item.columns);
    Chunk<T> c;
    Ahead ahead;
    Room<T> room;
    T *a, *a_error, *values;
    const auto lay_out = [&](void* memory) {
        Pieces pieces(memory);
        c.lay_out(pieces, z, p.g.data != nullptr, &ahead);
        room.lay_out(pieces, z);
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
        read_chunk(p, item, z, token, room, c);
        if (reverse) {
            T* d_o = queries(values, z.ldv, z);
            read_d_o(p, item, z, c, d_o);
            find_d_values<T>(p, z, c, d_o, b, z.value_vectors, z.ldv, values);
            advance_adjoint<T>(z, c, true, values, z.value_vectors, z.ldv, b);
            find_d_values<T>(p, z, c, nullptr, a, z.key_vectors, z.ldk, a_error);
            advance_adjoint<T>(z, c, false, a_error, z.key_vectors, z.ldk, a);
        } else {
            find_errors(z, c, b, z.ldv, z.value_vectors, c.error, z.ldv);
            advance(z, c, c.error, z.ldv, z.value_vectors, b, z.ldv);
            memset(a_error, 0, sizeof(T) * z.steps * z.ldk);
            find_errors(z, c, a, z.ldk, z.key_vectors, a_error, z.ldk);
            advance(z, c, a_error, z.ldk, z.key_vectors, a, z.ldk);
        }
    }
    for (int i = 0; i < z.key; ++i) memcpy(static_cast<T*>(a_out) + i * p.key_dim, a + i * z.ldk, sizeof(T) * z.key);
    for (int i = 0; i < z.key; ++i)
        memcpy(static_cast<T*>(b_out) + i * p.value_dim + item.column, b + i * z.ldv, sizeof(T) * z.value);
}

// out = a state + b
template <class T>
void compose(const EngineCall& p, const void* a_in, const void* b_in, const void* state_in, void* out_in) {
    const T *a = static_cast<const T*>(a_in), *b = static_cast<const T*>(b_in),
            *state = static_cast<const T*>(state_in);
    for (int64_t i = 0; i < p.key_dim; ++i) {
        T* __restrict__ out = static_cast<T*>(out_in) + i * p.value_dim;
        for (int64_t j = 0; j < p.value_dim; ++j) out[j] = b[i * p.value_dim + j];
        for (int64_t k = 0; k < p.key_dim; ++k)
            for (int64_t j = 0; j < p.value_dim; ++j) out[j] += a[i * p.key_dim + k] * state[k * p.value_dim + j];
    }
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
