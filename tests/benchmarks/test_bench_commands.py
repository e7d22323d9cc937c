"""The commands of `deltaproduct bench`, what their reports look like, and what they refuse."""

import dataclasses
import json

import pytest
import torch
import tyro
from cases import S3, TINY, shown

from deltaproduct.benchmarks import OpShape, bench_generate, bench_ops, bench_scaling, bench_train, generate, row_names
from deltaproduct.cli import bench as cli
from deltaproduct.cli.main import COMMANDS, main
from deltaproduct.cli.renamed import COMMANDS as RENAMED
from deltaproduct.errors import UsageError
from deltaproduct.ops import BACKENDS
from deltaproduct.plots import style
from deltaproduct.plots.benchmark import speedup_figure

# --- Reports ----------------------------------------------------------------------------------------------------------


def test_reports_are_plain_json(quick, quick_generate, quick_train):
    """They survive JSON unchanged, without NaN and without tuples."""
    scaling = bench_scaling([16, 32], backend="chunkwise", shape=TINY, device="cpu", repeats=1)
    for report in (quick, scaling, quick_generate, quick_train):
        value = report.to_dict()
        assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert quick.to_dict()["shapes"][0]["rows"][0]["forward"]["median_ms"] > 0
    assert [r.benchmark for r in (quick, scaling, quick_generate, quick_train)] == [
        "ops",
        "scaling",
        "generate",
        "train",
    ]


def test_tables_fit_a_terminal_of_80_columns(quick, quick_generate, quick_train):
    text = shown(quick)
    for report in (quick, quick_generate, quick_train):
        assert "…" not in shown(report)  # how rich marks what it cut
    assert all(name in text for name in row_names()) and "Roofline" in text and "B4 T64 H2 K16 N2" in text
    assert all(other.reason in text for other in quick.unavailable)


# --- The commands -----------------------------------------------------------------------------------------------------


def command(kind, *arguments):
    return tyro.cli(kind, args=list(arguments)).run()


def test_bench_train_runs_what_reproduce_runs(monkeypatch):
    configs = []
    monkeypatch.setattr("deltaproduct.benchmarks.bench_train", lambda config, **kw: configs.append(config) or S3)
    monkeypatch.setattr("deltaproduct.benchmarks.render.render", lambda *a: None)
    command(cli.BenchTrain)
    command(cli.BenchTrain, "--task", "S5", "--num-householder", "4")
    assert configs[0] == S3 and S3.model.mixer.num_householder == 2 and S3.model.mixer.allow_neg_eigval
    assert configs[1].training.task == "S5" and configs[1].model.mixer.num_householder == 4
    assert configs[1].model.num_labels == 120 and configs[1].training.lengths == S3.training.lengths


