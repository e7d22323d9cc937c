"""Before anything is compiled: what each construction would make, and every reason why it cannot be done within limits,
all of them at once, with sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel

ONE_LAYER = ("permutation", "rotation")  # strategies
MAX_PAIRS = 4_000_000  # of a state and a symbol, which automaton.json lists and the certificate goes through


@dataclass(frozen=True)
class Plan:
    """A model to be: its sizes, which cost little, and its weights when they are asked for.

    Attributes:
        strategy: the construction's name.
        config: of the model, with all its sizes.
        build: writes the weights; the model is float32, in evaluation mode.
    """

    strategy: str
    config: ModelConfig
    build: Callable[[], SequenceModel]

    @property
    def num_householder(self) -> int:
        """The most Householder factors per token in any layer."""
        return max(options.num_householder for options in self.config.mixers)

    @property
    def cost(self) -> tuple[int, int, int]:
        """Layers, Householder factors per token, width: the fewer the better, in this order."""
        return self.config.num_hidden_layers, self.num_householder, self.config.hidden_size


@dataclass(frozen=True)
class Limits:
    """What a compiled model may have at most; None means any number.

    Raises UsageError when one is less than 1.
    """

    states: int | None = None
    layers: int | None = None
    num_householder: int | None = None
    width: int | None = 16_384

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if limit is not None and limit < 1:
                raise UsageError(f"At most {limit} {name.replace('_', ' ')} leave nothing to compile.")

    def reasons(self, plan: Plan) -> list[str]:
        """Why a plan does not fit."""
        config = plan.config
        sizes = [
            (config.num_hidden_layers, self.layers, "layers"),
            (plan.num_householder, self.num_householder, "Householder factors per token"),
            (config.hidden_size, self.width, "slots of width"),
        ]
        return [too_many(n, limit, things) for n, limit, things in sizes if limit is not None and n > limit]


NO_LIMITS = Limits()


def check_size(what: str, states: int, symbols: int, limits: Limits) -> list[str]:
    """Why an automaton is too large as it is. Raises UsageError when its table alone would be."""
    if states * symbols > MAX_PAIRS:
        raise UsageError(
            f"{what} cannot be compiled: {states:,} states by {symbols:,} symbols are more than {MAX_PAIRS:,} pairs."
        )
    if limits.states is not None and states > limits.states:
        return [too_many(states, limits.states, "states")]
    return []


def choose(what: str, makers: Mapping[str, Callable[[], Plan]], limits: Limits, reasons: list[str]) -> Plan:
    """The plan of the fewest layers, then the fewest Householder factors, then the least width, of those that fit.

    Args:
        what: is to be compiled, for messages.
        makers: of plans by the strategy's name, those of one layer first; each may raise UsageError, with a reason.
            When one layer is enough, nothing deeper is tried.
        reasons: why nothing fits at all.

    Raises UsageError with every reason of every strategy when none is left.
    """
    found: list[Plan] = []
    against = list(reasons)
    for strategy, make in makers.items():
        if strategy not in ONE_LAYER and any(plan.config.num_hidden_layers == 1 for plan in found):
            break
        try:
            plan = make()
        except UsageError as e:
            against.append(f"{strategy}: {str(e).rstrip('.')}")
            continue
        if too_many := limits.reasons(plan):
            against.append(f"{strategy}: {' and '.join(too_many)}")
        else:
            found.append(plan)
    if reasons or not found:
        raise UsageError(f"{what} cannot be compiled within these limits. " + "; ".join(against) + ".")
    return min(found, key=lambda plan: plan.cost)


def too_many(needed: int, limit: int, things: str) -> str:
    """Why something does not fit, as a part of a sentence."""
    return f"needs {needed:,} {things}, at most {limit:,}"
