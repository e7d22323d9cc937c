"""The operator that users call, and the one place where its backend is chosen."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.ops import cpu, transforms, triton
from deltaproduct.ops.backend import Backend, Recurrence
from deltaproduct.ops.chunkwise import chunkwise, chunkwise_states
from deltaproduct.ops.differentiable import differentiable
from deltaproduct.ops.inputs import (
    check_cu_seqlens,
    check_inputs,
    check_query,
    check_state,
    compute_dtype,
    expand_heads,
    normalised,
    num_sequences,
)
from deltaproduct.ops.reference import reference, reference_states, token_step


def _never(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _triton_backend(name: str, summary: str, kernels: triton.Kernels) -> Backend:
    return Backend(
        name,
        summary,
        kernels.forward,
        chunkwise_states,
        triton.unsupported_reason,
        triton.unsupported_size_reason,
        kernels.step,
        triton.step_inplace,
    )


# Fastest first: `auto` takes the first that can serve. What serves a GPU and what serves a CPU do not compete, except
# where Triton's kernels are interpreted, which is for tests.
BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cpu", "native CPU engine", cpu.cpu, chunkwise_states, cpu.unsupported_reason, step=cpu.cpu_step),
        _triton_backend("triton", "GPU kernels", triton.Kernels(precise=False)),
        _triton_backend(
            "triton_precise", "GPU kernels that keep all bits of every operand", triton.Kernels(precise=True)
        ),
        Backend("chunkwise", "chunks as matrix products, any device", chunkwise, chunkwise_states, _never),
        Backend("reference", "the plain loop: the specification", reference, reference_states, _never),
    )
}


def resolve_backend(
    backend: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """(name, reason) of the backend that serves `device` and `dtype`, and N and K where `size` is given as (N, K).

    "auto" takes the fastest that can. Naming one that cannot, or that does not exist, raises `UsageError`.

    Backward passes, and `torch.func`'s grad, vjp, jacrev and vmap (one gradient, any number of maps), run on that
    backend. Forward mode (jvp, jacfwd, linearize, `torch.autograd.forward_ad`) and gradients of gradients inside of
    `torch.func` do not: there "auto" and "chunkwise" compute the chunks in plain PyTorch operations, more slowly, and
    "reference" its loop; the other names raise `UsageError`. Gradients that are to be differentiated again
    (`create_graph`) are computed by the backend, and their own derivatives in plain PyTorch operations.
    """
    device = torch.device(device)

    def reason_against(b: Backend) -> str | None:
        return b.unsupported_reason(device, dtype) or (b.unsupported_size_reason(*size) if size else None)

    if backend != "auto":
        if backend not in BACKENDS:
            near = did_you_mean(backend, ("auto", *BACKENDS))
            raise UsageError(f"There is no backend {backend!r}{near}; choose auto, {', '.join(BACKENDS)}.")
        if reason := reason_against(BACKENDS[backend]):
            raise UsageError(f"Backend {backend!r} cannot serve: {reason}.")
        return backend, "asked for by name"
    passed_over: list[tuple[str, str]] = []
    for name, b in BACKENDS.items():
        reason = reason_against(b)
        if reason is None:
            return name, "the fastest that can serve" + "".join(f"; not {other}: {why}" for other, why in passed_over)
        passed_over.append((name, reason))
    raise AssertionError("the reference serves everything")


def _transformed(backend: str, name: str, scale: float, qk_l2norm: bool) -> Recurrence:
    """What serves under PyTorch's other transformations (`ops/transforms.py`), where `backend` was asked for."""
    formula = partial(differentiable, scale=scale, qk_l2norm=qk_l2norm)
    if name == "reference":
        return partial(reference, scale=scale, qk_l2norm=qk_l2norm)
    if name == "chunkwise":
        return formula
    if transforms.only_first():
        rule = transforms.Rule(partial(BACKENDS[name].run, scale=scale, qk_l2norm=qk_l2norm), formula)
        return partial(transforms.FirstDerivative.apply, rule)
    if backend == "auto":
        return formula
    raise UsageError(
        f"Backend {name!r} has no derivative in forward mode and no second one inside of torch.func; "
        "use backend 'auto', 'chunkwise' or 'reference'."
    )


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The (Gated) DeltaProduct recurrence over a whole sequence (arXiv 2502.10297, equations 2–4).

    Per value head, with state S [K,V], for every token t:

        S ← exp(g_t)·S;   S ← S + β_{t,j} k_{t,j} (v_{t,j} − Sᵀ k_{t,j})ᵀ for j = 1 … N;   o_t = scale·Sᵀ q_t

    Args:
        q: [B,T,H,K] queries.
        k: [B,T,N,H,K] keys, one per Householder step; ‖k‖ = 1 keeps transitions from growing (see `qk_l2norm`).
        v: [B,T,N,HV,V] values; HV is a multiple of H, and HV/H consecutive value heads share a query/key head.
        beta: [B,T,N,HV] step sizes in [0,2]; above 1 a transition has a negative eigenvalue.
        g: [B,T,HV] log forget gate ≤ 0, applied once per token before its first step; None means none.
        scale: factor of the output; None means K^-½.
        initial_state: [B,HV,K,V], or [S,HV,K,V] for S packed sequences; None means zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: [S+1] ints from 0 to T: packed sequences (B = 1); empty ones are allowed.
        qk_l2norm: normalise q and k by √(Σx² + 1e-6) first.
        backend: "auto", "reference", "chunkwise", "cpu", "triton" or "triton_precise"; see `resolve_backend`.

    Returns:
        (o, final_state): o [B,T,HV,V] in v's dtype; final_state float32 (float64 if an input is), or None. Both can
        be differentiated once, and with the reference backend as often as you like.

    Raises:
        UsageError: shapes, dtypes or devices disagree, or the named backend cannot serve.
    """
    check_inputs(k, v, beta, g)
    check_query(q, k)
    if cu_seqlens is not None:
        transforms.check_values("cu_seqlens", cu_seqlens)
        check_cu_seqlens(cu_seqlens, k)
    check_state(initial_state, k, v, num_sequences(k.shape[0], cu_seqlens))
    size = (k.shape[2], k.shape[4])
    name, _ = resolve_backend(backend, device=k.device, dtype=compute_dtype(q, k, v, beta), size=size)
    # The loop over nothing is nothing, and chunked layouts need at least one token.
    chosen = BACKENDS["reference" if 0 in k.shape[:2] else name]
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.autocast(k.device.type, enabled=False):
        if transforms.active(q, k, v, beta, g, initial_state):
            run = _transformed(backend, chosen.name, scale, qk_l2norm)
            o, final_state = run(q, k, v, beta, g, initial_state, cu_seqlens)
        else:
            o, final_state = chosen.run(q, k, v, beta, g, initial_state, cu_seqlens, scale, qk_l2norm)
    return o, final_state if output_final_state else None


def delta_product_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `delta_product`: the same tensors with T dropped, and the state carried in and out.

    q [B,H,K], k [B,N,H,K], v [B,N,HV,V], beta [B,N,HV], g [B,HV], state [B,HV,K,V] → (o [B,HV,V], state). The given
    state is not changed, or, `inplace`, overwritten and returned: on a GPU without a second one. There is no gradient
    then.

    backend: as for `delta_product`. A backend that is named and has no kernel for one token runs a sequence of length
    1; "auto" runs the body of the reference's loop in its place, which takes less time.

    Raises:
        UsageError: shapes, dtypes or devices disagree, the named backend cannot serve, a state to be overwritten is not
            of the dtype that states are computed in, or one is to be overwritten inside of `torch.func` or with
            tangents.
    """
    k_t, v_t, beta_t, g_t = k.unsqueeze(1), v.unsqueeze(1), beta.unsqueeze(1), None if g is None else g.unsqueeze(1)
    check_inputs(k_t, v_t, beta_t, g_t)
    check_query(q.unsqueeze(1), k_t)
    check_state(state, k_t, v_t, k.shape[0])
    dtype, out_dtype, heads = compute_dtype(q, k, v, beta), v.dtype, v.shape[2]
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    name, _ = resolve_backend(backend, device=k.device, dtype=dtype, size=(k.shape[1], k.shape[3]))
    transformed = transforms.active(q, k, v, beta, g, state)
    # An exported program runs where our engine is not. The loop's own body is what PyTorch can transform.
    step = None if transformed or torch.compiler.is_exporting() or k.shape[0] == 0 else BACKENDS[name].step
    if inplace:
        if transformed:
            raise UsageError(
                "A state is overwritten without derivatives or maps: inplace is not for torch.func and jvp."
            )
        if state.dtype != dtype:
            raise UsageError(f"A state of {state.dtype} cannot be overwritten by one of {dtype}.")
        with torch.no_grad():
            if (write := BACKENDS[name].step_inplace) is not None and step is not None and state.is_contiguous():
                return write(q, k, v, beta, g, state, scale, qk_l2norm), state
            o, found = delta_product_step(
                q, k, v, beta, g, state=state, scale=scale, qk_l2norm=qk_l2norm, backend=backend
            )
            return o, state.copy_(found)
    if step is None and backend != "auto":
        o, final = delta_product(
            q.unsqueeze(1), k_t, v_t, beta_t, g_t, scale=scale, initial_state=state, output_final_state=True,
            qk_l2norm=qk_l2norm, backend=backend,
        )  # fmt: skip
        assert final is not None  # it was asked for
        return o.squeeze(1), final
    with torch.autocast(k.device.type, enabled=False):
        if step is not None:
            return step(q, k, v, beta, g, state, scale, qk_l2norm)
        q, k = (expand_heads(x.to(dtype), heads) for x in normalised(q, k, qk_l2norm))
        g = None if g is None else g.to(dtype)
        o, state = token_step(state.to(dtype), q, k, v.to(dtype), beta.to(dtype), g, scale)
    return o.to(out_dtype), state


