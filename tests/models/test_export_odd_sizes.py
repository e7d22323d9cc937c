"""Exported steps of models with odd sizes: an empty history, no convolution, one layer, no MLP, grouped heads.

Tolerances: those of tests/models/test_export.py.
"""

import json

import pytest
import torch
from export_cases import V, assert_program_is_the_model, build, needed

from deltaproduct.layers import MIXERS
from deltaproduct.layers.options import option_names
from deltaproduct.models.export import FORMATS, DecodingStep, describe, export_step, trace_step

WITH_CONVOLUTION = [name for name, mixer in MIXERS.items() if "conv_size" in option_names(mixer.options)]
# Beside the configurations of test_export.py, which have a convolution of width 4 and one layer.
ODD = {
    "width 1": {"conv_size": 1},
    "width 1, two layers, tied, no MLP": {
        "conv_size": 1, "num_hidden_layers": 2, "tie_word_embeddings": True, "intermediate_size": 0,
    },
    "width 2 beside width 1": {
        "mixer": [{"name": "deltaproduct", "conv_size": 1}, {"name": "deltaproduct", "conv_size": 2}],
    },
    "width 1, four steps, gates": {
        "conv_size": 1, "num_householder": 4, "use_forget_gate": True, "use_output_gate": True,
    },
    "width 1, grouped heads": {"conv_size": 1, "num_v_heads": 4, "expand_v": 2.0},
    "four steps, no convolution, grouped heads": {
        "num_householder": 4, "use_short_conv": False, "num_v_heads": 4, "use_forget_gate": True,
    },
}  # fmt: skip
EXPORTED = ("deltanet", "gated_deltanet", "mamba2", "dense_linear_rnn", "slstm")  # with a convolution of width 1


def described_ports(step: DecodingStep) -> list[str]:
    said = describe(step)
    inputs, outputs = ([entry["name"] for entry in said[side]] for side in ("inputs", "outputs"))
    assert outputs == ["logits", *(f"next.{name}" for name in inputs[1:])]
    return inputs[1:]


@pytest.mark.parametrize("mixer", WITH_CONVOLUTION)
@torch.no_grad()
def test_a_step_has_no_empty_tensors(mixer):
    """Neither goes in nor comes out, and the step is the model's."""
    model = build(mixer=mixer, conv_size=1, num_hidden_layers=2)
    step = DecodingStep(model)
    assert described_ports(step) == step.names and not any("history" in name for name in step.names)
    state, carried = step.initial(3), None
    assert all(x.numel() for x in state)
    for token in torch.randint(V, (5, 3), generator=torch.Generator().manual_seed(1)):
        want, carried = model(token[:, None], carried)
        logits, *state = step(token, *state)
        assert len(state) == len(step.names) and torch.equal(logits, want[:, 0])


def test_histories_of_width_one_and_two_side_by_side():
    step = DecodingStep(build(**ODD["width 2 beside width 1"]))
    assert step.names == ["0.recurrent", "1.recurrent", "1.q_history", "1.k_history", "1.v_history"]


@pytest.mark.slow("export")
def test_the_traced_step_of_an_empty_history():
    model = build(**ODD["width 1"])
    run = trace_step(DecodingStep(model)).module()
    for batch_size in (1, 5):
        assert_program_is_the_model(run, model, batch_size)


def check(changes: dict, to: str, folder) -> None:
    needed(to)
    model = build(**changes)
    said = export_step(model, folder / "out", to)
    assert all(0 not in entry["shape"] for side in ("inputs", "outputs") for entry in said[side])
    assert json.loads((folder / "out" / "step.json").read_text())["inputs"] == said["inputs"]
    run = FORMATS[to].open(folder / "out" / FORMATS[to].file)
    for batch_size in (1, 5):
        assert_program_is_the_model(run, model, batch_size)


@pytest.mark.slow("export")
def test_an_empty_history_in_onnx(tmp_path):
    check(ODD["width 1"], "onnx", tmp_path)


@pytest.mark.slow("export")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name, to, tmp_path):
    check(ODD[name], to, tmp_path)


@pytest.mark.slow("export")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("mixer", EXPORTED)
def test_an_empty_history_of_every_mixer(mixer, to, tmp_path):
    check({"mixer": mixer, "conv_size": 1}, to, tmp_path)
