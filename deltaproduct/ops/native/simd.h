// Small dense products on vectors of one instruction set: tiles held in registers, triangular solves, transposes.
//
// Compiled once for every instruction set, into a namespace of its own (DP_ARCH); only plain C headers are used, so
// that no inline function of the C++ library is compiled for instructions that the machine at hand may lack. All
// matrices are row-major; `ld` is the distance between rows, and the last dimension is a whole number of vectors.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(DP_ARCH) || !defined(DP_VECTOR_BYTES) || !defined(DP_REGISTERS)
#error "define the instruction set before including simd.h"
#endif

#define DP_INLINE inline __attribute__((always_inline))

namespace deltaproduct {
namespace DP_ARCH {

template <class T>
constexpr int width = DP_VECTOR_BYTES / int(sizeof(T));

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(DP_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
DP_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
DP_INLINE void store(T* p, Vec<T> x) {
    *reinterpret_cast<Vec<T>*>(p) = x;
}

// f(n) with n known to the compiler where it is one of the usual numbers of vectors in a row, so that loops unroll.
template <int N>
struct Count {
    constexpr operator int() const { return N; }
};
template <class F>
DP_INLINE void with_count(int n, F f) {
    switch (n) {
        case 1: return f(Count<1>{});
        case 2: return f(Count<2>{});
        case 4: return f(Count<4>{});
        case 8: return f(Count<8>{});
        default: return f(n);
    }
}

// By halves: lane after lane, every addition would wait for the one before.
template <class T, int BYTES>
DP_INLINE T sum_of_bytes(const T* x) {
    if constexpr (BYTES == 2 * sizeof(T)) {
        return x[0] + x[1];
    } else {
        typedef T Half __attribute__((vector_size(BYTES / 2)));
        Half low, high;
        memcpy(&low, x, sizeof low);
        memcpy(&high, x + BYTES / 2 / sizeof(T), sizeof high);
        low += high;
        return sum_of_bytes<T, BYTES / 2>(reinterpret_cast<const T*>(&low));
    }
}
template <class T>
DP_INLINE T sum_of(Vec<T> x) {
    return sum_of_bytes<T, DP_VECTOR_BYTES>(reinterpret_cast<const T*>(&x));
}

template <class T>
struct LaneNumbers;
template <>
struct LaneNumbers<float> {
    typedef int32_t type __attribute__((vector_size(DP_VECTOR_BYTES)));
};
template <>
struct LaneNumbers<double> {
    typedef int64_t type __attribute__((vector_size(DP_VECTOR_BYTES)));
};

// x with all but its first lanes set to zero
template <class T>
DP_INLINE Vec<T> first_lanes(Vec<T> x, int count) {
    typename LaneNumbers<T>::type lane;
    for (int i = 0; i < width<T>; ++i) lane[i] = i;
    typename LaneNumbers<T>::type bits;
    memcpy(&bits, &x, sizeof x);
    bits &= lane < count;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Rows of tensors to be fetched while the products run, a few cache lines with each tile: asked for all at once, they
// would wait in line for the few misses that a core can have under way, and the core with them.
class Ahead {
public:
    void forget() { count_ = done_ = 0; }

    // tokens × steps rows of so many bytes, which will be read or written
    void add(const char* first, int tokens, int64_t token, int steps, int64_t step, int64_t bytes, bool write) {
        runs_[count_++] = {first, tokens, steps, 0, token - steps * step, step, bytes, write};
    }

    DP_INLINE void fetch() {
        for (int64_t bytes = 0; bytes < PER_TILE && done_ < count_;) {
            Run& run = runs_[done_];
            for (int64_t i = 0; i < run.bytes; i += LINE) {
                if (run.write)
                    __builtin_prefetch(run.row + i, 1);
                else
                    __builtin_prefetch(run.row + i, 0);
            }
            bytes += run.bytes;
            run.row += run.step;
            if (++run.at == run.steps) {
                run.at = 0;
                run.row += run.rest;
                if (--run.tokens == 0) ++done_;
            }
        }
    }

private:
    static constexpr int64_t LINE = 64, PER_TILE = 8 * LINE;
    struct Run {
        const char* row;
        int tokens, steps, at;  // tokens left, rows a token, rows done of this token
        int64_t rest, step, bytes;
        bool write;
    };
    Run runs_[4];
    int count_ = 0, done_ = 0;
};

// The terms k of a product that a block of rows [first, last) needs: all of them, or those on one side of a diagonal;
// in one span or, where keys and queries are summed over together, in two.
struct Terms {
    int from, to, then_from = 0, then_to = 0;
};
struct AllTerms {
    int count;
    DP_INLINE Terms operator()(int, int) const { return {0, count}; }
};

// A product a b; TRANSPOSED: element (i,k) of a is at a[k·lda + i].
template <bool TRANSPOSED, class T, class Range>
struct Product {
    const T* a;
    int64_t lda;
    const T* b;
    int64_t ldb;
    Range terms;

    DP_INLINE Product from_column(int j) const { return {a, lda, b + j, ldb, terms}; }
};
template <class T, class Range>
DP_INLINE Product<false, T, Range> times(const T* a, int64_t lda, const T* b, int64_t ldb, Range terms) {
    return {a, lda, b, ldb, terms};
}
template <class T, class Range>
DP_INLINE Product<true, T, Range> transposed_times(const T* a, int64_t lda, const T* b, int64_t ldb, Range terms) {
    return {a, lda, b, ldb, terms};
}

// sum ± the rows [first, first + MR) and the first NV vectors of columns of a product
template <int MR, int NV, bool MINUS, class T, bool TRANSPOSED, class Range>
DP_INLINE void accumulate(Vec<T> (&sum)[MR][NV], int first, const Product<TRANSPOSED, T, Range>& p) {
    const Terms terms = p.terms(first, first + MR);
    const T* a = p.a + first * (TRANSPOSED ? 1 : p.lda);
    const auto span = [&](int from, int to) __attribute__((always_inline)) {
        for (int k = from; k < to; ++k) {
            Vec<T> row[NV];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) row[j] = load(p.b + k * p.ldb + j * width<T>);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) {
                const T x = TRANSPOSED ? a[k * p.lda + i] : a[i * p.lda + k];
#pragma GCC unroll 4
                for (int j = 0; j < NV; ++j) {
                    if constexpr (MINUS)
                        sum[i][j] -= row[j] * x;
                    else
                        sum[i][j] += row[j] * x;
                }
            }
        }
    };
    span(terms.from, terms.to);
    span(terms.then_from, terms.then_to);
}

// c (+)= ± the sum of products, for MR rows and NV vectors of columns. All sums stay in registers throughout.
template <int MR, int NV, bool MINUS, class T, class... Products>
DP_INLINE void tile(int first, T* __restrict__ c, int64_t ldc, bool add, const Products&... products) {
    c += first * ldc;
    Vec<T> sum[MR][NV];
    if (add) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) sum[i][j] = load(c + i * ldc + j * width<T>);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) sum[i][j] = Vec<T>{};
    }
    (accumulate<MR, NV, MINUS, T>(sum, first, products), ...);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) store(c + i * ldc + j * width<T>, sum[i][j]);
}

