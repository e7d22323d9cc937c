"""Configurations, weights and JSON that say what no model is: one line that names the field or the file."""

import json
import struct
from typing import Any

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file

from deltaproduct.errors import UsageError
from deltaproduct.files import parse_json, read_json, seal_folder
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.fla.checkpoint import read_fla, write_fla
from deltaproduct.models.sampling import Sampling
from deltaproduct.models.streaming import Stream
from deltaproduct.training.config import Run, TrainConfig

TINY = {"vocab_size": 7, "num_labels": 7, "hidden_size": 8, "num_heads": 2, "head_dim": 4, "intermediate_size": 16}
HUGE = 10**19


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    SequenceModel(ModelConfig.build(**TINY)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(call, match):
    with pytest.raises(UsageError, match=match) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


FIELDS: dict[str, list[Any]] = {
    "hidden_size": [HUGE, -1, 0, 8.0, "8", True, None, [8], {}, 2**28],
    "vocab_size": [HUGE, 0, "7", True, None],
    "num_labels": [HUGE, 0, 7.5],
    "num_hidden_layers": [HUGE, 2**16, 0, -1, "1", False],
    "num_heads": [0, -2, HUGE, 2.5],
    "head_dim": [0, HUGE, "4"],
    "num_householder": [0, HUGE, True],
    "intermediate_size": [-1, HUGE, 1.5, "16"],
    "expand_v": [1e300, 0, -1.0, "1", None, True, 10**400],
    "num_v_heads": [HUGE, 1.5],
    "num_kv_heads": [0, HUGE],
    "rope_theta": [0.0, -1, "x"],
    "norm_eps": [0, -1e-5, "1e-5", None],
    "conv_size": [0, HUGE],
    "expand": [HUGE, 0],
    "ssm_state_size": [HUGE, 0],
    "use_forget_gate": [1, 0, "true", None],
    "tie_word_embeddings": [1, "false"],
    "mixer": [1, None, ["deltaproduct"], "x", "\x1b[2J"],
    "qkv_activation": [1, "eval"],
    "feature_map": [None, ["elu"], "x"],
    "initializer_range": [-1, "0.02"],
    "beta_bias_init": ["0", True],
    "layer_overrides": [
        [], "x", {"1": {}}, {"0": []}, {"0": {"hidden_size": 4}}, {"0": {"num_heads": "2"}}, {"0": {"num_heads": HUGE}},
        {"0": {"use_forget_gate": 1}}, {"00": {"num_heads": 2}}, {"-1": {}}, {"0": None}, {"0": {"mixer": []}},
    ],
}  # fmt: skip
CASES = [(name, value) for name, values in FIELDS.items() for value in values]
MIXER_OF = {"num_kv_heads": "attention", "rope_theta": "attention", "expand": "mamba", "ssm_state_size": "mamba",
            "feature_map": "linear_attention"}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n}={v!r:.30}" for n, v in CASES])
def test_a_field_of_another_kind_or_beyond_all_sizes(saved, name, value):
    """In the layout of earlier versions, in which all options lie beside the model's fields, and in today's."""
    mixer = MIXER_OF.get(name, "deltaproduct")
    flat = TINY | {"mixer": mixer} | {name: value}
    if name != "mixer" or not isinstance(value, list):
        refused(lambda: ModelConfig.from_dict(flat), name if name != "layer_overrides" else None)
    path = saved / "config.json"
    values = json.loads(path.read_text())
    options = {"name": mixer} if name in MIXER_OF else values["mixer"]
    in_mixer = name in options or name in MIXER_OF
    path.write_text(json.dumps(values | ({"mixer": options | {name: value}} if in_mixer else {name: value})))
    seal_folder(saved)
    refused(lambda: SequenceModel.from_pretrained(saved), name if value != 10**400 else "401 digits")


