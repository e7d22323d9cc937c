"""flash-linear-attention's checkpoints: its names and shapes, its configurations, and what its layers compute.

`outline` and `fla_logits` are written from its source (0.6.0; for the per-step layout 0.2.2, for that with `q_convs`
0.2.1) and share nothing with the code under test. Where the package and Triton are installed, its own model classes are
asked as well. What each of its releases writes: tests/models/test_fla_releases.py.
"""

import ast
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mixer_oracles import importable
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.cli.lm_convert import LmConvert
from deltaproduct.errors import UsageError
from deltaproduct.files import read_json
from deltaproduct.layers import AttentionOptions
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.fla.checkpoint import (
    from_fla_config,
    from_fla_state,
    read_fla,
    to_fla_config,
    to_fla_state,
    write_fla,
)
from deltaproduct.models.fla.config import ARCHITECTURES, DEFAULTS

pytestmark = pytest.mark.neighbours

SMALL = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 20, "num_heads": 2}
HEADS = {"head_dim": 4, "expand_v": 1.5}  # K = 4, V = 6: no two sizes of a layer are equal
ATTENTION = {"layers": [1], "num_heads": 3, "num_kv_heads": 1, "qkv_bias": False, "window_size": None,
             "rope_theta": 500.0}  # fmt: skip
DELTA_NET = SMALL | {"model_type": "delta_net", "expand_k": 2 / 3, "expand_v": 1.5}
GATED = SMALL | HEADS | {"model_type": "gated_deltanet"}
PRODUCT = SMALL | HEADS | {"model_type": "gated_deltaproduct", "num_householder": 3, "use_output_gate": False}
STEPS = SMALL | HEADS | {"model_type": "gated_deltaproduct", "num_householder": 3, "use_gate": False, "per_step": True}
GATES = {"use_forget_gate": True, "allow_neg_eigval": True}
CASES: dict[str, dict[str, Any]] = {
    "DeltaNet": DELTA_NET,
    "DeltaNet, all options": DELTA_NET | {"use_gate": True, "allow_neg_eigval": True, "use_short_conv": False},
    "Gated DeltaNet": GATED | {"conv_size": 3},
    "Gated DeltaNet, grouped values": GATED | {"num_v_heads": 4, "use_gate": False, "allow_neg_eigval": True},
    "DeltaProduct": PRODUCT | {"allow_neg_eigval": True},
    "DeltaProduct of one step": PRODUCT | {"num_householder": 1, "tie_word_embeddings": True},
    "Gated DeltaProduct": PRODUCT | GATES | {"use_output_gate": True},
    "Gated DeltaProduct, grouped values": PRODUCT | GATES | {"num_v_heads": 4, "use_short_conv": False},
    "with attention": PRODUCT | {"attn": ATTENTION, "norm_eps": 1e-3},
    "per step": STEPS | {"allow_neg_eigval": True},
    "per step, gates": STEPS | GATES | {"use_gate": True, "conv_size": 2, "tie_word_embeddings": True},
    "0.2.1": STEPS | {"allow_neg_eigval": True, "q_convs": True},
    "0.2.1, gates": STEPS | GATES | {"use_gate": True, "conv_size": 2, "tie_word_embeddings": True, "q_convs": True},
    "0.2.1, attention": STEPS | {"num_householder": 2, "attn": ATTENTION, "q_convs": True},
    "per step, one step, attention": STEPS | {"num_householder": 1, "use_short_conv": False, "attn": ATTENTION},
}
MARKS = ("per_step", "q_convs")
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
Shapes = dict[str, tuple[int, ...]]