// Sixteen sums in flight hide the latency of a multiply-add where there are registers for them, eight elsewhere.
constexpr int widest_tile = DP_REGISTERS >= 32 ? 4 : 2;
constexpr int tile_rows(int vectors) {
    return vectors == 4 ? 4 : vectors == 2 && DP_REGISTERS < 32 ? 4 : vectors == 1 && DP_REGISTERS >= 32 ? 16 : 8;
}

// The rows from `first` on by tiles of MR rows, and what is left by tiles of half as many.
template <int MR, int NV, bool MINUS, class T, class... Products>
DP_INLINE void panel(Ahead& ahead, int first, int rows, T* c, int64_t ldc, bool add, const Products&... products) {
    for (; first + MR <= rows; first += MR) {
        if constexpr (MR >= 4) ahead.fetch();
        tile<MR, NV, MINUS>(first, c, ldc, add, products...);
    }
    if constexpr (MR > 1) panel<MR / 2, NV, MINUS>(ahead, first, rows, c, ldc, add, products...);
}

template <int NV, bool MINUS, class T, class... Products>
void columns(Ahead& ahead, int rows, T* c, int64_t ldc, bool add, Products... products) {
    panel<tile_rows(NV), NV, MINUS>(ahead, 0, rows, c, ldc, add, products...);
}

// c [rows, vectors·width] = ± the sum of products, or c += it where `add`. A panel of b stays in the nearest cache
// while rows pass, and `ahead` is fetched meanwhile.
template <bool MINUS, class T, class... Products>
void product(Ahead& ahead, int rows, int vectors, T* c, int64_t ldc, bool add, Products... products) {
    constexpr int W = width<T>;
    int j = 0;
    if constexpr (widest_tile == 4)
        for (; j + 4 <= vectors; j += 4)
            columns<4, MINUS>(ahead, rows, c + j * W, ldc, add, products.from_column(j * W)...);
    for (; j + 2 <= vectors; j += 2)
        columns<2, MINUS>(ahead, rows, c + j * W, ldc, add, products.from_column(j * W)...);
    for (; j < vectors; ++j) columns<1, MINUS>(ahead, rows, c + j * W, ldc, add, products.from_column(j * W)...);
}

// Substitution goes by blocks of eight rows: within a block row waits for row, and two vectors side by side, where
// there are registers for them, fill the time; between blocks it is a product.
constexpr int solve_rows = 8, solve_vectors = DP_REGISTERS >= 32 ? 2 : 1;

