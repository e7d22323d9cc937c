// One call of the engine, as plain C data: what Python fills in and every kernel reads.
//
// Letters as in ops/README.md: B batch, T tokens, N Householder steps per token, H query/key heads, HV value heads,
// K key and V value dimension. The mirror of these structures is ops/native/library.py.
#pragma once

#include <cstdint>

namespace deltaproduct {

constexpr int MAX_CHUNK_TOKENS = 64, MAX_CHUNKS_PER_STATE = 8;

enum Dtype : int32_t { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

// A tensor whose last dimension (K or V; nothing for beta and g) is contiguous. Strides are in elements.
struct Tensor {
    void* data;  // null: there is none
    int64_t batch, token, step, head;
    int32_t dtype;
};

struct EngineCall {
    int64_t batch, length, steps, heads, value_heads, key_dim, value_dim;
    int64_t sequences;          // B, or the number of packed sequences
    const int64_t* cu_seqlens;  // [sequences + 1] where sequences are packed, else null
    double scale;
    double norm_eps;  // not 0: q and k are first divided by √(Σx² + norm_eps), and the gradients are those of the given

    // How the work is cut; no result depends on it but through rounding.
    int32_t wide;              // compute in double
    int32_t chunk_tokens;      // tokens in a chunk, at most MAX_CHUNK_TOKENS
    int32_t chunks_per_state;  // a state is kept at the start of every so many chunks
    int32_t value_blocks;      // a head's V columns are independent: blocks of them are separate work
    int32_t segments;          // spans of time worked on side by side, joined by their summaries (A, B)
    int32_t threads;

    Tensor q, k, v, beta, g;
    Tensor o;         // forward
    Tensor d_o;       // backward, as all that follow; d_q, d_k, d_beta and d_g have value_heads · value_blocks heads,
    Tensor d_q, d_k;  // which the caller sums
    Tensor d_v, d_beta, d_g;

    // Contiguous, in the type that is computed in. Null where not given or not asked for.
    const void* initial_state;  // [sequences,HV,K,V]
    void* final_state;          // [sequences,HV,K,V]
    void* states;               // [slots,HV,K,V], see `first_slot`; written by the forward, read by the backward
    const void* d_final_state;  // [sequences,HV,K,V]
    void* d_initial_state;      // [sequences,HV,K,V]
};

// A sequence's tokens, and where its kept states begin: ⌊first / span⌋ + number, which leaves every sequence room for
// ⌈length / span⌉ of them, whatever the lengths, without adding them up.
struct Sequence {
    int64_t batch, first, last, first_slot, end_slot;
};

inline Sequence sequence_of(const int64_t* cu_seqlens, int64_t length, int64_t span, int64_t number) {
    if (!cu_seqlens) {
        const int64_t slots = (length + span - 1) / span;
        return {number, 0, length, number * slots, (number + 1) * slots};
    }
    const int64_t first = cu_seqlens[number], last = cu_seqlens[number + 1];
    return {0, first, last, first / span + number, last / span + number + 1};
}
inline Sequence sequence_of(const EngineCall& p, int64_t number) {
    return sequence_of(p.cu_seqlens, p.length, int64_t(p.chunk_tokens) * p.chunks_per_state, number);
}

// One piece of work of decoding a token, or of a norm (program.h, norm.h): rows and columns of what, and which pointers
// are used, is said there.
// The mirror of this structure is ops/native/library.py.
enum InstructionKind : int32_t {
    PRODUCT,
    PRODUCT_ADDED,
    NORM,
    CONVOLUTION,
    SILU_TIMES,
    SIGMOID,
    GATE,
    TOKEN,
    NORM_BACKWARD
};
enum Activation : int32_t { IDENTITY, SILU, RELU };
struct Instruction {
    int32_t kind, activation;
    int64_t after;  // it needs the results of all instructions before this one
    int64_t batch, rows, columns;
    const float *w, *x, *u;
    float *y, *z;
    const EngineCall* call;
    double a;
};

// Mamba's selective scan (selective_scan.h): B batch, T tokens, I channels, N state size. Everything is float32.
// The mirror of this structure is ops/native/library.py.
constexpr int SCAN_TOKENS = 16;    // tokens in a chunk: the state is kept at the start of each
constexpr int SCAN_CHANNELS = 64;  // in a work item: a whole number of vectors
struct SelectiveScan {
    int64_t batch, length, channels, state_size;
    int64_t sequences;          // B, or the number of packed sequences
    const int64_t* cu_seqlens;  // [sequences + 1] where sequences are packed, else null
    int32_t allow_neg_eigval, threads;

    Tensor x, dt, b, c, y;  // rows of I or N
    Tensor d_y, d_x, d_dt;  // backward, as all that begins with d_
    // Contiguous. Null where not given or not asked for.
    const float* a;              // [N,I]
    const float* initial_state;  // [sequences,I,N]
    float* final_state;          // [sequences,I,N]
    float* states;               // [slots,N,I], a sequence's from ⌊first / SCAN_TOKENS⌋ + number on
    const float* d_final_state;  // [sequences,I,N]
    float *d_b, *d_c;            // [blocks,B,T,N], which the caller sums over the first dimension, as the next
    float* d_a;                  // [sequences,I,N]
    float* d_initial_state;      // [sequences,I,N]

    int64_t blocks() const { return (channels + SCAN_CHANNELS - 1) / SCAN_CHANNELS; }
};

inline Sequence sequence_of(const SelectiveScan& p, int64_t number) {
    return sequence_of(p.cu_seqlens, p.length, SCAN_TOKENS, number);
}

// How many units of work an instruction has, and how many a thread takes at once.
struct Units {
    int64_t count, grain;
};

// What one instruction set offers the engine. `item` numbers segments × sequences × value heads × value blocks, the
// blocks fastest.
struct Kernels {
    const char* name;
    void (*forward)(const EngineCall&, int64_t item, const void* segment_states);
    void (*backward)(const EngineCall&, int64_t item, const void* segment_states);
    // (A [K,K], B [K,V]) of an item's segment: it maps a state S at its start to A S + B at its end, and in reverse.
    void (*summary)(const EngineCall&, int64_t item, bool reverse, void* a, void* b);
    // out [K,V] = a state + b
    void (*compose)(const EngineCall&, const void* a, const void* b, const void* state, void* out);
    Units (*units)(const Instruction&);
    void (*run_units)(const Instruction&, int64_t from, int64_t to);  // these units of it
    void (*selective_scan)(const SelectiveScan&, int64_t item, bool reverse);  // items: sequences × blocks of channels
};

extern const Kernels avx512_kernels, avx2_kernels, portable_kernels;

// Memory of at least so many bytes for the calling thread alone, aligned for any vector; kept between calls.
void* scratch(int64_t bytes);

}  // namespace deltaproduct
