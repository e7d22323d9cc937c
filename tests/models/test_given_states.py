"""States that are given to a mixer or a model: one of another kind is refused in a line that says which and why."""

import json

import pytest
import torch
from mixer_cases import build as build_mixer
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from deltaproduct.errors import UsageError
from deltaproduct.files import replaced_folder
from deltaproduct.layers import MIXERS, AttentionState
from deltaproduct.layers.deltaproduct import DeltaProductState
from deltaproduct.models import Decoder, ModelConfig, SequenceModel, states
from deltaproduct.models.streaming import Stream
from deltaproduct.ops import cpu

V, B, D = 7, 2, 12
native = pytest.mark.skipif(
    cpu.unsupported_reason(torch.device("cpu"), torch.float32) is not None, reason="there is no native engine here"
)


def model_of(**changes) -> SequenceModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 4, "intermediate_size": 16}
    return SequenceModel(ModelConfig.build(V, V, defaults=sizes, **changes)).eval()


def state_after(mixer, batch: int = B, tokens: int = 3):
    return mixer(torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(1)))[1]


def one_line(error) -> str:
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    return str(error.value)


def on_tensors(state, change):
    return tree_map(lambda x: change(x) if isinstance(x, torch.Tensor) else x, state)


SPOILS = {
    "another batch size": lambda s: on_tensors(s, lambda x: torch.cat((x, x))),
    "no batch": lambda s: on_tensors(s, lambda x: x[0]),
    "one row": lambda s: on_tensors(s, lambda x: x[:1]),
    "another width": lambda s: s._replace(**{s._fields[0]: torch.cat((s[0], s[0]), -1)}),
    "a plain tuple": lambda s: tuple(s),
    "a list": lambda s: list(s),
    "a tensor": lambda s: s[0],
    "a dict": lambda s: s._asdict(),
    "ints": lambda s: s._replace(**{s._fields[0]: s[0].long()}),
    "bools": lambda s: s._replace(**{s._fields[0]: s[0].bool()}),
    "complex numbers": lambda s: s._replace(**{s._fields[0]: s[0].cfloat()}),
    "another device": lambda s: on_tensors(s, lambda x: x.to("meta")),
    "a part that is missing": lambda s: s._replace(**{s._fields[0]: None}),
    "a part that is a number": lambda s: s._replace(**{s._fields[0]: 0.0}),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_every_mixer_refuses_what_is_no_state_of_its_own(name, spoil):
    mixer = build_mixer(name, {}, torch.float32)
    state, x = state_after(mixer), torch.randn(B, 4, D)
    spoilt = SPOILS[spoil](state)
    mask = torch.ones(B, 4, dtype=torch.bool)
    mask[0, 0] = False
    packed = {"cu_seqlens": torch.tensor([0, 3, 8])}
    for call in (
        lambda: mixer(x, spoilt),
        lambda: mixer(x[:, :1], spoilt),
        lambda: mixer(x, spoilt, mask=mask),
        lambda: mixer(x.view(1, 8, D), spoilt, **packed),
    ):
        with pytest.raises(UsageError, match=rf"This state is not one of {type(mixer).__name__}'s") as refused:
            call()
        one_line(refused)
    for given in (state, None):  # and goes on with what is right
        mixer(x, given)
        mixer(x.view(1, 8, D), given, **packed)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_state_of_another_mixer_is_refused(name):
    mixer, x = build_mixer(name, {}, torch.float32), torch.randn(B, 4, D)
    own = type(state_after(mixer))
    for other_name in MIXERS:
        other = build_mixer(other_name, {}, torch.float32)
        state = state_after(other)
        same = on_tensors(state, lambda a: a.shape) == on_tensors(state_after(mixer), lambda a: a.shape)
        if type(state) is own and same:
            mixer(x, state)  # a preset's state is its parent's
        else:
            with pytest.raises(UsageError, match="This state is not one of") as refused:
                mixer(x, state)
            one_line(refused)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_states_of_other_precisions_are_converted(name):
    """A float64 state in a float32 mixer and the other way round: to the coarser one's rounding, 1e-5 as in
    tests/layers/test_mixers.py."""
    single = build_mixer(name, {}, torch.float32)
    double = build_mixer(name, {}, torch.float64)
    x = torch.randn(B, 4, D, generator=torch.Generator().manual_seed(2))
    start = state_after(single)
    wide = on_tensors(start, lambda a: a.double() if a.is_floating_point() else a)
    want, _ = double(x.double(), wide)
    for mixer, given, state in ((single, x, wide), (double, x.double(), start)):
        for tokens in (given, given[:, :1]):
            y, _ = mixer(tokens, state)
            assert y.dtype == tokens.dtype
            assert (y.double() - want[:, : y.shape[1]]).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_the_message_says_what_was_given_and_what_is_needed():
    mixer = build_mixer("deltaproduct", {}, torch.float32)
    with pytest.raises(UsageError) as refused:
        mixer(torch.randn(3, 4, D), state_after(mixer))
    said = one_line(refused)
    assert "DeltaProduct" in said and "recurrent" in said and "[2, 2, 4, 4]" in said and "[3, 2, 4, 4]" in said


@torch.no_grad()
def test_a_cache_of_attention_may_have_any_length_but_one():
    mixer = build_mixer("attention", {}, torch.float32)
    for tokens in (0, 1, 5):
        mixer(torch.randn(B, 4, D), state_after(mixer, tokens=tokens))
    keys, values, lengths = state_after(mixer)
    with pytest.raises(UsageError, match="keys of 2 tokens and values of 3"):
        mixer(torch.randn(B, 4, D), AttentionState(keys[:, :2], values, lengths))
    with pytest.raises(UsageError, match=r"lengths is torch.float32 and should be torch.int64"):
        mixer(torch.randn(B, 4, D), AttentionState(keys, values, lengths.float()))


@torch.no_grad()
def test_a_mixer_whose_parts_are_changed_takes_the_states_of_its_new_ones():
    mixer, other = (build_mixer("deltaproduct", {"conv_size": w}, torch.float32) for w in (4, 2))
    x = torch.randn(B, 4, D)
    mixer(x, state_after(mixer))  # what its states look like is known from here on
    mixer.q_conv1d = other.q_conv1d
    mixer(x, state_after(mixer))
    with pytest.raises(UsageError, match="q_history"):
        mixer(x, state_after(build_mixer("deltaproduct", {}, torch.float32)))


# Models


def wrong_states(model: SequenceModel) -> dict[str, tuple[object, str]]:
    tokens = torch.zeros(B, 3, dtype=torch.long)
    state = model(tokens)[1]
    longer = model_of(num_hidden_layers=3)(tokens)[1]
    return {
        "three layers": (longer, "of 3 layers and this model has 2"),
        "one layer": (state[:1], "of 1 layers and this model has 2"),
        "no layer": ((), "of 0 layers"),
        "a layer's alone": (state[0], "of 4 layers"),
        "a tensor": (state[0].recurrent, "a Tensor"),
        "another batch": (model(tokens[:1])[1], r"\[1, 2, 4, 4\]"),
        "another width": (model_of(head_dim=2)(tokens)[1], "recurrent has shape"),
        "another convolution": (model_of(conv_size=3)(tokens)[1], "q_history has shape"),
        "no convolution": (model_of(use_short_conv=False)(tokens)[1], "q_history is a NoneType"),
        "more steps": (model_of(num_householder=3)(tokens)[1], "k_history has shape"),
        "other mixers": (model_of(mixer="mamba2")(tokens)[1], "is a MambaState and should be a DeltaProductState"),
        "another order": (tuple(reversed(model_of(mixer=["gla", "deltaproduct"])(tokens)[1])), "GatedLinear"),
    }


WRONG = list(wrong_states(model_of()))


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_a_model_refuses_the_states_of_others(name):
    model, tokens = model_of(), torch.zeros(B, 2, dtype=torch.long)
    state, match = wrong_states(model)[name]
    for call in (
        lambda: model(tokens, state),
        lambda: model(tokens, state, mask=torch.tensor([[True, False], [True, True]])),
        lambda: model.hidden(tokens[:, :1], state),
        lambda: states.check_state(model, state, B),
    ):
        with pytest.raises(UsageError, match=match) as refused:
            call()
        one_line(refused)
    with torch.enable_grad():
        model.gradient_checkpointing = True
        with pytest.raises(UsageError, match=match):
            model(tokens, state)


@native
@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_a_decoder_refuses_them_and_keeps_its_own(name):
    model = model_of()
    decoder = Decoder(model, B)
    decoder(torch.tensor([1, 2]))
    before = decoder.state
    state, match = wrong_states(model)[name]
    with pytest.raises(UsageError, match=match) as refused:
        decoder.load(state)
    one_line(refused)
    for mine, kept in zip(decoder.state, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, kept, strict=True))


