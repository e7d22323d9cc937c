"""models.hf has the structure that transformers expects of a language model, without other names for its weights."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltaproduct.errors import UsageError
from deltaproduct.models import SequenceModel

pytest.importorskip("transformers", minversion="5.17")

from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM, DeltaProductModel
from deltaproduct.models.sequence_model import Block

pytestmark = pytest.mark.neighbours

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCAB = 7
TINY = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "intermediate_size": 16, "num_hidden_layers": 3,
        "initializer_range": 0.5}  # fmt: skip
GIVEN = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 0, 2, 2, 6]])


def build(**changed) -> DeltaProductForCausalLM:
    torch.manual_seed(0)
    return DeltaProductForCausalLM(DeltaProductConfig(VOCAB, **(TINY | changed))).eval()


@torch.no_grad()
def test_the_base_model_gives_hidden_states_and_is_part_of_every_call():
    model = build()
    base = model.base_model
    assert type(base) is DeltaProductModel and base is not model
    assert base is model.base_model is model.model is model.get_decoder() is base.base_model
    last = model(GIVEN, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(base(GIVEN).last_hidden_state, last)
    calls = []
    handle = base.register_forward_hook(lambda module, args, out: calls.append(out.last_hidden_state))
    logits = model(GIVEN).logits
    handle.remove()
    assert len(calls) == 1 and torch.equal(model.get_output_embeddings()(calls[0]), logits)
    assert base.get_input_embeddings() is model.get_input_embeddings() is model.embedding
    assert base.get_output_embeddings() is None
    assert base.dtype == model.dtype and base.device == model.device
    model.train()
    assert model.base_model.training and not model.eval().base_model.training


def test_the_names_of_weights_are_those_of_a_sequence_model():
    model = build()
    names = [name for name, _ in SequenceModel(model.config.model_config()).named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())
    assert not any(isinstance(module, DeltaProductModel) for module in model.modules())
    assert sum(p.numel() for p in model.base_model.parameters()) == model.num_parameters() - model.head.weight.numel()


@torch.no_grad()
def test_what_replaces_a_part_replaces_it_in_both():
    model = build()
    for change in (
        lambda m: m.set_input_embeddings(torch.nn.Embedding(VOCAB, 16)),
        lambda m: m.base_model.set_input_embeddings(torch.nn.Embedding(VOCAB, 16)),
        lambda m: setattr(m.base_model, "blocks", m.base_model.blocks[:2]),
        lambda m: setattr(m, "model", build(initializer_range=0.3).model),
        lambda m: m.load_state_dict(build(initializer_range=0.4).state_dict()),
        lambda m: m.double(),
    ):
        before = model(GIVEN).logits
        change(model)
        base, after = model.base_model, model(GIVEN).logits
        assert base.embedding is model.embedding and base.blocks is model.blocks and base.norm is model.norm
        assert torch.equal(model.head(base(GIVEN)[0]), after)
        assert not torch.equal(before, after)
    for p in model.base_model.parameters():
        p.requires_grad_(False)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight"]


@torch.no_grad()
def test_copies_have_a_base_model_of_their_own():
    model = build()
    want = model(GIVEN).logits
    deep, shallow = copy.deepcopy(model), copy.copy(model)
    replica = model._replicate_for_data_parallel()  # what nn.DataParallel runs in threads, with its own _modules
    for other in (deep, shallow, replica):
        assert other.base_model is not model.base_model and other.base_model is other.base_model
        assert torch.equal(other(GIVEN).logits, want)
    assert deep.base_model.embedding is deep.embedding is not model.embedding
    model.embedding.weight.zero_()
    assert torch.equal(deep(GIVEN).logits, want) and not torch.equal(model(GIVEN).logits, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_layers_are_recomputed(reentrant, every):
    model, runs = build(), []
    assert all(isinstance(b, GradientCheckpointingLayer) and isinstance(b, Block) for b in model.blocks)
    assert set(model._no_split_modules) == {type(model.blocks[0]).__name__} == {"Block"}
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": reentrant}, **({"every_n_layers": every} if every > 1 else {}))
    except TypeError:
        pytest.skip("this transformers recomputes all layers or none")
    assert [block.gradient_checkpointing for block in model.blocks] == [i % every == 0 for i in range(3)]
    model.train()
    out = model(GIVEN, labels=GIVEN, use_cache=True)
    assert runs == [0, 1, 2] and out.past_key_values.get_seq_length() == 6
    out.loss.backward()
    again = [i for i in range(3) if i % every == 0]
    assert sorted(runs) == sorted([0, 1, 2, *again])
    runs.clear()
    model.eval()(GIVEN, labels=GIVEN).loss.backward()
    assert runs == [0, 1, 2]


def test_recomputing_keeps_less():
    """Numbers that autograd keeps for the backward pass, beside the parameters."""
    kept = []
    for checkpointed in (False, True):
        model, sizes = build(intermediate_size=256).train(), []
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        own = {p.data_ptr() for p in model.parameters()}

        def pack(x, sizes=sizes, own=own):
            if x.data_ptr() not in own:
                sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(GIVEN, labels=GIVEN)
        kept.append(sum(sizes))
    # Of a block, its input of 16 numbers a token in place of several of 256 in the MLP alone.
    assert kept[1] < 0.2 * kept[0]


def test_arguments_that_no_model_has(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, DeltaProductModel.from_pretrained):
        with pytest.raises(UsageError, match="did you mean 'num_householder'") as error:
            load(tmp_path, num_housholder=3)
        assert "\n" not in str(error.value)


@pytest.mark.slow("processes")
def test_a_broken_torchvision_beside_is_one_line(tmp_path):
    """transformers imports whatever torchvision there is, and one of another PyTorch fails so."""
    package, info = tmp_path / "torchvision", tmp_path / "torchvision-9.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.0\n")
    paths = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-c", "import deltaproduct.models.hf"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and "(operator torchvision::nms does not exist). A torchvision of another PyTorch" in last
