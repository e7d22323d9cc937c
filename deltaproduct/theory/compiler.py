"""From groups and automata to checkpoints that are right on every input: exact weights for an unmodified model."""

from dataclasses import dataclass
from pathlib import Path

from deltaproduct.files import replaced_folder, write_json
from deltaproduct.models import SequenceModel
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import Group
from deltaproduct.theory.cascade import decompose
from deltaproduct.theory.one_layer import one_layer
from deltaproduct.theory.representations import representations
from deltaproduct.theory.stack import plan

AUTOMATON = "automaton.json"


@dataclass(frozen=True)
class Compiled:
    """A model, and the automaton that it carries out: its label at each position is the state after that symbol."""

    model: SequenceModel
    automaton: Automaton

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint like any other, with automaton.json beside it; the folder is replaced in one step.

        Raises UsageError when it cannot be written.
        """
        with replaced_folder(Path(folder)) as fresh:
            self.model.write_files(fresh)
            write_json(fresh / AUTOMATON, self.automaton.to_dict())


def group_automaton(group: Group) -> Automaton:
    """The group's word problem: symbols and states are its elements, and g goes by x to g ∘ x."""
    return Automaton(
        alphabet=group.names,
        states=group.names,
        initial=0,
        accepting=(0,),
        transitions=tuple(tuple(row) for row in group.table.tolist()),
    )


def compile_group(name: str, num_householder: int | None = None) -> Compiled:
    """The word problem of a group of `tasks/groups.py` in one layer, right at every length up to rounding.

    Args:
        name: such as "S5", "A5", "Z60", "D12", "S3_x_Z2".
        num_householder: N; None means the fewest that its representations need: 4 for S5, 2 for A5, S4, Z_m and D_m.

    Raises UsageError when there is no such group, or N is too few.
    """
    group, found = representations(name)
    return Compiled(one_layer(name, found, num_householder), group_automaton(group))


def compile_automaton(automaton: Automaton) -> Compiled:
    return compile_cascade(automaton)


def compile_cascade(automaton: Automaton) -> Compiled:
    """Any automaton of n ≤ 12 states in at most 2n − 3 layers with at most max(n − 1, 2) Householder factors a token.

    Stronger than P1's Theorem 4 (2ⁿ layers). Raises UsageError when there are more states.
    """
    return Compiled(plan(decompose(automaton)).model(), automaton)
