"""A sequence divided over processes against the same sequence on one, forward and backward."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.ops import delta_product
from deltaproduct.ops.context_parallel import ContextParallel, delta_product_context_parallel

LENGTH, WIDTH = 96, 8


def hard(length: int, n: int, gated: bool, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """Inputs of the regime in which states are tracked: three keys, far from orthogonal, and β near 2."""
    draw = torch.Generator().manual_seed(length + n)
    directions = torch.nn.functional.normalize(torch.randn(3, WIDTH, generator=draw, dtype=torch.float64) + 1.5, dim=-1)
    k = directions[torch.randint(3, (2, length, n, 2), generator=draw)]
    v = torch.randn(2, length, n, 4, 5, generator=draw, dtype=torch.float64)
    beta = 2 - 0.01 * torch.rand(2, length, n, 4, generator=draw, dtype=torch.float64)
    q = torch.randn(2, length, 2, WIDTH, generator=draw, dtype=torch.float64)
    g = -0.02 * torch.rand(2, length, 4, generator=draw, dtype=torch.float64) if gated else None
    initial = torch.randn(2, 4, WIDTH, 5, generator=draw, dtype=torch.float64)
    return tuple(None if x is None else x.to(dtype).requires_grad_() for x in (q, k, v, beta, g, initial))


def span_of(x: torch.Tensor | None, rank: int, size: int) -> torch.Tensor | None:
    return None if x is None else x.detach().chunk(size, 1)[rank].clone().requires_grad_()


def run_span(length: int, n: int, gated: bool, dtype: torch.dtype):
    context_parallel = ContextParallel()
    *inputs, initial = hard(length, n, gated, dtype)
    mine = [span_of(x, context_parallel.rank, context_parallel.size) for x in inputs]
    o, end = delta_product_context_parallel(*mine, context_parallel=context_parallel, initial_state=initial.detach())
    weight = torch.arange(1, o.numel() + 1, dtype=o.dtype).view(o.shape).sin()
    (o * weight).sum().backward()
    return o.detach(), end.detach(), [None if x is None else x.grad for x in mine]


@pytest.mark.slow("ranks")
@pytest.mark.parametrize(("size", "n", "gated"), [(2, 1, False), (4, 3, False), (3, 2, True)])
def test_spans_are_one_sequence_in_the_hard_regime(size, n, gated):
    # In float64, so that whatever differs by more than rounding is an error of the division, not of a chunk.
    found = on_ranks(size, run_span, LENGTH, n, gated, torch.float64)
    *inputs, initial = hard(LENGTH, n, gated, torch.float64)
    o, end = delta_product(*inputs, initial_state=initial.detach(), output_final_state=True, backend="reference")
    pieces = o.chunk(size, 1)
    weights = [torch.arange(1, p.numel() + 1, dtype=o.dtype).view(p.shape).sin() for p in pieces]
    sum((p * w).sum() for p, w in zip(pieces, weights, strict=True)).backward()
    for rank, (o_mine, _, grads) in enumerate(found):
        torch.testing.assert_close(o_mine, pieces[rank], rtol=1e-9, atol=1e-10)
        for x, grad in zip(inputs, grads, strict=True):
            if x is not None:
                torch.testing.assert_close(grad, x.grad.chunk(size, 1)[rank], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[-1][1], end, rtol=1e-9, atol=1e-10)


def run_twice(length: int):
    """The second derivative of Σ over ranks of Σ_s w_{r,s} x_s³, whose x_s is on rank s, and a refusal."""
    context_parallel = ContextParallel()
    x = torch.arange(1.0, length + 1, dtype=torch.float64).add(context_parallel.rank).requires_grad_()
    weights = 1.0 + context_parallel.rank + 10 * torch.arange(context_parallel.size, dtype=torch.float64)[:, None]
    (first,) = torch.autograd.grad((weights * context_parallel.gather(x) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    try:
        torch.func.jvp(context_parallel.gather, (x.detach(),), (x.detach(),))
        refusal = "none"
    except UsageError as e:
        refusal = str(e)
    return first.detach(), second, refusal


@pytest.mark.slow("ranks")
def test_second_derivatives_across_ranks():
    size, length = 2, 3
    for rank, (first, second, refusal) in enumerate(on_ranks(size, run_twice, length)):
        x = torch.arange(1.0, length + 1, dtype=torch.float64) + rank
        weight = sum(1.0 + other + 10 * rank for other in range(size))
        torch.testing.assert_close(first, 3 * weight * x**2)
        torch.testing.assert_close(second, 6 * weight * x)
        assert "none in forward mode or inside of torch.func" in refusal and "\n" not in refusal


def loss_of(model: SequenceModel, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(tokens)[0].flatten(0, 1), labels.flatten(), reduction="sum")


def model_and_tokens(length: int, n: int, gated: bool) -> tuple[SequenceModel, torch.Tensor]:
    torch.manual_seed(0)
    config = ModelConfig.build(11, 11, hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=8, num_householder=n,
                         intermediate_size=48, use_forget_gate=gated, beta_bias_init=3.0)  # fmt: skip
    return SequenceModel(config), torch.randint(11, (1, length + 1))


def run_model(length: int, n: int, gated: bool):
    model, tokens = model_and_tokens(length, n, gated)
    model.double()
    context_parallel = ContextParallel()
    model.use_context_parallel(context_parallel)
    mine, labels = (x.chunk(context_parallel.size, 1)[context_parallel.rank] for x in (tokens[:, :-1], tokens[:, 1:]))
    loss = loss_of(model, mine, labels)
    (loss / length).backward()
    return float(loss.detach()) / length, [p.grad for p in model.parameters()]


@pytest.mark.slow("ranks")
@pytest.mark.ci("2-3-True")
@pytest.mark.parametrize(("size", "n", "gated"), [(2, 2, False), (4, 2, False), (2, 3, True)])
def test_a_model_on_4096_tokens_has_the_loss_and_gradients_of_one_process(size, n, gated):
    """In float64, where roundings have grown to 1e-14 at the end of 4,096 tokens. In float32 another order of summation
    alone makes up to 1e-5, which depends on the processor."""
    length = 4096
    found = on_ranks(size, run_model, length, n, gated)
    model, tokens = model_and_tokens(length, n, gated)
    model.double()
    loss = loss_of(model, tokens[:, :-1], tokens[:, 1:]) / length
    loss.backward()
    assert sum(mine for mine, _ in found) == pytest.approx(float(loss.detach()), abs=1e-11)
    for i, p in enumerate(model.parameters()):
        total = sum(grads[i] for _, grads in found)
        assert (total - p.grad).abs().max() <= 1e-11 * max(1.0, float(p.grad.abs().max())), i


def refused(kind: str) -> str:
    model, tokens = model_and_tokens(8, 2, False)
    model.use_context_parallel(ContextParallel())
    with pytest.raises(UsageError) as error:
        if kind == "short":
            model(tokens[:, :2])
        elif kind == "masked":
            model(tokens, mask=torch.ones_like(tokens, dtype=torch.bool))
        else:
            model(tokens, cu_seqlens=torch.tensor([0, tokens.shape[1]]))
    dist.barrier()
    return str(error.value)


@pytest.mark.slow("ranks")
@pytest.mark.parametrize(("kind", "words"), [("short", "looks back"), ("masked", "padded"), ("packed", "packed")])
def test_what_cannot_be_divided(kind, words):
    assert all(words in message for message in on_ranks(2, refused, kind))


def test_mixers_that_cannot_divide_a_sequence():
    model = SequenceModel(ModelConfig.build(5, 5, mixer="attention"))
    with pytest.raises(UsageError, match="Attention cannot divide"):
        model.use_context_parallel(object())
    assert model.mixers()[0].context_parallel is None
