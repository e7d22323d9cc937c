"""A run's files that say what no run writes, behind a manifest that fits them: one line that names the file."""

import json
import os
import shutil

import pytest
import torch
from commands import run as command
from run_folder import metrics
from runs import run_config
from safetensors.torch import load_file, save_file

from deltaproduct.errors import UsageError
from deltaproduct.files import seal_folder
from deltaproduct.training import LanguageConfig, TrainConfig, train
from deltaproduct.training.checkpoint import Progress, load_checkpoint, progress_from
from deltaproduct.training.loop import OneProcess, new_model, new_optimizer
from deltaproduct.training.metrics import Metrics, last_metrics
from deltaproduct.training.objectives.language import LossTrend
from deltaproduct.training.objectives.task import Curriculum
from deltaproduct.training.run_folder import trained_as

STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    train(run_config(steps=STEPS), out, log_every=1, show=False)
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def load(checkpoint, model, optimizer):
    config, alone = run_config(steps=STEPS), OneProcess(torch.device("cpu"))
    return load_checkpoint(checkpoint, model, optimizer, Curriculum, config, alone)


def refused(run, match):
    """The line with which resuming is refused; model and optimiser stay as they were."""
    seal_folder(run / "checkpoint")
    config = run_config(steps=STEPS)
    model = new_model(config)
    optimizer = new_optimizer(model, config.training)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(UsageError, match=match) as error:
        load(run / "checkpoint", model, optimizer)
    assert "\n" not in str(error.value) and str(run / "checkpoint") in str(error.value)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert optimizer.state_dict()["state"] == {}


HUGE = int("9" * 30)
ENTRIES = {
    "unknown field": ({"more": 1}, "the unknown entry 'more'"),
    "negative step": ({"step": -1}, "step must be a whole number from 0 to 4, not -1"),
    "fractional step": ({"step": 1.5}, "step must be a whole number from 0 to 4, not 1.5"),
    "step of another kind": ({"step": "2"}, "step must be .*, not '2'"),
    "step that is true": ({"step": True}, "step must be .*, not True"),
    "step beyond the end": ({"step": STEPS + 1}, "step must be a whole number from 0 to 4, not 5"),
    "huge step": ({"step": HUGE}, "step must be a whole number from 0 to 4"),
    "step that the optimiser has not": (
        {"step": 3, "stage_start": 0, "stage": 0},
        "4 times, but the run has done 3 steps",
    ),
    "stage that does not exist": ({"stage": 2, "stage_start": 3}, "in stage 2, and it has stages 0 to 1"),
    "stage beyond all": ({"stage": HUGE}, "stage must be a whole number"),
    "stage in the future": ({"stage": 1, "stage_start": 5}, "stage_start must be a whole number from 0 to 4"),
    "stage before its time": ({"stage": 1, "stage_start": 0}, "stage 1 is said to begin at step 0"),
    "loss that is none": ({"loss_mean": None}, "loss_mean must be a finite number, not None"),
    "negative loss": ({"loss_mean": -1.0}, "loss_mean is -1.0, and no loss is negative"),
    "loss as text": ({"loss_mean": "1"}, "loss_mean must be a finite number, not '1'"),
    "loss beyond floats": ({"loss_mean": 10**99}, None),  # a float that a loss never reaches, but could
    "negative time": ({"seconds": -1.0}, "seconds must be 0 or more, not -1.0"),
    "time as a list": ({"seconds": [1]}, "seconds must be 0 or more"),
}


@pytest.mark.parametrize(("change", "match"), ENTRIES.values(), ids=ENTRIES)
def test_progress_that_no_run_can_have(run, change, match):
    path = run / "checkpoint" / "training.json"
    values = json.loads(path.read_text())
    values["progress"] |= change
    path.write_text(json.dumps(values))
    if match is None:
        config = run_config(steps=STEPS)
        model = new_model(config)
        seal_folder(run / "checkpoint")
        assert load(path.parent, model, new_optimizer(model, config.training)).kept.loss_mean == 1e99
    else:
        refused(run, match)


