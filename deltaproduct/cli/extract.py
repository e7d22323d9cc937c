"""`deltaproduct extract`: from a trained model to the automaton that it has learned."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from deltaproduct.cli.flags import BackendName
from deltaproduct.cli.outputs import check_new_folder, say
from deltaproduct.errors import UsageError
from deltaproduct.files import read_json, replaced_folder, write_json, write_text

if TYPE_CHECKING:
    from deltaproduct.analysis import Extraction
    from deltaproduct.models import SequenceModel
    from deltaproduct.tasks import Task
    from deltaproduct.tasks.automata import Automaton

DOT, PICTURE, EXTRACT = "automaton.dot", "automaton.png", "extract.json"


@dataclass(kw_only=True)
class Extract:
    """Find the automaton that a trained model follows; writes automaton.json, .dot and .png, and extract.json.

    `compile --automaton` makes exact weights of it, and `compile --from-run` does both.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="a run's folder, or a checkpoint's")]
    out: Annotated[Path, tyro.conf.arg(help="the folder to write, which must not exist yet")]
    method: Annotated[
        Literal["lstar", "clustering"], tyro.conf.arg(help="ask the model about words, or watch its state on them")
    ] = "lstar"
    max_length: Annotated[int, tyro.conf.arg(help="symbols in a random word; trained models drift on long ones")] = 64
    max_states: Annotated[int, tyro.conf.arg(help="give up beyond these")] = 2000
    seed: Annotated[int, tyro.conf.arg(help="of the words")] = 0
    task: Annotated[str | None, tyro.conf.arg(help="for a checkpoint that does not say what it was trained on")] = None
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    backend: BackendName = "auto"
    json: Annotated[bool, tyro.conf.arg(help="print extract.json and nothing else")] = False

    def run(self) -> None:
        check_new_folder(self.out)
        from deltaproduct.analysis import extract
        from deltaproduct.machine import command_line, describe_machine
        from deltaproduct.plots.automaton import MOST_STATES, draw_automaton
        from deltaproduct.plots.style import pyplot
        from deltaproduct.tasks import Task
        from deltaproduct.tasks.dot import automaton_to_dot
        from deltaproduct.theory.compiler import AUTOMATON

        pyplot()  # where it is missing, better now than after all the work
        model, source = trained(self.source, task=self.task, device=self.device, backend=self.backend)
        began = time.perf_counter()
        found = extract(
            model, source, method=self.method, max_length=self.max_length, max_states=self.max_states, seed=self.seed
        )
        seconds = time.perf_counter() - began
        report = {
            "source": str(self.source),
            "task": source.name if isinstance(source, Task) else None,
            "method": found.method,
            "seed": found.seed,
            "max_length": self.max_length,
            "max_states": self.max_states,
            "states": len(found.automaton.states),
            "symbols": len(found.automaton.alphabet),
            "outputs": list(found.outputs),
            "agreement": found.agreement,
            "agreement_words": found.words,
            "agreement_length": found.length,
            "learned_length": found.learned_length,
            "queries": found.queries,
            **_monoid(found, model, source),
            "seconds": round(seconds, 3),
            "command": command_line(),
            "machine": describe_machine(),
        }
        drawn = len(found.automaton.states) <= MOST_STATES
        with replaced_folder(self.out) as fresh:
            check_new_folder(self.out)  # another process may have made it meanwhile
            write_json(fresh / AUTOMATON, found.automaton.to_dict())
            write_text(fresh / DOT, automaton_to_dot(found.automaton))
            if drawn:
                draw_automaton(found.automaton, fresh / PICTURE)
            write_json(fresh / EXTRACT, report)
        if self.json:
            print(json.dumps(report))
            return
        say(f"{report['states']:,} states, {report['symbols']:,} symbols → {self.out}"
              + ("" if drawn else f" (no picture of more than {MOST_STATES})"))  # fmt: skip
        print(f"agreement with the model: {_share(found.agreement)} of all positions of {found.words} fresh words of "
              f"length {found.length}, after {found.queries:,} queries")  # fmt: skip
        if found.learned_length < found.length:
            print(f"learned from words of up to {found.learned_length} symbols: on longer ones the model drifts")
        say(f"transition monoid: {report['monoid']}" + _format_word_problem(report["word_problem"]))


def trained(
    source: Path, *, task: str | None = None, device: str = "auto", backend: str = "auto"
) -> tuple[SequenceModel, Task | Automaton]:
    """The model in a run's folder or a checkpoint's, and what it was trained on (`task`, where that is not said).

    For a folder of `compile` that is the automaton beside the weights. Raises UsageError when there is no such folder,
    it is damaged, or nothing says what the model was trained on.
    """
    from deltaproduct.machine import choose_device
    from deltaproduct.models import SequenceModel
    from deltaproduct.tasks import get_task
    from deltaproduct.tasks.automata import Automaton
    from deltaproduct.theory.compiler import AUTOMATON
    from deltaproduct.training.run_folder import locate

    found = locate(source, "task model")
    folder = found.checkpoint
    model = SequenceModel.from_pretrained(folder, device=choose_device(device)).use_backend(backend)
    if name := task or found.task():
        return model, get_task(name)
    if (folder / AUTOMATON).is_file():
        return model, Automaton.from_dict(read_json(folder / AUTOMATON))
    raise UsageError(f"{folder} does not say what it was trained on; name it with --task.")


def _monoid(found: Extraction, model: SequenceModel, source: Task | Automaton) -> dict[str, Any]:
    """What extract.json says of the transition monoid; that of a group task is held against the group."""
    from deltaproduct.analysis import compare_with_group, monoid_size, vocabulary

    known = vocabulary(model.config, source)
    if known.group is not None:
        verdict = compare_with_group(found.automaton, known.group, known.elements, found.outputs)
        return {
            "monoid": str(verdict),
            "monoid_elements": verdict.elements,
            "isomorphic": verdict.isomorphic,
            "word_problem": verdict.word_problem,
        }
    size = monoid_size(found.automaton)
    text = "too many elements to count" if size is None else f"{size:,} element{'s' if size != 1 else ''}"
    return {"monoid": text, "monoid_elements": size, "isomorphic": None, "word_problem": None}


def _format_word_problem(word_problem: bool | None) -> str:
    if word_problem is None:
        return ""
    return "; the automaton is its word problem" if word_problem else "; the automaton is not its word problem"


def _share(share: float) -> str:
    """To four places, rounded down, so that only what is perfect reads 1."""
    return "1" if share == 1 else f"{int(share * 10_000) / 10_000:.4f}"
