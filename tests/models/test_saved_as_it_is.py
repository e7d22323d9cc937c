"""What save_pretrained writes comes back with the same logits, or is refused: models that were changed after they were
built, ours and transformers'."""

import copy
import dataclasses
import json

import pytest
import torch
from changed_modules import LoraLinear, Wrapped, replace_forward, weight_norm
from saved_models import V, build, logits
from torch import nn
from torch.nn.utils import parametrizations, prune

from deltaproduct.errors import UsageError
from deltaproduct.layers import GatedDeltaNet
from deltaproduct.layers.parts import RMSNorm
from deltaproduct.models import SequenceModel
from deltaproduct.models.fla.checkpoint import read_fla, write_fla

pytestmark = pytest.mark.neighbours

KINDS = pytest.mark.parametrize("kind", ["ours", "transformers"])


def check_comes_back(model, folder) -> nn.Module:
    """Not a bit differs: the same weights run through the same code. And a second saving writes the same again."""
    want = logits(model)
    random = torch.get_rng_state()
    model.save_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), random)
    loaded = type(model).from_pretrained(folder).eval()
    assert torch.equal(logits(loaded), want)
    loaded.save_pretrained(folder)
    assert torch.equal(logits(type(model).from_pretrained(folder).eval()), want)
    return loaded


def refuse_to_save(model, folder, match: str) -> None:
    model_type = type(model)
    build("ours" if model_type is SequenceModel else "transformers").save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UsageError, match=match) as refused:
        model.save_pretrained(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


# Tied or not


def untie(model) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().flip(0))


def tie(model) -> None:
    model.head.weight = model.embedding.weight


@KINDS
def test_a_head_that_is_no_longer_tied_is_saved_beside_the_embedding(kind, tmp_path):
    model = build(kind, tie_word_embeddings=True)
    before = logits(model)
    untie(model)
    assert (logits(model) - before).abs().max() > 1e-2 * before.abs().max()
    loaded = check_comes_back(model, tmp_path / "model")
    assert loaded.head.weight is not loaded.embedding.weight and not loaded.config.tie_word_embeddings
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings  # what the model says of itself is left to its owner


@KINDS
def test_equal_weights_that_are_two_are_saved_as_two(kind, tmp_path):
    """They would part in training."""
    model = build(kind, tie_word_embeddings=True)
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    loaded = check_comes_back(model, tmp_path / "model")
    assert loaded.head.weight is not loaded.embedding.weight


@KINDS
def test_a_head_that_was_tied_by_hand_is_saved_as_tied(kind, tmp_path):
    model = build(kind)
    tie(model)
    loaded = check_comes_back(model, tmp_path / "model")
    assert loaded.head.weight is loaded.embedding.weight and loaded.config.tie_word_embeddings


@KINDS
def test_an_untied_head_of_new_values(kind, tmp_path):
    """`head = Linear`, as somebody fine-tunes it."""
    model = build(kind, tie_word_embeddings=True)
    model.head = nn.Linear(16, V, bias=False)
    check_comes_back(model, tmp_path / "model")


def test_weights_gathered_from_several_processes(tmp_path):
    """As a distributed run hands them over: whole, by name, a tied head's once or twice."""
    model = build(tie_word_embeddings=True)
    whole = {name: x.clone() for name, x in model.state_dict().items()}
    once = {name: x for name, x in whole.items() if name != "head.weight"}
    for number, weights in enumerate((whole, once)):
        other = build(tie_word_embeddings=True)
        if number == 1:  # sharding may have made two parameters of one
            other.head.weight = nn.Parameter(other.head.weight.detach().clone())
        (tmp_path / str(number)).mkdir()
        other.write_files(tmp_path / str(number), weights)
        loaded = SequenceModel.read_files(tmp_path / str(number), ["config.json", "model.safetensors"])
        assert torch.equal(logits(loaded), logits(model)) and loaded.is_tied
    with pytest.raises(UsageError, match=r"norm\.weight is missing"):
        model.write_files(tmp_path / "0", {n: x for n, x in whole.items() if n != "norm.weight"})


def test_flash_linear_attentions_layout_of_a_head_that_is_no_longer_tied(tmp_path):
    model = build(mixer="deltaproduct", tie_word_embeddings=True, use_forget_gate=True, use_output_gate=True)
    untie(model)
    write_fla(model, tmp_path / "model")
    loaded = read_fla(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model)) and not loaded.config.tie_word_embeddings
    model.norm.eps = 1e-3
    with pytest.raises(UsageError, match=r"norm\.eps"):
        write_fla(model, tmp_path / "model")


# Other changes that a configuration and tensors can say


def one_precision_here(model) -> None:
    model.blocks[1].mlp.bfloat16().float()
    model.blocks[0].mixer.o_norm.double()


def shared_block(model) -> None:
    model.blocks[1] = model.blocks[0]


def shared_projection(model) -> None:
    model.blocks[1].mixer.q_proj.weight = model.blocks[0].mixer.q_proj.weight


