"""Checkpoints of every release of flash-linear-attention (0.1 to 0.6.0) and of the DeltaProduct paper's own code.

`FIELDS` was read out of the releases' configuration classes (`ast` over their constructors). The forward pass of each
layout, written out, and the round trips of many models: tests/training/test_checkpoints.py.
"""

import ast
import importlib.metadata
import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltaproduct.cli.lm_convert import TARGETS, LmConvert
from deltaproduct.errors import UsageError
from deltaproduct.files import read_json
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.fla.checkpoint import from_fla_config, read_fla, to_fla_config, write_fla
from deltaproduct.models.fla.config import DEFAULTS

pytestmark = pytest.mark.neighbours

# Configurations

RELEASES = ["0.1", "0.1.1", "0.1.2", "0.2.0", "0.2.1", "0.2.2", "0.3.0", "0.3.1", "0.3.2", "0.4.0", "0.4.1", "0.4.2",
            "0.5.0", "0.5.1", "0.5.2", "0.6.0"]  # fmt: skip
_FIRST: dict[str, Any] = {
    "attn_mode": "chunk", "hidden_size": 2048, "use_short_conv": True, "conv_size": 4, "max_position_embeddings": 2048,
    "hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish", "norm_eps": 1e-6, "attn": None,
    "use_cache": True, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "initializer_range": 0.006, "fuse_norm": True, "fuse_swiglu": True, "fuse_cross_entropy": True, "vocab_size": 32000,
}  # fmt: skip
_LATER: dict[str, dict[str, Any]] = {
    "0.2.2": {"initializer_range": 0.02},
    "0.3.0": {"use_l2warp": False},
    "0.3.1": {"fuse_linear_cross_entropy": False},
    "0.5.1": {"attnres_block_size": None},
}
# What each release has besides the one before; None for a field: it went.
FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "delta_net": {
        "0.1": _FIRST
        | {"expand_k": 1, "expand_v": 1, "use_gate": False, "use_beta": True, "use_output_norm": True, "num_heads": 16,
           "qk_norm": "l2", "qk_activation": "silu", "num_hidden_layers": 24},
        **_LATER,
        "0.5.0": {"allow_neg_eigval": False},
    },
    "gated_deltanet": {
        "0.1": _FIRST | {"expand_v": 2, "use_gate": True, "head_dim": 256, "num_heads": 6, "num_hidden_layers": 21},
        **_LATER,
        "0.2.2": _LATER["0.2.2"] | {"num_v_heads": None},
        "0.3.0": _LATER["0.3.0"] | {"allow_neg_eigval": False},
        "0.6.0": {"output_gate_activation": "swish"},
    },
    "gated_deltaproduct": {
        "0.2.0": _FIRST
        | {"expand_v": 2, "use_gate": True, "head_dim": 256, "num_heads": 6, "num_hidden_layers": 21,
           "use_forget_gate": False, "allow_neg_eigval": False, "num_householder": 1},
        **_LATER,
        "0.3.0": _LATER["0.3.0"] | {"use_output_gate": True},
    },
}  # fmt: skip
GONE = {("gated_deltaproduct", "0.3.0"): "use_gate"}
EACH = [(kind, release) for kind, rows in FIELDS.items() for release in RELEASES
        if RELEASES.index(release) >= RELEASES.index(next(iter(rows)))]  # fmt: skip


def fields(kind: str, release: str) -> dict[str, Any]:
    """What a release's class writes into config.json when it is given nothing."""
    values: dict[str, Any] = {"model_type": kind, "torch_dtype": "float32", "transformers_version": "4.46.3"}
    for known in RELEASES[: RELEASES.index(release) + 1]:
        values |= FIELDS[kind].get(known, {})
        values.pop(GONE.get((kind, known), ""), None)
    return values


@pytest.mark.parametrize(("kind", "release"), EACH)
def test_every_release_means_the_same_by_its_defaults(kind, release):
    values = fields(kind, release)
    scale = values["initializer_range"]
    assert from_fla_config(values) == from_fla_config({"model_type": kind, "initializer_range": scale})