def sizes(case: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """N, H, HV, K, V."""
    heads = case["num_heads"]
    if case["model_type"] == "delta_net":
        return 1, heads, heads, *(round(case["hidden_size"] * case[name]) // heads for name in ("expand_k", "expand_v"))
    return (case.get("num_householder", 1), heads, case.get("num_v_heads") or heads, case["head_dim"],
            round(case["head_dim"] * case["expand_v"]))  # fmt: skip


def output_gate(case: dict[str, Any]) -> bool:
    return case.get("use_output_gate", case.get("use_gate", case["model_type"] != "delta_net"))


def forget_gate(case: dict[str, Any]) -> bool:
    return case["model_type"] == "gated_deltanet" or case.get("use_forget_gate", False)


def outline(case: dict[str, Any]) -> Shapes:
    """The names and shapes of the tensors in a checkpoint with this config.json."""
    n, h, hv, k, v = sizes(case)
    d, wide = case["hidden_size"], case["intermediate_size"]
    shapes: Shapes = {"model.embeddings.weight": (case["vocab_size"], d), "model.norm.weight": (d,)}
    if not case.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (case["vocab_size"], d)
    attention = case.get("attn") or {"layers": []}
    for i in range(case["num_hidden_layers"]):
        layer: Shapes = {"attn_norm.weight": (d,), "mlp_norm.weight": (d,), "mlp.gate_proj.weight": (wide, d),
                         "mlp.up_proj.weight": (wide, d), "mlp.down_proj.weight": (d, wide)}  # fmt: skip
        if i in attention["layers"]:
            narrow = d // attention["num_heads"] * attention["num_kv_heads"]
            rows = {"q_proj": d, "k_proj": narrow, "v_proj": narrow, "o_proj": d}
            layer |= {f"attn.{name}.weight": (size, d) for name, size in rows.items()}
        else:
            rows = {"k": h * k, "v": hv * v, "b": hv}
            layer |= {"attn.q_proj.weight": (h * k, d), "attn.o_proj.weight": (d, hv * v), "attn.o_norm.weight": (v,)}
            convolved = ("k", "v") if case.get("use_short_conv", True) else ()
            width = case.get("conv_size", 4)
            if convolved:
                names = [f"q_conv1ds.{j}" for j in range(n)] if case.get("q_convs") else ["q_conv1d"]
                layer |= {f"attn.{name}.weight": (h * k, 1, width) for name in names}
            if case.get("per_step"):
                for j in range(n):
                    layer |= {f"attn.{x}_projs.{j}.weight": (size, d) for x, size in rows.items()}
                    layer |= {f"attn.{x}_conv1ds.{j}.weight": (rows[x], 1, width) for x in convolved}
            else:
                layer |= {f"attn.{x}_proj.weight": (n * size, d) for x, size in rows.items()}
                layer |= {f"attn.{x}_conv1d.weight": (n * rows[x], 1, width) for x in convolved}
            if forget_gate(case):
                layer |= {"attn.a_proj.weight": (hv, d), "attn.A_log": (hv,), "attn.dt_bias": (hv,)}
            if output_gate(case):
                layer["attn.g_proj.weight"] = (hv * v, d)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def random_tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of which no two rows are alike, of norms that let every part of a block be seen in the logits."""
    rng = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=rng) / shape[-1] ** 0.5 for name, shape in outline(case).items()}
    for name, x in tensors.items():
        if ".b_proj" in name:
            x *= 8  # β near both ends of its range: the regime in which states are tracked
        if name.endswith(("norm.weight", "A_log")):
            x += 1
    return tensors


def write(folder: Path, case: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint as transformers saves it; `MARKS` are this file's own, and no fields."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(case) if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {name: value for name, value in case.items() if name not in MARKS}
    kind = ARCHITECTURES[case["model_type"]]
    extra = {"architectures": [kind], "dtype": "float32", "fuse_norm": True, "attn_mode": "chunk", "bos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(fields | extra))
    return folder


# What its layers compute, in float64


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def short_conv(x: Tensor, weight: Tensor | None) -> Tensor:
    """y[t] = silu(Σ_i w[:,i] x[t − (width − 1) + i]) for x [T,C], weight [C,1,width]; without one, silu alone."""
    if weight is None:
        return F.silu(x)
    width, y = weight.shape[-1], torch.zeros_like(x)
    for t in range(x.shape[0]):
        for i in range(width):
            if (source := t - (width - 1) + i) >= 0:
                y[t] += weight[:, 0, i] * x[source]
    return F.silu(y)


def fla_recurrent(case: dict[str, Any], w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The recurrent layer on x [T,D], one token, head and Householder step after the other; w without its prefix."""
    n, heads, value_heads, key, value = sizes(case)
    # 0.2.1 has a convolution of the queries for each step, and takes the first
    q = short_conv(x @ w["q_proj.weight"].T, w.get("q_conv1ds.0.weight" if case.get("q_convs") else "q_conv1d.weight"))
    ks, vs, betas = [], [], []
    for j in range(n):
        if case.get("per_step"):
            parts = {name: w[f"{name}_projs.{j}.weight"] for name in "kvb"}
            convs = {name: w.get(f"{name}_conv1ds.{j}.weight") for name in "kv"}
        else:  # "(n h d)": the rows of step j are one block
            rows = {"k": heads * key, "v": value_heads * value, "b": value_heads}
            block = {name: slice(j * size, (j + 1) * size) for name, size in rows.items()}
            parts = {name: w[f"{name}_proj.weight"][block[name]] for name in "kvb"}
            convs = {name: w[f"{name}_conv1d.weight"][block[name]] if f"{name}_conv1d.weight" in w else None
                     for name in "kv"}  # fmt: skip
        ks.append(short_conv(x @ parts["k"].T, convs["k"]))
        vs.append(short_conv(x @ parts["v"].T, convs["v"]))
        betas.append((x @ parts["b"].T).sigmoid() * (2 if case.get("allow_neg_eigval") else 1))
    gates = x @ w["g_proj.weight"].T if output_gate(case) else None
    tokens = x.shape[0]
    o = x.new_zeros(tokens, value_heads * value)
    for head in range(value_heads):
        at = slice(head // (value_heads // heads) * key, (head // (value_heads // heads) + 1) * key)
        mine = slice(head * value, (head + 1) * value)
        state = x.new_zeros(key, value)
        for t in range(tokens):
            if forget_gate(case):
                rate = x[t] @ w["a_proj.weight"][head] + w["dt_bias"][head]
                state = state * torch.exp(-w["A_log"][head].exp() * F.softplus(rate))
            for k_j, v_j, beta_j in zip(ks, vs, betas, strict=True):
                unit = k_j[t, at] / (k_j[t, at].square().sum() + 1e-6).sqrt()
                state = state + beta_j[t, head] * torch.outer(unit, v_j[t, mine] - unit @ state)
            unit = q[t, at] / (q[t, at].square().sum() + 1e-6).sqrt()
            y = rms_norm(unit @ state * key**-0.5, w["o_norm.weight"], case.get("norm_eps", 1e-6))
            o[t, mine] = y if gates is None else y * F.silu(gates[t, mine])
    return o @ w["o_proj.weight"].T


def fla_attention(spec: dict[str, Any], w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The attention layer on x [T,D]: rotary positions that turn channels i and i + K/2 together."""
    tokens, d = x.shape
    heads, groups = spec["num_heads"], spec["num_heads"] // spec["num_kv_heads"]
    size = d // heads
    angles = torch.arange(tokens).double()[:, None] / spec["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    o = torch.zeros_like(x)

    def turned(y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)

    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        shared = slice(head // groups * size, (head // groups + 1) * size)
        scores = turned(q[:, mine]) @ turned(k[:, shared]).T * size**-0.5
        hidden = torch.ones(tokens, tokens).triu(1).bool()
        o[:, mine] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, shared]
    return o @ w["o_proj.weight"].T


def fla_logits(case: dict[str, Any], tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The whole model on tokens [T]."""
    w = {name: x.double() for name, x in tensors.items()}
    eps, attention = case.get("norm_eps", 1e-6), case.get("attn") or {"layers": []}
    x = w["model.embeddings.weight"][tokens]
    for i in range(case["num_hidden_layers"]):
        stem = f"model.layers.{i}."
        layer = {name.removeprefix(stem): y for name, y in w.items() if name.startswith(stem)}
        mixer = {name.removeprefix("attn."): y for name, y in layer.items() if name.startswith("attn.")}
        y = rms_norm(x, layer["attn_norm.weight"], eps)
        x = x + (fla_attention(attention, mixer, y) if i in attention["layers"] else fla_recurrent(case, mixer, y))
        y = rms_norm(x, layer["mlp_norm.weight"], eps)
        gate, up = (y @ layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], eps) @ w.get("lm_head.weight", w["model.embeddings.weight"]).T


@EACH
def test_the_model_computes_what_its_layers_compute(case, tmp_path):
    tokens = torch.randint(3, (24,), generator=torch.Generator().manual_seed(0))  # few symbols: keys that repeat
    model = read_fla(write(tmp_path / "theirs", case)).double()
    want = fla_logits(case, random_tensors(case), tokens)
    with torch.no_grad():
        got = model(tokens[None])[0][0]
    # Both in float64 (u = 1e-16) over some 10^3 operations one after the other.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * float(want.abs().max()))


# Names, shapes and the way back


@EACH
def test_there_and_back(case, tmp_path):
    model = read_fla(write(tmp_path / "theirs", case))
    layout = "0.2.1" if case.get("q_convs") else "per-step" if case.get("per_step") else "fused"
    write_fla(model, tmp_path / "again", layout)
    written = read_json(tmp_path / "again" / "config.json")
    assert {name: tuple(x.shape) for name, x in to_fla_state(model.state_dict(), model.config, layout).items()} == (
        outline(case)
    )
    for name, value in case.items():
        if name not in (*MARKS, "expand_k", "expand_v"):
            assert written.get(name) == value, name
    assert sizes(written | {"intermediate_size": 20}) == sizes(case)
    tensors = random_tensors(case)
    for name, x in to_fla_state(read_fla(tmp_path / "again").state_dict(), model.config, layout).items():
        used = re.sub(r"q_conv1ds\.\d", "q_conv1ds.0", name)  # the others are copies
        assert torch.equal(x, tensors[used]), name


OURS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "gates": {"use_forget_gate": True, "use_output_gate": True, "num_householder": 3},
    "forget gate": {"use_forget_gate": True, "allow_neg_eigval": False},
    "output gate": {"use_output_gate": True, "use_short_conv": False},
    "grouped values": {"num_v_heads": 4, "expand_v": 0.5, "use_output_gate": True, "num_householder": 4},
    "grouped values, gated, one step": {"num_v_heads": 4, "use_forget_gate": True, "num_householder": 1},
    "deltanet": {"mixer": "deltanet", "use_output_gate": True, "tie_word_embeddings": True},
    "deltanet, forget gate": {"mixer": "deltanet", "use_forget_gate": True},
    "deltanet, grouped values": {"mixer": "deltanet", "num_v_heads": 4},
    "gated_deltanet": {"mixer": "gated_deltanet", "expand_v": 2.0, "num_v_heads": 6},
    "attention, two kinds": {
        "num_hidden_layers": 4,
        "mixer": [
            {"name": "attention", "num_heads": 3, "head_dim": 4},
            "deltaproduct",
            {"name": "attention", "num_heads": 3, "head_dim": 4},
            {"name": "attention", "num_heads": 6, "head_dim": 2, "num_kv_heads": 2, "rope_theta": 99.0},
        ],
    },
    "mostly attention": {"mixer": ["attention", "deltanet"], "num_heads": 3},
}


def ours(changed: dict[str, Any]) -> SequenceModel:
    torch.manual_seed(0)
    plain = {"vocab_size": 11, "num_labels": 11, "hidden_size": 12, "num_heads": 2, "head_dim": 4,
             "num_hidden_layers": 2, "intermediate_size": 20, "initializer_range": 0.3}  # fmt: skip
    return SequenceModel(ModelConfig.build(**(plain | changed))).eval()


NOT_IN_0_2_1 = ("grouped values", "grouped values, gated, one step", "deltanet, grouped values", "gated_deltanet",
                "attention, two kinds")  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "layout"),
    [
        pytest.param(changed, layout, id=f"{name}-{layout}")
        for name, changed in OURS.items()
        for layout in ("fused", "per-step", "0.2.1")
        if layout != "0.2.1" or name not in NOT_IN_0_2_1
    ],
)
def test_ours_come_back_exactly(changed, layout, tmp_path):
    model = ours(changed)
    state = model.state_dict()
    there = to_fla_state(state, model.config, layout)
    case = to_fla_config(model.config, layout)
    if not isinstance(case["attn"], list):  # which `outline` does not know
        shapes = {name: tuple(x.shape) for name, x in there.items()}
        assert shapes == outline(case | {"per_step": layout != "fused", "q_convs": layout == "0.2.1"})
    back = from_fla_state(there, model.config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)

    write_fla(model, tmp_path / "theirs", layout)
    again = read_fla(tmp_path / "theirs")
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert (again.head.weight is again.embedding.weight) == model.config.tie_word_embeddings
    assert to_fla_config(again.config, layout) == case


