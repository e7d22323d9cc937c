"""What several kernels need: where a chunk lies, its gates and norms, and products in a chosen precision.

Letters as in `ops/README.md`. A chunk is a block of C rows, one per Householder step: row r belongs to token r // N of
the chunk. C is a power of two; a chunk has TOKENS = ⌊C / N⌋ tokens, so that its last rows may be empty. BT, at least
TOKENS, is the power of two that holds what there is once per token.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on the CPU, by NumPy: for tests


@triton.jit
def chunk_place(chunk, table, T, chunks, TOKENS: tl.constexpr, PACKED: tl.constexpr):
    """(the chunk's first token among all B·T, how many tokens it has): 0 tokens for a place that no sequence needs."""
    if PACKED:
        first = tl.load(table + 2 * chunk).to(tl.int64)
        tokens = tl.load(table + 2 * chunk + 1)
    else:
        begin = chunk % chunks * TOKENS
        first = (chunk // chunks).to(tl.int64) * T + begin
        tokens = tl.minimum(T - begin, TOKENS)
    return first, tokens


@triton.jit
def load_rows(x, first, rows, valid, stride, col, size, SIZE: tl.constexpr):
    """A tile [rows,SIZE] of x, whose rows are `stride` apart; zeros where a row is not valid or a column beyond `size`.

    `first` is the first row's number, `col` the first column's. All that changes from chunk to chunk is one address."""
    cols = col + tl.arange(0, SIZE)
    at = x + first * stride + (rows[:, None] * stride + cols[None, :])
    return tl.load(at, mask=valid[:, None] & (cols < size)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, first, rows, valid, stride, col, size, SIZE: tl.constexpr):
    """The inverse of `load_rows`, in x's dtype."""
    cols = col + tl.arange(0, SIZE)
    at = x + first * stride + (rows[:, None] * stride + cols[None, :])
    tl.store(at, rounded(value, x.dtype.element_ty), mask=valid[:, None] & (cols < size)[None, :])


@triton.jit
def inverse_norm(x, NORMALISE: tl.constexpr, EPS: tl.constexpr):
    """What rows [n,K] are divided by, inverted: [n]; ones where nothing is normalised.

    Rows themselves stay as they are: a normalised key that is rounded to bfloat16 again has a norm of 1 ± 0.002, which
    thousands of steps raise to a power."""
    x = x.to(tl.float32)
    if NORMALISE:
        return 1.0 / tl.sqrt(tl.sum(x * x, axis=1) + EPS)
    else:
        return tl.full([x.shape[0]], 1.0, tl.float32)


@triton.jit
def log_decays(decays, at, token, valid, BT: tl.constexpr):
    """The sum of a chunk's log gates up to each of `token`, in two parts: see `gates.py`."""
    high = tl.load(decays + at * 2 * BT + token, mask=valid, other=0.0)
    low = tl.load(decays + at * 2 * BT + BT + token, mask=valid, other=0.0)
    return high, low


@triton.jit
def whole_log_decay(decays, at, BT: tl.constexpr):
    """The sum of all of a chunk's log gates, the same way."""
    return tl.load(decays + at * 2 * BT + BT - 1), tl.load(decays + at * 2 * BT + 2 * BT - 1)


@triton.jit
def between(high_to, low_to, high_from, low_from):
    """exp of a difference of log decays; never above 1, and exactly 1 from a row to itself."""
    return tl.exp(tl.minimum((high_to - high_from) + (low_to - low_from), 0.0))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in `dtype`, the nearest there is."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:  # it would cut off
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tf32(x):
    """x to the nearest tf32, whose lowest 13 bits are zero.

    Tensor cores would drop them, always towards zero: thousands of steps add that up."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits + 0x1000, bits)  # the usual NaN has all bits set, and would overflow
    return (bits & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def for_product(x, MODE: tl.constexpr):
    """What `product` makes of x beside another float32 operand: done once where x enters several products."""
    return _tf32(x) if MODE == "fast" or MODE == "tf32" else x


@triton.jit
def _half_product(a, b):
    """a @ b of bfloat16 numbers, in float32."""
    if INTERPRETED:  # it would multiply their bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _parts(x):
    """Three bfloat16 numbers that add up to x, all of its 24 bits."""
    high = rounded(x, tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rounded(rest, tl.bfloat16)
    return high, middle, rounded(rest - middle.to(tl.float32), tl.bfloat16)


@triton.jit
def product(a, b, MODE: tl.constexpr, ROUNDED: tl.constexpr = 0):
    """a @ b, [.., m,k] @ [.., k,n], in float32. An input of the operator has its own dtype, what is computed float32.

    MODE says what the tensor cores are given of a float32 operand:
        "fast": a rounding to the other operand's bfloat16, or to tf32 where both are float32;
        "split": three bfloat16 numbers beside an input, which is bfloat16 itself, and tf32x3 where both are float32;
        "tf32", "tf32x3": the operand in float32, multiplied so. float16 has no more bits than tf32.
    ROUNDED: how many of the operands, from the first on, have been through `for_product`.
    """
    a_is_input: tl.constexpr = a.dtype != tl.float32
    b_is_input: tl.constexpr = b.dtype != tl.float32
    if MODE == "fast" and (a_is_input or b_is_input):
        return _half_product(rounded(a, tl.bfloat16), rounded(b, tl.bfloat16))
    elif MODE == "fast" or MODE == "tf32":
        a = a.to(tl.float32) if a_is_input or ROUNDED >= 1 else _tf32(a)
        b = b.to(tl.float32) if b_is_input or ROUNDED == 2 else _tf32(b)
        return tl.dot(a, b, input_precision="tf32")
    elif MODE == "split" and a_is_input and b_is_input:
        return _half_product(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif MODE == "split" and a_is_input:
        high, middle, low = _parts(b)
        return _half_product(a, high) + (_half_product(a, middle) + _half_product(a, low))
    elif MODE == "split" and b_is_input:
        high, middle, low = _parts(a)
        return _half_product(high, b) + (_half_product(middle, b) + _half_product(low, b))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
