"""flash-linear-attention's operators on top of ours, so that moving over is one import.

    from deltaproduct.ops.fla_api import chunk_gated_delta_product

Names, arguments, their order and defaults are those of its version 0.6.0. What its other releases take (0.1 to 0.6.0)
is taken as well: older arguments by name (`head_first=False`, `transpose_state_layout`, `use_exp2`), and positional
arguments in the order of any release, where their types tell the orders apart. An argument that changes the answer is
honoured or refused. One that changes nothing (`cu_seqlens_cpu`, `chunk_indices`, `chunk_size`, and what the originals
ignore, such as `use_cache`) is named in a warning, once in a process.

The call layout puts the Householder steps of a token side by side in time: with n = num_householder, k is [B,T·n,H,K],
v [B,T·n,HV,V] and beta [B,T·n,HV], token after token, while q is [B,T,H,K] and g [B,T,HV]. States are [S,HV,K,V] in
float32 for S sequences (float64 where the inputs are). All is computed by `delta_product` with its automatic backend,
on any device and in any floating-point dtype, and can be differentiated, `fused_recurrent_*` included. Grouped value
heads (HV a multiple of H) are taken everywhere. `cu_seqlens` counts tokens.

B batch · T tokens · H query/key heads · HV value heads · K, V sizes of a head · S packed sequences.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.ops.dispatch import delta_product
from deltaproduct.ops.inputs import compute_dtype

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "fused_chunk_delta_rule",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "naive_chunk_gated_delta_rule",
    "naive_recurrent_gated_delta_rule",
]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Numbers of dimensions that tell positional arguments apart. A beta of four dimensions, one step size per value
# channel, is not supported; it is listed so that it is not taken for an initial state.
_RANKS = {"beta": (3, 4), "gk": (4,), "gv": (4,), "initial_state": (4,)}
_FLAGS = ("use_", "allow_", "output_", "head_first", "transpose_", "state_v_first")


def _fits(name: str, value: Any) -> bool:
    """Whether a positional argument may be the one of this name, going by its type and number of dimensions."""
    if name.startswith(_FLAGS):
        return isinstance(value, bool)
    if value is None:
        return True
    if name == "scale":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name == "cp_context":
        return not isinstance(value, bool | Tensor)
    return isinstance(value, Tensor) and value.dim() in _RANKS.get(name, (value.dim(),))


def _older_orders(*orders: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Lets a function take positional arguments in the order of older releases too, and their head_first=False.

    `orders` are the names in the order of each. A call that fits several, with different meanings, is refused.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        original: Any = function  # which is called in other orders than its own
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()
                    if p.kind is p.POSITIONAL_OR_KEYWORD}  # fmt: skip
        every = [tuple(defaults), *(tuple(order.split()) for order in orders)]
        shared = next(i for i, names in enumerate(zip(*every, strict=False)) if len(set(names)) > 1)

        def named(values: tuple[Any, ...]) -> dict[str, Any]:
            readings: list[dict[str, Any]] = []
            for names in every:
                if len(values) <= len(names) and all(map(_fits, names[shared:], values[shared:])):
                    given = zip(names, values, strict=False)
                    reading = {name: x for name, x in given if x is not defaults.get(name, False)}
                    if not any(reading.keys() == r.keys() and all(r[n] is reading[n] for n in r) for r in readings):
                        readings.append(reading)
            if len(readings) != 1:
                raise UsageError(
                    f"{function.__name__}: the positional arguments after {every[0][shared - 1]} fit the order of "
                    f"{'more than one release' if readings else 'no release'} of flash-linear-attention; "
                    "pass them by name."
                )
            return readings[0]

        @functools.wraps(function)
        def call(*values: Any, **options: Any) -> Any:
            given = named(values) if len(values) > shared else {}
            rest = () if given else values
            if any([x.pop("head_first", False) for x in (given, options)]):
                raise UsageError("head_first has been removed; the layout is [B,T,H,…], so transpose the inputs.")
            return original(*rest, **given, **options)

        return call

    return decorate


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """(Gated) DeltaProduct: (o [B,T,HV,V], final state [S,HV,K,V] or None).

    Raises:
        UsageError: shapes disagree, or there is a cp_context (context parallelism).
    """
    _refuse(cp_context=cp_context)
    _hints(cu_seqlens_cpu=cu_seqlens_cpu)
    return _run(
        q, k, v, beta, g, num_householder, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


@_older_orders(
    "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens cu_seqlens_cpu head_first",
    "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens head_first",
    "q k v beta scale initial_state output_final_state cu_seqlens head_first use_qk_l2norm_in_kernel",
)
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet: (o [B,T,HV,V], final state [S,HV,K,V] or None).

    Raises:
        UsageError: shapes disagree, or a further argument would change the answer of the operator that it belongs to.
    """
    _check_chunk_size(kwargs)
    _hints(cu_seqlens_cpu=cu_seqlens_cpu)
    _swallow(kwargs)
    return _run(q, k, v, beta, None, 1, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)


