"""`deltaproduct bench`: how fast the operator, decoding and training are on this machine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from deltaproduct.cli.flags import BackendName, IntList
from deltaproduct.cli.outputs import check_file
from deltaproduct.errors import UsageError

if TYPE_CHECKING:
    from deltaproduct.benchmarks.report import Report

ALL_LENGTH, ALL_BATCH = 256, 64  # of `bench train --all`
STEP_SIZES = ("num_heads", "head_dim", "num_householder", "gate")  # flags of `bench ops --step`


@dataclass(kw_only=True)
class _Bench:
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    repeats: Annotated[int | None, tyro.conf.arg(help="timed runs of each row; None: 7, or 3 with --quick")] = None
    quick: Annotated[bool, tyro.conf.arg(help="a tiny problem, a few seconds in all")] = False
    json: Annotated[bool, tyro.conf.arg(help="print the report as JSON and nothing else")] = False
    out: Annotated[Path | None, tyro.conf.arg(help="also write the report to this JSON file")] = None

    def _options(self, *more: str) -> dict[str, Any]:
        """What every benchmark takes, and `more` flags; an --out that cannot be written is refused before the work."""
        if self.out is not None:
            check_file(self.out)
        names = ("device", "repeats", "quick", *more)
        return {name: getattr(self, name) for name in names} | {"progress": self._say}

    def _show(self, report: Report) -> None:
        from rich.console import Console

        from deltaproduct.benchmarks.render import render
        from deltaproduct.files import make_folder, write_json

        if self.out is not None:
            make_folder(self.out.parent)
            write_json(self.out, report.to_dict())
        if self.json:
            print(json.dumps(report.to_dict()))
        else:
            render(report, Console())

    @staticmethod
    def _say(line: str) -> None:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(line, highlight=False, markup=False)


@dataclass(kw_only=True)
class _OperatorBench(_Bench):
    dtype: Annotated[
        str | None,
        tyro.conf.arg(help="of the inputs: float64, float32, bfloat16 or float16; None: float32, bfloat16 on a GPU"),
    ] = None
    backward: Annotated[bool, tyro.conf.arg(help="gradients too")] = True


@dataclass(kw_only=True)
class BenchOps(_OperatorBench):
    """Every backend of the operator and other implementations of it: correctness first, then interleaved timings and
    the roofline. With --step, one token of the operator instead."""

    shapes: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help="such as 'B64 T128 H4 K32 N2', with 'V64' where V is not K and ' gated'; none: the usual"),
    ] = ()
    against: Annotated[
        str | None,
        tyro.conf.arg(
            help="only this implementation, such as fla on a GPU, and what is to beat it; --out then draws a figure too"
        ),
    ] = None
    backends: Annotated[
        tuple[str, ...], tyro.conf.arg(help="rows to run, other implementations too; none: all that can serve")
    ] = ()
    hard: Annotated[bool, tyro.conf.arg(help="almost parallel keys and β near 2: how large are the errors?")] = False
    step: Annotated[
        bool,
        tyro.conf.arg(help="time delta_product_step, beside copying its states and, on a GPU, beside an empty kernel"),
    ] = False
    batches: Annotated[IntList | None, tyro.conf.arg(help="of --step: sequences decoded at once; None: 1,64,256")] = (
        None
    )
    num_heads: Annotated[int | None, tyro.conf.arg(help="of --step; None: 8, or 2 with --quick")] = None
    head_dim: Annotated[int | None, tyro.conf.arg(help="of --step; None: 128, or 16 with --quick")] = None
    num_householder: Annotated[int | None, tyro.conf.arg(help="of --step: steps per token; None: 2")] = None
    gate: Annotated[bool, tyro.conf.arg(help="of --step: with a forget gate")] = False

    def run(self) -> None:
        if self.step:
            self._run_step()
            return
        for name in ("batches", *STEP_SIZES):
            if getattr(self, name) not in (None, False):
                raise UsageError(f"--{name.replace('_', '-')} belongs to --step; give the sizes with --shapes.")
        from deltaproduct.benchmarks import OpShape, bench_ops
        from deltaproduct.plots.benchmark import speedup_figure
        from deltaproduct.plots.style import pyplot

        shapes = [OpShape.parse(s) for s in self.shapes]
        options = self._options("dtype", "backward", "against", "hard")
        if self.against is not None and self.out is not None:
            pyplot()  # where it is missing, better now than after all the work
            check_file(self.out.with_suffix(".png"))
        report = bench_ops(shapes or None, backends=self.backends or None, **options)
        self._show(report)
        if self.against is not None and self.out is not None:
            ours = report.shapes[0].rows[0].backend
            speedup_figure(report.to_dict()["shapes"], ours, self.against, self.out.with_suffix(".png"))

    def _run_step(self) -> None:
        for name in ("shapes", "against", "backends", "hard"):
            if getattr(self, name):
                raise UsageError(f"--step times one token of one backend; leave out --{name}.")
        if not self.backward:
            raise UsageError("--step has no gradients; leave out --no-backward.")
        from deltaproduct.benchmarks import OP_STEP_SHAPE, QUICK_OP_STEP_SHAPE, bench_op_step

        given = {name: value for name in STEP_SIZES if (value := getattr(self, name)) is not None}
        shape = dataclasses.replace(QUICK_OP_STEP_SHAPE if self.quick else OP_STEP_SHAPE, **given)
        self._show(bench_op_step(shape, **self._options("batches", "dtype")))


@dataclass(kw_only=True)
class BenchScaling(_OperatorBench):
    """One backend at growing sequence length: the time per token, which stays the same where cost is linear."""

    backend: BackendName = "auto"
    lengths: Annotated[IntList | None, tyro.conf.arg(help="None: 4096 to 65536")] = None

    def run(self) -> None:
        from deltaproduct.benchmarks import bench_scaling

        self._show(bench_scaling(self.lengths, backend=self.backend, **self._options("dtype", "backward")))


@dataclass(kw_only=True)
class BenchGenerate(_Bench):
    """Decoding one token with a whole model, beside the time of streaming its weights and states from memory."""

    repeats: Annotated[int | None, tyro.conf.arg(help="timed tokens; None: 20, or 5 with --quick")] = None
    num_hidden_layers: Annotated[int | None, tyro.conf.arg(help="None: 24, or 2 with --quick")] = None
    hidden_size: Annotated[int | None, tyro.conf.arg(help="None: 1024, or 64 with --quick")] = None
    num_heads: Annotated[int | None, tyro.conf.arg(help="None: 8, or 2 with --quick")] = None
    head_dim: Annotated[int | None, tyro.conf.arg(help="None: 128, or 16 with --quick")] = None
    num_householder: Annotated[int, tyro.conf.arg(help="Householder steps per token")] = 2
    batch_size: Annotated[int, tyro.conf.arg(help="sequences decoded at once")] = 1

    def run(self) -> None:
        from deltaproduct.benchmarks import GENERATE_MODEL, QUICK_GENERATE_MODEL, bench_generate

        names = ("num_hidden_layers", "hidden_size", "num_heads", "head_dim", "num_householder")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        config = (QUICK_GENERATE_MODEL if self.quick else GENERATE_MODEL).changed(**given)
        self._show(bench_generate(config, **self._options("batch_size")))


@dataclass(kw_only=True)
class BenchTrain(_Bench):
    """A whole training step of `deltaproduct reproduce s3`, with each backend, and its parts; or with each mixer.

    `reproduce` gives each of its processes a share of the cores: OMP_NUM_THREADS=1 measures the step as it runs there.
    """

    all: Annotated[
        bool, tyro.conf.arg(help="in place of backends, every mixer, at hidden 128, 8 heads × 16 and length 256")
    ] = False
    task: Annotated[str, tyro.conf.arg(help="the same run on another task, such as S5")] = "S3"
    num_householder: Annotated[int, tyro.conf.arg(help="Householder steps per token, of mixer deltaproduct")] = 2
    backends: Annotated[tuple[str, ...], tyro.conf.arg(help="rows to run; none: all that can serve")] = ()

    def run(self) -> None:
        if self.all and self.backends:
            raise UsageError("--all compares mixers, each with the operator's fastest backend; leave out --backends.")
        from deltaproduct.benchmarks import bench_mixers, bench_train
        from deltaproduct.experiments.recipes import LARGER_GROUPS, state_tracking_model
        from deltaproduct.experiments.word_problems import s3
        from deltaproduct.tasks import get_task
        from deltaproduct.training import Run

        task = get_task(self.task)
        training = dataclasses.replace(s3("cpu", [0])[0].config.training, task=task.name)
        changes = {"num_householder": self.num_householder, "allow_neg_eigval": True}
        if self.all:
            training = dataclasses.replace(training, lengths=(ALL_LENGTH,), batch_sizes=(ALL_BATCH,), stage_steps=())
            model = state_tracking_model(task, **LARGER_GROUPS, **changes)
            self._show(bench_mixers(Run(training, model), **self._options()))
        else:
            model = state_tracking_model(task, **changes)
            self._show(bench_train(Run(training, model), backends=self.backends or None, **self._options()))
