"""`bench train --all`: every registered mixer, none timed that is wrong, and a reason for each that is slow."""

import dataclasses
import json

import pytest
import torch
import tyro
from cases import S3, shown

from deltaproduct.benchmarks import bench_mixers, mixers, train
from deltaproduct.benchmarks.timing import Timing
from deltaproduct.cli import bench as cli
from deltaproduct.errors import UsageError
from deltaproduct.layers import MIXERS, DeltaNet, LinearAttention
from deltaproduct.models import SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.training import Run


class OffInFloat32(LinearAttention):
    """What loses precision: right in float64, 1% off in float32."""

    def mix(self, x, state, cu_seqlens):
        y, state = super().mix(x, state, cu_seqlens)
        return y * (1.01 if x.dtype == torch.float32 else 1), state


class NotANumber(DeltaNet):
    def mix(self, x, state, cu_seqlens):
        y, state = super().mix(x, state, cu_seqlens)
        return y / 0 * 0, state


class Broken(LinearAttention):
    def mix(self, x, state, cu_seqlens):
        raise RuntimeError("no such kernel\nand more")


def registered(name, mixer):
    """The mixer with options of that name, under which it can be registered."""
    return type(mixer.__name__, (mixer,), {"options": type("Options", (mixer.options,), {"name": name})})


@pytest.fixture(scope="module")
def quick_mixers():
    return bench_mixers(S3, quick=True, device="cpu", repeats=1)


def changed(config, training=None, model=None):
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **(training or {})),
        model=config.model.changed(**(model or {})),
    )


def run(names, **options):
    return bench_mixers(S3, mixers=names, device="cpu", **{"quick": True, "repeats": 1} | options)


# --- The report -------------------------------------------------------------------------------------------------------


def test_every_registered_mixer_has_a_row(quick_mixers):
    report, rows = quick_mixers, {row.mixer: row for row in quick_mixers.rows}
    assert list(rows) == list(MIXERS) and (report.batch_size, report.tokens, report.checked_batch) == (8, 17, 2)
    for name, row in rows.items():
        assert row.status == "timed" and 0 <= row.error < 1e-4 and row.worst, name  # what is refused begins at 1e-3
        assert row.step.runs == 1 and row.step.median_ms > 0 and row.peak_extra_bytes > 0
        assert row.ratio == pytest.approx(row.step.median_ms / rows["deltanet"].step.median_ms)
        assert row.num_parameters == SequenceModel(S3.model.changed(mixer=name)).num_parameters
    sizes = {name: rows[name].state_size for name in ("deltaproduct", "deltanet", "lstm", "attention")}
    # 4 heads × 16 × 16; two vectors of 4 × 16; and keys and values of 17 tokens, BOS included
    assert sizes == {"deltaproduct": 1024, "deltanet": 1024, "lstm": 128, "attention": 2 * 4 * 16 * 17}
    assert rows["deltanet"].ratio == 1


def test_the_report_is_plain_json_and_its_table_fits_80_columns(quick_mixers):
    value = quick_mixers.to_dict()
    assert json.loads(json.dumps(value, allow_nan=False)) == value and value["benchmark"] == "mixers"
    text = shown(quick_mixers)
    assert "A training step of S3, B8 T17 D64 H4 K16 N2" in text and "…" not in text  # how rich marks what it cut
    assert all(f"\n{name} " in text for name in MIXERS) and "× deltanet" in text and "2,176" in text
    wide = quick_mixers.rows[0]
    wide = dataclasses.replace(wide, mixer="dense_linear_rnn", step=Timing(11234, 10123, 12345, 3), ratio=123.4)
    wide = dataclasses.replace(wide, num_parameters=1_331_664, state_size=165_792, peak_extra_bytes=25_330 << 20)
    assert "…" not in shown(dataclasses.replace(quick_mixers, rows=[wide]))


