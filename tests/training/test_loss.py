"""Cross-entropy in blocks against PyTorch's on all logits at once."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deltaproduct.training.loss import IGNORED, summed_cross_entropy


def problem(dtype=torch.float64, positions=23, width=6, vocabulary=11):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(positions, width, generator=draw, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64)
    labels = torch.randint(vocabulary, (positions,), generator=draw)
    labels[3] = labels[17] = IGNORED
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("block", [1, 40, 11 * 23, 10_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_sum_and_its_gradients(dtype, block):
    x, weight, labels = problem(dtype)
    want = F.cross_entropy(x @ weight.mT, labels, ignore_index=IGNORED, reduction="sum")
    wanted = torch.autograd.grad(3 * want, (x, weight))
    got = summed_cross_entropy(x, weight, labels, block=block)
    found = torch.autograd.grad(3 * got, (x, weight))
    assert got.dtype == dtype
    for a, b in zip((got, *found), (want, *wanted), strict=True):
        torch.testing.assert_close(a, b)  # to the dtype's rounding


def test_one_gradient_or_none():
    x, weight, labels = problem()
    alone = summed_cross_entropy(x.detach(), weight, labels)
    assert not summed_cross_entropy(x.detach(), weight.detach(), labels).requires_grad
    (only,) = torch.autograd.grad(alone, weight)
    torch.testing.assert_close(only, torch.autograd.grad(summed_cross_entropy(x, weight, labels), weight)[0])


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    x, weight, labels = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = summed_cross_entropy(x, weight, labels)
    logits = (x.bfloat16() @ weight.bfloat16().mT).float()
    want = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-6)  # both round products of bfloat16 gradients


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def test_the_logits_of_all_positions_never_exist():
    x, weight, labels = problem(torch.float32, positions=400, width=4, vocabulary=300)
    with Largest() as largest:
        summed_cross_entropy(x, weight, labels, block=3000).backward()
    assert largest.elements <= 3000 < 400 * 300