@pytest.mark.parametrize("name", ["step", "stage", "stage_start", "loss_mean", "seconds"])
def test_progress_that_is_incomplete(run, name):
    path = run / "checkpoint" / "training.json"
    values = json.loads(path.read_text())
    del values["progress"][name]
    path.write_text(json.dumps(values))
    refused(run, f"training.json does not say .* no '{name}'")


TEXTS = {
    "empty": ("", "is not valid JSON"),
    "null": ("null", "holds no entries by name"),
    "a list": ("[1]", "holds no entries by name"),
    "nothing in it": ("{}", "is damaged. This is not a run's configuration"),
    "NaN": ('{"progress": NaN}', "it has NaN, which JSON does not"),
    "infinite": ('{"progress": 1e999}', "1e999, which is too large"),
    "5,000 digits": (f'{{"progress": {"9" * 5000}}}', "an integer of 5,000 digits"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "twice": ('{"progress": 1, "progress": 2}', "the entry 'progress' comes twice"),
    "half a character": ('{"progress": "\\ud800"}', "half of a surrogate pair"),
    "a mark": ("\ufeff{}", "is not valid JSON"),
}


@pytest.mark.parametrize(("text", "match"), TEXTS.values(), ids=TEXTS)
def test_a_training_json_of_another_shape(run, text, match):
    path = run / "checkpoint" / "training.json"
    path.write_text(text)
    refused(run, rf"training\.json .*{match}")
    with pytest.raises(UsageError, match=match):
        trained_as(run / "checkpoint")


def test_a_configuration_that_no_run_has_is_refused_by_evaluate_too(run, capsys):
    path = run / "checkpoint" / "training.json"
    values = json.loads(path.read_text())
    values["config"]["training"]["lengths"] = "48"  # cattrs would read the numbers 4 and 8
    path.write_text(json.dumps(values))
    refused(run, r"training\.json is damaged\. This is not a training configuration")
    status, _, err = command(capsys, "evaluate", run)
    assert status == 2 and err.count("\n") == 1 and "training.json" in err


# The optimiser as earlier versions saved it, in one file by the parameters' numbers: read for ever.


@pytest.fixture
def earlier(run):
    checkpoint, config = run / "checkpoint", run_config(steps=STEPS)
    model = new_model(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = new_optimizer(model, config.training).param_groups
    moments = load_file(checkpoint / "optimizer-0-of-1.safetensors")
    tensors = {}
    for number, p in enumerate(p for group in groups for p in group["params"]):
        tensors[f"{number}.step"] = torch.tensor(float(STEPS))
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{number}.{moment}"] = moments[f"{moment}.{names[id(p)]}"].reshape(p.shape)
    save_file(tensors, checkpoint / "optimizer.safetensors")
    for name in ("optimizer-0-of-1.safetensors", "optimizer.json"):
        (checkpoint / name).unlink()
    seal_folder(checkpoint)
    return run


def test_an_optimiser_of_an_earlier_version_is_read(trained, earlier):
    found = []
    for folder in (trained, earlier):
        model = new_model(run_config(steps=STEPS))
        optimizer = new_optimizer(model, run_config(steps=STEPS).training)
        assert load(folder / "checkpoint", model, optimizer).step == STEPS
        found.append(optimizer.state_dict()["state"])
    for number, entries in found[0].items():
        assert entries.keys() == found[1][number].keys()
        assert all(torch.equal(x, found[1][number][key]) for key, x in entries.items())


def nothing(tensors):
    tensors.clear()


TENSORS = {
    "empty": (nothing, "lacks 0.exp_avg"),
    "a parameter missing": (lambda t: [t.pop(n) for n in list(t) if n.startswith("3.")], "lacks 3.exp_avg"),
    "a moment missing": (lambda t: t.pop("2.exp_avg_sq"), "lacks 2.exp_avg_sq"),
    "a step missing": (lambda t: t.pop("0.step"), "lacks 0.step"),
    "another name": (lambda t: t.update({"name": t.pop("0.step")}), "lacks 0.step"),
    "one too many": (lambda t: t.update({"99.exp_avg": torch.zeros(1)}), "has 99.exp_avg"),
    "another optimiser's": (lambda t: t.update({"0.max_exp_avg_sq": torch.zeros(1)}), "has 0.max_exp_avg_sq"),
    "no number": (lambda t: t.update({"x.step": torch.zeros(())}), "has x.step"),
    "another shape": (lambda t: t.update({"0.exp_avg": t["0.exp_avg"].flatten()}), r"0.exp_avg of torch.float32 \["),
    "integers": (lambda t: t.update({"0.exp_avg": t["0.exp_avg"].long()}), "0.exp_avg of torch.int64"),
    "truths": (lambda t: t.update({"0.exp_avg": t["0.exp_avg"] > 0}), "0.exp_avg of torch.bool"),
    "half": (lambda t: t.update({"0.exp_avg": t["0.exp_avg"].half()}), "0.exp_avg of torch.float16"),
    "double": (lambda t: t.update({"1.exp_avg_sq": t["1.exp_avg_sq"].double()}), "1.exp_avg_sq of torch.float64"),
    "NaN": (lambda t: t["0.exp_avg"].fill_(torch.nan), "0.exp_avg has numbers that no optimiser comes to"),
    "infinite": (lambda t: t["0.exp_avg_sq"].view(-1)[-1:].fill_(torch.inf), "0.exp_avg_sq has numbers"),
    "negative squares": (lambda t: t["0.exp_avg_sq"].view(-1)[-1:].fill_(-1), "0.exp_avg_sq has numbers"),
    "another step": (lambda t: t["0.step"].fill_(5), "0.step is 5, and 4 steps are done"),
    "part of a step": (lambda t: t["0.step"].fill_(3.5), "0.step is 3.5"),
    "steps in a row": (lambda t: t.update({"0.step": torch.full((1,), 4.0)}), r"0.step of torch.float32 \[1\]"),
    "step as an integer": (lambda t: t.update({"0.step": torch.tensor(4)}), "0.step of torch.int64"),
}


@pytest.mark.parametrize(("change", "match"), TENSORS.values(), ids=TENSORS)
def test_an_optimiser_that_no_run_can_have(earlier, change, match):
    path = earlier / "checkpoint" / "optimizer.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(earlier, rf"optimizer\.safetensors .*{match}")


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, (10**18).to_bytes(8, "little") + b"{}", b"\2" + b"\0" * 7 + b"[]"]
)
def test_an_optimiser_that_is_no_safetensors_file(earlier, content):
    (earlier / "checkpoint" / "optimizer.safetensors").write_bytes(content)
    refused(earlier, r"optimizer\.safetensors is not a safetensors file")