// x ← (I + L)⁻¹ x for eight rows and NV vectors, L strictly lower; with TRANSPOSED, x ← (I + L)⁻ᵀ x.
template <int NV, bool TRANSPOSED, class T>
DP_INLINE void solve_block(const T* lower, int64_t ldl, T* x, int64_t ldx) {
    constexpr int R = solve_rows;
    Vec<T> row[R][NV];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) row[i][j] = load(x + i * ldx + j * width<T>);
#pragma GCC unroll 8
    for (int n = 0; n < R - 1; ++n) {
        const int r = TRANSPOSED ? R - 1 - n : n;  // done; its part is taken from those that wait for it
#pragma GCC unroll 8
        for (int i = n + 1; i < R; ++i) {
            const int s = TRANSPOSED ? R - 1 - i : i;
            const T l = TRANSPOSED ? lower[r * ldl + s] : lower[s * ldl + r];
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) row[s][j] -= row[r][j] * l;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) store(x + i * ldx + j * width<T>, row[i][j]);
}

// The same for any number of rows. Rows up to the next multiple of `solve_rows` must exist and be zero, in x and L.
template <bool TRANSPOSED, class T>
void solve(Ahead& ahead, int rows, int vectors, const T* lower, int64_t ldl, T* x, int64_t ldx) {
    const int blocks = (rows + solve_rows - 1) / solve_rows;
    for (int n = 0; n < blocks; ++n) {
        const int first = (TRANSPOSED ? blocks - 1 - n : n) * solve_rows;
        const int count = rows - first < solve_rows ? rows - first : solve_rows;
        T* block = x + first * ldx;
        if (TRANSPOSED && n > 0) {  // what the later rows, already solved, take away
            const int later = first + solve_rows;
            product<true>(
                ahead, count, vectors, block, ldx, true,
                transposed_times(lower + later * ldl + first, ldl, x + later * ldx, ldx, AllTerms{rows - later}));
        } else if (n > 0) {
            product<true>(
                ahead, count, vectors, block, ldx, true, times(lower + first * ldl, ldl, x, ldx, AllTerms{first}));
        }
        const T* own = lower + first * ldl + first;
        int j = 0;
        for (; j + solve_vectors <= vectors; j += solve_vectors)
            solve_block<solve_vectors, TRANSPOSED>(own, ldl, block + j * width<T>, ldx);
        for (; j < vectors; ++j) solve_block<1, TRANSPOSED>(own, ldl, block + j * width<T>, ldx);
    }
}

#if defined(__clang__) || __GNUC__ >= 12
template <int... I>
struct Lanes {};
template <int N, int... I>
struct LanesTo : LanesTo<N - 1, N - 1, I...> {};
template <int... I>
struct LanesTo<0, I...> {
    using type = Lanes<I...>;
};

// One round of the transpose of 2h × 2h blocks: a and b exchange their off-diagonal quarters.
template <int H, class V, int... I>
DP_INLINE void exchange(V& a, V& b, Lanes<I...>) {
    constexpr int W = sizeof...(I);
    const V x = __builtin_shufflevector(a, b, ((I & H) ? W + I - H : I)...);
    b = __builtin_shufflevector(a, b, ((I & H) ? W + I : I + H)...);
    a = x;
}

template <int H, class T>
DP_INLINE void transpose_rounds(Vec<T> (&row)[width<T>]) {
    if constexpr (H > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < width<T>; ++i)
            if (!(i & H)) exchange<H>(row[i], row[i + H], typename LanesTo<width<T>>::type{});
        transpose_rounds<H / 2, T>(row);
    }
}

template <class T>
DP_INLINE void transpose_square(const T* from, int64_t ldf, T* to, int64_t ldt) {
    Vec<T> row[width<T>];
#pragma GCC unroll 16
    for (int i = 0; i < width<T>; ++i) row[i] = load(from + i * ldf);
    transpose_rounds<width<T> / 2, T>(row);
#pragma GCC unroll 16
    for (int i = 0; i < width<T>; ++i) store(to + i * ldt, row[i]);
}
#else
template <class T>
DP_INLINE void transpose_square(const T* from, int64_t ldf, T* to, int64_t ldt) {
    for (int i = 0; i < width<T>; ++i)
        for (int j = 0; j < width<T>; ++j) to[j * ldt + i] = from[i * ldf + j];
}
#endif

// to [columns, rows] = fromᵀ; both are whole numbers of vectors.
template <class T>
void transpose(int rows, int columns, const T* from, int64_t ldf, T* to, int64_t ldt) {
    for (int i = 0; i < rows; i += width<T>)
        for (int j = 0; j < columns; j += width<T>) transpose_square(from + i * ldf + j, ldf, to + j * ldt + i, ldt);
}

}  // namespace DP_ARCH
}  // namespace deltaproduct