@pytest.mark.parametrize(("mixer", "match"), [
    ({"name": "lstm", "num_householder": 4}, "The mixer lstm has no option 'num_householder'"),
    ({"name": "gru", "num_haeds": 4}, r"\(did you mean 'num_heads'\?\); there are num_heads, head_dim"),
    ([{"name": "gru"}, {"name": "gla", "rope_theta": 1.0}], "The mixer gla has no option 'rope_theta'"),
    ({"num_heads": 4}, "need its name"), ({"name": None}, "need its name"), ({"name": "x"}, "There is no mixer 'x'"),
    ([], "mixer must be"), ([[]], "mixer must be"), ([1], "mixer must be"),
    ([{"name": "gru"}] * 2, "mixer has 2 entries"),
])  # fmt: skip
def test_options_that_a_mixer_has_not_in_json(saved, mixer, match):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mixer": mixer}))
    seal_folder(saved)
    refused(lambda: SequenceModel.from_pretrained(saved), match)


def test_options_beside_a_mixer_of_the_new_layout_are_refused():
    values = ModelConfig.build(5, 5, mixer="lstm").to_dict()
    refused(lambda: ModelConfig.from_dict(values | {"num_heads": 2}), "no field 'num_heads' beside its mixer; options")
    refused(lambda: ModelConfig.from_dict(values | {"hiden_size": 2}), "did you mean 'hidden_size'")
    refused(lambda: ModelConfig.from_dict(values | {"layer_overrides": {}}), "no field 'layer_overrides'")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["expand_v", "norm_eps", "rope_theta", "initializer_range", "beta_bias_init",
                                  "ttt_base_lr", "embedding_init_std"])  # fmt: skip
def test_numbers_that_are_not_finite(name, value):
    mixer = {"rope_theta": "attention", "ttt_base_lr": "ttt_linear"}.get(name, "deltaproduct")
    refused(lambda: ModelConfig.build(mixer=mixer, **TINY, **{name: value}), f"{name} must be a finite number")


@pytest.mark.parametrize("change", [
    {"head_dim": 2**27, "num_heads": 2**27}, {"head_dim": 2**20, "num_householder": 2**20},
    {"mixer": {"name": "mamba", "expand": 2**27}},
    {"expand_v": 1e9}, {"num_v_heads": 2**27},
])  # fmt: skip
def test_sizes_that_only_together_are_too_large(change):
    refused(lambda: ModelConfig.build(TINY["vocab_size"], TINY["num_labels"], defaults=TINY, **change), "A layer would")


def test_what_models_have_is_taken_as_before():
    """Whole numbers for floats, sizes of the largest models, and numpy's integers."""
    large = ModelConfig.build(
        10**6, 10**6, hidden_size=2**15, num_heads=256, head_dim=512, expand_v=2, num_hidden_layers=1000,
        num_householder=4,
    )  # fmt: skip
    assert ModelConfig.from_dict(large.to_dict()) == large
    read = ModelConfig.from_dict(
        {"vocab_size": 7, "num_labels": 7, "mixer": {"name": "attention", "rope_theta": 500_000}}
    )
    assert type(read.mixer.rope_theta) is float and read.mixer.rope_theta == 500_000.0


TRAINING: dict[str, list[Any]] = {
    "steps": [0, -1, 1.5, "6", True, HUGE], "lr": [0, -1.0, "1", None, True], "beta1": [2, "0.9"],
    "seed": [-1, HUGE, 0.5],
    "lengths": ["48", [], [0], [1.5], ["4"], {"4": 1}, 4, [HUGE], [True]], "batch_sizes": ["4", [0], None],
    "stage_steps": ["", "5", [0]], "min_length": [0, 1.5, "1"], "task": [1, None, ["S3"]], "weight_decay": [-1, "0"],
    "warmup_steps": [-1, HUGE, 2.5], "grad_accumulation": [0, "1"], "num_samples": [1.5, "100"],
}  # fmt: skip
TRAINING_CASES = [(name, value) for name, values in TRAINING.items() for value in values]


@pytest.mark.parametrize(("name", "value"), TRAINING_CASES, ids=[f"{n}={v!r:.30}" for n, v in TRAINING_CASES])
def test_a_runs_field_of_another_kind(name, value):
    values = Run(TrainConfig(), ModelConfig.build(**TINY)).to_dict()
    refused(lambda: Run.from_dict(values | {"training": values["training"] | {name: value}}), name)