KIND = {
    "plain": "gated_deltaproduct",
    "gates": "gated_deltaproduct",
    "grouped values": "gated_deltaproduct",
    "grouped values, gated, one step": "gated_deltanet",  # whose model takes num_v_heads
    "deltanet": "delta_net",
    "deltanet, forget gate": "gated_deltanet",
    "deltanet, grouped values": "gated_deltaproduct",
    "gated_deltanet": "gated_deltanet",
    "mostly attention": "delta_net",
}


@pytest.mark.parametrize("name", KIND)
def test_the_kind_that_is_written(name):
    config = ours(OURS[name]).config
    assert to_fla_config(config)["model_type"] == KIND[name]
    assert to_fla_config(config)["architectures"] == [ARCHITECTURES[KIND[name]]]
    assert to_fla_config(config, "per-step")["model_type"] == "gated_deltaproduct"


# Configurations

# Version 0.6.0's defaults, as our fields. Its layers' are others, and must not be taken.
BARE = {
    "vocab_size": 32000, "num_labels": 32000, "hidden_size": 2048, "intermediate_size": 5632, "norm_eps": 1e-6,
    "initializer_range": 0.02, "tie_word_embeddings": False,
}  # fmt: skip
BARE_OPTIONS = {"use_short_conv": True, "conv_size": 4, "allow_neg_eigval": False, "qkv_activation": "silu",
                "beta_bias_init": None, "num_v_heads": None}  # fmt: skip