def test_slow_mixers_say_why(monkeypatch):
    """Beyond 5 × DeltaNet's time; a reason that nobody has written down is noticed."""
    median_ms = {"deltanet": 10.0, "lstm": 50.0, "gru": 50.1, "mamba": 123.0, "odd": 60.0, "attention": 1.0}
    monkeypatch.setitem(MIXERS, "odd", registered("odd", LinearAttention))
    monkeypatch.setattr(mixers, "interleaved", lambda runs, **kw: {n: Timing(median_ms[n], 1, 200, 3) for n in runs})
    report = run(list(median_ms), repeats=7)
    assert [row.ratio for row in report.rows] == pytest.approx([1, 5, 5.01, 12.3, 6, 0.1])
    why = {row.mixer: row.why_slow for row in report.rows if row.why_slow}
    assert why == {"gru": "tokens one after the other", "mamba": mixers.REASONS["mamba"], "odd": "no reason is known"}
    text = shown(report)
    assert "gru takes 5.01 × deltanet's time: tokens one after the other." in text
    assert "odd takes 6.00 × deltanet's time: no reason is known." in text and "lstm takes" not in text
    assert "mamba is slow and had 3 runs." in text


def test_reasons_are_of_registered_mixers():
    assert set(mixers.REASONS) <= set(MIXERS) and mixers.YARDSTICK in MIXERS


# --- Correctness comes first ------------------------------------------------------------------------------------------


def test_wrong_and_failing_mixers_are_not_timed(monkeypatch):
    monkeypatch.setitem(MIXERS, "off", registered("off", OffInFloat32))
    monkeypatch.setitem(MIXERS, "broken", registered("broken", Broken))
    timed = []
    real = mixers.interleaved
    monkeypatch.setattr(mixers, "interleaved", lambda runs, **kw: timed.extend(runs) or real(runs, **kw))
    report = run(["off", "broken", "linear_attention", "deltanet"])
    off, broken, good, yardstick = report.rows
    assert off.status == "wrong" and off.error > report.error_limit and "above 1.0e-03" in off.reason
    assert broken.status == "failed" and broken.reason == "RuntimeError: no such kernel" and broken.error is None
    for row in (off, broken):
        assert row.step is row.ratio is row.peak_extra_bytes is row.num_parameters is None
    assert timed == ["linear_attention", "deltanet"] and good.status == yardstick.status == "timed"
    assert "off is wrong and was not timed" in shown(report) and "FAILED" in shown(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_without_deltanet_there_are_no_ratios(monkeypatch):
    assert run(["gru"]).rows[0].ratio is None
    monkeypatch.setitem(MIXERS, "deltanet", NotANumber)
    wrong, good = run(["deltanet", "gru"]).rows
    assert wrong.status == "wrong" and "not finite" in wrong.reason
    assert good.step and good.ratio is good.why_slow is None


def test_a_bias_is_judged_with_its_weight():
    """mLSTM's input gates have a bias whose gradient is nothing but rounding: by itself it is 3e-2 off."""
    task = get_task("parity")
    model = dataclasses.replace(S3.model, vocab_size=task.vocab_size, num_labels=task.num_labels)
    training = dataclasses.replace(S3.training, task="parity", seed=1, lengths=(64,), batch_sizes=(2,), stage_steps=())
    (row,) = bench_mixers(Run(training, model), mixers=["mlstm"], device="cpu", repeats=1).rows
    assert row.status == "timed" and row.error < 1e-4  # 9e-6 was seen
    sizes = {"loss": (), "a.weight": (2, 3), "a.bias": (2,), "bias": (1,), "b.bias": (4,)}
    found = mixers._maps({name: torch.ones(size) for name, size in sizes.items()})
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "loss": (), "a.weight": (8,), "bias": (1,), "b.bias": (4,)
    }  # fmt: skip


# --- What is run ------------------------------------------------------------------------------------------------------


def test_checks_and_steps_are_of_the_runs_last_stage(monkeypatch):
    """Correctness on two whole sequences, the operator's loop in float64 first; then the loop's own step."""
    made, steps = [], []

    class Watched(train.Training):
        def __init__(self, config, backend, device, dtype=torch.float32):
            super().__init__(config, backend, device, dtype)
            made.append((self.model.config.mixer.name, backend, dtype, tuple(self.tokens.shape)))

    def watched(objective, model, optimizer, progress, ranks):
        settings = objective.settings
        steps.append((model.config.mixer.name, progress.step, settings.batch_size(0), settings.lengths))
        return real(objective, model, optimizer, progress, ranks)

    real = train.train_step
    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(mixers, "Training", Watched)
    training = dataclasses.replace(S3.training, lengths=(4, 9), batch_sizes=(6, 5), num_samples=12)
    config = dataclasses.replace(S3, training=training)
    report = bench_mixers(config, mixers=["deltanet", "gru"], device="cpu", repeats=2)
    check = [("reference", torch.float64, (2, 10)), ("auto", torch.float32, (2, 10))]
    for name, seen in (("deltanet", made[:3]), ("gru", made[3:])):
        assert seen == [(name, *rest) for rest in (*check, ("auto", torch.float32, (5, 10)))]
    # one to warm up, whose memory is measured; then in turn, the second round beginning with the other
    order = [("deltanet", 0), ("gru", 0), ("deltanet", 1), ("gru", 1), ("gru", 2), ("deltanet", 2)]
    assert steps == [(name, step, 5, (9,)) for name, step in order]
    assert (report.batch_size, report.tokens) == (5, 10) and report.config["training"]["lengths"] == [9]
    assert report.config["model"]["mixer"]["name"] == "deltaproduct"