@torch.no_grad()
def test_none_in_a_layers_place_starts_that_layer_afresh():
    model, tokens = model_of(), torch.ones(B, 2, dtype=torch.long)
    state = model(tokens)[1]
    fresh = states.initial_state(model, B)
    want, _ = model(tokens, (state[0], fresh[1]))
    assert torch.equal(model(tokens, (state[0], None))[0], want)


def test_a_saved_conversation_with_other_tensors_is_refused(tmp_path):
    model = model_of()
    stream = Stream(model)
    stream.prefill([1, 2, 3])
    stream.save(tmp_path / "saved")
    tensors, said = (
        load_file(tmp_path / "saved" / "stream.safetensors"),
        json.loads((tmp_path / "saved" / "stream.json").read_text()),
    )

    def rewritten(changed: dict, more: dict) -> None:
        with replaced_folder(tmp_path / "saved") as fresh:
            save_file(tensors | changed, fresh / "stream.safetensors")
            (fresh / "stream.json").write_text(json.dumps(said | more))

    wide = torch.zeros(1, 2, 4, 5)
    for changed, more, match in (
        ({"state.0.recurrent": wide}, {}, "recurrent has shape"),
        ({"state.1.q_history": torch.zeros(2, 3, 8)}, {}, "q_history has shape"),
        ({"state.1.recurrent": wide[..., :4].long()}, {}, "should be torch.float32"),
        ({"logits": torch.zeros(V + 1)}, {}, "logits"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, {}, "damaged"),
        ({}, {"position": "many"}, "position"),
        ({}, {"sampling": {"heat": 1}}, "sampling"),
    ):
        rewritten(changed, more)
        with pytest.raises(UsageError, match=match) as refused:
            Stream.load(tmp_path / "saved", model)
        one_line(refused)
    rewritten({}, {})
    assert Stream.load(tmp_path / "saved", model).position == 3


def test_transformers_model_refuses_a_cache_of_other_layers():
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

    sizes = {"hidden_size": D, "num_heads": 2, "head_dim": 4, "intermediate_size": 16}
    two, three = (
        DeltaProductForCausalLM(DeltaProductConfig(V, num_hidden_layers=layers, **sizes)).eval() for layers in (2, 3)
    )
    tokens = torch.zeros(B, 3, dtype=torch.long)
    with torch.no_grad():
        cache = three(tokens, use_cache=True).past_key_values
        with pytest.raises(UsageError, match="of 3 layers and this model has 2"):
            two(tokens, past_key_values=cache)
        cache = two(tokens[:1], use_cache=True).past_key_values
        with pytest.raises(UsageError, match="hold 1 sequences, and the tokens are of 2"):
            two(tokens, past_key_values=cache)


@torch.no_grad()
def test_a_state_class_of_ones_own_is_taken():
    class Mine(DeltaProductState):
        pass

    mixer = build_mixer("deltaproduct", {}, torch.float32)
    mixer(torch.randn(B, 2, D), Mine(*state_after(mixer)))