def in_one_piece(model) -> None:
    """All weights are views of one tensor, as some optimizers lay them."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    at = 0
    for p in model.parameters():
        p.data = flat[at : at + p.numel()].view_as(p)
        at += p.numel()


def not_contiguous(model) -> None:
    weight = model.blocks[0].mixer.q_proj.weight
    weight.data = weight.data.T.contiguous().T


def equal_module(model) -> None:
    old = model.blocks[0].mlp.up_proj
    model.blocks[0].mlp.up_proj = nn.Linear(old.in_features, old.out_features, bias=False)


def loss_of_ones_own(model) -> None:
    model.loss = nn.CrossEntropyLoss()


SAVED = {
    "half": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "precisions": one_precision_here,
    "shared block": shared_block,
    "shared projection": shared_projection,
    "in one piece": in_one_piece,
    "not contiguous": not_contiguous,
    "equal module": equal_module,
    "a module without weights": loss_of_ones_own,
    "another backend": lambda m: [b.mixer.__setattr__("backend", "reference") for b in m.blocks],
    "frozen": lambda m: m.requires_grad_(False),
    "compiled blocks": lambda m: [b.compile() for b in m.blocks],
}


@pytest.mark.parametrize("name", SAVED)
def test_what_can_be_said_comes_back(name, tmp_path):
    model = build()
    SAVED[name](model)
    if name == "compiled blocks":  # saving does not run them
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(logits(SequenceModel.from_pretrained(tmp_path / "model")), logits(build()))
    elif name == "another backend":  # how it was run is not what it is
        model.save_pretrained(tmp_path / "model")
        assert SequenceModel.from_pretrained(tmp_path / "model").blocks[0].mixer.backend == "auto"
    else:
        check_comes_back(model, tmp_path / "model")


@pytest.mark.parametrize("name", ["half", "shared block", "shared projection", "in one piece", "equal module"])
def test_what_can_be_said_comes_back_in_transformers(name, tmp_path):
    model = build("transformers")
    SAVED[name](model)
    want = logits(model)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype="auto").eval()
    assert torch.equal(logits(loaded), want)


def test_a_changed_configuration_is_what_is_saved(tmp_path):
    model = build()
    model.norm.eps = 1e-3
    for block in model.blocks:
        block.mixer_norm.eps = block.mlp_norm.eps = block.mixer.o_norm.eps = 1e-3
    model.config = dataclasses.replace(model.config, norm_eps=1e-3)
    check_comes_back(model, tmp_path / "model")


# What they cannot say


def embedding_of(size: int):
    def change(model) -> None:
        model.embedding = nn.Embedding(size, 16)

    return change


def wrap(path: str, kind):
    def change(model) -> None:
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, name, kind(getattr(parent, name)))

    return change


def gated(model) -> None:
    model.blocks[1].mixer = GatedDeltaNet(16, 2, 8)


def extra_weights(model) -> None:
    model.value = nn.Linear(16, 1)


def no_mlp(model) -> None:
    model.blocks[0].mlp = None


def quantized(model) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


REFUSED = {
    "a layer more": (lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])), "no place for blocks.2"),
    "a layer less": (lambda m: m.blocks.pop(1), "it has no blocks.1"),
    "another eps": (lambda m: setattr(m.norm, "eps", 1e-3), "norm.eps is 0.001 and its configuration makes it 1e-05"),
    "another eigenvalue": (lambda m: setattr(m.blocks[0].mixer, "allow_neg_eigval", False), "allow_neg_eigval"),
    "another activation": (lambda m: setattr(m.blocks[0].mixer, "qkv_activation", "relu"), "qkv_activation"),
    "resized embedding": (embedding_of(V + 3), r"embedding.* its configuration makes it"),
    "max_norm": (lambda m: setattr(m.embedding, "max_norm", 1.0), "embedding.max_norm"),
    "another mixer": (gated, "blocks.1.mixer is of the class GatedDeltaNet"),
    "another norm": (wrap("norm", lambda n: nn.LayerNorm(16)), "norm is of the class LayerNorm and not RMSNorm"),
    "a norm of another eps": (wrap("norm", lambda n: RMSNorm(16, 1e-2)), "norm.eps"),
    "a bias": (wrap("head", lambda h: nn.Linear(16, V)), "no place for head.bias"),
    "no MLP": (no_mlp, "it has no blocks.0.mlp"),
    "an adapter": (wrap("blocks.0.mixer.q_proj", LoraLinear), "q_proj is of the class LoraLinear"),
    "an adapter around the head": (wrap("head", Wrapped), "head is of the class Wrapped"),
    "more weights": (extra_weights, "no place for value"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m.head), "head is of the class Parametrized"),
    "weight norm": (lambda m: weight_norm(m.blocks[0].mlp.gate_proj), "gate_proj is of the class Parametrized"),
    "pruning": (lambda m: prune.l1_unstructured(m.head, "weight", 0.5), "no place for head.weight_"),
    "another forward": (lambda m: replace_forward(m.blocks[0].mlp), "blocks.0.mlp has a forward"),
    "on the device meta": (lambda m: m.blocks[0].to("meta"), "has no values"),
}


@KINDS
@pytest.mark.parametrize("name", REFUSED)
def test_what_they_cannot_say_is_refused(name, kind, tmp_path):
    change, match = REFUSED[name]
    model = build(kind)
    change(model)
    refuse_to_save(model, tmp_path / "model", match)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="PyTorch has no quantised products here")
def test_quantised_modules_are_refused(tmp_path):
    model = build()
    quantized(model)
    refuse_to_save(model, tmp_path / "model", "of the class")


@KINDS
def test_hooks_are_not_saved_and_a_warning_says_so(kind, tmp_path):
    model = build(kind)
    want = logits(model)
    model.head.register_forward_hook(lambda module, given, output: 2 * output)
    with pytest.warns(UserWarning, match="hooks .of head"):
        model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "model").eval()), want)


@KINDS
def test_an_adapter_that_was_merged_is_saved(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = build(kind)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(UsageError, match=r"q_proj is of the class Linear of peft.* and not Linear"):
        model.save_pretrained(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    assert torch.equal(logits(merged), logits(model))
    check_comes_back(merged, tmp_path / "model")
