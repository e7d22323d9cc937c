"""The Triton kernels under PyTorch's other transformations, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from operator_cases import Problem
from transforms import ALL, BEYOND, OTHERS, REFUSAL, assert_equal, operator, step

from deltaproduct.errors import UsageError

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32 on both sides, and tf32×3 with two bits fewer on a GPU: sums of at most a hundred terms, 6e-8 · 4 · √100
TOLERANCE = 2e-5
PROBLEM = Problem(T=2, N=2, B=1, H=1, HV=2, K=3, V=2)
# One of every kind: `torch.func` once, maps, both at once, a second derivative, a batch and a tangent in the backward
SOME = ("grad", "vmap, some shared", "gradients of samples", "twice", "batched cotangents", "a tangent of a cotangent")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


REFUSED = ("jvp", "forward_ad", "jvp of grad", "hessian")
RUNS = [
    pytest.param(name, marks=() if name in ("grad", "jvp") else pytest.mark.slow("interpreter"))
    for name in (*SOME, *REFUSED)
]


@pytest.mark.parametrize("name", RUNS)
def test_the_kernels(name):
    f, xs = operator(PROBLEM, "triton")
    given = [x.float().to(DEVICE) for x in xs]
    if name in BEYOND:
        with pytest.raises(UsageError, match=f"'triton' {REFUSAL}"):
            ALL[name](f, given)
        return
    want = ALL[name](operator(PROBLEM, "reference")[0], xs)
    assert_equal([a.cpu() for a in ALL[name](f, given)], want, TOLERANCE)


@pytest.mark.skipif(DEVICE == "cpu", reason="without a GPU a token is not Triton's")
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "twice"])
def test_a_token(name):
    _, slow, xs = OTHERS["delta_product_step"]
    got = ALL[name](step, [x.float().to(DEVICE) for x in xs])
    assert_equal([a.cpu() for a in got], ALL[name](slow, xs), TOLERANCE)