def delta_product_states(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    positions: Sequence[int] | Tensor,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The trace of the recurrence, for analysis: the state after each of `positions` Householder steps.

    Steps are numbered through the sequence, 0 … T·N: position 0 is the initial state, position t·N + j the state after
    step j of token t (counting tokens from 0), and position t·N the state before token t's gate.

    Args:
        k, v, beta, g, initial_state, backend: as for `delta_product`.
        positions: P step numbers, in any order; repeats are allowed.

    Returns:
        [B,P,HV,K,V], float32 (float64 if an input is), differentiable.
    """
    check_inputs(k, v, beta, g)
    check_state(initial_state, k, v, k.shape[0])
    steps = k.shape[1] * k.shape[2]
    if isinstance(positions, Tensor):
        transforms.check_values("positions", positions)
    positions = [int(p) for p in positions]
    for p in positions:
        if not 0 <= p <= steps:
            raise UsageError(f"Position {p} is outside 0 … {steps}, the Householder steps of this sequence.")
    size = (k.shape[2], k.shape[4])
    name, _ = resolve_backend(backend, device=k.device, dtype=compute_dtype(k, v, beta), size=size)
    run = reference_states if steps == 0 or k.shape[0] == 0 else BACKENDS[name].states
    with torch.autocast(k.device.type, enabled=False):
        return run(k, v, beta, g, initial_state, positions)
