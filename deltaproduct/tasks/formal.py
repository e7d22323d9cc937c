"""Formal languages of the Chomsky hierarchy's benchmark (Delétang et al., arXiv 2207.02098) that are regular."""

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton

OPERATORS = "+-*"


def modular_arithmetic(modulus: int = 5, operators: str = OPERATORS) -> Automaton:
    """Arithmetic mod m without brackets: expressions such as 2+3*4-1=, whose value the state after "=" names.

    A product binds tighter than a sum. What matters of a beginning is the sum s of its complete terms and the term t
    that still grows, both mod m, and whether a digit or something else comes next: + and - close the term and begin
    one of 1 or −1. With all three operators there are 2m² + m + 1 states, 56 for m = 5: states "s,t" after a digit,
    "s,t," before one, the values "=v", and "none" for what is no expression. A value of 0 is accepted.

    Raises UsageError when m is not 2 … 10, or an operator is not one of + - *.
    """
    if not 2 <= modulus <= 10:
        raise UsageError(f"The modulus must be from 2 to 10, so that a number is one digit; not {modulus}.")
    if not operators or set(operators) - set(OPERATORS):
        raise UsageError(f"The operators must be some of {' '.join(OPERATORS)}, not {operators!r}.")
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
