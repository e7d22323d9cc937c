"""`deltaproduct mixers`, and the flags that depend on the mixer: --mixer, --layers, --attention-every."""

import dataclasses
import json
import pickle
import re

import pytest
from commands import run

from deltaproduct.cli.lm_train import LmTrain
from deltaproduct.cli.lm_train import command as lm_train
from deltaproduct.cli.lm_train import defaults as lm_defaults
from deltaproduct.cli.train import command as train
from deltaproduct.layers import MIXERS, AttentionOptions, DeltaProductOptions
from deltaproduct.layers.options import declared
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.training.run_folder import read_run

TINY = ["--hidden-size", "16", "--steps", "2", "--lengths", "8", "--batch-sizes", "8"]


def test_the_list_has_every_mixer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(capsys, "mixers", "list")
    rows = {
        cells[0]: cells[1:]
        for line in out.splitlines()
        if len(cells := [x.strip() for x in line.strip("│ ").split("│")]) == 4
    }
    assert status == 0 and set(rows) == set(MIXERS)
    assert [name for name, cells in rows.items() if cells[1] == "grows"] == ["attention"]
    assert rows["mamba"][2] == "allow_neg_eigval" and rows["gla"][2] == "no" and rows["lstm"][2] == "-"


@pytest.mark.parametrize("name", MIXERS)
def test_one_mixer_is_shown_with_its_options(capsys, name):
    status, out, _ = run(capsys, "mixers", "show", name)
    assert status == 0 and MIXERS[name].about.recurrence in out and MIXERS[name].about.paper in out
    lines = out.splitlines()
    assert lines[5:] == [line for line in lines if " = " in line and ": " in line and "  " in line]
    assert [line.split(":")[0] for line in lines[5:]] == [x.name for x in declared(name)]
    assert all(x.help in line for x, line in zip(declared(name), lines[5:], strict=True))


def test_what_is_shown_of_states(capsys):
    # H·K·V of 4 heads of 16 × 16, and three tokens before a convolution of width 4 over q (64), k and v (2 × 64 each).
    assert f"{4 * 16 * 16 + 3 * 5 * 64:,} floats" in run(capsys, "mixers", "show", "deltaproduct")[1]
    assert "grows by 128 floats a token" in run(capsys, "mixers", "show", "attention")[1]  # a key and a value
    status, _, err = run(capsys, "mixers", "show", "atention")
    assert status == 2 and "did you mean 'attention'" in err


@pytest.mark.parametrize("words", [["train"], ["lm", "train"]], ids=" ".join)
@pytest.mark.parametrize("mixer", MIXERS)
def test_help_shows_the_mixers_flags_and_no_others(capsys, words, mixer):
    status, out, _ = run(capsys, *words, "--mixer", mixer, "--help")
    mine = {x.name for x in declared(mixer)}
    others = {x.name for name in MIXERS for x in declared(name)} - mine
    shown = {word.strip(",").removeprefix("--").replace("-", "_") for word in out.split() if word.startswith("--")}
    assert status == 0 and mine <= shown and not others & shown
    titles = [found[1] for line in out.splitlines() if (found := re.match(r"\W*(\w* ?options) \W+$", line))]
    assert titles == ["options", "model options", "mixer options", "training options", "run options"]


@pytest.mark.parametrize("words", [["train"], ["lm", "train", "--data", "nowhere"]], ids=["train", "lm train"])
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--mixer lstm --num-householder 4",
            "--num-householder means nothing to the mixer lstm, which takes num_heads",
        ),
        ("--mixer mamba --no-use-short-conv", "--no-use-short-conv means nothing to the mixer mamba"),
        ("--mixer mamba --use_short_conv", "--use_short_conv means nothing to the mixer mamba"),
        ("--layers lstm,gru --expand=2", "--expand means nothing to the mixers lstm, gru, which take num_heads"),
        ("--mixer lsmt", "There is no mixer 'lsmt' (did you mean 'lstm'?)"),
        ("--layers lstm,gur", "--layers: there is no mixer 'gur' (did you mean 'gru'?)"),
        ("--layers lstm,,gru", "--layers: a comma of 'lstm,,gru' has nothing beside it"),
        ("--layers lstm,gru --mixer lstm", "--layers names the mixer of every layer; leave out --mixer."),
        ("--layers lstm,gru --attention-every 2", "leave out --attention-every."),
        ("--layers lstm,gru --num-hidden-layers 3", "--layers names 2 layers and --num-hidden-layers says 3"),
    ],
)
def test_flags_that_do_not_go_together(capsys, tmp_path, words, flags, says):
    status, _, err = run(capsys, *words, *flags.split(), "--out", tmp_path / "run")
    assert status == 2 and says in err and len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("every", ["0", "1", "5"])
