"""RMSNorm with a gradient (ops/norm.py), native and in PyTorch, against autograd of the formula in float64."""

import pytest
import torch
from ways import NATIVE, WAYS, computed_by

from deltaproduct.layers.parts import RMSNorm
from deltaproduct.ops import norm
from deltaproduct.ops.norm import rms_norm

pytestmark = pytest.mark.numerical

EPS = 1e-5
# Odd sizes, less than a vector, more than a block of rows and exactly one, a row by itself
SHAPES = [(1, 1), (3, 5), (2, 7, 16), (256, 17), (257, 37), (513, 64), (2, 300, 4, 16), (3, 1000)]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way to compute it."""
    with computed_by(request.param, monkeypatch):
        yield request.param


def draw(shape, dtype=torch.float32):
    rng = torch.Generator().manual_seed(sum(shape))
    x, d_y = (torch.randn(shape, generator=rng, dtype=dtype) for _ in range(2))
    return 3 * x, 1 + torch.randn(shape[-1], generator=rng, dtype=dtype), d_y


def gradients(function, x, weight, d_y):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, EPS)
    y.backward(d_y)
    return y.detach(), x.grad, weight.grad


def exact(x, weight, d_y):
    def formula(x, weight, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    return gradients(formula, x.double(), weight.double(), d_y.double())


def assert_close(got, want, terms=0.0):
    """`terms` is how large what was added up is, where that is more than any result."""
    for have, wanted in zip(got, want, strict=True):
        assert have.dtype == torch.float32 and have.shape == wanted.shape
        # Sums over at most a thousand columns or rows, in some order: √1000 roundings, times 4 for the largest of many
        assert (have.double() - wanted).abs().max() <= 4 * 32 * 2**-24 * max(wanted.abs().max(), terms)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_gradients(shape, way):
    x, weight, d_y = draw(shape)
    assert norm._is_native(x, weight) == (way != "pytorch")
    cancelled = (d_y * weight / x).abs().max() if shape[-1] == 1 else 0  # a number by itself is always divided away
    assert_close(gradients(rms_norm, x, weight, d_y), exact(x, weight, d_y), cancelled)


def test_any_layout(way):
    """Inputs and gradients that are not contiguous, or that repeat themselves in memory."""
    x, weight, d_y = draw((6, 40, 24))
    x, weight = x.transpose(0, 1), weight.repeat_interleave(2)[::2]
    for d in (d_y.transpose(0, 1), d_y[:1, :1].expand(40, 6, 24)):
        assert_close(gradients(rms_norm, x, weight, d), exact(x, weight, d))


def test_rows_of_zeros_and_of_large_numbers(way):
    x, weight, d_y = draw((4, 33))
    x[1], x[2] = 0, 1e15
    assert_close(gradients(rms_norm, x[:2], weight, d_y[:2]), exact(x[:2], weight, d_y[:2]))
    y, d_x, _ = gradients(rms_norm, x, weight, d_y)
    assert y.isfinite().all() and d_x.isfinite().all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "weight"])
def test_one_gradient_alone(wanted, way):
    x, weight, d_y = draw((5, 24))
    leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight), wanted, strict=True)]
    rms_norm(*leaves, EPS).backward(d_y)
    for leaf, want, is_wanted in zip(leaves, exact(x, weight, d_y)[1:], wanted, strict=True):
        assert (leaf.grad is not None) == is_wanted
        if is_wanted:
            assert_close([leaf.grad], [want])


@pytest.mark.skipif(not NATIVE, reason="without the native engine there is one way only")
def test_threads_change_no_bit():
    x = draw((2000, 40))
    want = gradients(rms_norm, *x)
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(gradients(rms_norm, *x), want, strict=True))


def test_what_the_engine_does_not_take():
    """Other dtypes, nothing at all, and tensors without memory behind them."""
    x, weight, d_y = draw((5, 24), torch.float64)
    assert not norm._is_native(x, weight) and not norm._is_native(x.float(), weight)
    for got, want in zip(gradients(rms_norm, x, weight, d_y), exact(x, weight, d_y), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    half = gradients(rms_norm, x.bfloat16(), weight.float(), d_y.bfloat16())
    assert half[0].dtype == half[1].dtype == torch.bfloat16
    nothing = gradients(rms_norm, x[:0].float(), weight.float(), d_y[:0].float())
    assert nothing[0].shape == nothing[1].shape == (0, 24) and not nothing[2].any()
    with torch._subclasses.FakeTensorMode():
        fake = torch.randn(5, 24, requires_grad=True)
        assert rms_norm(fake, torch.ones(24), EPS).shape == (5, 24)


def test_a_compiled_norm_has_no_graph_break():
    module, x = RMSNorm(24), draw((5, 24))[0]
    with torch.no_grad():
        module.weight.copy_(draw((5, 24))[1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.clone().requires_grad_()), module(x))