def test_no_run_goes_on_from_weights_that_are_not_finite(run):
    path = run / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"][0] = torch.nan
    save_file(tensors, path)
    refused(run, r"not finite \(norm\.weight\)")


def test_progress_of_another_kind_of_run():
    """The check serves language runs as well, whose means may be null."""
    values = {"step": 3, "seconds": 1, "loss_mean": None, "lowest_mean": 2}
    settings = LanguageConfig(steps=3)
    with pytest.raises(UsageError, match=r"training\.json .* no loss_mean or lowest_mean of 3 steps"):
        progress_from(values, LossTrend, settings, "training.json")
    values |= {"step": 0}
    found = progress_from(values, LossTrend, settings, "training.json")
    assert found == Progress(LossTrend(None, 2.0), 0, 1.0) and isinstance(found.kept.lowest_mean, float)
    for change, match in (
        ({"step": None}, "step"),
        ({"lowest_mean": "1"}, "lowest_mean"),
        ({"seconds": None}, "seconds"),
    ):
        with pytest.raises(UsageError, match=rf"training\.json .* {match} must be"):
            progress_from(values | change, LossTrend, settings, "training.json")
    for value in (None, [], "x", 3):
        with pytest.raises(UsageError, match=r"training\.json .* no progress"):
            progress_from(value, Curriculum, TrainConfig(), "training.json")


# metrics.jsonl