def test_quick_is_one_size_whatever_the_run():
    training = dataclasses.replace(S3.training, lengths=(4, 9), batch_sizes=(6, 5), num_samples=6)  # fewer than a batch
    report = bench_mixers(dataclasses.replace(S3, training=training), mixers=["gru"], quick=True, device="cpu")
    assert (report.batch_size, report.tokens, report.rows[0].step.runs) == (8, 17, 3)


def test_an_unknown_mixer_is_noticed_before_anything_is_run():
    said = []
    with pytest.raises(UsageError, match="nonesuch"):
        run(["gru", "nonesuch"], progress=said.append)
    assert not said


def command(*arguments):
    return tyro.cli(cli.BenchTrain, args=list(arguments)).run()


def test_the_command_compares_mixers_at_one_size(monkeypatch):
    configs = []
    monkeypatch.setattr("deltaproduct.benchmarks.bench_mixers", lambda config, **kw: configs.append((config, kw)) or S3)
    monkeypatch.setattr("deltaproduct.benchmarks.render.render", lambda *a: None)
    command("--all")
    command("--all", "--task", "S5", "--num-householder", "3", "--quick", "--repeats", "2", "--device", "cpu")
    (config, _), (other, options) = configs
    model, training = config.model, config.training
    assert (model.hidden_size, model.mixer.num_heads, model.mixer.head_dim, model.num_hidden_layers) == (128, 8, 16, 1)
    assert (training.task, training.lengths, training.batch_sizes) == ("S3", (256,), (64,))
    assert model.mixer.num_householder == 2 and model.mixer.allow_neg_eigval
    assert (other.training.task, other.model.num_labels, other.model.mixer.num_householder) == ("S5", 120, 3)
    assert options["quick"] and options["repeats"] == 2 and options["device"] == "cpu" and "backends" not in options


def test_the_command_prints_and_writes_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(mixers, "MIXERS", {name: MIXERS[name] for name in ("deltanet", "gru")})
    out = tmp_path / "a" / "all.json"
    command("--all", "--quick", "--repeats", "1", "--device", "cpu", "--json", "--out", str(out))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text()) and printed["benchmark"] == "mixers"
    assert [row["mixer"] for row in printed["rows"]] == ["deltanet", "gru"]
    assert printed["rows"][0]["ratio"] == 1 and printed["rows"][1]["step"]["median_ms"] > 0


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda: run([]), "no mixer to benchmark"),
        (lambda: run(["gru"], repeats=0), "repeats"),
        (lambda: bench_mixers(S3, device="abacus"), "abacus"),
        (lambda: bench_mixers(changed(S3, training={"precision": "bfloat16"})), "float32"),
        (lambda: bench_mixers(changed(S3, training={"grad_accumulation": 2})), "accumulation"),
        (lambda: bench_mixers(changed(S3, training={"min_length": 2})), "one length"),
        (lambda: bench_mixers(changed(S3, model={"mixer": ["gru", "deltaproduct"]})), "all alike"),
        (lambda: bench_mixers(changed(S3, training={"task": "S4"})), "vocab_size"),
        (lambda: command("--all", "--quick", "--backends", "chunkwise"), "--backends"),
        (lambda: command("--all", "--num-householder", "0"), "num_householder"),
    ],
)
def test_mistakes_are_one_clear_line(mistake, says):
    with pytest.raises(UsageError, match=says) as e:
        mistake()
    assert "\n" not in str(e.value) and str(e.value).endswith(".")