def test_the_fields_are_what_the_installed_release_has():
    package = importlib.util.find_spec("fla")
    folders = [Path(p, "models") for p in (package and package.submodule_search_locations) or ()]
    version = importlib.metadata.version("flash-linear-attention") if any(f.is_dir() for f in folders) else None
    if version not in RELEASES:
        pytest.skip(f"flash-linear-attention {RELEASES[0]} to {RELEASES[-1]} is not installed")
    for kind in (kind for kind, release in EACH if release == version):
        file = next(f for folder in folders for f in [folder / kind / f"configuration_{kind}.py"] if f.is_file())
        init = next(x for x in ast.walk(ast.parse(file.read_text()))
                    if isinstance(x, ast.FunctionDef) and x.name == "__init__").args  # fmt: skip
        theirs = dict(zip([a.arg for a in init.args][1:], map(ast.literal_eval, init.defaults), strict=True))
        own = fields(kind, version)
        assert theirs == {name: own[name] for name in own if name in FIELDS_OF[kind]}, kind


FIELDS_OF = {kind: {name for row in rows.values() for name in row} for kind, rows in FIELDS.items()}
# A value that is not the default, of every field of every release that `DEFAULTS` does not have: it changes nothing,
# or our layers cannot compute it and it is refused.
LEFT_ASIDE = {
    "attn_mode": "fused_recurrent", "max_position_embeddings": 9, "use_cache": False, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0, "fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False,
    "use_l2warp": True, "fuse_linear_cross_entropy": True, "use_output_norm": False,
}  # fmt: skip
REFUSED = {"hidden_act": "powlu", "use_beta": False, "qk_norm": "sum", "qk_activation": "relu", "attnres_block_size": 2,
           "output_gate_activation": "sigmoid", "attn": {"layers": [0], "num_heads": 8, "window_size": 5}}  # fmt: skip


@pytest.mark.parametrize("kind", FIELDS)
def test_every_field_of_every_release(kind):
    plain = fields(kind, "0.6.0")
    for name in FIELDS_OF[kind] - DEFAULTS[kind].keys():
        if name in REFUSED:
            with pytest.raises(UsageError, match=name if name != "attn" else "window_size") as error:
                from_fla_config(plain | {name: REFUSED[name]})
            assert "\n" not in str(error.value)
        else:
            assert from_fla_config(plain | {name: LEFT_ASIDE[name]}) == from_fla_config(plain), name


PAPERS = {
    "attn_mode": "chunk", "bos_token_id": 1, "clamp_min": None, "eos_token_id": 2, "use_gate": False, "expand_k": 1,
    "expand_v": 1, "fuse_cross_entropy": True, "fuse_norm": True, "hidden_act": "swish", "hidden_ratio": 4,
    "hidden_size": 1024, "initializer_range": 0.006, "intermediate_size": None, "max_position_embeddings": 2048,
    "model_type": "gated_deltaproduct", "num_heads": 8, "head_dim": 128, "num_hidden_layers": 2, "norm_first": False,
    "norm_eps": 1e-6, "tie_word_embeddings": True, "use_cache": False, "use_decay_gate": False, "vocab_size": 32000,
    "use_forget_gate": False, "allow_neg_eigval": True, "num_householder": 10, "layer_type": "normal",
    "use_beta_conv1d": False,
}  # fmt: skip


def test_the_papers_configurations():
    """As in its repository (language_modeling/model_configs/delta_product_-1_1_2_s5.json)."""
    config = from_fla_config(PAPERS)
    assert (config.mixer.num_householder, config.mixer.allow_neg_eigval, config.mixer.use_forget_gate) == (
        10,
        True,
        False,
    )
    assert not config.mixer.use_output_gate and config.tie_word_embeddings and config.intermediate_size == 2816
    for name, value in {"clamp_min": -5.0, "norm_first": True, "use_beta_conv1d": True}.items():
        with pytest.raises(UsageError, match=f"has {name}={value!r}; this library computes only"):
            from_fla_config(PAPERS | {name: value})


