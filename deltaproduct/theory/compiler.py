"""From groups and automata to checkpoints that are right on every input: exact weights for an unmodified model.

Strategies, each a construction in a file of its own:

* permutation: one layer; each symbol permutes the states, or takes all to one, as swaps of a simplex's corners
  (stack.py), or a group's elements permute its points (one_layer.py). P2, Theorem 3.
* rotation: one layer of at most two factors per token, for groups of rotations (one_layer.py). P1, Theorem 4.
* two-layer: rotations and mirrorings of a polygon with single reflections (two_layers.py). P2, Theorem 6; P1,
  Theorem 7.
* cascade: any automaton (cascade.py, stack.py). Stronger than P2, Theorem 4, and P1, Theorem 2.
* shallow: small groups in three layers, or four of single reflections (shallow.py). P1, Theorem 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.files import replaced_folder, write_json
from deltaproduct.models import SequenceModel
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import Group, build_group
from deltaproduct.theory.cascade import decompose
from deltaproduct.theory.congruences import takes_one_level
from deltaproduct.theory.constructions.one_layer import one_layer
from deltaproduct.theory.constructions.shallow import Action, shallow
from deltaproduct.theory.constructions.stack import stack
from deltaproduct.theory.constructions.two_layers import two_layers
from deltaproduct.theory.householder import transpositions
from deltaproduct.theory.limits import NO_LIMITS, Limits, Plan, check_size, choose, too_many
from deltaproduct.theory.representations import of_automaton, of_group, require_permutations

AUTOMATON = "automaton.json"
CERTIFICATE = "certificate.json"
STRATEGIES = ("auto", "permutation", "rotation", "two-layer", "cascade", "shallow")

Makers = dict[str, Callable[[], Plan]]


@dataclass(frozen=True)
class Compiled:
    """A model, and the automaton that it carries out: its label at each position is the state after that symbol."""

    model: SequenceModel
    automaton: Automaton
    strategy: str | None = None

    def save(self, folder: str | Path, certificate: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint like any other, with automaton.json beside it; the folder is replaced in one step.

        Args:
            certificate: what is to be certificate.json, if anything.

        Raises UsageError when it cannot be written.
        """
        with replaced_folder(Path(folder)) as fresh:
            self.model.write_files(fresh)
            write_json(fresh / AUTOMATON, self.automaton.to_dict())
            if certificate is not None:
                write_json(fresh / CERTIFICATE, certificate)


def compile_group(name: str, strategy: str = "auto", limits: Limits = NO_LIMITS) -> Compiled:
    """The word problem of a group of `tasks/groups.py`, right at every length up to rounding.

    Args:
        name: such as "S5", "A5", "Z60", "D12", "S3_x_Z2".
        strategy: one of `STRATEGIES`; "auto" takes what has the fewest layers, and of these the fewest Householder
            factors: one layer, of 4 for S5 and 2 for A5, S4, Z_m and D_m, unless limits ask for less.
        limits: of the model.

    Raises UsageError when there is no such group, or nothing fits: then with every reason.
    """
    group = build_group(name)
    n = len(group.elements)
    reasons = check_size(name, n, n, limits)
    makers: Makers = {
        "permutation": lambda: _as_permutations(group, limits),
        "rotation": lambda: _as_rotations(name),
        "two-layer": lambda: two_layers(of_group(name), "two-layer"),
        "shallow": lambda: shallow(Action.of_group(group), _steps(limits), "shallow"),
    }
    if strategy == "cascade":  # one level of n labels, which is never better than the others
        makers["cascade"] = lambda: stack(decompose(group_automaton(group)), "cascade")
    plan = choose(name, _asked(makers, strategy), limits, reasons)
    return Compiled(plan.build(), group_automaton(group), plan.strategy)


def compile_automaton(automaton: Automaton, strategy: str = "auto", limits: Limits = NO_LIMITS) -> Compiled:
    """Any automaton of few states, or that comes apart into such (cascade.py); all of its states are told apart.

    With n states it takes at most 2n − 3 layers with at most max(n − 1, 2) Householder factors per token. What does not
    matter for acceptance is best merged first (`Automaton.minimal`).

    Args:
        strategy, limits: as in `compile_group`.

    Raises UsageError when nothing fits: with every reason.
    """
    n = len(automaton.states)
    reasons = check_size("The automaton", n, len(automaton.alphabet), limits)
    makers: Makers = {
        "permutation": lambda: _one_level(automaton),
        "rotation": lambda: one_layer(of_automaton(automaton), "rotation"),
        "two-layer": lambda: two_layers(of_automaton(automaton), "two-layer"),
        "cascade": lambda: stack(decompose(automaton), "cascade"),
        "shallow": lambda: shallow(Action.of_automaton(automaton), _steps(limits), "shallow"),
    }
    plan = choose("The automaton", _asked(makers, strategy), limits, reasons)
    return Compiled(plan.build(), automaton, plan.strategy)


def group_automaton(group: Group) -> Automaton:
    """The group's word problem: symbols and states are its elements, and g goes by x to g ∘ x."""
    return Automaton(
        alphabet=group.names,
        states=group.names,
        initial=0,
        accepting=(0,),
        transitions=tuple(tuple(row) for row in group.table.tolist()),
    )


def _asked(makers: Makers, strategy: str) -> Makers:
    if strategy == "auto":
        return makers
    if strategy not in STRATEGIES:
        near = did_you_mean(strategy, STRATEGIES)
        raise UsageError(f"There is no strategy {strategy!r}{near}; there are {', '.join(STRATEGIES)}.")
    return {strategy: makers[strategy]}


def _steps(limits: Limits) -> int:
    return 2 if limits.num_householder is None else limits.num_householder


def _as_permutations(group: Group, limits: Limits) -> Plan:
    """The plan of `one_layer`, whose width is known before: a key for every corner of every factor's simplex but one,
    and of each as many values as there are Householder factors."""
    sizes = [int(part[1:]) for part in group.name.split("_x_")]
    begin, steps = 0, 1
    for m in sizes:
        for p in {p[begin : begin + m] for p in group.elements}:
            if steps < m - 1:  # the most that there can be
                steps = max(steps, len(transpositions([x - begin for x in p])))
        begin += m
    heads = sum(m - 1 for m in sizes)
    width = len(group.elements) + 1 + heads * min(steps, max(sizes) - 1)
    if limits.width is not None and width > limits.width:
        raise UsageError(too_many(width, limits.width, "slots of width"))
    return one_layer(of_group(group.name, as_rotations=False), "permutation")


def _as_rotations(name: str) -> Plan:
    problem = of_group(name)
    if any(r.size > 3 for r in problem.representations):
        raise UsageError("it is no group of rotations in three dimensions, nor a product of such")
    return one_layer(problem, "rotation")


def _one_level(automaton: Automaton) -> Plan:
    if not takes_one_level(automaton):
        require_permutations(automaton)  # which says of one symbol why it is neither
    return stack(decompose(automaton), "permutation")