def test_commands_print_and_write_json(capsys, tmp_path):
    sizes = ["--num-hidden-layers", "1", "--hidden-size", "32", "--num-heads", "1", "--head-dim", "8"]
    sizes += ["--num-householder", "3", "--batch-size", "2"]
    common = ["--quick", "--repeats", "1", "--device", "cpu", "--json", "--out"]
    command(cli.BenchGenerate, *sizes, *common, str(tmp_path / "a" / "step.json"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a" / "step.json").read_text())
    model = printed["model"] | printed["model"]["mixer"]
    assert [model[n] for n in ("num_hidden_layers", "hidden_size", "num_heads", "head_dim")] == [1, 32, 1, 8]
    assert model["num_householder"] == 3 and printed["batch_size"] == 2 and printed["repeats"] == 1
    command(cli.BenchTrain, "--backends", "chunkwise", *common, str(tmp_path / "train.json"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "train.json").read_text())
    assert [row["backend"] for row in printed["rows"]] == ["chunkwise"]
    ops = ["--shapes", TINY.label, "--backends", "textbook_loop", "chunkwise"]
    command(cli.BenchOps, *ops, *common, str(tmp_path / "ops.json"))
    printed = json.loads(capsys.readouterr().out)
    assert [row["backend"] for row in printed["shapes"][0]["rows"]] == ["textbook_loop", "chunkwise"]
    assert list(printed["shapes"][0]["rows"][0]["speedup"]) == ["chunkwise"]
    step = ["--step", "--batches", "2", "--num-heads", "1", "--head-dim", "8", "--num-householder", "3", "--gate"]
    command(cli.BenchOps, *step, *common, str(tmp_path / "ops-step.json"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "ops-step.json").read_text())
    assert [row["batch_size"] for row in printed["rows"]] == [2]
    assert printed["shape"]["num_householder"] == 3 and printed["shape"]["gate"]


def test_against_another_implementation_draws_how_many_times_as_fast(capsys, tmp_path, monkeypatch):
    drawn = []

    def figure(shapes, ours, other, path):
        drawn.append((ours, other, [s["label"] for s in shapes]))
        speedup_figure(shapes, ours, other, path)

    monkeypatch.setattr("deltaproduct.plots.benchmark.speedup_figure", figure)
    shapes = [TINY.label, f"{TINY.label} gated", "B1 T4 H1 K4 V8 N3"]
    common = ["--quick", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "ops.json")]
    command(cli.BenchOps, "--against", "textbook_loop", "--shapes", *shapes, *common)
    report = json.loads((tmp_path / "ops.json").read_text())
    ours = report["shapes"][0]["rows"][0]["backend"]
    assert drawn == [(ours, "textbook_loop", shapes)] and ours in BACKENDS
    assert [len(s["rows"]) for s in report["shapes"]] == [2, 2, 2]
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_speed_ups_shows_their_ratio(tmp_path, monkeypatch):
    def row(backend, forward, both):
        ms = {"forward": forward, "forward_backward": both}
        return {"backend": backend} | {n: t and {"median_ms": t} for n, t in ms.items()}

    def result(n, gate, ours, theirs):
        label = f"B1 T4 H1 K4 N{n}" + (" gated" if gate else "")
        return {
            "label": label,
            "shape": {"num_householder": n, "gate": gate},
            "rows": [row("a", *ours), row("b", *theirs)],
        }

    shapes = [result(1, False, (1, 2), (3, 8)), result(2, False, (2, 2), (3, 2)), result(2, True, (1, 2), (5, None))]
    found = {}

    def look(figure, path):
        for line in figure.axes[0].lines:
            found[line.get_label()] = list(zip(*line.get_data(), strict=True))

    monkeypatch.setattr(style, "save", look)
    speedup_figure(shapes, "a", "b", tmp_path / "x.png")
    assert found["forward"] == [(1, 3), (2, 1.5)] and found["forward and backward"] == [(1, 4), (2, 1)]
    assert found["forward, gated"] == [(2, 5)] and "forward and backward, gated" not in found


# --- Old names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("step --batch-size 2", "generate --batch-size 2"),
        ("decode --batches 2 --gate", "ops --step --batches 2 --gate"),
    ],
)
def test_a_command_of_old_says_its_new_name_and_does_the_same(capsys, monkeypatch, old, new):
    seen = []
    monkeypatch.setattr("deltaproduct.benchmarks.bench_generate", lambda *a, **kw: seen.append((a, kw)))
    monkeypatch.setattr("deltaproduct.benchmarks.bench_op_step", lambda *a, **kw: seen.append((a, kw)))
    monkeypatch.setattr(cli._Bench, "_show", lambda self, report: print("a report"))
    main(["bench", *new.split()])
    assert capsys.readouterr() == ("a report\n", "")
    main(["bench", *old.split()])
    after = "bench ops --step" if "--step" in new else "bench generate"
    line = f"deltaproduct: bench {old.split()[0]} is now {after}; the old name goes with the next release.\n"
    assert capsys.readouterr() == ("a report\n", line)
    assert seen[0] == seen[1] and len(seen) == 2


def test_a_mistake_behind_an_old_name_still_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as e:
        main(["bench", "step", "--batch-size", "many"])
    assert e.value.code == 2 and "--batch-size" in capsys.readouterr().err


def test_every_old_command_leads_to_one_that_is_there():
    for old, new in RENAMED.items():
        assert old[1] not in COMMANDS[old[0]].commands and new[1] in COMMANDS[new[0]].commands


def test_names_of_old_in_the_package_warn():
    import deltaproduct.benchmarks as benchmarks

    for old, new in {
        "PEERS": "IMPLEMENTATIONS",
        "bench_step": "bench_generate",
        "bench_decode": "bench_op_step",
    }.items():
        with pytest.warns(DeprecationWarning, match=f"benchmarks.{old} is now deltaproduct.benchmarks.{new}") as caught:
            assert getattr(benchmarks, old) is getattr(benchmarks, new)
        assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'bench_nonesuch'"):
        _ = benchmarks.bench_nonesuch