@pytest.mark.parametrize(("kind", "release"), EACH)
def test_negative_eigenvalues_are_read_only_where_they_were_computed(kind, release):
    """Older classes keep the field and do not use it; delta_net's of 0.5.0 does, and cannot be told from those."""
    values = fields(kind, release) | {"allow_neg_eigval": True}
    field = {"delta_net": "attnres_block_size", "gated_deltanet": "use_l2warp"}.get(kind)
    if field is None or field in values:
        assert from_fla_config(values).mixer.allow_neg_eigval
        return
    with pytest.raises(UsageError, match=rf"allow_neg_eigval=True and no {field}, as if written before") as error:
        from_fla_config(values)
    assert "Set it to false" in str(error.value) and "\n" not in str(error.value)
    assert from_fla_config(values | {field: None}).mixer.allow_neg_eigval
    assert not from_fla_config(values | {"allow_neg_eigval": False}).mixer.allow_neg_eigval


# What the releases read: sizes by multiples, which most of them cut off


def test_multiples_survive_being_cut_off():
    """hidden_size · expand_k is cut off to a whole number until 0.5.2, head_dim · expand_v in every release."""
    for key, value in itertools.product((29, 57, 58), (1, 7, 29)):
        sizes = {"hidden_size": 100, "num_heads": 1, "head_dim": key, "expand_v": value / key}
        common = {"vocab_size": 11, "num_labels": 11, "num_hidden_layers": 1, "intermediate_size": 8} | sizes
        for mixer in ("deltanet", "deltaproduct"):
            config = ModelConfig.build(mixer=mixer, defaults={"num_householder": 1}, **common)
            written = to_fla_config(config)
            if mixer == "deltanet":
                assert int(100 * written["expand_k"]) == key and int(100 * written["expand_v"]) == value
            else:
                assert int(written["head_dim"] * written["expand_v"]) == value
            again = from_fla_config(written)
            assert again.mixer.head_dim == key and round(key * again.mixer.expand_v) == value


# The layout of 0.2.0, 0.2.1 and the paper's code

SMALL = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 20, "num_heads": 2,
         "head_dim": 4, "expand_v": 1.5}  # fmt: skip


def ours(**changed: Any) -> SequenceModel:
    torch.manual_seed(0)
    plain = SMALL | {"initializer_range": 0.3, "num_householder": 3, "allow_neg_eigval": True}
    return SequenceModel(ModelConfig.build(11, 11, defaults=plain, **changed)).eval()


def logits(model: SequenceModel) -> Tensor:
    with torch.no_grad():
        return model(torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0)))[0]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewritten(folder: Path, changed: dict[str, Tensor | None]) -> Path:
    """The checkpoint with these tensors in place of its own, without a manifest, as others write it."""
    state = tensors(folder) | changed
    save_file({name: x for name, x in state.items() if x is not None}, folder / "model.safetensors", {"format": "pt"})
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    write_fla(ours(use_forget_gate=True), tmp_path / "theirs", "0.2.1")
    return tmp_path / "theirs"


def test_what_is_written(theirs):
    written = tensors(theirs)
    config = read_json(theirs / "config.json")
    assert config["use_gate"] is False and "use_output_gate" not in config and config["num_householder"] == 3
    for layer in range(2):
        first = written[f"model.layers.{layer}.attn.q_conv1ds.0.weight"]
        assert first.shape == (8, 1, 4)
        for j in (1, 2):
            assert torch.equal(written[f"model.layers.{layer}.attn.q_conv1ds.{j}.weight"], first)
    assert not any("q_conv1d." in name for name in written)