BARE_OF = {
    "delta_net": (24, {"name": "deltanet", "num_heads": 16, "head_dim": 128, "expand_v": 1.0,
                       "use_output_gate": False, "use_forget_gate": False}),
    "gated_deltanet": (21, {"name": "gated_deltanet", "num_heads": 6, "head_dim": 256, "expand_v": 2.0}),
    "gated_deltaproduct": (21, {"name": "deltaproduct", "num_heads": 6, "head_dim": 256, "expand_v": 2.0,
                                "use_output_gate": True, "use_forget_gate": False, "num_householder": 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BARE_OF)
def test_defaults_are_those_of_the_configuration_class(kind):
    layers, options = BARE_OF[kind]
    values = from_fla_config({"model_type": kind}).to_dict()
    assert values.pop("mixer") == BARE_OPTIONS | options
    assert values == BARE | {"num_hidden_layers": layers, "embedding_init_std": None}


@pytest.mark.parametrize("kind", BARE_OF)
def test_the_table_of_defaults_is_what_its_source_has(kind):
    package = importlib.util.find_spec("fla")
    files = [Path(folder, "models", kind, f"configuration_{kind}.py")
             for folder in (package and package.submodule_search_locations) or ()]  # fmt: skip
    if not any(file.is_file() for file in files):
        pytest.skip("flash-linear-attention is not installed")
    tree = ast.parse(next(file for file in files if file.is_file()).read_text())
    init = next(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "__init__").args
    names = [a.arg for a in init.args][1:]
    theirs = dict(zip(names, map(ast.literal_eval, init.defaults), strict=True))
    own = dict(DEFAULTS[kind])
    if kind == "gated_deltaproduct":  # what the older versions called it, and what only the layer has
        assert own.pop("use_output_gate") is None and own.pop("num_v_heads") is None
        own["use_output_gate"] = own.pop("use_gate")
    assert own == {name: theirs[name] for name in own}


EVERY_KIND, WITH_HEAD_DIM = tuple(BARE_OF), ("gated_deltanet", "gated_deltaproduct")
SAME = {"vocab_size": 50, "num_hidden_layers": 3, "norm_eps": 0.25, "initializer_range": 0.5, "conv_size": 2,
        "tie_word_embeddings": True, "use_short_conv": False, "allow_neg_eigval": True,
        "intermediate_size": 100}  # fmt: skip
LEFT_ASIDE = {"fuse_norm": False, "attn_mode": "fused_recurrent", "residual_in_fp32": True, "use_l2warp": True,
              "hidden_act": "silu", "use_output_norm": True, "conv_bias": False, "use_cache": False}  # fmt: skip
FIELDS = [  # kinds, what is given, and what follows besides the fields of the same names
    *((EVERY_KIND, {name: value}, {}) for name, value in (SAME | LEFT_ASIDE).items()),
    *(
        (WITH_HEAD_DIM, {name: value}, {})
        for name, value in {"head_dim": 32, "expand_v": 0.5, "num_v_heads": 12}.items()
    ),
    (WITH_HEAD_DIM, {"num_heads": 2, "hidden_size": 96}, {"intermediate_size": 256}),
    (("delta_net",), {"num_heads": 2, "hidden_size": 96}, {"intermediate_size": 256, "head_dim": 48}),
    (EVERY_KIND, {"hidden_ratio": 6}, {"intermediate_size": 8192}),
    (EVERY_KIND, {"hidden_ratio": 7}, {"intermediate_size": 9728}),  # 9557 2/3, rounded down, then up to 256
    (EVERY_KIND, {"hidden_ratio": None}, {}),
    (WITH_HEAD_DIM, {"norm_eps": 1, "expand_v": 1}, {}),  # whole numbers for floats
    (("delta_net",), {"use_gate": True}, {"use_output_gate": True}),
    (("delta_net",), {"expand_k": 0.5}, {"head_dim": 64, "expand_v": 2.0}),
    (("delta_net",), {"expand_v": 0.5}, {}),
    (("gated_deltanet",), {"use_gate": False}, {"name": "deltanet", "use_output_gate": False, "use_forget_gate": True}),
    (("gated_deltaproduct",), {"use_output_gate": False}, {}),
    (("gated_deltaproduct",), {"use_gate": False}, {"use_output_gate": False}),
    (("gated_deltaproduct",), {"use_gate": True, "use_output_gate": False}, {}),
    (("gated_deltaproduct",), {"use_forget_gate": True}, {}),
    (("gated_deltaproduct",), {"num_householder": 4}, {}),
]


@pytest.mark.parametrize(("kind", "given", "follows"), [(kind, *row) for kinds, *row in FIELDS for kind in kinds])
def test_every_field(kind, given, follows):
    def flat(values):
        return values.pop("mixer") | values

    plain = flat(from_fla_config({"model_type": kind}).to_dict())
    wanted = plain | {name: value for name, value in given.items() if name in plain} | follows
    wanted |= {"num_labels": wanted["vocab_size"]}
    assert flat(from_fla_config({"model_type": kind} | given).to_dict()) == wanted


def test_attention_layers():
    spec = {"layers": [0, 2], "num_heads": 4}
    config = from_fla_config(SMALL | {"model_type": "delta_net", "num_hidden_layers": 4, "attn": [
        spec, {"layers": [3], "num_heads": 6, "num_kv_heads": 2, "rope_theta": 5}]})  # fmt: skip
    plain = AttentionOptions(num_heads=4, head_dim=3, num_kv_heads=4, rope_theta=10_000.0)
    other = AttentionOptions(num_heads=6, head_dim=2, num_kv_heads=2, rope_theta=5.0)
    assert config.mixer[0] == config.mixer[2] == plain and config.mixer[3] == other
    assert config.mixer[1] == from_fla_config(SMALL | {"model_type": "delta_net"}).mixer
    assert to_fla_config(config)["attn"] == [
        {"num_heads": 4, "num_kv_heads": 4, "qkv_bias": False, "window_size": None, "rope_theta": 10_000.0,
         "layers": [0, 2]},
        {"num_heads": 6, "num_kv_heads": 2, "qkv_bias": False, "window_size": None, "rope_theta": 5.0, "layers": [3]},
    ]  # fmt: skip


def refused(match: str, function, *arguments) -> None:
    """It raises, with one line."""
    with pytest.raises(UsageError, match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([], "model_type None cannot be read"),
        ({"model_type": "transformer"}, "model_type 'transformer' cannot be read; known are delta_net"),
        ({"model_type": ["delta_net"]}, "cannot be read"),
        (DELTA_NET | {"use_beta": False}, "has use_beta=False; this library computes only True"),
        (DELTA_NET | {"qk_norm": "sum"}, "has qk_norm='sum'; this library computes only 'l2'"),
        (DELTA_NET | {"qk_activation": "elu"}, "has qk_activation='elu'"),
        (DELTA_NET | {"num_heads": 5}, "does not divide into 5 heads"),
        (DELTA_NET | {"num_heads": 0}, "does not divide into 0 heads"),
        (DELTA_NET | {"expand_k": 0.3}, "expand_k=0.3 does not divide into 2 heads"),
        (GATED | {"output_gate_activation": "sigmoid"}, "has output_gate_activation='sigmoid'"),
        (GATED | {"hidden_act": "powlu"}, "has hidden_act='powlu'"),
        (GATED | {"conv_bias": True}, "has conv_bias=True"),
        (GATED | {"num_heads": "2"}, "has num_heads='2', which should be of type int"),
        (GATED | {"use_gate": 1}, "has use_gate=1, which should be of type bool"),
        (GATED | {"expand_v": float("inf")}, "has expand_v=inf, which should be of type float"),
        (GATED | {"norm_eps": None}, "has norm_eps=None, which should be of type float"),
        (GATED | {"vocab_size": 0}, "vocab_size must be at least 1"),
        (PRODUCT | {"attnres_block_size": 4}, "has attnres_block_size=4"),
        (PRODUCT | {"num_householder": 0}, "num_householder must be at least 1"),
        (PRODUCT | {"attn": ATTENTION | {"window_size": 64}}, "window_size=64"),
        (PRODUCT | {"attn": ATTENTION | {"qkv_bias": True}}, "qkv_bias=True"),
        (PRODUCT | {"attn": ATTENTION | {"num_heads": 5}}, "num_heads=5, which should divide hidden_size=12"),
        (PRODUCT | {"attn": ATTENTION | {"num_kv_heads": 2}}, "num_kv_heads=2, which should divide num_heads=3"),
        (PRODUCT | {"attn": ATTENTION | {"layers": [2]}}, r"names layer 2 wrongly or twice; layers are 0 … 1"),
        (PRODUCT | {"attn": [ATTENTION, ATTENTION]}, "names layer 1 wrongly or twice"),
        (PRODUCT | {"attn": ATTENTION | {"rope_theta": None}}, "rope_theta=None, which should be a number"),
        (PRODUCT | {"attn": ATTENTION | {"rope_theta": float("inf")}}, "rope_theta=inf, which should be a number"),
        (PRODUCT | {"attn": "flash"}, "does not say in which layers"),
    ],
)
def test_what_our_layers_cannot_compute(values, match):
    refused(match, from_fla_config, values)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"num_labels": 5}, "it is no language model, with vocab_size=11 and num_labels=5"),
        ({"intermediate_size": 0}, "layer 0 has no MLP"),
        ({"intermediate_size": [20, 8]}, "layer 1 has another intermediate_size"),
        ({"mixer": ["deltaproduct", {"name": "deltaproduct", "num_householder": 3}]}, "its recurrent layers differ"),
        ({"mixer": ["deltaproduct", "attention"]}, "attention in layer 1 has num_heads · head_dim ≠"),
        ({"mixer": ["deltaproduct", {"name": "attention", "num_heads": 3, "rope_theta": None}]}, "no rotary positions"),
        ({"mixer": ["deltaproduct", "gla"]}, "layer 1 is gla"),
        ({"mixer": "attention", "num_heads": 3}, "all its layers are attention"),
        ({"qkv_activation": "identity"}, "qkv_activation is 'identity'"),
        ({"beta_bias_init": 1.0}, "the projection of β has a bias"),
    ],
)
@pytest.mark.parametrize("layout", ["fused", "per-step", "0.2.1"])
def test_what_flash_linear_attention_cannot_hold(changed, match, layout, tmp_path):
    refused(match, write_fla, ours(changed), tmp_path / "out", layout)
    assert not any(tmp_path.iterdir())


