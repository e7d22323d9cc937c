"""`deltaproduct evaluate`: accuracy of a run or a checkpoint by sequence length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from deltaproduct.cli.flags import BackendName, IntList, check_lengths
from deltaproduct.cli.outputs import say
from deltaproduct.errors import UsageError

if TYPE_CHECKING:
    from deltaproduct.evaluation import RangeResult


@dataclass(kw_only=True)
class Evaluate:
    """Token accuracy and prefix-exact sequence accuracy by length, on data that no training run can have seen."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="a run's folder, or a checkpoint's")]
    lengths: Annotated[IntList, tyro.conf.arg(help="sequence lengths, BOS not counted")] = (128, 512, 2048, 8192)
    length_range: Annotated[
        IntList | None, tyro.conf.arg(help="lengths drawn from one number to another in place of those, such as 40,256")
    ] = None
    sequences: Annotated[
        int | None, tyro.conf.arg(help="sequences per length, or in all over a range; None: 64, or 8192")
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="of the evaluation data")] = 0
    task: Annotated[str | None, tyro.conf.arg(help="for a checkpoint that does not say what it was trained on")] = None
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    backend: BackendName = "auto"
    json: Annotated[bool, tyro.conf.arg(help="print one JSON object and nothing else")] = False

    def run(self) -> None:
        lengths = check_lengths(self.lengths)
        if self.length_range is not None and len(self.length_range) != 2:
            raise UsageError("length_range must be the shortest and the longest length, such as 40,256.")
        from rich.console import Console
        from rich.table import Table

        from deltaproduct.evaluation import evaluate_lengths, evaluate_range, scores
        from deltaproduct.machine import choose_device
        from deltaproduct.models import SequenceModel
        from deltaproduct.tasks import get_task
        from deltaproduct.training.run_folder import locate

        found = locate(self.source, "task model")
        folder = found.checkpoint
        model = SequenceModel.from_pretrained(folder, device=choose_device(self.device)).use_backend(self.backend)
        name = self.task or found.task()
        if name is None:
            raise UsageError(f"{folder} does not say what it was trained on; name it with --task.")
        task = get_task(name)
        if self.length_range is not None:
            lo, hi = self.length_range
            sequences = 8192 if self.sequences is None else self.sequences
            self._show_range(evaluate_range(model, task, (lo, hi), sequences=sequences, seed=self.seed), name)
            return
        sequences = 64 if self.sequences is None else self.sequences
        results = evaluate_lengths(model, task, lengths, sequences=sequences, seed=self.seed)
        if self.json:
            print(json.dumps(scores(results)))
            return
        say(f"{folder} on {name}, {sequences} sequences per length")
        table = Table()
        for column in ("length", "token accuracy", "sequence accuracy"):
            table.add_column(column, justify="right")
        for length, result in results.items():
            table.add_row(f"{length:,}", f"{result.accuracy:.4f}", f"{result.sequence_accuracy:.4f}")
        Console().print(table)

    def _show_range(self, result: RangeResult, task: str) -> None:
        figures = {
            "accuracy": result.accuracy,
            "scaled_accuracy": result.scaled_accuracy,
            "sequence_accuracy": result.sequence_accuracy,
        }
        if self.json:
            print(json.dumps(figures))
            return
        lo, hi = result.lengths
        say(f"{self.source} on {task}, {result.sequences} sequences of lengths {lo} to {hi}")
        for figure, value in figures.items():
            print(f"  {figure.replace('_', ' ')}: {value:.4f}")
