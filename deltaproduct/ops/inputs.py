"""What every backend needs to know of its inputs: whether their shapes agree, and in which precision to work."""

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.renamed import renamed_names

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NORM_EPS = 1e-6  # inside the square root, as in the published layers: x / √(Σx² + 1e-6)

MIN_LOG_DECAY = -1000.0  # exp of it is 0 in float64 already; without a floor, −inf − (−inf) would be NaN


class Arguments(NamedTuple):
    """The operator's tensors, in the order in which every backend takes them; shapes as in `delta_product`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of states and solves: float64 if any input is, otherwise float32 (never below)."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def backward_dtype(k: Tensor, g: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """What a chunked backward computes in, for states of `dtype`: float64 where N ≥ K steps follow a gate.

    So many steps can wipe out all K directions of the state that the gate lets through. Then almost nothing depends on
    the gate, while a chunk finds its gradient as a sum over pairs of steps, each as large as ever, that cancel: in
    float32 what is left is the roundings of the pairs. Matrices are small there, so that float64 costs little.
    """
    return torch.float64 if g is not None and k.shape[2] >= k.shape[4] else dtype


def l2_normalise(x: Tensor) -> Tensor:
    """x / √(Σx² + 1e-6) over the last dimension, in float32 or better, so that ‖k‖ is 1 to rounding."""
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def normalised(q: Tensor, k: Tensor, qk_l2norm: bool) -> tuple[Tensor, Tensor]:
    """q and k as a recurrence reads them: both by `l2_normalise` with `qk_l2norm`, else as they are."""
    return (l2_normalise(q), l2_normalise(k)) if qk_l2norm else (q, k)


def expand_heads(x: Tensor, value_heads: int) -> Tensor:
    """Query/key heads [..., H, K] → [..., HV, K]: value heads h·HV/H … (h+1)·HV/H − 1 share query/key head h."""
    heads = x.shape[-2]
    return x if heads == value_heads else x.repeat_interleave(value_heads // heads, dim=-2)


def num_sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    """How many sequences a batch of B holds, which each have a state: B, or the S that cu_seqlens [S+1] packs."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def sequence_bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Packed sequences as (first token, one past the last) pairs."""
    return list(pairwise(cu_seqlens.tolist()))


def _named(names: str, x: Tensor) -> str:
    return f"[{names}] = {list(x.shape)}"


def check_inputs(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> None:
    """k [B,T,N,H,K], v [B,T,N,HV,V], beta [B,T,N,HV], g [B,T,HV] agree with one another; `UsageError` otherwise."""
    for name, x, rank in (("k", k, 5), ("v", v, 5), ("beta", beta, 4)) + ((("g", g, 3),) if g is not None else ()):
        if x.dtype not in DTYPES:
            raise UsageError(f"{name} is {x.dtype}; the operator takes float64, float32, bfloat16 or float16.")
        if x.dim() != rank:
            raise UsageError(f"{name} has {x.dim()} dimensions and needs {rank}; its shape is {list(x.shape)}.")
        if x.device != k.device:
            raise UsageError(f"{name} is on {x.device} and k on {k.device}; put them on one device.")
    if k.shape[:3] != v.shape[:3]:
        raise UsageError(f"k {_named('B,T,N,H,K', k)} and v {_named('B,T,N,HV,V', v)} differ in B, T or N.")
    if beta.shape != v.shape[:4]:
        raise UsageError(f"beta {_named('B,T,N,HV', beta)} does not match v {_named('B,T,N,HV,V', v)}.")
    if g is not None and g.shape != (v.shape[0], v.shape[1], v.shape[3]):
        raise UsageError(f"g {_named('B,T,HV', g)} does not match v {_named('B,T,N,HV,V', v)}.")
    if min(k.shape[2], k.shape[3], k.shape[4], v.shape[3], v.shape[4]) < 1:
        raise UsageError(f"N, H, HV, K and V must be at least 1: k {_named('B,T,N,H,K', k)}, v {list(v.shape)}.")
    if v.shape[3] % k.shape[3]:
        raise UsageError(f"The {v.shape[3]} value heads are not a multiple of the {k.shape[3]} query/key heads.")


def check_query(q: Tensor, k: Tensor) -> None:
    """q [B,T,H,K] agrees with k [B,T,N,H,K]; `UsageError` otherwise."""
    if q.dtype not in DTYPES:
        raise UsageError(f"q is {q.dtype}; the operator takes float64, float32, bfloat16 or float16.")
    if q.shape != (*k.shape[:2], *k.shape[3:]):
        raise UsageError(f"q {_named('B,T,H,K', q)} does not match k {_named('B,T,N,H,K', k)}.")
    if q.device != k.device:
        raise UsageError(f"q is on {q.device} and k on {k.device}; put them on one device.")


def check_cu_seqlens(cu_seqlens: Tensor, k: Tensor) -> None:
    """cu_seqlens is S+1 non-decreasing ints from 0 to T, with B = 1; `UsageError` otherwise."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UsageError("cu_seqlens must be an int32 or int64 tensor: 0, the end of each sequence, …, T.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise UsageError("cu_seqlens must be one dimension of at least two ints: 0, the end of each sequence, …, T.")
    if cu_seqlens.device != k.device:
        raise UsageError(f"cu_seqlens is on {cu_seqlens.device} and the inputs on {k.device}; put them on one device.")
    if k.shape[0] != 1:
        raise UsageError(f"Packed sequences (cu_seqlens) need a batch of 1, not {k.shape[0]}.")
    # Reading the values would break a compiled graph; the kernel reads them there.
    if torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != k.shape[1]:
        raise UsageError(f"cu_seqlens must run from 0 to T={k.shape[1]}, not from {ends[0]} to {ends[-1]}.")
    if any(a > b for a, b in pairwise(ends)):
        raise UsageError("cu_seqlens must not decrease.")


def check_state(state: Tensor | None, k: Tensor, v: Tensor, sequences: int) -> None:
    """A state is [sequences,HV,K,V] on the inputs' device; `UsageError` otherwise."""
    if state is None:
        return
    if state.dtype not in DTYPES:
        raise UsageError(f"The state is {state.dtype}; it should be float32, or float64 where the inputs are.")
    wanted = (sequences, v.shape[-2], k.shape[-1], v.shape[-1])
    if state.shape != wanted:
        raise UsageError(f"The state is {list(state.shape)} and should be [sequences,HV,K,V] = {list(wanted)}.")
    if state.device != k.device:
        raise UsageError(f"The state is on {state.device} and k on {k.device}; put them on one device.")


def pad_time(x: Tensor, length: int) -> Tensor:
    """Append zeros along dimension 1 until it is `length` long; x itself when it already is."""
    missing = length - x.shape[1]
    return x if missing == 0 else F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))


if not TYPE_CHECKING:  # a type checker would take any name for one of this module's
    __getattr__ = renamed_names(__name__, {"check_step_inputs": "check_inputs"})
