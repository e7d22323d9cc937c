"""`deltaproduct bench`: how fast the operator is on this machine, and how its cost grows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from deltaproduct.benchmarks import OpsBenchmark, OpShape, ScalingBenchmark, bench_ops, bench_scaling
from deltaproduct.benchmarks.render import render
from deltaproduct.cli.flags import IntList
from deltaproduct.files import make_folder, write_json


@dataclass(kw_only=True)
class _Bench:
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    dtype: Annotated[str, tyro.conf.arg(help="of the inputs: float64, float32, bfloat16 or float16")] = "float32"
    repeats: Annotated[int | None, tyro.conf.arg(help="timed runs of each row; None: 7, or 3 with --quick")] = None
    backward: Annotated[bool, tyro.conf.arg(help="gradients too")] = True
    quick: Annotated[bool, tyro.conf.arg(help="a tiny problem, a few seconds in all")] = False
    json: Annotated[bool, tyro.conf.arg(help="print the report as JSON and nothing else")] = False
    out: Annotated[Path | None, tyro.conf.arg(help="also write the report to this JSON file")] = None

    def _options(self) -> dict[str, Any]:
        """What every benchmark takes."""
        names = ("device", "dtype", "repeats", "backward", "quick")
        return {name: getattr(self, name) for name in names} | {"progress": self._say}

    def _show(self, report: OpsBenchmark | ScalingBenchmark) -> None:
        if self.out is not None:
            make_folder(self.out.parent)
            write_json(self.out, report.to_dict())
        if self.json:
            print(json.dumps(report.to_dict()))
        else:
            render(report, Console())

    @staticmethod
    def _say(line: str) -> None:
        Console(stderr=True, soft_wrap=True).print(line, highlight=False, markup=False)


@dataclass(kw_only=True)
class BenchOps(_Bench):
    """Every backend of the operator side by side: correctness first, then interleaved timings and the roofline."""

    shapes: Annotated[
        tuple[str, ...], tyro.conf.arg(help="such as 'B64 T128 H4 K32 N2', with ' gated' for a gate; none: the usual")
    ] = ()
    backends: Annotated[tuple[str, ...], tyro.conf.arg(help="rows to run; none: all that can serve")] = ()

    def run(self) -> None:
        shapes = [OpShape.parse(s) for s in self.shapes]
        self._show(bench_ops(shapes or None, backends=self.backends or None, **self._options()))


@dataclass(kw_only=True)
class BenchScaling(_Bench):
    """One backend at growing sequence length: the time per token, which stays the same where cost is linear."""

    backend: Annotated[str, tyro.conf.arg(help="auto, chunkwise, cpu or triton")] = "auto"
    lengths: Annotated[IntList | None, tyro.conf.arg(help="None: 4096 to 65536")] = None

    def run(self) -> None:
        self._show(bench_scaling(self.lengths, backend=self.backend, **self._options()))
