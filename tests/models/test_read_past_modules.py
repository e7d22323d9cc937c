"""Weights that are read past their modules: the native decoder and the loss without logits.

Neither calls the modules that it reads, so neither may be used where a module computes something else than its weight.
Tolerance, relative to the largest logit, between the native decoder, the model token by token and the model in one
piece: that of test_decoder.py, 8·u·L·(√n + T·N), with L = 2, n = 24, T = 8 and N = 2. The loss is compared in
float64.
"""

import copy

import pytest
import torch
from changed_modules import LoraLinear, Wrapped, larger, replace_forward, stretch, weight_norm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from deltaproduct.errors import UsageError
from deltaproduct.layers import DeltaProduct
from deltaproduct.models import Decoder, ModelConfig, SequenceModel
from deltaproduct.models.sequence_model import Block
from deltaproduct.models.streaming import Stream
from deltaproduct.ops import cpu
from deltaproduct.training.objectives.language import LanguageLoss

pytestmark = pytest.mark.neighbours

V = 11
native = pytest.mark.skipif(
    cpu.unsupported_reason(torch.device("cpu"), torch.float32) is not None, reason="there is no native engine here"
)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
NEAR = 8 * 2**-24 * 2 * (24**0.5 + 8 * 2)  # 2.0e-5


def build(**changes) -> SequenceModel:
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8, "intermediate_size": 24}
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig.build(V, V, defaults=settings, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class HalfBeta(DeltaProduct):
    """Somebody's own mixer, which has ours' `record`."""

    def project(self, x, state, cu_seqlens=None):
        q, k, v, beta, g, histories = super().project(x, state, cu_seqlens)
        return q, k, v, beta / 2, g, histories


def set_module(name: str, change):
    def apply(model: nn.Module) -> None:
        above, _, field = name.rpartition(".")
        parent = model.get_submodule(above)
        setattr(parent, field, change(getattr(parent, field)))

    return apply


def on(name: str, change):
    return lambda model: change(model.get_submodule(name))


def own_mix(mixer: DeltaProduct) -> None:
    before = mixer.mix

    def mix(x, state, cu_seqlens):
        y, state = before(x, state, cu_seqlens)
        return stretch(y), state

    mixer.mix = mix  # type: ignore[method-assign]


def global_hook(model: nn.Module) -> None:
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: stretch(output) if isinstance(module, nn.Linear) else None
    )
    request_cleanup.append(hook)


request_cleanup: list = []


@pytest.fixture(autouse=True)
def no_hook_stays():
    yield
    while request_cleanup:
        request_cleanup.pop().remove()


