"""Native decoding (models/decoding.py, ops/engine_program.py) against the model itself, run whole in float64.

Tolerance: that of `bench generate`, 8·u·L·(√n + T·N): the same arithmetic in another order (benchmarks/generate.py).
"""

import copy
import shutil

import pytest
import torch
from compiled_sizes import most_steps

from deltaproduct.errors import UsageError
from deltaproduct.layers.mixer import Mixer
from deltaproduct.models import Decoder, ModelConfig, SequenceModel
from deltaproduct.ops import cpu
from deltaproduct.ops.engine_program import EngineProgram
from deltaproduct.ops.native import library

if reason := cpu.unsupported_reason(torch.device("cpu"), torch.float32):
    pytest.skip(reason, allow_module_level=True)

TINY = ModelConfig.build(
    vocab_size=11, num_labels=7, hidden_size=48, num_hidden_layers=2, num_heads=2, head_dim=16, num_householder=2
)
TOKENS = 24


@pytest.fixture(params=cpu.ENGINE.kernels_here())
def kernels(request):
    before = cpu.ENGINE.kernels
    cpu.ENGINE.use_kernels(request.param)
    yield
    cpu.ENGINE.use_kernels(before)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)


def build(**changes) -> SequenceModel:
    """A model whose every parameter is random: norms' weights are not all one and biases not all zero."""
    torch.manual_seed(0)
    model = SequenceModel(TINY.changed(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def some_tokens(batch_size: int, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(1))


def limit(model: SequenceModel, length: int = TOKENS) -> float:
    c = model.config
    longest = max(c.hidden_size, c.mlp_size, *(options.num_heads * options.head_dim for options in c.mixers))
    return 8 * 2**-24 * c.num_hidden_layers * (longest**0.5 + length * most_steps(c))


def assert_close(got: torch.Tensor, want: torch.Tensor, model: SequenceModel, length: int = TOKENS) -> None:
    assert got.shape == want.shape and got.dtype == torch.float32
    if want.numel():
        assert (got.double() - want).abs().max() <= limit(model, length) * want.abs().max()


def decode(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([decoder(column) for column in tokens.T], dim=1)


@torch.no_grad()
def whole(model: SequenceModel, tokens: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    return copy.deepcopy(model).double().use_backend("reference")(tokens)


CONFIGS = {
    "plain": {},
    "one step": {"num_householder": 1, "allow_neg_eigval": False},
    "gates": {"use_forget_gate": True, "use_output_gate": True, "num_householder": 3},
    "no convolution": {"use_short_conv": False, "qkv_activation": "relu"},
    "identity": {"qkv_activation": "identity", "conv_size": 2, "beta_bias_init": 1.0},
    "a width of one": {"conv_size": 1},
    "odd sizes": {"hidden_size": 37, "head_dim": 9, "expand_v": 3.0, "num_v_heads": 6, "num_heads": 3},
    "preset": {"mixer": "gated_deltanet"},
    "tied": {"num_labels": 11, "tie_word_embeddings": True},
    "no MLP": {"intermediate_size": 0},
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_is_the_model_token_by_token(name, batch_size, kernels):
    model, tokens = build(**CONFIGS[name]), some_tokens(batch_size)
    decoder = Decoder(model, batch_size)
    want, want_states = whole(model, tokens)
    assert_close(decode(decoder, tokens), want, model)
    for state, want_state in zip(decoder.state, want_states, strict=True):
        assert type(state) is type(want_state)
        for x, want_x in zip(state, want_state, strict=True):
            if want_x is None:
                assert x is None
            else:
                assert_close(x, want_x, model)


def test_threads_change_nothing(two_threads):
    """Each unit of work is the same whoever does it: not a bit differs."""
    model, tokens = build(use_forget_gate=True, hidden_size=160), some_tokens(2)
    on_two = decode(Decoder(model, 2), tokens)
    torch.set_num_threads(1)
    assert torch.equal(decode(Decoder(model, 2), tokens), on_two)


def test_threads_of_our_own(two_threads, monkeypatch, tmp_path):
    """As without PyTorch's OpenMP: a copy of the engine is loaded beside it, with variables of its own."""
    model, tokens = build(), some_tokens(2)
    want = decode(Decoder(model, 2), tokens)
    monkeypatch.setattr(library, "_openmp_of_process", lambda: None)
    monkeypatch.setattr(cpu, "ENGINE", library.Engine(shutil.copy(cpu.ENGINE.path, tmp_path)))
    assert cpu.ENGINE.openmp is None
    assert torch.equal(decode(Decoder(model, 2), tokens), want)


def test_goes_on_from_a_state_and_starts_afresh():
    """After the model itself has read a prompt; and what `state` gave is not changed by going on."""
    model, tokens = build(use_forget_gate=True), some_tokens(2)
    want, _ = whole(model, tokens)
    with torch.no_grad():
        _, prompt = model(tokens[:, :10])
    decoder = Decoder(model, 2)
    decoder(tokens[:, 3])  # something else
    decoder.load(prompt)
    assert_close(decode(decoder, tokens[:, 10:]), want[:, 10:], model)
    kept = decoder.state
    copies = [[None if x is None else x.clone() for x in state] for state in kept]
    decoder.load(None)
    logits = decoder(tokens[:, 0])
    assert_close(logits, want[:, 0], model)
    assert all(x is y is None or torch.equal(x, y) for s, c in zip(kept, copies, strict=True) for x, y in zip(s, c))
    before = logits.clone()
    decoder(tokens[:, 1])
    assert torch.equal(logits, before)  # they are the caller's own


def test_weights_are_read_in_place():
    model, tokens = build(), some_tokens(1)
    decoder = Decoder(model)
    decoder(tokens[:, 0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    decoder.load(None)
    assert_close(decode(decoder, tokens), whole(model, tokens)[0], model)


def test_reflections_by_the_thousand():
    """Keys that hardly change and β near 2, where errors last: as far apart as the model's own steps may be."""
    model, tokens = build(num_hidden_layers=1, qkv_activation="identity"), some_tokens(1, 2000)
    with torch.no_grad():
        model.blocks[0].mixer.b_proj.weight.mul_(0.01)
        model.embedding.weight[:] = model.embedding.weight[:1] + 0.01 * model.embedding.weight
    assert_close(decode(Decoder(model), tokens), whole(model, tokens)[0], model, 2000)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2)]
)
def test_refused_tokens(tokens):
    with pytest.raises(UsageError, match="2 ints"):
        Decoder(build(), 2)(tokens)


def test_refused_models(monkeypatch):
    with pytest.raises(UsageError, match="float32"):
        Decoder(build().double())
    with pytest.raises(UsageError, match="at least 1"):
        Decoder(build(), 0)
    monkeypatch.setattr(type(build().mixers()[0]), "emit", Mixer.emit)
    with pytest.raises(UsageError, match="has no native decoding"):
        Decoder(build())
    monkeypatch.setattr(cpu, "ENGINE", None)
    monkeypatch.setattr(cpu, "WHY_NO_ENGINE", "there was no compiler")
    with pytest.raises(UsageError, match="no native decoding here: there was no compiler"):
        EngineProgram(1)