@_older_orders(
    "q k v beta scale initial_state output_final_state cu_seqlens use_qk_l2norm_in_kernel",
    "q k v beta scale initial_state output_final_state cu_seqlens head_first use_qk_l2norm_in_kernel",
)
def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_delta_rule` under the name of the kernel that goes token by token; without beta all its values are 1."""
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    return _run(q, k, v, beta, None, 1, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)


@_older_orders(
    "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel "
    "allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu cp_context",
    "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens cu_seqlens_cpu cp_context "
    "transpose_state_layout",
    "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens head_first",
    "q k v g beta scale initial_state output_final_state cu_seqlens head_first use_qk_l2norm_in_kernel",
)
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet: (o [B,T,HV,V], final state [S,HV,K,V] or None); further arguments as for the next.

    Raises:
        UsageError: shapes disagree, a further argument would change the answer and is not known, or there is a
            cp_context (context parallelism).
    """
    # The originals of this name have no decays per channel, and read g as a natural logarithm in every version.
    _refuse(cp_context=cp_context, **{name: kwargs.pop(name, None) for name in ("gk", "gv", "use_exp2")})
    _check_chunk_size(kwargs)
    _hints(cu_seqlens_cpu=cu_seqlens_cpu, chunk_indices=chunk_indices)
    return fused_recurrent_gated_delta_rule(
        q, k, v, g, None, None, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, **kwargs,
    )  # fmt: skip


@_older_orders(
    "q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel A_log "
    "dt_bias cu_seqlens use_exp2 transpose_state_layout",
    "q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens "
    "transpose_state_layout",
    "q k v g beta scale initial_state output_final_state cu_seqlens use_qk_l2norm_in_kernel head_first",
    "q k v g beta scale initial_state output_final_state cu_seqlens head_first use_qk_l2norm_in_kernel",
)
def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet: (o [B,T,HV,V], final state [S,HV,K,V] or None).

    Args:
        g: [B,T,HV] log decay; with use_gate_in_kernel the decay is −exp(A_log) · softplus(g + dt_bias), both [HV]; with
            use_exp2 (version 0.5.0) it is a logarithm of base 2.
        beta: [B,T,HV]; with use_beta_sigmoid_in_kernel its logits, of a sigmoid that allow_neg_eigval doubles.
        state_v_first: states, given and returned, are [S,HV,V,K]; transpose_state_layout is its older name.

    Raises:
        UsageError: shapes disagree, a further argument would change the answer and is not known, or there are decays
            per channel (gk, gv).
    """
    _refuse(gk=gk, gv=gv)
    if "transpose_state_layout" in kwargs:
        _warn("transpose_state_layout is deprecated and has been renamed to state_v_first.", deprecated=True)
        if state_v_first:
            raise UsageError("transpose_state_layout is the older name of state_v_first; give only one of them.")
        state_v_first = bool(kwargs.pop("transpose_state_layout"))
    use_exp2 = kwargs.pop("use_exp2", False)
    _swallow(kwargs)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise UsageError("allow_neg_eigval=True doubles the sigmoid, so it needs use_beta_sigmoid_in_kernel=True.")
    if use_gate_in_kernel:
        if A_log is None or g is None:
            raise UsageError("use_gate_in_kernel=True needs both g and A_log.")
        if use_exp2:
            raise UsageError("use_exp2=True says how to read a given g; use_gate_in_kernel=True computes another.")
        g = _decay(g, A_log, dt_bias)
    else:
        _hints(A_log=A_log, dt_bias=dt_bias)
    if use_exp2 and g is not None:
        g = g.to(compute_dtype(g)) * math.log(2)
    if beta is None:
        beta = torch.ones_like(v[..., 0])
    if use_beta_sigmoid_in_kernel:
        beta = (2 if allow_neg_eigval else 1) * torch.sigmoid(beta.to(compute_dtype(beta)))
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    o, state = _run(q, k, v, beta, g, 1, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return o, state.mT.contiguous() if state_v_first and state is not None else state


# The names that version 0.5.0 added for the same two functions.
chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def naive_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet with beta before g, in float32 (float64 where an input is): (o, final state or None)."""
    q, k, v, beta, g = (x.to(compute_dtype(x)) for x in (q, k, v, beta, g))
    return _run(q, k, v, beta, g, 1, scale, initial_state, output_final_state, False, None)


def naive_chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`naive_recurrent_gated_delta_rule` with g before beta."""
    _hints(chunk_size=None if chunk_size == 64 else chunk_size)
    return naive_recurrent_gated_delta_rule(q, k, v, beta, g, scale, initial_state, output_final_state)


def fused_chunk_delta_rule(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What every release exports and none computes.

    Raises:
        UsageError: always.
    """
    raise UsageError("fused_chunk_delta_rule has been removed; use chunk_delta_rule.")


def _decay(g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """−exp(A_log) · softplus(g + dt_bias) for g [B,T,HV]."""
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.shape != g.shape[-1:]:
            raise UsageError(f"{name} is {list(x.shape)} and should be [HV] = {list(g.shape[-1:])}, as g ends.")
    dtype = compute_dtype(g)
    rate = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * F.softplus(rate)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    num_householder: int,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    qk_l2norm: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as this module's first lines say → (o [B,T,HV,V], final state)."""
    if num_householder < 1:
        raise UsageError(f"num_householder must be at least 1, not {num_householder}.")
    for name, x, rank in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("beta", beta, 3)):
        if x.dim() != rank:
            raise UsageError(f"{name} has {x.dim()} dimensions and needs {rank}; its shape is {list(x.shape)}.")
        if name != "q" and x.shape[1] != q.shape[1] * num_householder:
            raise UsageError(f"{name} has {x.shape[1]} steps in time, but {q.shape[1]} tokens of {num_householder} "
                             f"Householder steps have {q.shape[1] * num_householder}.")  # fmt: skip
    k, v, beta = (rearrange(x, "b (t n) ... -> b t n ...", n=num_householder) for x in (k, v, beta))
    return delta_product(
        q, k, v, beta, g, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm,
    )  # fmt: skip


_CHUNK_SIZES = (16, 32, 64)

# What changes the answer of one of these operators, of another of flash-linear-attention's, or of a copy of them in
# another project. Where it is not an argument, the original may swallow it; here it may only have its default.
_MEANINGFUL = {
    "A_log", "allow_neg_eigval", "cp_context", "dt_bias", "g", "g_gamma", "gk", "gv", "h0", "inplace",
    "inplace_final_state", "lower_bound", "num_accepted_tokens", "num_householder", "offsets", "output_h",
    "return_intermediate_states", "reverse", "safe_gate", "ssm_state_indices", "state_v_first",
    "transpose_state_layout", "use_beta_sigmoid_in_kernel", "use_exp2", "use_gate_in_kernel", "use_k_l2norm",
    "use_q_l2norm",
}  # fmt: skip


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise UsageError(f"{name} is not supported by this library's operators; leave it out.")


def _swallow(options: dict[str, Any]) -> None:
    """What an original takes in **kwargs and ignores: a warning, or `UsageError` where it would mean something."""
    _refuse(**{name: value for name, value in options.items() if name in _MEANINGFUL})
    for name in options:
        if name not in _MEANINGFUL:
            _warn(f"{name} changes nothing in this library's operators.")


def _hints(**hints: Any) -> None:
    """What only kernels use: a warning for what is given."""
    for name, value in hints.items():
        if value is not None:
            _warn(f"{name} changes nothing in this library's operators.")


def _warn(message: str, *, deprecated: bool = False) -> None:
    if not torch.compiler.is_compiling():  # a warning would break the graph
        _warn_once(message, deprecated)


@functools.cache
def _warn_once(message: str, deprecated: bool) -> None:
    warnings.warn(message, DeprecationWarning if deprecated else UserWarning, stacklevel=6)


def _check_chunk_size(options: dict[str, Any]) -> None:
    if (size := options.get("chunk_size", 64)) not in _CHUNK_SIZES:
        raise UsageError(f"chunk_size must be one of {', '.join(map(str, _CHUNK_SIZES))}, not {size}.")