def not_contiguous(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.T.contiguous().T


def half_beta(model: SequenceModel) -> None:
    old = model.blocks[1].mixer
    model.blocks[1].mixer = HalfBeta(16, 2, 8)
    model.blocks[1].mixer.load_state_dict(old.state_dict())


def other_norm(norm: nn.Module) -> nn.Module:
    return nn.LayerNorm(16)


# Each with the name that the refusal has to give. The model itself goes on computing with all of these.
UNUSUAL = {
    "adapter by inheritance": ("blocks.0.mixer.q_proj", set_module("blocks.0.mixer.q_proj", LoraLinear)),
    "adapter by composition": ("blocks.1.mlp.up_proj", set_module("blocks.1.mlp.up_proj", Wrapped)),
    "adapter of the head": ("head", set_module("head", LoraLinear)),
    "adapter around the head": ("head", set_module("head", Wrapped)),
    "adapter of the embedding": ("embedding", set_module("embedding", Wrapped)),
    "adapter of a convolution": ("k_conv1d", lambda m: on("blocks.0.mixer.k_conv1d", replace_forward)(m)),
    "hook on a projection": ("v_proj", on("blocks.0.mixer.v_proj", lambda m: m.register_forward_hook(larger))),
    "hook before": (
        "down_proj",
        on("blocks.0.mlp.down_proj", lambda m: m.register_forward_pre_hook(lambda _, a: (stretch(a[0]),))),
    ),
    "hook on a norm": ("norm", on("norm", lambda m: m.register_forward_hook(larger))),
    "hook on the embedding": ("embedding", on("embedding", lambda m: m.register_forward_hook(larger))),
    "hook on the head": ("head", on("head", lambda m: m.register_forward_hook(larger))),
    "hook on a mixer": ("blocks.1.mixer", on("blocks.1.mixer", lambda m: m.register_forward_hook(larger))),
    "hook on a block": ("blocks.1", on("blocks.1", lambda m: m.register_forward_hook(larger))),
    "hook on the model": ("the model", lambda m: m.register_forward_hook(larger)),
    "hook on all modules": ("hook", global_hook),
    "forward of an instance": ("o_proj", on("blocks.0.mixer.o_proj", replace_forward)),
    "forward of the model": ("the model", replace_forward),
    "mix of an instance": ("blocks.0.mixer", on("blocks.0.mixer", own_mix)),
    "mixer with another project": ("HalfBeta", half_beta),
    "parametrization": (
        "head",
        on("head", lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
    ),
    "spectral norm": ("b_proj", on("blocks.0.mixer.b_proj", parametrizations.spectral_norm)),
    "weight norm": ("gate_proj", on("blocks.0.mlp.gate_proj", weight_norm)),
    "pruning": ("head", on("head", lambda m: prune.l1_unstructured(m, "weight", 0.5))),
    "max_norm": ("embedding", on("embedding", lambda m: setattr(m, "max_norm", 0.5))),
    "other norm": ("blocks.0.mixer_norm", set_module("blocks.0.mixer_norm", other_norm)),
    "other block": ("blocks.1", set_module("blocks.1", lambda b: Stretched(b))),
}


class Stretched(nn.Module):
    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    @property
    def mixer(self):
        return self.block.mixer

    def forward(self, x, state=None, **options):
        x, state = self.block(x, state, **options)
        return stretch(x), state


EACH = pytest.mark.parametrize("name", UNUSUAL)


@torch.no_grad()
def token_by_token(model: SequenceModel, tokens: list[int], state=None):
    logits = []
    for token in tokens:
        now, state = model(torch.tensor([[token]]), state)
        logits.append(now[0, 0])
    return torch.stack(logits), state


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= NEAR * want.abs().max()


def changed(name: str) -> tuple[SequenceModel, str]:
    model = build()
    before, _ = token_by_token(model, TOKENS)
    word, change = UNUSUAL[name]
    torch.manual_seed(1)
    change(model)
    after, _ = token_by_token(model, TOKENS)
    assert (after - before).abs().max() > 1e-2 * before.abs().max()  # what is read past the module would be wrong
    return model, word


@native
@EACH
def test_the_decoder_refuses_and_names_the_module(name):
    model, word = changed(name)
    with pytest.raises(UsageError, match=word) as refused:
        Decoder(model)
    assert "\n" not in str(refused.value) and str(refused.value).endswith("Call the model token by token.")


@EACH
def test_a_conversation_is_what_the_model_computes(name):
    model, _ = changed(name)
    stream, want = Stream(model), token_by_token(model, TOKENS)[0]
    assert not stream.is_native
    stream.prefill(TOKENS[:5])
    assert_near(stream.logits, want[4])
    for i in (5, 6, 7):
        stream.prefill(TOKENS[i : i + 1])
        assert_near(stream.logits, want[i])


@native
@EACH
def test_what_comes_after_the_reading_is_noticed(name):
    """The decoder refuses from then on and keeps its state, with which the model goes on; a conversation does that by
    itself."""
    model = build()
    decoder, stream = Decoder(model), Stream(model)
    for token in TOKENS[:3]:
        decoder(torch.tensor([token]))
        stream.prefill([token])
    assert stream.is_native
    torch.manual_seed(1)
    UNUSUAL[name][1](model)
    with pytest.raises(UsageError, match=UNUSUAL[name][0]):
        decoder(torch.tensor([TOKENS[3]]))
    want, _ = token_by_token(model, TOKENS[3:], decoder.state)
    for token, logits in zip(TOKENS[3:5], want, strict=False):
        stream.prefill([token])
        assert_near(stream.logits, logits)
    assert not stream.is_native and stream.position == 5
    stream.prefill(TOKENS[5:])  # in one piece
    assert_near(stream.logits, want[-1])


@native
def test_a_prompt_after_a_change_is_noticed_as_well():
    model = build()
    stream = Stream(model)
    stream.prefill(TOKENS[:3])
    state = stream.state
    UNUSUAL["hook on the model"][1](model)
    stream.prefill(TOKENS[3:])
    assert not stream.is_native
    assert_near(stream.logits, token_by_token(model, TOKENS[3:], state)[0][-1])


def rescaled(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: 1.1 * x for name, x in model.state_dict().items()}


def train_a_step(model: SequenceModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = F.cross_entropy(model(torch.tensor([TOKENS]))[0][0, :-1], torch.tensor(TOKENS[1:]))
    loss.backward()
    optimizer.step()


def new_parameter(model: SequenceModel) -> None:
    model.blocks[0].mixer.q_proj.weight = nn.Parameter(-model.blocks[0].mixer.q_proj.weight.detach())


def new_data(model: SequenceModel) -> None:
    for p in model.parameters():
        p.data = 1.2 * p.data


def new_bias(linear: nn.Linear) -> None:
    linear.bias = nn.Parameter(torch.randn(linear.out_features))


def other_linear(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features)


def no_mlp(model: SequenceModel) -> None:
    model.blocks[1].mlp = None


def rounded(model: SequenceModel) -> None:
    model.half().float()


# What the decoder goes on with: it has to see the change at the next token.
SEEN = {
    "values": lambda m: m.load_state_dict(rescaled(m)),
    "training": train_a_step,
    "new tensors": lambda m: m.load_state_dict(rescaled(m), assign=True),
    "a new parameter": new_parameter,
    "new data": new_data,
    "there and back": rounded,
    "another module": set_module("blocks.0.mlp.up_proj", other_linear),
    "another head": set_module("head", other_linear),
    "another embedding": set_module("embedding", lambda e: nn.Embedding(V, 16)),
    "a bias": on("blocks.1.mixer.o_proj", new_bias),
    "a bias of the head": on("head", new_bias),
    "eps": on("norm", lambda m: setattr(m, "eps", 3.0)),
    "an option": on("blocks.0.mixer", lambda m: setattr(m, "allow_neg_eigval", False)),
    "an activation": on("blocks.0.mixer", lambda m: setattr(m, "qkv_activation", "relu")),
    "a shorter model": no_mlp,
    "blocks that change places": lambda m: m.blocks.insert(0, m.blocks.pop(1)),
}


@native
@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_the_decoder_sees_what_changes(change):
    model = build()
    before = token_by_token(model, TOKENS)[0][-1]
    decoder = Decoder(model)
    for token in TOKENS[:3]:
        decoder(torch.tensor([token]))
    state = decoder.state
    torch.manual_seed(1)
    change(model)
    want, _ = token_by_token(model, TOKENS[3:], state)
    got = torch.cat([decoder(torch.tensor([token])) for token in TOKENS[3:]])
    assert_near(got, want)
    assert (want[-1] - before).abs().max() > 1e-3 * before.abs().max() or change is rounded


REFUSED_MODELS = {
    "half": (lambda m: m.half(), "float16"),
    "one layer's precision": (lambda m: m.blocks[1].mlp.double(), "blocks.1.mlp.gate_proj.weight is torch.float64"),
    "meta": (lambda m: m.to("meta"), "meta"),
    "not contiguous": (on("blocks.0.mixer.q_proj", not_contiguous), "q_proj.weight is not contiguous"),
}


@native
@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_what_the_engine_cannot_read_is_refused_before_and_after(name):
    change, word = REFUSED_MODELS[name]
    model = build()
    decoder = Decoder(model)
    change(model)
    for attempt in (lambda: Decoder(model), lambda: decoder(torch.tensor([1])), lambda: decoder.load(None)):
        with pytest.raises(UsageError, match=word):
            attempt()


@native
def test_a_head_of_other_sizes_cannot_be_read_past_its_end():
    """The engine takes pointers: a projection that is too small would be read beyond its memory."""
    model = build()
    model.blocks[0].mixer.o_proj = nn.Linear(8, 16, bias=False)
    with pytest.raises(UsageError, match="takes a tensor of"):
        Decoder(model)


@native
def test_a_state_that_no_longer_fits_is_refused():
    model = build()
    decoder = Decoder(model)
    decoder(torch.tensor([1]))
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    with pytest.raises(UsageError, match="of 2 layers and this model has 3"):
        decoder(torch.tensor([2]))


# The loss without logits


HEADS = [name for name in UNUSUAL if "head" in name] + ["hook on the model", "forward of the model", "parametrization",
                                                       "pruning", "hook on all modules"]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [*HEADS, "a bias of the head", "a hook on the gradient"])
def test_the_loss_is_that_of_the_logits(name, tied):
    """And so are all gradients, an adapter's included."""
    model = build(tie_word_embeddings=tied).double()
    if name == "a hook on the gradient":
        model.head.register_full_backward_hook(lambda module, given, _: tuple(3 * g for g in given))
    else:
        torch.manual_seed(1)
        (UNUSUAL[name][1] if name in UNUSUAL else SEEN[name])(model)
        model.double()
    inputs, targets = torch.tensor([TOKENS[:-1]]), torch.tensor([TOKENS[1:]])
    want = F.cross_entropy(model(inputs)[0][0], targets[0], reduction="sum")
    parameters = dict(model.named_parameters())
    want_gradients = torch.autograd.grad(want, list(parameters.values()))
    loss = LanguageLoss(model)(inputs, targets)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    assert abs(float((loss - want).detach())) <= 1e-12 * float(want.detach())
    for key, got, wanted in zip(parameters, gradients, want_gradients, strict=True):
        assert (got - wanted).abs().max() <= 1e-10 * max(1, float(wanted.abs().max())), key


def test_the_loss_of_a_plain_head_holds_no_logits(monkeypatch):
    model, calls = build(), []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or F.linear(x, self.weight, self.bias))
    LanguageLoss(model)(torch.tensor([TOKENS[:-1]]), torch.tensor([TOKENS[1:]])).backward()
    assert calls and all(module is not model.head for module in calls)


def test_with_peft():
    """The adapter of the field's own library, on the projections and on the head."""
    peft = pytest.importorskip("peft")
    model = build()
    before = token_by_token(model, TOKENS)[0]
    config = peft.LoraConfig(target_modules=["q_proj", "head"], init_lora_weights=False)
    peft.get_peft_model(model, config)  # in place
    want = token_by_token(model, TOKENS)[0]
    assert (want - before).abs().max() > 1e-2 * before.abs().max()
    with pytest.raises(UsageError, match=r"q_proj|head"):
        Decoder(model)
    stream = Stream(model)
    stream.prefill(TOKENS)
    assert_near(stream.logits, want[-1])
    inputs, targets = torch.tensor([TOKENS[:-1]]), torch.tensor([TOKENS[1:]])
    loss = LanguageLoss(model)(inputs, targets)
    assert_near(loss.detach(), F.cross_entropy(model(inputs)[0][0], targets[0], reduction="sum").detach())
    loss.backward()
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    assert adapters and all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters)


def test_with_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")

    class Larger(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model = build()
    hooks.add_hook_to_module(model.blocks[0].mlp.up_proj, Larger())
    stream, want = Stream(model), token_by_token(model, TOKENS)[0]
    assert not stream.is_native
    stream.prefill(TOKENS)
    assert_near(stream.logits, want[-1])
