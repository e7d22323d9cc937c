"""Models whose weights another library holds: quantised, offloaded, wrapped. They run, whole as in pieces."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from deltaproduct.errors import UsageError
from deltaproduct.layers import MIXERS
from deltaproduct.layers.parts import GateProjection, ShortConvolution
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.streaming import Stream

pytestmark = pytest.mark.neighbours

VOCAB = 11
EACH = pytest.mark.parametrize("name", MIXERS)


def build(name: str, **options) -> SequenceModel:
    """Two layers of a mixer with all its options that bring projections with them, and its convolution."""
    torch.manual_seed(0)
    wanted = {"use_forget_gate": True, "use_output_gate": True, "beta_bias_init": 0.5}
    config = ModelConfig.build(
        VOCAB, VOCAB, mixer=name, defaults=wanted | {"num_heads": 2, "head_dim": 8}, hidden_size=16,
        num_hidden_layers=2, intermediate_size=16, initializer_range=0.2, **options,
    )  # fmt: skip
    return SequenceModel(config).eval()


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def in_pieces(model: SequenceModel, x: torch.Tensor) -> torch.Tensor:
    state, pieces = None, []
    for piece in x.split([5, 1, 6], 1):
        logits, state = model(piece, state)
        pieces.append(logits)
    return torch.cat(pieces, 1)


class Opaque(nn.Module):
    """A linear map that shows no weight, as those of libraries that hold it in a form of their own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._call = [linear]  # a list hides it: neither a parameter nor a module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call[0](x)


class Adapted(nn.Module):
    """LoRA as adapters do it: the map in `base` and beside it a product of two narrow ones."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x.to(self.down.weight.dtype)))


def replace_linears(module: nn.Module, replacement) -> list[str]:
    """Put `replacement(linear)` in place of every linear map; their names."""
    names = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    for name in names:
        module.set_submodule(name, replacement(module.get_submodule(name)))
    return names


@EACH
@torch.no_grad()
def test_linear_maps_that_show_no_weight(name):
    model, x = build(name), tokens()
    want, _ = model(x)
    assert replace_linears(model, Opaque)
    got, state = model(x)
    assert torch.equal(got, want)
    # Float32 rounding along another order of sums, enlarged by norms: the model's own whole and pieces differ as much.
    assert (in_pieces(model, x) - want).abs().max() <= 1e-4 * want.abs().max()
    assert all(s.dtype in (torch.float32, torch.long) for s in tree_leaves(state) if s is not None)
    assert model.device == torch.device("cpu") and model.use_backend("auto") is model


@pytest.mark.parametrize(
    ("name", "kinds"),
    [*((name, {nn.Linear}) for name in MIXERS), ("lstm", None), ("gru", None)],  # None: PyTorch's choice, also of RNNs
)
@torch.no_grad()
def test_quantised_linear_maps(name, kinds):
    plain, x = build(name), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's plans for the function
        model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), kinds, dtype=torch.qint8)
    quantised = [m for m in model.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(quantised) == sum(type(m) is nn.Linear for m in plain.modules()) >= 2 * 4 + 1
    whole, _ = model(x)
    # Activations are rounded to a 127th of the range of their call, so that pieces are not bit for bit the whole. A
    # range of ±3.5 deviations makes that 2 · 3.5 / 127 / √12 = 1.6% of noise a map, in either; 10 maps are in a row.
    noise = 10 * 2 * 0.016
    assert (in_pieces(model, x) - whole).norm() <= noise * whole.norm()
    assert (whole - plain(x)[0]).norm() <= noise * whole.norm()
    fresh = torch.cat([model(piece)[0] for piece in x.split([5, 1, 6], 1)], 1)
    assert (fresh - whole).norm() > 1.5 * (in_pieces(model, x) - whole).norm()  # the state is carried


@EACH
def test_adapters_take_effect_and_learn(name):
    """An adapter on every linear map: none is passed over, in the logits or in the gradient."""
    model, x = build(name), tokens()
    with torch.no_grad():
        want, _ = model(x)
    names = replace_linears(model, Adapted)
    adapters = {name: model.get_submodule(name) for name in names}
    for adapter in adapters.values():
        nn.init.zeros_(adapter.up.weight)
    logits, _ = model(x)
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()
    logits.square().sum().backward()
    for adapter_name, adapter in adapters.items():  # a gradient that is not 0 is an effect, to first order
        assert adapter.up.weight.grad.abs().max() > 0, adapter_name
    for adapter in adapters.values():
        nn.init.normal_(adapter.up.weight)
    assert (model(x)[0] - want).abs().max() > 0.01 * want.abs().max()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *((name, "half of it") for name in MIXERS),
        *((name, where) for name in ("gated_deltanet", "mamba", "ttt_linear", "gru") for where in ("memory", "disk")),
    ],
)
@torch.no_grad()
def test_offloaded_weights(name, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain, x = build(name), tokens()
    want, _ = plain(x)
    model = copy.deepcopy(plain)
    if where == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        device_map = {"embedding": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "norm": "cpu", "head": "disk"}
        accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(p.is_meta for p in model.parameters())
    got, state = model(x)
    assert torch.equal(got, want)
    assert not any(s.is_meta for s in tree_leaves(state) if s is not None)
    assert (in_pieces(model, x) - want).abs().max() <= 1e-4 * want.abs().max()
    assert model.device == torch.device("cpu")


@torch.no_grad()
def test_a_learned_first_state_is_not_read_where_it_is_not(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build("ttt_linear")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(UsageError, match="first state of TTTLinear is learned") as refusal:
        model.blocks[0].mixer.init_state(1)
    assert "\n" not in str(refusal.value)


@torch.no_grad()
def test_conversations_with_offloaded_and_quantised_models(tmp_path):
    """They go on token by token; saving needs the weights' sha256, which cannot be had of them."""
    accelerate = pytest.importorskip("accelerate")
    plain = build("titans")
    want = plain(torch.tensor([[1, 2, 3]]))[0][0, -1]
    accelerate.cpu_offload(plain, execution_device="cpu")
    stream = Stream(plain)
    stream.prefill([1, 2, 3])
    assert torch.equal(stream.logits, want)
    assert len(list(stream.generate(3))) == 3
    with pytest.raises(UsageError, match="quantised or offloaded"):
        stream.save(tmp_path / "conversation")
    assert not (tmp_path / "conversation").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@EACH
