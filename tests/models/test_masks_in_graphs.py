"""Masks under torch.export and torch.compile: static shapes, and what packing the real tokens gives.

In float64 the two ways differ by rounding: EXACT, as in test_mixers.py. In a graph, float32 operators are the
same as outside and on the same numbers: 1e-6 of the largest logit where the compiler may order sums anew.
"""

import pytest
import torch
from mixer_cases import EXACT, OPTIONS, assert_same, known_options, noise
from mixer_cases import build as build_mixer
from torch import nn
from torch.utils._pytree import tree_leaves

from deltaproduct.errors import UsageError
from deltaproduct.layers import MIXERS, DeltaProduct
from deltaproduct.models import ModelConfig, SequenceModel

B, T, D, V = 5, 9, 12, 7
IN_GRAPHS = sorted(set(MIXERS) - {"attention", "ttt_linear", "lstm", "gru"})
CASES = [
    pytest.param(name, options, id="-".join([name, *(f"{k}={v}" for k, v in options.items())]))
    for name in IN_GRAPHS
    for options in OPTIONS
    if options == known_options(name, options)
]


def some_mask() -> torch.Tensor:
    """Padding on the left, on the right, in gaps; a row of nothing else, and one of none."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :4] = mask[1, 6:] = mask[2, [0, 3, 8]] = mask[3] = False
    return mask


@pytest.fixture
def in_a_graph(monkeypatch):
    """The way that is taken while a graph is traced, called as usual: what it computes needs no tracing."""

    def enter() -> None:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    return enter


@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize("started", [False, True], ids=["afresh", "from a state"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_static_shapes_give_what_packing_gives(name, options, started, tokens, in_a_graph):
    mixer, mask = build_mixer(name, options), some_mask()[:, -tokens:]
    x = noise(B, tokens, D)
    poisoned = x.masked_fill(~mask[..., None], torch.nan)  # what stands in the padding is never looked at
    with torch.no_grad():
        state = mixer(noise(B, 3, D, seed=2))[1] if started else None
    parameters = list(mixer.parameters())

    def gradients(y, end):
        total = (y * noise(*y.shape, seed=3)).sum() + sum(a.square().sum() for a in tree_leaves(end) if a is not None)
        return torch.autograd.grad(total, [poisoned, *parameters])

    poisoned.requires_grad_()
    want = mixer(poisoned, state, mask=mask)
    want_gradients = gradients(*want)
    in_a_graph()
    got = mixer(poisoned, state, mask=mask)
    assert_same(got, want)
    assert (got[0][~mask] == 0).all()
    for a, b in zip(gradients(*got), want_gradients, strict=True):
        assert (a - b).abs().max() <= EXACT * max(1.0, b.abs().max())
    # A row of padding alone leaves its state as it was, to the bit.
    before = mixer.init_state(B) if state is None else state
    for a, b in zip(got[1], before, strict=True):
        assert a is b is None or torch.equal(a[3], b[3])


@torch.no_grad()
def test_no_tokens_and_no_padding(in_a_graph):
    mixer, x = build_mixer("gated_deltanet", {}), noise(B, T, D)
    want, start = mixer(x)
    in_a_graph()
    assert_same(mixer(x, mask=torch.ones(B, T, dtype=torch.bool))[0], want)
    y, end = mixer(x[:, :0], start, mask=torch.ones(B, 0, dtype=torch.bool))
    assert y.shape == (B, 0, D)
    assert_same(end, start)


@pytest.mark.parametrize("name", sorted(set(MIXERS) - set(IN_GRAPHS)))
def test_the_other_mixers_say_that_they_cannot(name, in_a_graph):
    mixer = build_mixer(name, {})
    in_a_graph()
    with pytest.raises(UsageError, match=f"{type(mixer).__name__} cannot be exported or compiled") as refused:
        mixer(noise(B, T, D), mask=some_mask())
    assert "\n" not in str(refused.value) and "leave the mask out" in str(refused.value)


@pytest.mark.parametrize("method", ["mix", "project"])
def test_somebodys_own_mixer_is_not_computed_as_the_one_it_inherits_from(method, in_a_graph):
    inherited = getattr(DeltaProduct, method)
    own = type("Own", (DeltaProduct,), {method: lambda self, *given, **named: inherited(self, *given, **named)})
    mixer = own(D, 2, 4).double()
    in_a_graph()
    with pytest.raises(UsageError, match="Own cannot be exported or compiled"):
        mixer(noise(B, T, D), mask=some_mask())


# Graphs


def model_of(**changes) -> SequenceModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_heads": 2, "head_dim": 4, "intermediate_size": 16, "num_hidden_layers": 2}
    return SequenceModel(ModelConfig.build(V, V, defaults=sizes, **changes)).eval()


def some_tokens(batch: int = B, length: int = T) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


class Masked(nn.Module):
    def __init__(self, model: SequenceModel):
        super().__init__()
        self.model = model

    def forward(self, tokens, mask):
        return self.model(tokens, mask=mask)


def assert_near(got, want) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert a is b is None or (a.shape == b.shape and (a - b).abs().max() <= 1e-6 * max(1, b.abs().max()))


class MaskedLogits(Masked):
    def forward(self, tokens, mask):
        return super().forward(tokens, mask)[0]


GATED = {"use_forget_gate": True, "use_output_gate": True, "num_householder": 3}


@pytest.mark.slow("export")
@torch.no_grad()
def test_an_exported_model_takes_any_mask():
    """Of any batch size and length: neither is fixed by the one that was traced."""
    model = model_of(**GATED)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    program = torch.export.export(Masked(model), (some_tokens(), some_mask()), dynamic_shapes=shapes)
    run = program.module()
    longer = torch.rand(3, 14, generator=torch.Generator().manual_seed(2)) > 0.4
    for tokens, mask in (
        (some_tokens(), some_mask()),
        (some_tokens(), ~some_mask()),
        (some_tokens(), torch.ones(B, T, dtype=torch.bool)),
        (some_tokens(3, 14), longer),
    ):
        assert_near(run(tokens, mask), model(tokens, mask=mask))


@pytest.mark.slow("graphs")
@torch.no_grad()
def test_a_model_compiled_into_one_graph_takes_any_mask():
    torch._dynamo.reset()
    model, tokens = model_of(num_hidden_layers=1, **GATED), some_tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    _, state = model(tokens)
    for mask in (some_mask(), ~some_mask()):
        assert_near(compiled(tokens, state, mask=mask), model(tokens, state, mask=mask))


@pytest.mark.slow("export")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", IN_GRAPHS)
@torch.no_grad()
def test_every_such_mixer_can_be_exported_and_compiled(name):
    torch._dynamo.reset()
    model, tokens = model_of(mixer=name, num_hidden_layers=1), some_tokens()
    run = torch.export.export(Masked(model), (tokens, some_mask())).module()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mask in (some_mask(), ~some_mask()):
        want = model(tokens, mask=mask)
        assert_near(run(tokens, mask), want)
        assert_near(compiled(tokens, mask=mask), want)


@pytest.mark.slow("graphs")
@pytest.mark.parametrize("name", sorted(set(MIXERS) - set(IN_GRAPHS)))
@torch.no_grad()
def test_a_compiled_model_of_another_mixer_still_packs(name):
    """Where graphs may break, they break there, and the answer is the right one."""
    torch._dynamo.reset()
    model, tokens, mask = model_of(mixer=name, num_hidden_layers=1), some_tokens(), some_mask()
    assert_near(torch.compile(model, backend="eager")(tokens, mask=mask), model(tokens, mask=mask))


def test_exporting_another_mixer_with_a_mask_is_one_line():
    model = model_of(mixer="lstm", num_hidden_layers=1)
    with pytest.raises(UsageError, match="LSTM cannot be exported") as refused, torch.no_grad():
        torch.export.export(Masked(model), (some_tokens(), some_mask()))
    assert "\n" not in str(refused.value)


@pytest.mark.slow("inductor")
@pytest.mark.ci("compiled-deltaproduct")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", IN_GRAPHS)
@pytest.mark.parametrize("way", ["compiled", "trained", "aotinductor"])
def test_compiled_by_inductor(name, way, tmp_path):
    torch._dynamo.reset()
    model, tokens, mask = model_of(mixer=name), some_tokens(), some_mask()
    if way == "trained":
        want = model(tokens, mask=mask)[0]
        want_gradients = torch.autograd.grad(want.square().sum(), list(model.parameters()))
        got = torch.compile(model, fullgraph=True)(tokens, mask=mask)[0]
        assert_near(got, want)
        for a, b in zip(torch.autograd.grad(got.square().sum(), list(model.parameters())), want_gradients, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())
        return
    with torch.no_grad():
        want = model(tokens, mask=mask)
        if way == "compiled":
            assert_near(torch.compile(model, fullgraph=True)(tokens, mask=mask), want)
        else:
            # The logits alone: PyTorch writes no named tuples, as states are, into a package.
            program = torch.export.export(MaskedLogits(model), (tokens, mask))
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
            assert_near(torch._inductor.aoti_load_package(path)(tokens, mask), want[0])


class Transformers(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.slow("graphs")
@pytest.mark.ci("compiled")
@pytest.mark.parametrize("way", ["exported", "compiled"])
@torch.no_grad()
def test_transformers_model_takes_an_attention_mask(way):
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

    torch._dynamo.reset()
    sizes = {"hidden_size": D, "num_heads": 2, "head_dim": 4, "intermediate_size": 16}
    model = DeltaProductForCausalLM(DeltaProductConfig(V, **sizes)).eval()
    tokens, masks = some_tokens(), (some_mask().long(), (~some_mask()).long(), torch.ones(B, T, dtype=torch.long))
    if way == "exported":
        run = torch.export.export(Transformers(model), (tokens, masks[0])).module()
    else:
        run = torch.compile(Transformers(model), fullgraph=True, backend="eager")
    for mask in masks:
        assert_near(run(tokens, mask), Transformers(model)(tokens, mask))