@pytest.mark.parametrize(
    "flags",
    ["--batches 2", "--num-heads 1", "--head-dim 8", "--num-householder 3", "--gate"]
    + [f"--step {flag}" for flag in ("--shapes B1", "--against fla", "--backends cpu", "--hard", "--no-backward")],
)
def test_flags_of_the_other_kind_are_refused(flags):
    flag = flags.removeprefix("--step ").split()[0]
    with pytest.raises(UsageError, match=flag):
        command(cli.BenchOps, "--quick", *flags.split())


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def changed(config, training=None, model=None):
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **(training or {})),
        model=config.model.changed(**(model or {})),
    )


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: bench_ops([TINY], backends=["nonesuch"]),
        lambda: bench_ops([TINY], backends=[]),
        lambda: bench_ops([]),
        lambda: bench_ops([TINY], repeats=0),
        lambda: bench_ops([TINY], repeats=1.5),
        lambda: bench_ops([TINY], dtype="int8"),
        lambda: bench_ops([TINY], dtype=torch.int64),
        lambda: bench_ops([TINY], device="abacus"),
        lambda: bench_ops([TINY], device="meta"),
        lambda: bench_scaling([16, 32], backend="nonesuch"),
        lambda: bench_scaling([16, 32], backend="reference"),
        lambda: bench_scaling([16, 32], backend="textbook_loop"),
        lambda: bench_scaling([16, 16]),
        lambda: bench_scaling([0, 16]),
        lambda: bench_scaling([16, 32], repeats=0),
        lambda: bench_generate(quick=True, batch_size=0),
        lambda: bench_generate(quick=True, repeats=0),
        lambda: bench_generate(quick=True, device="abacus"),
        lambda: command(cli.BenchGenerate, "--quick", "--head-dim", "0"),
        lambda: bench_train(S3, backends=["nonesuch"]),
        lambda: bench_train(S3, backends=["textbook_loop"]),
        lambda: bench_train(S3, backends=[]),
        lambda: bench_train(S3, repeats=0),
        lambda: bench_train(changed(S3, training={"precision": "bfloat16"})),
        lambda: bench_train(changed(S3, training={"task": "S4"})),
        lambda: bench_train(changed(S3, model={"num_v_heads": 8})),
        lambda: bench_train(changed(S3, model={"mixer": "deltanet"})),
        lambda: command(cli.BenchTrain, "--num-householder", "0"),
        lambda: OpShape(0, 128, 4, 32, 2),
        lambda: OpShape(64, 128, 4, 32, 0),
        lambda: OpShape(64, -1, 4, 32, 2),
        lambda: OpShape(64, 128, 4, 32.0, 2),
        lambda: OpShape.parse("64 128 4 32 2"),
        lambda: OpShape.parse("B64 T0 H4 K32 N2"),
    ],
)
def test_mistakes_are_one_clear_line(mistake):
    with pytest.raises(UsageError) as e:
        mistake()
    assert str(e.value) and "\n" not in str(e.value) and str(e.value).endswith(".")


def test_other_rooms_mistakes_are_passed_on(monkeypatch):
    with pytest.raises(UsageError, match="S99x"):
        command(cli.BenchTrain, "--task", "S99x")
    monkeypatch.setattr(generate, "DeltaProduct", type("Another", (), {}))
    with pytest.raises(UsageError, match="DeltaProduct"):
        bench_generate(quick=True, device="cpu")


def test_naming_a_backend_that_cannot_serve_is_an_error(monkeypatch):
    away = dataclasses.replace(
        BACKENDS["reference"], name="away", unsupported_reason=lambda device, dtype: "it is away"
    )
    monkeypatch.setitem(BACKENDS, "away", away)
    with pytest.raises(UsageError, match="it is away"):
        bench_ops([TINY], backends=["away"], device="cpu")
    report = bench_ops([TINY], device="cpu", repeats=1)
    assert [n.reason for n in report.unavailable if n.backend == "away"] == ["it is away"]
    assert "away cannot serve: it is away." in shown(report)
