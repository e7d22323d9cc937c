"""What is proven about a group and a model class, put together: verdict, citations, and commands that show it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from deltaproduct.errors import UsageError
from deltaproduct.tasks.groups import build_group
from deltaproduct.theory.constructions.shallow import Action, shallow
from deltaproduct.theory.constructions.two_layers import two_layers
from deltaproduct.theory.limits import MAX_PAIRS, Plan
from deltaproduct.theory.representations import of_group
from deltaproduct.theory.theorems.group_facts import GroupFacts, group_facts
from deltaproduct.theory.theorems.measured import Measured, measured
from deltaproduct.theory.theorems.model_class import ModelClass
from deltaproduct.theory.theorems.statements import Statement, applicable

Verdict = Literal["possible", "impossible", "undecided"]


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`.

    Attributes:
        group, moves, model: what was asked about.
        description: the group in a sentence.
        verdict: possible, impossible, or undecided where no theorem says either.
        statements: all that apply, those that allow first.
        nearest: where the verdict is not possible, classes in [-1,1] that are: the fewest factors in as many layers,
            and the fewest layers with as many factors.
        measured: what training found; experiments, not theorems.
        weights: the command that writes exact weights, where there is one.
        experiment: where the verdict is not possible, the command that tries to train such a model.
    """

    group: str
    moves: int | None
    model: ModelClass
    description: str
    verdict: Verdict
    statements: tuple[Statement, ...]
    nearest: tuple[ModelClass, ...]
    measured: tuple[Measured, ...]
    weights: str | None
    experiment: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def explain(group: str, model: ModelClass, *, moves: int | None = None) -> Explanation:
    """What is proven about a model class and the word problem of a group, and by which theorem.

    Args:
        group: its name, as `tasks.groups.build_group` takes it.
        model: the class.
        moves: only symbols that move at most so many points, as in the task Sn_limit_to_k; 1 < moves < n.

    Raises UsageError when there is no such group, or no such restriction of it.
    """
    facts = group_facts(group, moves)
    statements = applicable(facts, model)
    verdict = verdict_of(statements)
    possible = verdict == "possible"
    return Explanation(
        group=group,
        moves=moves,
        model=model,
        description=_describe(facts, moves),
        verdict=verdict,
        statements=statements,
        nearest=() if possible else _nearest(facts, model),
        measured=measured(
            group,
            moves,
            num_householder=model.num_householder,
            layers=model.layers,
            allow_neg_eigval=model.allow_neg_eigval,
            diagonal=model.diagonal,
        ),
        weights=_weights(facts, model) if possible else None,
        experiment=None if possible else _experiment(group, model, moves),
    )


def verdict_of(statements: tuple[Statement, ...]) -> Verdict:
    """What statements come to. Raises AssertionError where one allows what another forbids: an error in the rules."""
    effects = {statement.effect for statement in statements}
    if effects >= {"allows", "forbids"}:
        raise AssertionError(f"Theorems contradict each other: {statements}")
    return "possible" if "allows" in effects else "impossible" if "forbids" in effects else "undecided"


def _describe(facts: GroupFacts, moves: int | None) -> str:
    orders = [str(m) for m in sorted({facts.orders[i] for i in facts.inputs})]
    what = f"{facts.size:,} elements, {'' if facts.abelian else 'not '}commutative"
    symbols = "" if moves is None else f"{len(facts.inputs)} symbols, which move at most {facts.moved} points, "
    listed = ", ".join(orders) if len(orders) <= 12 else f"{', '.join(orders[:6])}, …, {orders[-1]}"
    return f"{facts.name}: {what}; {symbols or 'elements '}of order {listed}."


def _nearest(facts: GroupFacts, model: ModelClass) -> tuple[ModelClass, ...]:
    possible = replace(model, allow_neg_eigval=True)
    steps = range(1, facts.one_layer_householder + 1)
    wider = [] if model.diagonal else [replace(possible, num_householder=n) for n in steps]
    deeper = [replace(possible, layers=n) for n in range(1, max(4, facts.parity_layers or 0) + 1)]
    found = [next((c for c in classes if verdict_of(applicable(facts, c)) == "possible"), None)
             for classes in (wider, deeper)]  # fmt: skip
    least = [c for c in found if c is not None]
    return tuple(dict.fromkeys(c for c in least if not any(_less(other, c) for other in least)))


def _less(a: ModelClass, b: ModelClass) -> bool:
    return a != b and a.num_householder <= b.num_householder and a.layers <= b.layers


def _weights(facts: GroupFacts, model: ModelClass) -> str | None:
    """`deltaproduct compile` with no more factors and layers than asked for, where it has a construction."""
    n = model.num_householder
    if model.diagonal or facts.size**2 > MAX_PAIRS:
        return None
    if n >= facts.one_layer_householder:
        strategy = ""
    elif model.layers >= 2 and _of_polygons(facts) and _fits(lambda: two_layers(of_group(facts.name), "two-layer")):
        strategy = "--strategy two-layer "
    elif model.layers >= (3 if n > 1 else 4) and _fits(lambda: _shallow(facts.name, n)):
        strategy = "--strategy shallow "
    else:
        return None
    return f"deltaproduct compile --group {facts.name} --num-householder {n} {strategy}--out exact/{facts.name}"


def _of_polygons(facts: GroupFacts) -> bool:
    """Whether two_layers.py knows the group: all its factors are cyclic or dihedral."""
    return all(part.cyclic or part.dihedral for part in facts.factors or (facts,))


def _shallow(name: str, num_householder: int) -> Plan:
    return shallow(Action.of_group(build_group(name)), num_householder, "shallow")


def _fits(make: Callable[[], Plan]) -> bool:
    try:
        make()
    except UsageError:  # a look-up would be too large
        return False
    return True


def _experiment(group: str, model: ModelClass, moves: int | None) -> str:
    """`deltaproduct train` for the class; for diagonal transitions Mamba, whose gate is its decay."""
    task = group if moves is None else f"{group}_only_swaps" if moves == 2 else f"{group}_limit_to_{moves}"
    kind = "--mixer mamba" if model.diagonal else f"--num-householder {model.num_householder}"
    flags = [f"--task {task}", kind]
    flags += ["--allow-neg-eigval" if model.allow_neg_eigval else "--no-allow-neg-eigval"]
    flags += [f"--num-hidden-layers {model.layers}"] if model.layers > 1 else []
    flags += ["--use-forget-gate"] if model.gated and not model.diagonal else []
    return f"deltaproduct train {' '.join(flags)} --steps 350 --seed 0 --out runs/shown"