def test_states_follow_x(name, dtype):
    """`init_state` takes x's dtype and device, whatever the weights'; without them, the weights', or the defaults."""
    mixer = build(name).blocks[0].mixer
    state = mixer.init_state(2, dtype, "meta")
    high = torch.float64 if dtype == torch.float64 else torch.float32
    for field, s in zip(state._fields, state, strict=True):
        if s is None:
            continue
        history = "history" in field or field in ("previous", "keys", "values")
        ints = field in ("lengths", "position")
        assert s.dtype == (torch.long if ints else dtype if history else high), field
        assert s.is_meta and s.shape[0] == 2, field
    ours = mixer.to(dtype).init_state(2)
    assert all(a is b is None or (a.dtype == b.dtype and not a.is_meta) for a, b in zip(ours, state, strict=True))
    called, _ = mixer(torch.zeros(2, 1, 16, dtype=dtype)), None
    assert [s is None for s in called[1]] == [s is None for s in state]


def test_without_parameters_states_are_pytorchs_defaults():
    conv = ShortConvolution(3, 4)
    del conv.weight
    assert conv.init_state(2).dtype == torch.float32 and conv.init_state(2).device.type == "cpu"
    conv.weight = nn.Parameter(torch.empty(3, 1, 4, dtype=torch.bfloat16, device="meta"))  # as offloading leaves it
    assert conv.init_state(2).dtype == torch.bfloat16 and conv.init_state(2).device.type == "cpu"


def test_impossible_states_are_refused():
    mixer = build("gated_deltanet").blocks[0].mixer
    with pytest.raises(UsageError, match=r"Inputs of torch.int64 have no state") as refusal:
        mixer.init_state(2, torch.int64)
    assert "\n" not in str(refusal.value)
    elsewhere = mixer.init_state(2, torch.float32, "meta")
    with pytest.raises(UsageError, match=r"recurrent is on meta and the input on cpu; .* init_state") as refusal:
        mixer(torch.zeros(2, 3, 16), elsewhere)
    assert "\n" not in str(refusal.value)


def test_gates_stay_float32_where_linear_maps_are_quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(build("gated_deltanet"), {nn.Linear}, dtype=torch.qint8)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer.b_proj, GateProjection) and isinstance(mixer.a_proj, GateProjection)
    assert not isinstance(mixer.q_proj, nn.Linear)


@torch.no_grad()
def test_looking_into_an_offloaded_layer_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = build("gated_deltanet")
    accelerate.cpu_offload(model, execution_device="cpu")
    mixer, x = model.blocks[0].mixer, torch.zeros(1, 3, 16)
    with pytest.raises(UsageError, match="offloading brings them for a call") as refusal:
        mixer.project(x, mixer.init_state(1))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba", "ttt_linear"])
@torch.no_grad()
def test_transformers_device_map_with_a_disk(name, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductForCausalLM

    plain, x = build(name), tokens()
    plain.save_pretrained(tmp_path / "model")
    device_map = {"embedding": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "norm": "cpu", "head": "cpu"}
    model = DeltaProductForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
    )
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(model(x).logits, plain(x)[0])
    text = model.generate(x, max_new_tokens=4, do_sample=False)
    state, (next_tokens, written) = None, (x, [])
    for _ in range(4):
        logits, state = plain(next_tokens, state)
        next_tokens = logits[:, -1:].argmax(-1)
        written.append(next_tokens)
    assert torch.equal(text[:, x.shape[1] :], torch.cat(written, 1))