def test_an_unknown_layout():
    refused("must be fused, per-step or 0.2.1, not 'flat'", to_fla_config, ours({}).config, "flat")


# Weights that do not fit


@pytest.mark.parametrize("name", ["Gated DeltaProduct", "per step"])
def test_tensors_that_do_not_fit(name):
    case = CASES[name] | {"num_hidden_layers": 1}
    tensors, config = random_tensors(case), from_fla_config(case)
    from_fla_state(tensors, config)
    for key in tensors:
        short = {other: x for other, x in tensors.items() if other != key}
        refused(f"The checkpoint lacks {key}, which", from_fla_state, short, config)
    for key in ("lm_head.weight", max(tensors)):
        wrong = tensors | {key: torch.zeros(2, 3)}
        refused(rf"{key} has shape \(2, 3\); its configuration makes it", from_fla_state, wrong, config)
    extra = tensors | {"model.layers.0.attn.q_conv1d.bias": torch.zeros(8)}
    refused("has model.layers.0.attn.q_conv1d.bias, which its", from_fla_state, extra, config)
    for steps, match in ((2, "has shape|has model.layers.0"), (4, "has shape|lacks")):
        other = from_fla_config(case | {"num_householder": steps})
        refused(match, from_fla_state, tensors, other)


def test_a_tied_head_may_be_stored_but_not_differ():
    case = CASES["DeltaProduct of one step"]
    tensors, config = random_tensors(case), from_fla_config(case)
    embeddings = tensors["model.embeddings.weight"]
    state = from_fla_state(tensors | {"lm_head.weight": embeddings.clone()}, config)
    assert torch.equal(state["head.weight"], embeddings)
    refused("lm_head.weight differs", from_fla_state, tensors | {"lm_head.weight": embeddings + 1}, config)


