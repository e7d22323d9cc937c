"""PyTorch's transformations of functions, and the operators that they are tried on."""

from collections.abc import Callable, Sequence

import torch
from operator_cases import Problem, draw
from torch import Tensor
from torch.autograd import forward_ad

from deltaproduct.ops import delta_product, delta_product_states, delta_product_step
from deltaproduct.ops.generalised_delta import generalised_delta_rule
from deltaproduct.ops.inverse import differentiable_inverse
from deltaproduct.ops.norm import rms_norm
from deltaproduct.ops.scan import diagonal_scan, gated_linear_attention, running_max
from deltaproduct.ops.selective_scan import selective_scan

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def like(x: Tensor, seed: int) -> Tensor:
    """Numbers of x's shape in [−1,1] without a pattern, drawn from no generator: vmap wants to hear about those."""
    angles = (torch.arange(x.numel(), dtype=torch.float64) * 12.9898 + seed).sin() * 43758.5453
    return angles.sin().to(x.dtype).reshape(x.shape)


def many(y: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def loss(f: Function) -> Callable[..., Tensor]:
    """A scalar in which every result enters squared, so that second derivatives of results count, too."""

    def scalar(*xs: Tensor) -> Tensor:
        return sum(((y * y.detach().sin() + 0.5 * y * y) * 0.3).sum() for y in many(f(*xs)))  # type: ignore[return-value]

    return scalar


def projected(f: Function) -> Callable[..., Tensor]:
    """Some numbers instead of all results: Jacobians stay small."""

    def few(*xs: Tensor) -> Tensor:
        return torch.stack([(y * like(y.detach(), 3)).sum() for y in many(f(*xs))] + [(many(f(*xs))[0] ** 2).sum()])

    return few


def tangents(xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(like(x, 100 + i) for i, x in enumerate(xs))


def everything(xs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(xs)))


def leaves(xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in xs)


def samples(xs: Sequence[Tensor], n: int = 3) -> list[Tensor]:
    """n samples of each, one of them along another dimension than the first."""
    found = [torch.stack([x * (1 - 0.1 * i) for i in range(n)]) for x in xs]
    found[0] = found[0].movedim(0, 1)
    return found


def in_dims(xs: Sequence[Tensor], shared: bool) -> tuple[int | None, ...]:
    """Of `samples`; all but the first two inputs are the same for all samples where they are `shared`."""
    return tuple(1 if i == 0 else None if shared and i > 1 else 0 for i in range(len(xs)))


def of_samples(f: Function, xs: Sequence[Tensor], shared: bool) -> tuple[Tensor, ...]:
    dims = in_dims(xs, shared)
    given = [a if dim is not None else x for a, x, dim in zip(samples(xs), xs, dims, strict=True)]
    return many(torch.func.vmap(f, in_dims=dims)(*given))


def by_forward_ad(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(xs, tangents(xs), strict=True)]
        parts = [forward_ad.unpack_dual(y) for y in many(f(*duals))]
        return tuple(part for y in parts for part in (y.primal, y.tangent))


def one_tangent(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of the last input alone."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(xs[-1], tangents(xs)[-1])
        found = [forward_ad.unpack_dual(y).tangent for y in many(f(*xs[:-1], dual))]
        return tuple(torch.zeros(()) if t is None else t for t in found)


def forward_over_backward(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    given = leaves(xs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(given, tangents(xs), strict=True)]
        grads = torch.autograd.grad(loss(f)(*duals), duals)
        return tuple(forward_ad.unpack_dual(d).tangent for d in grads)


def tangent_of_a_cotangent(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Forward as ever, and a backward that is handed a dual number."""
    given = leaves(xs)
    y = many(f(*given))[0]
    with forward_ad.dual_level():
        d = forward_ad.make_dual(like(y.detach(), 1), like(y.detach(), 2))
        grads = torch.autograd.grad(y, given, d, allow_unused=True)
        return tuple(forward_ad.unpack_dual(d).tangent for d in grads if d is not None)


def twice(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    given = leaves(xs)
    first = torch.autograd.grad(loss(f)(*given), given, create_graph=True)
    second = torch.autograd.grad(sum((d * d).sum() for d in first), given)
    return *first, *second


def three_times(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    given = leaves(xs)
    grads: Sequence[Tensor] = torch.autograd.grad(loss(f)(*given), given, create_graph=True)
    grads = torch.autograd.grad(sum((d * d).sum() for d in grads), given, create_graph=True)
    return torch.autograd.grad(sum((d * like(d.detach(), 5)).sum() for d in grads), given)


def inside_of_autograd(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`torch.func.grad` within what `backward()` differentiates."""
    given = leaves(xs)
    first = torch.func.grad(loss(f), argnums=everything(xs))(*given)
    return torch.autograd.grad(sum((d * d).sum() for d in first), given)


def batched_cotangents(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    given = leaves(xs)
    y = many(f(*given))[0]
    d = torch.stack([like(y.detach(), seed) for seed in range(3)])
    return tuple(g for g in torch.autograd.grad(y, given, d, is_grads_batched=True, allow_unused=True) if g is not None)


def a_map_within_a_gradient(f: Function, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    def total(*given: Tensor) -> Tensor:
        return sum(y.square().sum() for y in of_samples(f, given, shared=True))  # type: ignore[return-value]

    return torch.func.grad(total, argnums=everything(xs))(*xs)


# What a backend with a backward of its own does by itself
REVERSE: dict[str, Callable[[Function, Sequence[Tensor]], Sequence[Tensor]]] = {
    "grad": lambda f, xs: torch.func.grad(loss(f), argnums=everything(xs))(*xs),
    "vjp": lambda f, xs: torch.func.vjp(f, *xs)[1](torch.func.vjp(f, *xs)[0]),
    "jacrev": lambda f, xs: torch.func.jacrev(projected(f), argnums=everything(xs))(*xs),
    "vmap": lambda f, xs: of_samples(f, xs, shared=False),
    "vmap, some shared": lambda f, xs: of_samples(f, xs, shared=True),
    "vmap of vmap": lambda f, xs: of_samples(lambda *ys: of_samples(f, ys, shared=True), xs, shared=False),
    "gradients of samples": lambda f, xs: of_samples(torch.func.grad(loss(f), everything(xs)), xs, shared=True),
    "a map within a gradient": a_map_within_a_gradient,
    "batched cotangents": batched_cotangents,
    "twice": twice,
    "three times": three_times,
    "torch.func.grad inside of autograd": inside_of_autograd,
    "autograd.functional.hessian": lambda f, xs: [
        torch.autograd.functional.hessian(lambda x: loss(f)(x, *xs[1:]), xs[0])
    ],
    "autograd.functional.jacobian": lambda f, xs: torch.autograd.functional.jacobian(
        projected(f), tuple(xs), vectorize=True
    ),
    "a tangent of a cotangent": tangent_of_a_cotangent,
}

# And what only a formula of plain operations does
BEYOND: dict[str, Callable[[Function, Sequence[Tensor]], Sequence[Tensor]]] = {
    "jvp": lambda f, xs: [a for y in torch.func.jvp(f, tuple(xs), tangents(xs)) for a in many(y)],
    "jacfwd": lambda f, xs: [torch.func.jacfwd(projected(f), argnums=len(xs) - 1)(*xs)],
    "forward_ad": by_forward_ad,
    "forward_ad of one input": one_tangent,
    "forward over backward": forward_over_backward,
    "grad of grad": lambda f, xs: torch.func.grad(
        lambda *ys: sum(d.square().sum() for d in torch.func.grad(loss(f), argnums=everything(xs))(*ys)),
        argnums=everything(xs),
    )(*xs),
    "jvp of grad": lambda f, xs: torch.func.jvp(
        torch.func.grad(loss(f), argnums=everything(xs)), tuple(xs), tangents(xs)
    )[1],
    "grad of jvp": lambda f, xs: torch.func.grad(
        lambda *ys: torch.func.jvp(loss(f), ys, tangents(xs))[1], argnums=everything(xs)
    )(*xs),
    "hessian": lambda f, xs: [torch.func.hessian(loss(f))(*xs)],
    "jvp of samples": lambda f, xs: of_samples(
        lambda *ys: torch.func.jvp(projected(f), ys, tangents(xs))[1], xs, shared=True
    ),
}

ALL = REVERSE | BEYOND


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    assert len(got) == len(want)
    # A result's size, or that of the others where it vanishes: both sides may then be anything below that.
    got, want = [a.detach() for a in got], [b.detach() for b in want]
    size = max(float(b.abs().max()) for b in want)
    assert size > 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * size, (a, b)


def operator(p: Problem, backend: str, **options) -> tuple[Function, list[Tensor]]:
    x = {n: a for n, a in draw(p).items() if not n.startswith("d_")}
    cu = None if p.cu is None else torch.tensor(p.cu)

    def f(*given: Tensor) -> tuple[Tensor, ...]:
        o, final = delta_product(
            **dict(zip(x, given, strict=True)), cu_seqlens=cu, output_final_state=True, backend=backend, **options
        )
        assert final is not None
        return o, final

    return f, list(x.values())


REFUSAL = r"has no derivative in forward mode .* use backend 'auto', 'chunkwise' or 'reference'\.$"


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def keys(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(numbers(*shape, seed=seed), dim=-1)


def norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def loop_of_diagonal_scan(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        found.append(h)
    return torch.stack(found, 1), h


def loop_of_selective_scan(x, dt, A, B, C, h):
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(y.unbind(1) for y in (x, dt, B, C)), strict=True):
        h = (dt_t.unsqueeze(-1) * A).exp() * h + (dt_t * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)
        outputs.append((h @ C_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1), h


def loop_of_linear_attention(q, k, v, a, s):
    outputs = []
    for q_t, k_t, v_t, a_t in zip(*(y.unbind(1) for y in (q, k, v, a)), strict=True):
        s = a_t.unsqueeze(-1) * s + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append((q_t.unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(outputs, 1), s


def loop_of_generalised_delta(q, k, v, g, u, z, s):
    outputs = []
    for q_t, k_t, v_t, g_t, u_t, z_t in zip(*(y.unbind(1) for y in (q, k, v, g, u, z)), strict=True):
        y = (z_t.unsqueeze(-2) @ s).squeeze(-2)
        s = g_t.exp().unsqueeze(-1) * s + u_t.unsqueeze(-1) * y.unsqueeze(-2) + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append((q_t.unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(outputs, 1), s


def step(q, k, v, beta, g, state):
    return delta_product_step(q, k, v, beta, g, state=state, qk_l2norm=True)


def one_token(q, k, v, beta, g, state):
    q, k, v, beta, g = (x.unsqueeze(1) for x in (q, k, v, beta, g))
    o, final = delta_product(
        q, k, v, beta, g, initial_state=state, qk_l2norm=True, output_final_state=True, backend="reference"
    )
    return o.squeeze(1), final


def states(backend: str) -> Function:
    return lambda *x: delta_product_states(*x[:-1], initial_state=x[-1], positions=[7, 0, 24, 19], backend=backend)


OTHERS: dict[str, tuple[Function, Function, list[Tensor]]] = {
    "delta_product_step": (
        step, one_token,
        [numbers(2, 1, 3), numbers(2, 2, 1, 3), numbers(2, 2, 2, 2), numbers(2, 2, 2).sigmoid(), -numbers(2, 2).abs(),
         numbers(2, 2, 3, 2)],
    ),
    "delta_product_states": (
        states("auto"), states("reference"),
        [keys(1, 4, 6, 1, 3), numbers(1, 4, 6, 1, 2), 2 * numbers(1, 4, 6, 1).sigmoid(), -numbers(1, 4, 1).abs(),
         numbers(1, 1, 3, 2)],
    ),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), norm_formula, [numbers(3, 5), 1 + numbers(5)]),
    "diagonal_scan": (
        diagonal_scan, loop_of_diagonal_scan, [numbers(1, 7, 2).tanh(), numbers(1, 7, 2, seed=1), numbers(1, 2, seed=2)]
    ),
    "selective_scan": (
        lambda *x: selective_scan(*x[:-1], initial_state=x[-1]), loop_of_selective_scan,
        [numbers(1, 6, 2), numbers(1, 6, 2, seed=1).abs(), -numbers(2, 3).abs(), numbers(1, 6, 3, seed=2),
         numbers(1, 6, 3, seed=3), numbers(1, 2, 3, seed=4)],
    ),
    "gated_linear_attention": (
        lambda q, k, v, a, s: gated_linear_attention(q, k, v, a=a, initial_state=s, scale=1.0),
        loop_of_linear_attention,
        [numbers(1, 5, 1, 2), numbers(1, 5, 1, 2, seed=1), numbers(1, 5, 1, 3, seed=2), numbers(1, 5, 1, 2).sigmoid(),
         numbers(1, 1, 2, 3)],
    ),
    "generalised_delta_rule": (
        generalised_delta_rule, loop_of_generalised_delta,
        [numbers(1, 5, 1, 2), numbers(1, 5, 1, 2, seed=1), numbers(1, 5, 1, 3, seed=2), -numbers(1, 5, 1, 2).sigmoid(),
         0.3 * numbers(1, 5, 1, 2, seed=3), 0.3 * numbers(1, 5, 1, 2, seed=4), numbers(1, 1, 2, 3)],
    ),
    "running_max": (
        lambda g, i, m: running_max(g, i, m)[1],
        lambda g, i, m: torch.stack([(m := torch.maximum(m + g[:, t], i[:, t])) for t in range(g.shape[1])], 1),
        [-numbers(1, 6, 2).abs(), numbers(1, 6, 2, seed=1), 3 + numbers(1, 2, seed=2).abs()],
    ),
    "differentiable_inverse": (
        lambda x: differentiable_inverse(x.tril(-1)),
        lambda x: torch.linalg.inv(torch.eye(4, dtype=x.dtype) + x.tril(-1)),
        [0.5 * numbers(2, 4, 4)],
    ),
}  # fmt: skip