def test_attention_in_no_layer_or_in_all(capsys, tmp_path, every):
    flags = ["--attention-every", every, "--num-hidden-layers", "4", "--out", tmp_path / "run"]
    status, _, err = run(capsys, "train", *TINY, *flags)
    assert status == 2 and f"at most the number of layers, 4, not {every}" in err


def test_every_so_many_layers_attention(capsys, tmp_path):
    flags = ["--num-hidden-layers", "5", "--attention-every", "2", "--num-heads", "2", "--head-dim", "8"]
    assert run(capsys, "train", *TINY, *flags, "--out", tmp_path / "run")[0] == 0
    config = SequenceModel.from_pretrained(tmp_path / "run" / "checkpoint").config
    assert config.mixer_names == "deltaproduct,attention,deltaproduct,attention,deltaproduct"
    assert config.mixer[1] == AttentionOptions(num_heads=2, head_dim=8) and config.mixer[0].beta_bias_init == 4.0


def test_layers_by_name_and_how_such_a_run_is_continued(capsys, tmp_path):
    flags = ["--layers", "deltaproduct,deltaproduct,attention", "--num-heads", "2", "--head-dim", "8"]
    out = ["--out", tmp_path / "run"]
    assert run(capsys, "train", *TINY, *flags, *out)[0] == 0
    stored = read_run(tmp_path / "run").model
    assert stored.num_hidden_layers == 3 and [x.name for x in stored.mixers] == flags[1].split(",")
    for again in ([], flags, ["--num-heads", "2"], ["--layers", flags[1]]):
        assert run(capsys, "train", "--resume", *again, *out)[0] == 0, again
    for changed, says in (
        (["--num-heads", "4"], "--num-heads 4, stored 2"),
        (["--mixer", "gla"], "--mixer gla, stored deltaproduct,deltaproduct,attention"),
        (["--layers", "gla,gla,attention"], "--mixer gla,gla,attention, stored deltaproduct,deltaproduct,attention"),
        (["--attention-every", "2"], "--mixer deltaproduct,attention,deltaproduct, stored deltaproduct,deltaproduct"),
        (["--expand", "2"], "--expand means nothing to the mixers deltaproduct, attention"),
    ):
        status, _, err = run(capsys, "train", "--resume", *changed, *out)
        assert status == 2 and says in err, err


def test_a_run_whose_layers_differ_in_an_option_is_continued(capsys, tmp_path):
    """No flag says such a thing; the run was begun in Python."""
    out, heads = ["--out", tmp_path / "run"], ["--num-heads", "2", "--head-dim", "8"]
    assert run(capsys, "train", *TINY, *heads, "--layers", "deltaproduct,gla", *out)[0] == 0
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    values["model"]["mixer"][1]["num_heads"] = 4
    values["model"]["intermediate_size"] = [0, 8]
    path.write_text(json.dumps(values))
    arguments = [str(word) for word in ("--resume", *out)]
    kind = train(arguments)
    assert "num_heads" not in kind.option_names and "head_dim" in kind.option_names
    status, _, err = run(capsys, "train", *arguments)  # all but the weights, which are of the run as it was
    assert status == 2 and "other settings" not in err and len(err.splitlines()) == 1


def test_presets_give_their_options_to_each_mixer():
    command = lm_defaults(["--preset", "213m", "--mixer", "deltanet", "--data", "x"])
    assert (command.mixer, command.head_dim, command.num_heads, command.hidden_size) == ("deltaproduct", 128, 6, 736)
    assert "num_householder" not in type(command).option_names
    hybrid = lm_train(["--layers", "deltaproduct,attention"])
    assert {"num_householder", "rope_theta"} <= set(hybrid.option_names)


def test_a_command_with_options_goes_through_a_pickle():
    """A launcher's processes unpickle it."""
    kind = lm_train(["--mixer", "mamba"])
    command = dataclasses.replace(kind(data="corpus", out="run", mixer="mamba", expand=3), steps=7)
    again = pickle.loads(pickle.dumps(command))
    assert vars(again) == vars(command) and isinstance(again, LmTrain) and again.option_names == command.option_names
    assert again.expand == 3


def test_the_default_of_a_flag_is_the_recipes():
    kind = train([])
    flags = {f.name: f.default for f in dataclasses.fields(kind)}
    assert flags["beta_bias_init"] == 4.0 and flags["use_short_conv"] is False and flags["conv_size"] == 4
    assert ModelConfig(7, 6).mixer == DeltaProductOptions() and DeltaProductOptions().beta_bias_init is None