# Files


def shards(folder: Path, case: dict[str, Any], whole: str) -> None:
    """Replace the one file of weights by two and an index."""
    tensors = random_tensors(case)
    (folder / "model.safetensors").unlink()
    stem, suffix = whole.rsplit(".", 1)
    places = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return write(tmp_path / "theirs", PRODUCT)


def test_every_way_of_storing_weights(theirs):
    tensors, config = random_tensors(PRODUCT), from_fla_config(PRODUCT)

    def check() -> None:
        for name, x in to_fla_state(read_fla(theirs).state_dict(), config).items():
            assert torch.equal(x, tensors[name]), name

    check()
    shards(theirs, PRODUCT, "model.safetensors")
    check()
    for file in theirs.glob("model*"):
        file.unlink()
    torch.save(tensors, theirs / "pytorch_model.bin")
    check()
    (theirs / "pytorch_model.bin").rename(theirs / "model.safetensors")  # which `shards` replaces
    shards(theirs, PRODUCT, "pytorch_model.bin")
    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, tmp_path):
    tensors = {name: x.to(dtype) for name, x in random_tensors(GATED).items()}
    model = read_fla(write(tmp_path / "theirs", GATED, tensors))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, x in to_fla_state(model.state_dict(), model.config).items():
        assert x.dtype == wide and torch.equal(x, tensors[name].to(wide)), name


