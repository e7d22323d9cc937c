"""What the operator's backends are compared with."""

import torch
from torch import Tensor

from deltaproduct.ops.inputs import compute_dtype, expand_heads

TEXTBOOK = "textbook_loop"


def textbook_loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    """The recurrence as people usually write it in PyTorch: index token and step, einsum, append → o [B,T,HV,V].

    Shapes as in `delta_product`; scale K^-½, no initial state, arithmetic in float32 or better. It is a peer to compare
    with and serves nothing else: the specification is `ops/reference.py`, which it deliberately does not call. It
    differs from that in one habit. The backward of x[:, t, j] fills a zero tensor as large as the whole of x and adds
    it to the gradient, T·N times over, so the backward's cost is quadratic in T; the reference unbinds once instead.
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
