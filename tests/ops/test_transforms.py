"""Every operator under PyTorch's other transformations, against the same of its formula in plain operations, in float64.

Right numbers, or one clear line: never the silent zero that PyTorch makes of a custom operator in forward mode.
Both sides are sums of at most a few hundred terms in float64, and second derivatives have products of two such sums:
1e-10 of the largest entry leaves a thousandfold margin. Where the engine takes float32 only, 5e-5 by the same count.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from test_operator import Problem, draw, serving
from torch import Tensor
from torch.autograd import forward_ad

from deltaproduct.errors import UsageError
from deltaproduct.ops import delta_product, delta_product_states, delta_product_step

Function = Callable[..., Tensor | tuple[Tensor, ...]]
DOUBLE, SINGLE = 1e-10, 5e-5


def like(x: Tensor, seed: int) -> Tensor:
    """Numbers of x's shape in [−1,1] without a pattern, drawn from no generator: vmap wants to hear about those."""
    return (torch.arange(x.numel(), dtype=x.dtype) * 12.9898 + seed).sin().mul(43758.5453).sin().reshape(x.shape)


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
    "gradients of samples": lambda f, xs: of_samples(
        torch.func.grad(loss(f), argnums=everything(xs)), xs, shared=True
    ),
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
EACH = pytest.mark.parametrize("name", ALL)


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    assert len(got) == len(want)
    # A result's size, or that of the others where it vanishes: both sides may then be anything below that.
    got, want = [a.detach() for a in got], [b.detach() for b in want]
    size = max(float(b.abs().max()) for b in want)
    assert size > 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * size, (a, b)


# --- The recurrence ---------------------------------------------------------------------------------------------------

CHUNK = 32  # Householder steps
PROBLEMS = [
    Problem(T=5, N=2, B=2, H=1, HV=2, K=3, V=2),
    Problem(T=3, N=2, B=1, H=1, HV=1, K=3, V=2, gate=False, initial=False),
    Problem(T=40, N=1, B=1, H=1, HV=1, K=2, V=2),  # more than a chunk, and N < K
    Problem(T=2, N=5, B=1, H=1, HV=1, K=2, V=2),  # N ≥ K
    Problem(T=7, N=2, B=1, H=1, HV=2, K=3, V=2, cu=(0, 0, 3, 4, 7)),
    Problem(T=5, N=2, B=1, H=1, HV=1, K=3, V=2, resets="-inf"),
]


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


@EACH
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_the_operator(p, name):
    for backend in ("auto", "chunkwise"):
        f, xs = operator(p, backend)
        slow, _ = operator(p, "reference")
        assert_equal(ALL[name](f, xs), ALL[name](slow, xs), DOUBLE)