class Touch:
    """What a hostile pickle does: call something when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_pickle_is_not_run(theirs, tmp_path):
    (theirs / "model.safetensors").unlink()
    (theirs / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Touch(tmp_path / "touched")}, protocol=2))
    refused("pytorch_model.bin is damaged, or holds more than tensors", read_fla, theirs)
    torch.save({"x": Touch(tmp_path / "touched")}, theirs / "pytorch_model.bin")
    refused("pytorch_model.bin is damaged, or holds more than tensors", read_fla, theirs)
    assert not (tmp_path / "touched").exists()


def test_damaged_and_missing_files(theirs, tmp_path):
    refused("is not a folder", read_fla, tmp_path / "nowhere")
    weights = theirs / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    refused("model.safetensors is not a safetensors file", read_fla, theirs)
    weights.unlink()
    refused("has neither model.safetensors nor pytorch_model.bin", read_fla, theirs)
    for content in (b"", b"PK\x03\x04 not a zip", b"\x80\x02"):
        (theirs / "pytorch_model.bin").write_bytes(content)
        refused("pytorch_model.bin is damaged", read_fla, theirs)
    torch.save([1], theirs / "pytorch_model.bin")
    refused("holds a list, not tensors by name", read_fla, theirs)
    torch.save({"step": 3}, theirs / "pytorch_model.bin")
    refused("The checkpoint's step is int; only floating-point", read_fla, theirs)
    (theirs / "config.json").unlink()
    refused("config.json cannot be read", read_fla, theirs)


def test_shards_that_are_not_there(theirs):
    shards(theirs, PRODUCT, "model.safetensors")
    index = theirs / "model.safetensors.index.json"
    good = read_json(index)
    elsewhere = {"weight_map": {"x": "../model.safetensors"}}
    index.write_text(json.dumps(elsewhere))
    refused(r"names the file '\.\./model.safetensors', which is not in its own folder", read_fla, theirs)
    index.write_text("{}")
    refused("has no weight_map", read_fla, theirs)
    good["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(good))
    refused("model-00001-of-00002.safetensors does not hold more", read_fla, theirs)
    (theirs / "model-00002-of-00002.safetensors").unlink()
    refused("model-00002-of-00002.safetensors is missing", read_fla, theirs)


def test_what_was_written_here_is_verified(tmp_path):
    write_fla(ours({}), tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused("is corrupt: model.safetensors does not match", read_fla, tmp_path / "out")


# The command


def test_convert(theirs, tmp_path, capsys):
    LmConvert(source=theirs, to="ours", out=tmp_path / "ours").run()
    printed = capsys.readouterr().out
    assert "flash-linear-attention's" in printed and "layers: 2, width: 12, vocabulary: 11" in printed
    model = SequenceModel.from_pretrained(tmp_path / "ours")
    want = read_fla(theirs).state_dict()
    assert all(torch.equal(x, want[name]) for name, x in model.state_dict().items())
    (tmp_path / "run").mkdir()
    (tmp_path / "ours").rename(tmp_path / "run" / "checkpoint")  # a run's folder serves as well
    parts = {"fla": "k_proj.weight", "fla-per-step": "q_conv1d.weight", "fla-0.2.1": "q_conv1ds.2.weight"}
    for to, part in [*parts.items(), ("fla", parts["fla"])]:
        LmConvert(source=tmp_path / "run", to=to, out=tmp_path / "out").run()  # each replaces the one before
        state = read_fla(tmp_path / "out").state_dict()
        assert all(torch.equal(x, want[name]) for name, x in state.items())
        assert f"model.layers.0.attn.{part}".encode() in (tmp_path / "out" / "model.safetensors").read_bytes()
    LmConvert(source=theirs, to="fla-per-step", out=tmp_path / "steps").run()
    assert b"k_projs.2" in (tmp_path / "steps" / "model.safetensors").read_bytes()


def test_convert_says_what_their_model_class_cannot_load(tmp_path, capsys):
    for grouped in (False, True):
        ours({"num_v_heads": 4 if grouped else None}).save_pretrained(tmp_path / "ours")
        LmConvert(source=tmp_path / "ours", to="fla", out=tmp_path / "out").run()
        assert ("does not hand num_v_heads on" in capsys.readouterr().out) == grouped


def test_convert_overwrites_nothing_of_the_users(theirs, tmp_path):
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def convert(source: Path, to: str, out: Path) -> None:
        LmConvert(source=source, to=to, out=out).run()

    ours({}).save_pretrained(tmp_path / "ours")
    write_fla(ours({}), tmp_path / "written")
    (tmp_path / "written" / "tokenizer.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents()
    refused("is not empty, nor a checkpoint in this library's layout", convert, theirs, "ours", tmp_path / "notes")
    refused("is not empty, nor a checkpoint in flash-linear", convert, tmp_path / "ours", "fla", theirs)
    refused("is not empty, nor a checkpoint in flash-linear", convert, theirs, "fla", tmp_path / "ours")
    refused("is not empty, nor", convert, tmp_path / "ours", "fla", tmp_path / "ours")
    refused("also holds tokenizer.json", convert, tmp_path / "ours", "fla", tmp_path / "written")
    refused("is a file", convert, theirs, "ours", tmp_path / "file")
    refused("does not exist", convert, tmp_path / "nothing", "ours", tmp_path / "out")
    refused("config.json cannot be read", convert, tmp_path / "notes", "ours", tmp_path / "out")
    refused("is in this library's layout already", convert, tmp_path / "ours", "ours", tmp_path / "out")
    (tmp_path / "notes" / "config.json").write_text('{"model_type": "llama"}')
    refused("is of model type 'llama'", convert, tmp_path / "notes", "ours", tmp_path / "out")
    (tmp_path / "notes" / "config.json").unlink()
    assert contents() == before
    (tmp_path / "empty").mkdir()
    convert(theirs, "ours", tmp_path / "empty")
    SequenceModel.from_pretrained(tmp_path / "empty")


# flash-linear-attention's own classes


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].get("per_step")])
def test_its_own_model_class_takes_them(name, monkeypatch):
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # as conftest.py has imported Triton
    if reason := importable("fla.models"):
        pytest.skip(reason)
    import fla.models

    case = CASES[name]
    if case.get("attn") and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("its attention needs flash-attn")
    if case["model_type"] == "gated_deltaproduct" and case.get("num_v_heads"):
        pytest.skip("its model does not hand num_v_heads on to its layer")
    config = from_fla_config(case)
    written = to_fla_config(config)
    cls = getattr(fla.models, written["architectures"][0])
    with torch.device("meta"):
        its = cls(cls.config_class(**written))
    shapes = {key: tuple(x.shape) for key, x in its.state_dict().items()}
    if case.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    assert shapes == outline(case)
    state = to_fla_state(from_fla_state(random_tensors(case), config), config)
    its.load_state_dict(state, strict=not case.get("tie_word_embeddings"), assign=True)


@pytest.mark.slow("kernels")
@pytest.mark.timeout(600)  # the interpreter runs every kernel's program one after the other
def test_its_own_kernels_agree(tmp_path):
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    program = Path(__file__).parents[1] / "helpers" / "fla_kernels.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 16
    # Two float32 computations of some 10^2 steps one after the other, each of u = 6e-8, and norms that amplify.
    assert max(differences.values()) < 1e-4, differences
