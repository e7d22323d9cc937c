"""Problems for the operator's tests: what goes in, what the oracle makes of it, and what the package does."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import torch
from oracle import Answer, oracle, relative_error

from deltaproduct.errors import UsageError
from deltaproduct.ops import BACKENDS, delta_product, resolve_backend

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def serving() -> list[str]:
    """The backends that can serve on this machine's CPU; Triton's, interpreted, have tests of their own."""
    names = []
    for name in BACKENDS:
        try:
            names.append(resolve_backend(name)[0])
        except UsageError:
            continue
    return names


BACKEND = pytest.mark.parametrize("backend", serving())


@dataclass(frozen=True)
class Problem:
    T: int
    N: int = 2
    B: int = 2
    H: int = 2
    HV: int = 2
    K: int = 8
    V: int = 6
    gate: bool = True
    initial: bool = True
    cu: tuple[int, ...] | None = None
    scale: float | None = None
    beta: str = "uniform"  # in [0,2]; or "ends": exactly 0 or 2
    resets: str = ""  # the log gates of every fifth token or so: "-inf" or "-1e4"

    def __str__(self) -> str:
        default = Problem(-1)
        return "-".join(f"{k}{v}" for k, v in vars(self).items() if v != getattr(default, k)).replace(" ", "")


CU = (0, 0, 1, 38, 38, 39, 74, 75, 75)  # empty at begin, middle and end; three of a single token


@lru_cache(maxsize=64)
def draw(p: Problem, seed: int | None = None) -> dict[str, torch.Tensor]:
    """The operator's inputs in float64, and random gradients of what it returns. Values are exact in float32."""
    rng = np.random.default_rng(p.T * 1000 + p.N if seed is None else seed)
    sequences = p.B if p.cu is None else len(p.cu) - 1
    k = rng.standard_normal((p.B, p.T, p.N, p.H, p.K))
    x = {
        "q": rng.standard_normal((p.B, p.T, p.H, p.K)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((p.B, p.T, p.N, p.HV, p.V)),
        "beta": rng.uniform(0, 2, (p.B, p.T, p.N, p.HV)),
        "d_o": rng.standard_normal((p.B, p.T, p.HV, p.V)),
        "d_final": rng.standard_normal((sequences, p.HV, p.K, p.V)),
    }
    if p.beta == "ends":
        x["beta"] = np.where(rng.random(x["beta"].shape) < 0.5, 0.0, 2.0)
    if p.gate:
        x["g"] = -rng.exponential(0.2, (p.B, p.T, p.HV))
        if p.resets:
            x["g"][rng.random(x["g"].shape) < 0.2] = float(p.resets)
    if p.initial:
        x["initial_state"] = rng.standard_normal((sequences, p.HV, p.K, p.V))
    return {name: torch.tensor(a, dtype=torch.float32).double() for name, a in x.items()}


def solve(p: Problem, x: dict[str, torch.Tensor]) -> Answer:
    cu = None if p.cu is None else list(p.cu)
    return oracle(**{name: a.double().numpy() for name, a in x.items()}, scale=p.scale, cu_seqlens=cu)


@lru_cache(maxsize=64)
def solved(p: Problem) -> Answer:
    return solve(p, draw(p))


def leaves(x: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {n: a.detach().clone().to(dtype).requires_grad_() for n, a in x.items() if not n.startswith("d_")}


def run(backend: str, x: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], **options) -> Answer:
    """What the package makes of `inputs`, whose gradients are of ⟨o, d_o⟩ + ⟨final, d_final⟩."""
    o, final = delta_product(**inputs, output_final_state=True, backend=backend, **options)
    loss = (o * x["d_o"]).sum() + (final * x["d_final"]).sum()
    if loss.requires_grad:  # a loop over no token from no state touches no input
        loss.backward()
    # A tensor that nothing reaches (no token, say) has the gradient zero, which PyTorch may write as None.
    grads = {n: np.zeros(a.shape) if a.grad is None else a.grad.double().numpy() for n, a in inputs.items()}
    return Answer(o.detach().double().numpy(), final.detach().double().numpy(), grads=grads)


def errors(got: Answer, want: Answer) -> dict[str, float]:
    found = {"o": relative_error(got.o, want.o), "final": relative_error(got.final, want.final)}
    # d_o and d_final are of size 1, and so is what is summed for a gradient, even one that then vanishes: 40 steps
    # leave hardly a trace of the state before them, and its gradient is 0 to within the roundings of those sums.
    return found | {f"d_{n}": relative_error(a, want.grads[n], floor=1.0) for n, a in got.grads.items()}


def assert_within(found: dict[str, float], tolerance: float) -> None:
    assert not {n: e for n, e in found.items() if not e <= tolerance}, f"tolerance {tolerance:.1e}: {found}"


def options(p: Problem) -> dict:
    return {"scale": p.scale, "cu_seqlens": None if p.cu is None else torch.tensor(p.cu)}
