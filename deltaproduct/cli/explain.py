"""`deltaproduct explain`: what theorems allow or forbid a model class on a group's word problem."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from deltaproduct.cli.outputs import say

if TYPE_CHECKING:
    from deltaproduct.theory.theorems.explanation import Explanation

VERDICTS = {
    "possible": "Possible: there are weights with which {model} follows {task} at every length.",
    "impossible": "Impossible: no weights make {model} follow {task} at every length.",
    "undecided": "No theorem decides whether {model} can follow {task} at every length.",
}
HEADINGS = {"allows": "allowed by", "forbids": "forbidden by", "bounds": "known about it"}
SOURCES = (
    "P1: DeltaProduct, arXiv 2502.10297. P2: Unlocking State-Tracking, arXiv 2411.12537. What is allowed says that "
    "weights exist, not that training finds them; what is forbidden is so in finite precision, whatever the width."
)
WIDTH = 100


@dataclass(kw_only=True)
class Explain:
    """Say what is proven about a class of models and a group: possible, impossible or open, and by which theorem."""

    group: Annotated[str, tyro.conf.arg(help="such as S5, A5, Z60, D12, S3_x_Z2")]
    num_householder: Annotated[int, tyro.conf.arg(help="n_h, Householder factors per token")] = 1
    layers: Annotated[int, tyro.conf.arg(help="how many")] = 1
    allow_neg_eigval: Annotated[bool, tyro.conf.arg(help="eigenvalues in [-1,1], in place of [0,1]")] = True
    gated: Annotated[bool, tyro.conf.arg(help="with a forget gate")] = False
    transition: Annotated[str, tyro.conf.arg(help="deltaproduct, or diagonal as in Mamba, GLA and mLSTM")] = (
        "deltaproduct"
    )
    moves: Annotated[int | None, tyro.conf.arg(help="only symbols that move at most so many points (S_n)")] = None
    json: Annotated[bool, tyro.conf.arg(help="print one JSON object and nothing else")] = False

    def run(self) -> None:
        from deltaproduct.theory.theorems.explanation import explain
        from deltaproduct.theory.theorems.model_class import ModelClass

        model = ModelClass(self.num_householder, self.layers, self.allow_neg_eigval, self.gated, self.transition)
        found = explain(self.group, model, moves=self.moves)
        for line in [json.dumps(found.to_dict())] if self.json else format_explanation(found).split("\n"):
            say(line)


def format_explanation(found: Explanation) -> str:
    """The explanation as lines of text; commands are never wrapped."""
    task = found.group if found.moves is None else f"{found.group} (symbols that move at most {found.moves} points)"
    verdict = VERDICTS[found.verdict].format(model=found.model, task=task)
    lines = [*textwrap.wrap(verdict, WIDTH), *textwrap.wrap(found.description, WIDTH)]
    previous = None
    for statement in found.statements:
        if statement.effect != previous:
            lines += ["", HEADINGS[statement.effect]]
        previous = statement.effect
        lines += _entry(statement.source, statement.reason)
    if found.nearest:
        lines += ["", "possible instead", *(f"  {model}" for model in found.nearest)]
    if found.measured:
        lines += ["", "measured by training: experiments, not theorems"]
        for experiment in found.measured:
            lines += _entry(experiment.source, experiment.result)
    if found.verdict == "possible":
        lines += ["", "exact weights", f"  {found.weights or 'none: compile has no construction for this case'}"]
    if found.experiment:
        lines += ["", "to see it fail" if found.verdict == "impossible" else "to try it", f"  {found.experiment}"]
    return "\n".join([*lines, "", *textwrap.wrap(SOURCES, WIDTH)])


def _entry(source: str, text: str) -> list[str]:
    return textwrap.wrap(f"{source}: {text}", WIDTH, initial_indent="  ", subsequent_indent="    ")
