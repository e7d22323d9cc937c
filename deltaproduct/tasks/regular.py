"""The regular tasks of the Chomsky hierarchy's benchmark (Delétang et al., arXiv 2207.02098): parity, even pairs, cycle
navigation and modular arithmetic without brackets.

A finite automaton can do each of them. The drawing functions take (batch, length, generator) and return tokens
[batch,length] and answers [batch]; `chomsky.py` says how they are asked. The examples are tokens → answer.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.automaton_task import run_automaton
from deltaproduct.tasks.chomsky import BITS, DIGITS, PARITIES, FormalTask, answer_task, ended, uniform

CYCLE = 5
STEPS = ("-1", "0", "+1")
OPERATORS = "+-*"


def parity(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Whether the number of ones is even or odd.

    0 1 1 0 = → even
    1 0 1 1 = → odd
    """
    bits = uniform(2, batch, length - 1, generator)
    return ended(bits, 2), bits.sum(dim=1) % 2


def even_pairs(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Whether the number of neighbours 01 and 10 together is even or odd: even just when the first bit equals the last.

    0 1 1 0 = → even
    0 1 0 0 1 = → odd
    """
    bits = uniform(2, batch, length - 1, generator)
    return ended(bits, 2), bits[:, 0] ^ bits[:, -1]


def cycle_navigation(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The place on a cycle of 5 after steps back, none and forth from place 0.

    +1 -1 0 -1 -1 = → 3
    +1 +1 +1 -1 = → 2
    """
    steps = uniform(len(STEPS), batch, length - 1, generator)
    return ended(steps, len(STEPS)), (steps - 1).sum(dim=1) % CYCLE


def check_arithmetic(modulus: int, operators: str) -> None:
    """`UsageError` unless numbers are digits below a modulus of 2 to 10, and the operators some of + - *."""
    if not 2 <= modulus <= 10:
        raise UsageError(f"The modulus must be from 2 to 10, so that a number is one digit; not {modulus}.")
    if not operators or set(operators) - set(OPERATORS):
        raise UsageError(f"The operators must be some of {' '.join(OPERATORS)}, not {operators!r}.")


def modular_arithmetic(modulus: int = 5, operators: str = OPERATORS) -> Automaton:
    """Arithmetic mod m without brackets: expressions such as 2+3*4-1=, whose value the state after "=" names.

    A product binds tighter than a sum. What matters of a beginning is the sum s of its complete terms and the term t
    that still grows, both mod m, and whether a digit or something else comes next: + and - close the term and begin
    one of 1 or −1. With all three operators there are 2m² + m + 1 states, 56 for m = 5: states "s,t" after a digit,
    "s,t," before one, the values "=v", and "none" for what is no expression. A value of 0 is accepted.

    Raises UsageError when m is not 2 … 10, or an operator is not one of + - *.
    """
    check_arithmetic(modulus, operators)
    m = modulus
    digits = [str(d) for d in range(m)]
    alphabet = (*digits, *sorted(set(operators)), "=")
    names = {(s, t): f"{s},{t}" for s in range(m) for t in range(m)}
    table: dict[str, dict[str, str]] = {"none": {}}
    for (s, t), name in names.items():
        total = (s + t) % m
        table[name + ","] = {d: names[s, t * int(d) % m] for d in digits}
        table[name] = {"=": f"={total}", "+": f"{total},1,", "-": f"{total},{m - 1},", "*": name + ","}
    table |= {f"={v}": {} for v in range(m)}
    states = sorted(table)
    number = {name: i for i, name in enumerate(states)}
    return Automaton(
        alphabet=alphabet,
        states=tuple(states),
        initial=number["0,1,"],
        accepting=(number["=0"],),
        transitions=tuple(tuple(number[table[q].get(a, "none")] for a in alphabet) for q in states),
    ).reachable()


def mod_arithmetic(
    batch: int, length: int, generator: torch.Generator, *, modulus: int = 5, operators: str = OPERATORS
) -> tuple[Tensor, Tensor]:
    """The value mod 5 of digits with operators between them; * binds tighter than + and −.

    An expression of digits and operators has an odd number of symbols. The published code shortens what does not fit;
    here, an expression of even size begins with a sign (−, or + where there is no −).

    1 + 2 * 3 = → 2
    - 1 - 3 = → 1
    """
    automaton = _arithmetic(modulus, operators)
    number = {symbol: i for i, symbol in enumerate(automaton.alphabet)}
    signed = length % 2  # what comes before "=" is then even
    digits = uniform(modulus, batch, length // 2, generator)
    signs = torch.tensor([number[operator] for operator in sorted(set(operators))], device=generator.device)
    between = signs[uniform(len(signs), batch, length // 2 - 1, generator)]
    tokens = digits.new_full((batch, length), number["="])
    tokens[:, signed:-1:2], tokens[:, signed + 1 : -1 : 2] = digits, between
    if signed:
        tokens[:, 0] = number["-" if "-" in operators else "+"]
    # −x is 0−x, which the automaton knows.
    read = torch.cat([tokens.new_zeros((batch, signed)), tokens], dim=1)
    values = torch.tensor([int(name[1:]) if name[0] == "=" else -1 for name in automaton.states], device=tokens.device)
    return tokens, values[run_automaton(automaton, read)[:, -1]]


@lru_cache(maxsize=8)
def _arithmetic(modulus: int, operators: str) -> Automaton:
    return modular_arithmetic(modulus, operators)


def mod_arithmetic_task(name: str, modulus: int = 5, operators: str = OPERATORS) -> FormalTask:
    """Modular arithmetic without brackets, as a task called `name`.

    Raises UsageError when m is not 2 … 10, an operator is not one of + - *, or neither + nor - is one.
    """
    alphabet = _arithmetic(modulus, operators).alphabet
    if not set("+-") & set(operators):
        raise UsageError("One of the operators must be + or -, which can also be the sign of a number.")
    draw = partial(mod_arithmetic, modulus=modulus, operators=operators)
    values = tuple(str(v) for v in range(modulus))
    summary = f"the value modulo {modulus} of an expression with {' '.join(operators)}"
    return answer_task(name, summary, alphabet, values, draw)


TASKS = {
    task.name: task
    for task in (
        answer_task("parity", "whether the number of ones is even or odd", (*BITS, "="), PARITIES, parity),
        answer_task("even_pairs", "whether 01 and 10 occur even times in all", (*BITS, "="), PARITIES, even_pairs),
        answer_task("cycle_navigation", "the place on a cycle of 5 after steps of -1, 0 and +1", (*STEPS, "="), DIGITS,
                    cycle_navigation),
        mod_arithmetic_task("mod_arithmetic"),
        mod_arithmetic_task("mod_arithmetic_no_star", operators="+-"),
    )
}  # fmt: skip
