"""Models: streaming, sizes, configurations; and checkpoints that come back exactly or not at all."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import seal
from torch.utils._pytree import tree_leaves

from deltaproduct import files
from deltaproduct.errors import UsageError
from deltaproduct.files import replaced_folder, verified_folder
from deltaproduct.layers import GatedDeltaNet
from deltaproduct.models import ModelConfig, SequenceModel

TINY = {"vocab_size": 7, "num_labels": 5, "hidden_size": 8, "num_heads": 2, "head_dim": 4, "intermediate_size": 16}
HYBRID = {
    "mixer": [
        "deltaproduct",
        {"name": "gated_deltanet", "num_heads": 1},
        {"name": "deltaproduct", "num_householder": 3},
    ],
    "intermediate_size": [16, 0, 16],
}
CONFIGS = {
    "plain": {},
    "two layers, no MLP": {"num_hidden_layers": 2, "intermediate_size": 0},
    "tied": {"num_labels": 7, "tie_word_embeddings": True},
    "hybrid": HYBRID,
    "torch's initialisation": {"initializer_range": None, "beta_bias_init": 0.5, "use_short_conv": False},
    "gates": {"use_forget_gate": True, "use_output_gate": True, "num_v_heads": 4, "expand_v": 0.5},
}
EACH = pytest.mark.parametrize("changed", CONFIGS.values(), ids=CONFIGS)


def build(changed: dict | None = None, seed: int = 0) -> SequenceModel:
    torch.manual_seed(seed)
    changed = changed or {}
    sizes = {name: changed.get(name, TINY[name]) for name in ("vocab_size", "num_labels")}
    return SequenceModel(ModelConfig.build(defaults=TINY, **changed | sizes))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path, match: str) -> str:
    """The one line with which loading `folder` is refused."""
    with pytest.raises(UsageError, match=match) as error:
        SequenceModel.from_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def weights(model: SequenceModel) -> dict[str, torch.Tensor]:
    return {name: a.clone() for name, a in model.state_dict().items()}


# Running


@EACH
def test_streaming_packing_and_padding(changed):
    model, x = build(changed).double(), tokens(2, 15)
    logits, state = model(x)
    assert logits.shape == (2, 15, model.config.num_labels)

    carried, pieces = None, []
    for lo, hi in ((0, 1), (1, 9), (9, 15)):
        piece, carried = model(x[:, lo:hi], carried)
        pieces.append(piece)
    # float64 rounding, enlarged by norms of values about 0.02 times 300 at most: 1e-16 · 1e4.
    assert (torch.cat(pieces, 1) - logits).abs().max() <= 1e-12
    for a, b in zip(tree_leaves(carried), tree_leaves(state)):
        assert a is b is None or (a - b).abs().max() <= 1e-12

    cu = torch.tensor([0, 15, 15, 30])
    packed, _ = model(x.reshape(1, 30), cu_seqlens=cu)
    assert (packed.view_as(logits) - logits).abs().max() <= 1e-12

    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[0, :3] = mask[1, 4:7] = False
    padded = tokens(2, 18).masked_scatter(mask, x)
    out, end = model(padded, mask=mask)
    assert (out[mask].view_as(logits) - logits).abs().max() <= 1e-12
    for a, b in zip(tree_leaves(end), tree_leaves(state)):
        assert a is b is None or (a - b).abs().max() <= 1e-12


def test_sizes():
    model = build({"num_hidden_layers": 2})
    # Per layer, with D=8, H·K=8, N=2: q 64, k and v 128 each, b 8·4, convolutions 4·(8+16+16), o_norm 4, o 64;
    # MLP 3·8·16; two norms of 8. Beside the layers: embedding 7·8, norm 8, head 8·5.
    layer = 64 + 128 + 128 + 32 + 160 + 4 + 64 + 3 * 8 * 16 + 2 * 8
    assert model.num_parameters == 2 * layer + 56 + 8 + 40
    # S is 2 heads of 4×4; histories are 3 tokens of 8 + 16 + 16.
    assert model.state_size == 2 * (2 * 16 + 3 * 40)
    assert build(CONFIGS["tied"]).num_parameters == build({"num_labels": 7}).num_parameters - 56


def test_layers_of_a_hybrid_differ():
    first, second, third = build(CONFIGS["hybrid"]).blocks
    assert isinstance(second.mixer, GatedDeltaNet) and not isinstance(first.mixer, GatedDeltaNet)
    assert [block.mixer.num_householder for block in (first, second, third)] == [2, 1, 3]
    assert [block.mixer.num_heads for block in (first, second, third)] == [2, 1, 2]
    assert first.mlp is not None and second.mlp is None


@pytest.mark.parametrize(("hidden", "mlp"), [(768, 2048), (1024, 2816), (64, 256), (96, 256), (97, 512), (2048, 5632)])
def test_mlp_width_is_eight_thirds_rounded_up_to_256(hidden, mlp):
    assert ModelConfig.build(5, 5, hidden_size=hidden).mlp_size == mlp


def test_initialisation():
    wide = {"hidden_size": 256, "vocab_size": 300, "intermediate_size": 256}
    # 65,536 and 76,800 draws: their standard deviation is known to 0.3%.
    for changed, linear, embedding in (
        ({"initializer_range": 0.05, "embedding_init_std": 0.3}, 0.05, 0.3),
        ({}, 0.02, 0.02),
        ({"initializer_range": None}, (3 * 256) ** -0.5, 1.0),  # PyTorch's: uniform within ±1/√256
    ):
        model = build(wide | changed)
        assert model.blocks[0].mlp.gate_proj.weight.std().item() == pytest.approx(linear, rel=0.02)
        assert model.embedding.weight.std().item() == pytest.approx(embedding, rel=0.02)
    assert (build({"beta_bias_init": 1.5}).blocks[0].mixer.b_proj.bias == 1.5).all()


def test_backend_can_be_chosen():
    model, x = build().double(), tokens(2, 9)
    want, _ = model(x)
    got, _ = model.use_backend("reference")(x)
    assert (got - want).abs().max() <= 1e-12 and model.blocks[0].mixer.backend == "reference"
    with pytest.raises(UsageError, match="no backend 'nonsense'"):
        model.use_backend("nonsense")
    assert model.blocks[0].mixer.backend == "reference"


# Configurations


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        *((name, {name: 0}) for name in ("vocab_size", "num_labels", "hidden_size", "num_hidden_layers", "num_heads")),
        *((name, {name: 0}) for name in ("head_dim", "num_householder", "conv_size", "norm_eps", "expand_v")),
        *((name, {name: -1}) for name in ("intermediate_size", "initializer_range", "embedding_init_std")),
        *((name, {"mixer": {"name": "gla", name: 0}}) for name in ("gate_low_rank_dim", "gate_logit_normalizer")),
        *((name, {"mixer": {"name": "mamba", name: 0}}) for name in ("expand", "ssm_state_size", "time_step_rank")),
        ("feature_map", {"mixer": {"name": "linear_attention", "feature_map": "nonsense"}}),
        ("tie_word_embeddings", {"tie_word_embeddings": True}),
        ("mixer", {"mixer": "nonsense"}),
        ("mixer", {"mixer": []}),
        ("mixer has 3 entries for num_hidden_layers=2", HYBRID | {"num_hidden_layers": 2}),
        ("intermediate_size has 2 entries", {"intermediate_size": [1, 2]}),
        ("intermediate_size", {"num_hidden_layers": 2, "intermediate_size": [1, -2]}),
        ("'num_kv_heads' is no field of a model and no option of the mixer deltaproduct", {"num_kv_heads": 1}),
        ("did you mean 'num_heads'", {"mixer": "lstm", "num_haeds": 1}),
    ],
)
def test_impossible_configurations_are_refused(name, changed):
    with pytest.raises(UsageError, match=name) as error:
        ModelConfig.build(**(TINY | changed))
    assert "\n" not in str(error.value)


@EACH
def test_configuration_round_trip(changed):
    config = ModelConfig.build(**(TINY | changed))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("match", "values"),
    [
        ("nonsense", TINY | {"nonsense": 1}),
        ("vocab_size", {"num_labels": 5}),
        ("hidden_size", TINY | {"hidden_size": "wide"}),
        ("head_dim must be at least 1", TINY | {"head_dim": -2}),
        ("configuration", [1, 2]),
        ("configuration", None),
    ],
)
def test_what_is_no_configuration_is_refused(match, values):
    with pytest.raises(UsageError, match=match) as error:
        ModelConfig.from_dict(values)
    assert "\n" not in str(error.value)


# Checkpoints


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoint_round_trip_is_exact(changed, dtype, tmp_path):
    model = build(changed).to(dtype)
    model.save_pretrained(tmp_path / "a" / "model")
    loaded = SequenceModel.from_pretrained(str(tmp_path / "a" / "model"))
    assert loaded.config == model.config and not loaded.training
    for name, a in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype and torch.equal(loaded.state_dict()[name], a), name
    assert torch.equal(loaded(tokens(2, 9))[0], model(tokens(2, 9))[0])
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_word_embeddings
    assert all(p.requires_grad for p in loaded.parameters())
    files = {p.name for p in (tmp_path / "a" / "model").rglob("*")}
    assert files == {"config.json", "model.safetensors", "manifest.json"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model"]


def test_changed_bytes_are_refused(saved):
    for name in ("model.safetensors", "config.json"):
        file = saved / name
        good = file.read_bytes()
        for i in range(20):
            at = i * (len(good) - 1) // 19  # first and last byte included
            file.write_bytes(good[:at] + bytes([good[at] ^ (1 << i % 8)]) + good[at + 1 :])
            assert name in refusal(saved, "corrupt")
        file.write_bytes(good)
    SequenceModel.from_pretrained(saved)


def test_truncated_and_missing_files_are_refused(saved):
    for name in ("model.safetensors", "config.json"):
        good = (saved / name).read_bytes()
        for bad in (b"", good[:-1], good[: len(good) // 2], good + b"\0"):
            (saved / name).write_bytes(bad)
            assert name in refusal(saved, "corrupt")
        (saved / name).unlink()
        assert name in refusal(saved, "missing")
        (saved / name).write_bytes(good)
    manifest = (saved / "manifest.json").read_text()
    for bad in ("", "{", "[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": 3}', manifest[:-10]):
        (saved / "manifest.json").write_text(bad)
        refusal(saved, r"manifest\.json")
    for missing in ("model.safetensors", "config.json"):
        values = json.loads(manifest)
        del values["files"][missing]
        (saved / "manifest.json").write_text(json.dumps(values))
        refusal(saved, missing)
    (saved / "manifest.json").write_text(json.dumps(json.loads(manifest) | {"files": {"config.json": 3}}))
    refusal(saved, r"config\.json|manifest\.json")
    (saved / "manifest.json").unlink()
    refusal(saved, r"no manifest\.json")
    refusal(saved / "nothing", "not a folder")
    refusal(saved / "config.json", "not a folder")


def test_a_manifest_that_is_no_text_is_refused(saved):
    (saved / "manifest.json").write_bytes(b"\xff\xfe{}")
    refusal(saved, r"manifest\.json")


def test_weights_and_configuration_must_belong_together(saved, tmp_path):
    build({"hidden_size": 16}).save_pretrained(tmp_path / "other")
    (saved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    seal(saved)
    refusal(saved, "does not fit")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    for changed in ({**tensors, "extra": torch.zeros(2)}, {n: a for n, a in tensors.items() if "o_norm" not in n}):
        save_file(changed, tmp_path / "other" / "model.safetensors")
        seal(tmp_path / "other")
        refusal(tmp_path / "other", "extra|o_norm")
    (saved / "model.safetensors").write_bytes(b"no safetensors at all")
    seal(saved)
    refusal(saved, "not a safetensors file")


def test_foreign_configurations_are_refused(saved):
    good = json.loads((saved / "config.json").read_text())
    for match, values in (
        ("nonsense", good | {"nonsense": 1}),
        ("model type", good | {"model_type": "gpt2"}),
        ("model type", {n: v for n, v in good.items() if n != "model_type"}),
        ("model type", [good]),
        ("num_heads must be", good | {"mixer": good["mixer"] | {"num_heads": 0}}),
        ("num_v_heads", good | {"mixer": good["mixer"] | {"num_v_heads": 3}}),
    ):
        (saved / "config.json").write_text(json.dumps(values))
        seal(saved)
        refusal(saved, match)


# Replacing a folder


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_crash_between_the_renames_loses_nothing(saved, fails_at, monkeypatch):
    old, new, rename, calls = build(), build(seed=1), os.rename, []

    class Killed(BaseException):
        """A process that dies here runs no handler; this at least is caught by none."""

    def dying(a, b):
        calls.append((a, b))
        if len(calls) == fails_at:
            raise Killed
        rename(a, b)

    monkeypatch.setattr(files, "_exchanged", lambda *_: False)  # as on a file system that cannot exchange names
    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(Killed):
        new.save_pretrained(saved)
    monkeypatch.undo()
    # The manifest of the new folder was complete in both cases; before the first rename the old one is still in place.
    want = weights(old if fails_at == 1 else new)
    loaded = weights(SequenceModel.from_pretrained(saved))
    assert all(torch.equal(loaded[n], a) for n, a in want.items())
    new.save_pretrained(saved)
    loaded = weights(SequenceModel.from_pretrained(saved))
    assert all(torch.equal(loaded[n], a) for n, a in weights(new).items())
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("newer_is_whole", [False, True])
def test_what_a_dead_process_left_is_put_right(saved, newer_is_whole):
    # Killed between the renames: nothing at `saved`, the old folder beside it, and the new one whole or not.
    beside = saved.parent
    build(seed=1).save_pretrained(beside / "fresh")
    if not newer_is_whole:
        (beside / "fresh" / "manifest.json").unlink()
    os.rename(saved, beside / f".{saved.name}.old")
    os.rename(beside / "fresh", beside / f".{saved.name}.new")
    loaded = weights(SequenceModel.from_pretrained(saved))
    assert all(torch.equal(loaded[n], a) for n, a in weights(build(seed=int(newer_is_whole))).items())
    # Who reads renames nothing; the next who writes clears up.
    assert not saved.exists() and (beside / f".{saved.name}.old").exists()
    build(seed=2).save_pretrained(saved)
    assert [p.name for p in beside.iterdir()] == [saved.name]


def test_the_first_save_cut_off_before_its_rename_is_no_checkpoint_or_a_whole_one(tmp_path, monkeypatch):
    def dying(a, b):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        build().save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    refusal(tmp_path / "model", "not a folder")
    build().save_pretrained(tmp_path / "model")
    SequenceModel.from_pretrained(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failing_body_leaves_the_old_folder(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(RuntimeError, match="in the middle"), replaced_folder(saved) as fresh:
        (fresh / "config.json").write_text("half")
        raise RuntimeError("in the middle")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert verified_folder(saved, "checkpoint") == ["config.json", "model.safetensors"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot be written") as error:
        build().save_pretrained(tmp_path / "file" / "model")
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_folder(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    largest = len(before["model.safetensors"])
    for limit in (largest // 2, 100):  # the weights do not fit; nothing fits
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # to a writer this is a disk that is full
        try:
            with pytest.raises(UsageError, match="cannot be written") as error:
                build(seed=1).save_pretrained(saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize("mixer", ["deltaproduct", "mamba2", "attention"])
def test_recomputing_blocks_in_the_backward_pass_changes_no_bit(mixer):
    model = build({"mixer": mixer, "num_hidden_layers": 2})
    x = tokens(2, 9)
    gradients, blocks_run = [], []
    for model.gradient_checkpointing in (False, True):
        runs = []
        hook = model.blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model.zero_grad()
        _, state = model(x)
        model(x, state)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        blocks_run.append(len(runs))
        hook.remove()
    assert blocks_run[1] == 2 * blocks_run[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_the_head_sees():
    model = build()
    given = tokens(1, 7)
    first, state = model.hidden(given[:, :4])
    second, _ = model.hidden(given[:, 4:], state)
    torch.testing.assert_close(model.head(torch.cat((first, second), 1)), model(given)[0])


def test_the_old_name_of_gradient_checkpointing_warns_and_works():
    model = SequenceModel(ModelConfig(vocab_size=5, num_labels=5, hidden_size=8, intermediate_size=0))
    with pytest.warns(DeprecationWarning, match="recompute is now gradient_checkpointing"):
        model.recompute = True
    assert model.gradient_checkpointing
    with pytest.warns(DeprecationWarning, match="recompute is now gradient_checkpointing"):
        assert model.recompute