ROWS = [{"step": n, "loss": 0.5} for n in range(1, 5)]
WHOLE = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def open_metrics(path, after_step=3):
    Metrics(path, after_step=after_step).close()
    return path.read_bytes()


def test_lines_up_to_the_checkpoint_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert open_metrics(path) == b""  # a run begins
    path.write_bytes(WHOLE)
    assert open_metrics(path) == b"".join(WHOLE.splitlines(keepends=True)[:3])
    nan = b'{"step": 1, "loss": NaN}\n'
    path.write_bytes(nan)
    assert open_metrics(path) == nan


@pytest.mark.parametrize("end", [b'{"step": 5, "lo', b"\0\0\0\0", b"\xff\xfe", b'{"st'])
def test_an_end_that_a_kill_cut_off_goes(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + end)
    assert open_metrics(path, after_step=9) == WHOLE
    path.write_bytes(WHOLE.rstrip(b"\n"))  # whole but for its end
    assert open_metrics(path, after_step=9) == WHOLE


LINES = {
    "no JSON": (b"step 2", "line 2 is no metrics of a step"),
    "no object": (b"[2]", "line 2 is no metrics"),
    "no step": (b'{"loss": 1}', "line 2 is no metrics"),
    "text for a step": (b'{"step": "2"}', "line 2 is no metrics"),
    "true for a step": (b'{"step": true}', "line 2 is no metrics"),
    "half a step": (b'{"step": 1.5}', "line 2 is no metrics"),
    "a negative step": (b'{"step": -2}', "line 2 is no metrics"),
    "a step of 5,000 digits": (b'{"step": ' + b"9" * 5000 + b"}", "line 2 is no metrics"),
    "no UTF-8": (b'{"step": 2, "x": "\xff"}', "line 2 is no metrics"),
    "empty": (b"", "line 2 is no metrics"),
    "zeros": (b"\0" * 100, "line 2 is no metrics"),
    "deep": (b"[" * 100_000, "line 2 is no metrics"),
    "a step again": (b'{"step": 1}', "line 2 is of step 1 after 1"),
    "a step back": (b'{"step": 0}', "line 2 is of step 0 after 1"),
    "a step ahead": (b'{"step": 9}', "line 3 is of step 3 after 9"),
}


@pytest.mark.parametrize(("line", "match"), LINES.values(), ids=LINES)
def test_an_odd_line_is_refused_and_loses_no_other(tmp_path, line, match):
    path = tmp_path / "metrics.jsonl"
    lines = WHOLE.split(b"\n")
    changed = b"\n".join([lines[0], line, *lines[2:]])
    path.write_bytes(changed)
    with pytest.raises(UsageError, match=rf"metrics\.jsonl was changed: {match}") as error:
        open_metrics(path)
    assert "\n" not in str(error.value) and path.read_bytes() == changed
    if b"ahead" not in line:
        assert last_metrics(path) == ROWS[-1]


def test_what_is_no_file_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("nowhere")
    with pytest.raises(UsageError, match="a symbolic link to nothing"):
        open_metrics(path)
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(UsageError, match="is not a file"):
            open_metrics(path)
        assert last_metrics(path) is None
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("content", "last"), [
    (b"", None), (b"\n\n", None), (b"\xff", None), (b"[1]", None), (b"x" + WHOLE, ROWS[-1]),
    (WHOLE + b'{"st', ROWS[-1]),
])  # fmt: skip
def test_the_last_line_is_the_last_whole_one(tmp_path, content, last):
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path) is None
    path.write_bytes(content)
    assert last_metrics(path) == last


def test_a_finished_run_whose_metrics_are_gone_is_resumed_without_a_traceback(run, capsys):
    """At its end the command shows the last line, if there is one."""
    assert metrics(run)[-1]["step"] == STEPS
    for content in (None, b"", b"\xff"):
        path = run / "metrics.jsonl"
        path.unlink() if content is None else path.write_bytes(content)
        status, _, err = command(capsys, "train", "--out", run, "--resume")
        assert status in (0, 2) and "Traceback" not in err and err.count("\n") <= 1