JSON = {
    "empty": b"", "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "5,000 digits below 0": b'{"a": -' + b"9" * 5000 + b"}",
    "101 digits": b"[" + b"9" * 101 + b"]", "NaN": b'{"a": NaN}', "infinite": b"[Infinity]", "minus": b"[-Infinity]",
    "1e999": b"[1e999]", "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
    "half a character": b'{"a": "\\ud800"}', "half a name": b'{"\\uDFFF": 1}', "twice": b'{"a": 1, "b": 2, "a": 1}',
    "twice inside": b'[{"a": {"b": 1, "b": 2}}]', "a mark": b"\xef\xbb\xbf{}", "UTF-16": "{}".encode("utf-16"),
    "Latin-1": b'{"a": "\xe9"}', "NUL": b"\0", "cut off": b'{"a": [1,', "two values": b"{} {}",
}  # fmt: skip


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_json_that_is_none(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert str(path) in refused(lambda: read_json(path), "not valid JSON|not text in UTF-8")


def test_json_that_is_some():
    assert parse_json('{"a": [1, -2.5, "\\ud83d\\ude00", null, true]}', "here") == {"a": [1, -2.5, "😀", None, True]}
    assert parse_json("1" + "0" * 99, "here") == 10**99
    assert parse_json('"\\udcff"', "here") == "\udcff"  # a byte of a file's name that is no UTF-8
    assert parse_json("[1e999, Infinity]", "here", finite=False) == [float("inf")] * 2


def test_json_that_is_no_file(tmp_path):
    refused(lambda: read_json(tmp_path), "is not a file")
    refused(lambda: read_json(tmp_path / "nowhere"), "cannot be read")


# Weights

KINDS = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("which", ["one", "all"])
def test_weights_of_a_kind_that_no_layer_computes_in(saved, kind, which):
    tensors = load_file(saved / "model.safetensors")
    names = ["norm.weight"] if which == "one" else list(tensors)
    save_file(tensors | {name: tensors[name].to(kind) for name in names}, saved / "model.safetensors")
    seal_folder(saved)
    refused(lambda: SequenceModel.from_pretrained(saved), f"of {str(kind).removeprefix('torch.')}; weights are of")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_several_precisions(saved, kind):
    tensors = load_file(saved / "model.safetensors")
    whole = {name: x.to(kind) for name, x in tensors.items()}
    save_file(whole, saved / "model.safetensors")
    seal_folder(saved)
    assert SequenceModel.from_pretrained(saved).dtype == kind
    save_file(tensors | {"head.weight": whole["head.weight"]}, saved / "model.safetensors")
    seal_folder(saved)
    refused(lambda: SequenceModel.from_pretrained(saved), "are of .* and not in a way that a model can compute with")


def header(entries):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text)) + text


FILES = {
    "empty": b"",
    "a header of 10^18 bytes": struct.pack("<Q", 10**18) + b"{}",
    "a header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "no header": header(b"no JSON"),
    "a deep header": header(b"[" * 50_000),
    "a list": header(b"[]"),
    "an unknown kind": header({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}) + b"1234",
    "half bytes": header({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}) + b"12",
    "beyond the end": header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}) + b"1234",
    "a shape of 2^64": header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}) + b"1234",
    "a negative shape": header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + b"1234",
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_weights_that_are_no_safetensors_file(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    seal_folder(saved)
    refused(lambda: SequenceModel.from_pretrained(saved), r"model\.safetensors is not a safetensors file")


def test_a_model_of_very_many_layers_is_refused_before_it_is_built(saved, monkeypatch):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2**16 - 1}))
    seal_folder(saved)
    monkeypatch.setattr(SequenceModel, "__init__", lambda *_: pytest.fail("it is built"))
    refused(lambda: SequenceModel.from_pretrained(saved), r"does not fit its configuration")