def test_only_the_first_convolution_of_the_queries_counts(theirs):
    want = logits(read_fla(theirs))
    unused = {name: torch.full_like(x, torch.nan) for name, x in tensors(theirs).items()
              if re.search(r"q_conv1ds\.[12]", name)}  # fmt: skip
    assert len(unused) == 4
    assert torch.equal(logits(read_fla(rewritten(theirs, unused))), want)
    assert torch.equal(logits(read_fla(rewritten(theirs, dict.fromkeys(unused)))), want)
    first = {"model.layers.0.attn.q_conv1ds.0.weight": torch.zeros(8, 1, 4)}
    assert not torch.equal(logits(read_fla(rewritten(theirs, first))), want)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("q_conv1ds.0.weight", None, r"lacks model.layers.0.attn.q_conv1ds.0.weight"),
        (
            "q_conv1ds.2.weight",
            torch.zeros(8, 1, 3),
            r"q_conv1ds.2.weight has shape \(8, 1, 3\); its config.* \(8, 1, 4\)",
        ),
        ("q_conv1ds.3.weight", torch.zeros(8, 1, 4), r"has model.layers.0.attn.q_conv1ds.3.weight, which its"),
        ("q_conv1ds.0.bias", torch.zeros(8), r"has model.layers.0.attn.q_conv1ds.0.bias, which its"),
        ("q_conv1d.weight", torch.zeros(8, 1, 4), r"has model.layers.0.attn.q_conv1d.weight, which its"),
        ("D", torch.ones(2), r"has model.layers.0.attn.D, which its"),
    ],
)
def test_what_does_not_fit(theirs, name, value, match):
    with pytest.raises(UsageError, match=match) as error:
        read_fla(rewritten(theirs, {f"model.layers.0.attn.{name}": value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_the_papers_code_saves(theirs, prefix):
    """A pickle of a bfloat16 state dict, of a model that torch.compile may have wrapped (its state_tracking/src)."""
    state = {name: x.bfloat16() for name, x in tensors(theirs).items()}
    save_file(state, theirs / "model.safetensors", {"format": "pt"})
    (theirs / "manifest.json").unlink()
    want = logits(read_fla(theirs))
    (theirs / "model.safetensors").unlink()
    torch.save({prefix + name: x for name, x in state.items()}, theirs / "pytorch_model.bin")
    assert torch.equal(logits(read_fla(theirs)), want)


def test_there_and_back_through_every_layout(tmp_path):
    model = ours(use_forget_gate=True, use_output_gate=True)
    model.save_pretrained(tmp_path / "ours")
    state, want, source = model.state_dict(), logits(model), tmp_path / "ours"
    for to in ("fla-0.2.1", "fla", "fla-0.2.1", "fla-per-step", "fla-0.2.1", "ours"):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))} {to}"
        LmConvert(source=source, to=to, out=folder).run()
        again = SequenceModel.from_pretrained(folder) if to == "ours" else read_fla(folder)
        assert any("q_conv1ds.2" in name for name in tensors(folder)) == (to == "fla-0.2.1")
        assert torch.equal(logits(again), want)
        assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())
        source = folder


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"num_v_heads": 4}, "its value heads are grouped, and version 0.2.1 has as many"),
        (
            {
                "num_hidden_layers": 3,
                "mixer": [
                    {"name": "attention", "num_heads": 3, "head_dim": 4},
                    "deltaproduct",
                    {"name": "attention", "num_heads": 6, "head_dim": 2},
                ],
            },
            "its attention layers differ from one another",
        ),
    ],
)
def test_what_0_2_1_cannot_hold(changed, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        write_fla(ours(**changed), tmp_path / "out", "0.2.1")
    assert not any(tmp_path.iterdir())


# The command


def test_an_unknown_layout_names_the_choices(tmp_path, capsys):
    status, _, message = run(capsys, "lm", "convert", tmp_path, "--to", "fla-0.2.0", "--out", tmp_path / "out")
    assert status == 2 and "There is no layout 'fla-0.2.0'" in message
    for name, what in TARGETS.items():
        assert f"{name} ({what})" in message
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gated_deltaproduct"}))
    with pytest.raises(UsageError) as error:
        LmConvert(source=tmp_path, to="per-step", out=tmp_path / "out").run()
    assert len(str(error.value).splitlines()) == 1 + len(TARGETS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("neg", [False, True])
@pytest.mark.parametrize(
    ("mixer", "since"), [("deltanet", "0.5.0"), ("gated_deltanet", "0.3.0"), ("deltaproduct", None)]
)
def test_convert_says_which_releases_compute_something_else(mixer, since, neg, tmp_path, capsys):
    steps = {"num_householder": 1} if mixer == "deltaproduct" else {}
    ours(mixer=mixer, num_v_heads=2, allow_neg_eigval=neg, **steps).save_pretrained(tmp_path / "ours")
    LmConvert(source=tmp_path / "ours", to="fla", out=tmp_path / "out").run()
    assert (f"since version {since}; an older one" in capsys.readouterr().out) == (neg and since is not None)
    LmConvert(source=tmp_path / "ours", to="fla-0.2.1", out=tmp_path / "steps").run()
    assert "since version" not in capsys.readouterr().out  # Gated DeltaProduct has always used it
