"""flash-linear-attention's operators on top of ours: names, arguments, their order and defaults are those of its
version 0.6.0, so that moving over is one import.

    from deltaproduct.ops.compat import chunk_gated_delta_product

Its call layout puts the Householder steps of a token side by side in time: with n = num_householder, k is [B,T·n,H,K],
v [B,T·n,HV,V] and beta [B,T·n,HV], token after token, while q is [B,T,H,K] and g [B,T,HV]. States are [S,HV,K,V] in
float32 for S sequences (float64 where the inputs are). All is computed by `delta_product` with its automatic backend,
on any device and in any floating-point dtype, and can be differentiated, `fused_recurrent_*` included. Grouped value
heads (HV a multiple of H) are taken everywhere. `cu_seqlens` counts tokens. What the kernels alone need
(`cu_seqlens_cpu`, `chunk_indices`, `chunk_size`) is accepted and not used.

B batch · T tokens · H query/key heads · HV value heads · K, V sizes of a head · S packed sequences.
"""

from typing import Any

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
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
]


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
    return _run(
        q, k, v, beta, g, num_householder, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
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
    """DeltaNet: (o [B,T,HV,V], final state [S,HV,K,V] or None); of further arguments only chunk_size.

    Raises:
        UsageError: shapes disagree, or an argument is not known.
    """
    _check_others(kwargs)
    return _run(q, k, v, beta, None, 1, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)


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
        UsageError: shapes disagree, an argument is not known, or there is a cp_context (context parallelism).
    """
    _refuse(cp_context=cp_context)
    gate = {name: kwargs.pop(name, default) for name, default in _GATE.items()}
    _check_others(kwargs)
    return fused_recurrent_gated_delta_rule(
        q, k, v, g, None, None, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, **gate,
    )  # fmt: skip


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
        g: [B,T,HV] log decay; with use_gate_in_kernel the decay is −exp(A_log) · softplus(g + dt_bias), both [HV].
        beta: [B,T,HV]; with use_beta_sigmoid_in_kernel its logits, of a sigmoid that allow_neg_eigval doubles.
        state_v_first: states, given and returned, are [S,HV,V,K].

    Raises:
        UsageError: shapes disagree, an argument is not known, or there are decays per channel (gk, gv).
    """
    _refuse(gk=gk, gv=gv)
    _check_others(kwargs)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise UsageError("allow_neg_eigval=True doubles the sigmoid, so it needs use_beta_sigmoid_in_kernel=True.")
    if use_gate_in_kernel:
        if A_log is None or g is None:
            raise UsageError("use_gate_in_kernel=True needs both g and A_log.")
        dtype = compute_dtype(g)
        rate = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
        g = -A_log.to(dtype).exp() * F.softplus(rate)
    if beta is None:
        beta = torch.ones_like(v[..., 0])
    if use_beta_sigmoid_in_kernel:
        beta = (2 if allow_neg_eigval else 1) * torch.sigmoid(beta.to(compute_dtype(beta)))
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    o, state = _run(q, k, v, beta, g, 1, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return o, state.mT.contiguous() if state_v_first and state is not None else state


_GATE = {"use_gate_in_kernel": False, "A_log": None, "dt_bias": None}
_CHUNK_SIZES = (16, 32, 64)


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


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise UsageError(f"{name} is not supported by this library's operators; leave it None.")


def _check_others(kwargs: dict[str, Any]) -> None:
    """`UsageError` for what the original would not take either, or would read in a way that it has given up."""
    if "head_first" in kwargs:
        raise UsageError("head_first has been removed; the layout is [B,T,H,…].")
    if "transpose_state_layout" in kwargs:
        raise UsageError("transpose_state_layout is now called state_v_first.")
    if (size := kwargs.get("chunk_size", 64)) not in _CHUNK_SIZES:
        raise UsageError(f"chunk_size must be one of {', '.join(map(str, _CHUNK_SIZES))}, not {size}.")
    if unknown := sorted(set(kwargs) - {"chunk_size"}):
        raise UsageError(f"There is no argument {unknown[0]!r}.")