def test_a_pickle_of_others_is_refused_in_one_line(tmp_path, capfd):
    """PyTorch's warnings of the pickle's protocol stay away."""
    torch.manual_seed(0)
    config = ModelConfig.build(vocab_size=7, num_labels=7, hidden_size=8, num_heads=2, head_dim=4, mixer="deltanet")
    write_fla(SequenceModel(config), tmp_path / "fla")
    (tmp_path / "fla" / "model.safetensors").unlink()
    (tmp_path / "fla" / "manifest.json").unlink()
    (tmp_path / "fla" / "pytorch_model.bin").write_bytes(FILES["a pickle"])
    refused(lambda: read_fla(tmp_path / "fla"), "damaged, or holds more than tensors")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weights_of_others_that_are_of_such_a_kind(tmp_path, kind):
    torch.manual_seed(0)
    config = ModelConfig.build(vocab_size=7, num_labels=7, hidden_size=8, num_heads=2, head_dim=4, mixer="deltanet")
    write_fla(SequenceModel(config), tmp_path / "fla")
    tensors = load_file(tmp_path / "fla" / "model.safetensors")
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].to(kind)}, tmp_path / "fla" / "model.safetensors")
    seal_folder(tmp_path / "fla")
    match = rf"model\.norm\.weight is {kind}; only floating-point tensors can be read, float32"
    refused(lambda: read_fla(tmp_path / "fla"), match)


# Conversations

STREAMS: dict[str, list] = {
    "position": [0, -1, 1.5, "3", True, None, HUGE, [1]],
    "sampling": [
        None, [], {}, {"temperature": "1"}, {"temperature": -1}, {"top_k": 1.5}, {"top_k": True}, {"seed": -1},
        {"seed": HUGE}, {"more": 1}, {"top_p": 2}, {"top_p": "x"},
    ],
    "config": [None, [], {}, "x"],
    "weights": [None, "0" * 64, 1],
}  # fmt: skip
STREAM_CASES = [(name, value) for name, values in STREAMS.items() for value in values]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig.build(**TINY)).eval()
    stream = Stream(model, Sampling(seed=1))
    stream.prefill([1, 2, 3])
    folder = tmp_path_factory.mktemp("said") / "said"
    stream.save(folder)
    return model, folder, (folder / "stream.json").read_text(), load_file(folder / "stream.safetensors")


@pytest.mark.parametrize(("name", "value"), STREAM_CASES, ids=[f"{n}={v!r:.30}" for n, v in STREAM_CASES])
def test_a_conversation_that_says_what_none_says(said, name, value):
    model, folder, text, tensors = said
    values = json.loads(text)
    if name == "sampling" and value:
        value = values["sampling"] | value
    changes_nothing = name == "sampling" and value == {}  # all of it has defaults
    (folder / "stream.json").write_text(json.dumps(values | {name: value}))
    save_file(tensors, folder / "stream.safetensors")
    seal_folder(folder)
    if changes_nothing:
        assert Stream.load(folder, model).sampling == Sampling()
    else:
        refused(lambda: Stream.load(folder, model), None)


STREAM_TENSORS = {
    "logits as integers": {"logits": lambda x: x.long()},
    "logits of another size": {"logits": lambda x: x[:-1]},
    "logits that are NaN": {"logits": lambda x: x.fill_(torch.nan)},
    "a state of integers": {"state.0.recurrent": lambda x: x.long()},
    "a state of truths": {"state.0.recurrent": lambda x: x > 0},
    "a state that is infinite": {"state.0.recurrent": lambda x: x.fill_(torch.inf)},
    "a state of more sequences": {"state.0.recurrent": lambda x: torch.cat([x, x])},
    "a generator that is short": {"generator": lambda x: x[:-1]},
    "a generator of floats": {"generator": lambda x: x.float()},
    "a generator of noise": {"generator": lambda x: torch.full_like(x, 255)},
}


@pytest.mark.parametrize("changes", STREAM_TENSORS.values(), ids=STREAM_TENSORS)
def test_a_conversation_of_other_tensors(said, changes):
    model, folder, text, tensors = said
    (folder / "stream.json").write_text(text)
    assert changes.keys() <= tensors.keys()
    changed = {name: change(tensors[name].clone()) for name, change in changes.items()}
    save_file(tensors | changed, folder / "stream.safetensors")
    seal_folder(folder)
    refused(lambda: Stream.load(folder, model), "damaged|not finite")


def test_a_message_of_any_length_is_one_short_line(saved, capsys):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mixer": "x\x1b[31m" * 10_000}))
    seal_folder(saved)
    status, _, err = run(capsys, "evaluate", saved, "--task", "S3")
    assert status == 2 and err.count("\n") == 1 and len(err) < 1600 and "\x1b" not in err
