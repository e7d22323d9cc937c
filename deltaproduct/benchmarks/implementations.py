"""What the operator's backends are compared with: other people's code.

One is called as `delta_product` is, with q [B,T,H,K], k [B,T,N,H,K], v [B,T,N,HV,V], beta [B,T,N,HV] and g [B,T,HV]
or None, and gives o [B,T,HV,V]; scale K^-½, no initial state. None of them is a dependency. They are imported when they
are asked for, and run as their authors set them up; what is done to their inputs is what any user of them would have
to do, and is part of their time.
"""

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import first_line
from deltaproduct.ops.inputs import compute_dtype, expand_heads
from deltaproduct.renamed import renamed_names

TEXTBOOK = "textbook_loop"
Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Implementation:
    """Somebody's operator. `load` imports what it needs and returns it; an ImportError says what is missing."""

    name: str
    summary: str
    load: Callable[[], Operator]
    distribution: str | None = None  # the package that it comes from
    loop: bool = False  # goes step by step and indexes its inputs: its backward is quadratic in T
    float64: bool = False  # works in float64 where its inputs are
    gpu: bool = False  # its kernels run on a GPU only

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve here, in one line; None if it can."""
        if self.gpu and device.type != "cuda":
            return "its kernels need a GPU"
        if dtype == torch.float64 and not self.float64:
            return "it computes in float32 whatever its inputs"
        try:
            self.load()
        except Exception as e:  # importing is running other people's code
            return first_line(e, with_kind=not isinstance(e, ImportError))
        return None

    @property
    def version(self) -> str | None:
        """Of the package that it comes from; None for our own, or where the package does not say."""
        try:
            return importlib.metadata.version(self.distribution) if self.distribution else None
        except importlib.metadata.PackageNotFoundError:
            return None


def textbook_loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    """The recurrence as people usually write it in PyTorch: index token and step, einsum, append → o [B,T,HV,V].

    Arithmetic in float32 or better. It is there to be compared with and serves nothing else: the specification is
    `ops/reference.py`, which it deliberately does not call. It differs from that in one habit. The backward of
    x[:, t, j] fills a zero tensor as large as the whole of x and adds it to the gradient, T·N times over, so the
    backward's cost is quadratic in T; the reference unbinds once instead.
    """
    dtype, heads = compute_dtype(q, k, v, beta), v.shape[3]
    q, k = (expand_heads(x.to(dtype), heads) for x in (q, k))
    state = q.new_zeros(q.shape[0], heads, k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t].to(dtype).exp()[..., None, None]
        for j in range(k.shape[2]):
            error = v[:, t, j].to(dtype) - torch.einsum("bhkv,bhk->bhv", state, k[:, t, j])
            step = beta[:, t, j].to(dtype)[..., None] * k[:, t, j]
            state = state + torch.einsum("bhk,bhv->bhkv", step, error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * k.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1).to(v.dtype)


def as_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """DeltaProduct as the gated delta rule on a sequence of T·N tokens (arXiv 2502.10297, section 3).

    A token's N steps become N tokens. Its gate acts at the first of them (log gate 0 at the others), its query reads
    at the last (zeros at the others, whose outputs are nobody's).

    Returns:
        q [B,T·N,H,K], k [B,T·N,H,K], v [B,T·N,HV,V], beta [B,T·N,HV], g [B,T·N,HV]; k, v and beta are views.
    """
    n = k.shape[2]
    gate = v.new_zeros(beta.shape[0], beta.shape[1] * n, beta.shape[3]) if g is None else g
    if n > 1:
        q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
        gate = gate if g is None else F.pad(g.unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2)
    return q, k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2), gate


@cache
def _transformers() -> Operator:
    """transformers' chunked gated delta rule in PyTorch: what its Qwen3-Next model runs where there is no kernel.

    Its own chunk size (64), scale (K^-½) and head grouping; its normalisation is off, as keys come normalised.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed")
    from transformers.models.qwen3_next import modeling_qwen3_next

    # The name is a wrapper that calls flash-linear-attention's GPU kernel where that is installed, and else warns.
    rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
        n = k.shape[2]
        q, k, v, beta, g = as_gated_delta_rule(q, k, v, beta, g)
        return rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=False)[0][:, n - 1 :: n]

    return run


def _fla_naive(op: str) -> ModuleType:
    """flash-linear-attention's fla/ops/OP/naive.py by itself: its package cannot be imported without Triton, but this
    file needs only PyTorch and einops."""
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:  # the latter is some folder of that name
        raise ImportError("flash-linear-attention is not installed")
    files = [Path(folder, "ops", op, "naive.py") for folder in package.submodule_search_locations or ()]
    file = next((file for file in files if file.is_file()), None)
    spec = importlib.util.spec_from_file_location(f"_fla_{op}_naive", file) if file else None
    if spec is None or spec.loader is None:
        raise ImportError(f"this flash-linear-attention has no ops/{op}/naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _fla_chunkwise() -> Operator:
    """flash-linear-attention's naive_chunk_gated_delta_rule at its own chunk size, 64."""
    rule = _fla_naive("gated_delta_rule").naive_chunk_gated_delta_rule

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
        n, heads = k.shape[2], v.shape[3]
        q, k, v, beta, g = as_gated_delta_rule(expand_heads(q, heads), expand_heads(k, heads), v, beta, g)
        return rule(q=q, k=k, v=v, g=g, beta=beta)[0][:, n - 1 :: n].to(v.dtype)

    return run


@cache
def _fla_loop() -> Operator:
    """flash-linear-attention's naive_recurrent_gated_delta_product: the recurrence itself, token by token."""
    rule = _fla_naive("gated_delta_product").naive_recurrent_gated_delta_product

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
        n, heads = k.shape[2], v.shape[3]
        q, k = (expand_heads(x, heads) for x in (q, k))
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        return rule(q, k, v, g, beta, scale=k.shape[-1] ** -0.5, num_householder=n)[0].to(v.dtype)

    return run


@cache
def _fla_kernels() -> Operator:
    """flash-linear-attention's Triton kernels: those of DeltaNet and Gated DeltaNet at one step per token, otherwise
    those of Gated DeltaProduct, each called as its own layers call it. They take bfloat16 or float16."""
    if importlib.util.find_spec("fla") is None:
        raise ImportError("flash-linear-attention is not installed")
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_product import chunk_gated_delta_product
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
        n, heads = k.shape[2], v.shape[3]
        q, k = (expand_heads(x, heads) for x in (q, k))
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        if n > 1:
            return chunk_gated_delta_product(q, k, v, g, beta, num_householder=n)[0]
        if g is None:
            return chunk_delta_rule(q, k, v, beta)[0]
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]

    return run


IMPLEMENTATIONS: dict[str, Implementation] = {
    p.name: p
    for p in (
        Implementation("fla", "flash-linear-attention's Triton kernels", _fla_kernels, "fla-core", gpu=True),
        Implementation("transformers", "Qwen3-Next's chunked rule in PyTorch", _transformers, "transformers"),
        Implementation("fla_chunkwise", "flash-linear-attention's naive chunked rule", _fla_chunkwise, "fla-core"),
        Implementation("fla_loop", "flash-linear-attention's naive loop", _fla_loop, "fla-core", loop=True),
        Implementation(TEXTBOOK, "the loop one usually writes", lambda: textbook_loop, loop=True, float64=True),
    )
}


__getattr__ = renamed_names(__name__, {"PEERS": "IMPLEMENTATIONS", "Peer": "Implementation"})
