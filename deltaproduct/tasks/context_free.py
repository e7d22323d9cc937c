"""The deterministic context-free tasks of the Chomsky hierarchy's benchmark (Delétang et al., arXiv 2207.02098):
modular arithmetic with brackets, equations, reversal and a stack.

A pushdown automaton can do each of them. `chomsky.py` says how they are asked. The examples are tokens → answer.
"""

from functools import partial

import torch
from torch import Tensor

from deltaproduct.tasks.chomsky import (
    BITS,
    DIGITS,
    UNSCORED,
    FormalTask,
    answer_task,
    ended,
    half,
    transduction,
    uniform,
    uniform_up_to,
)
from deltaproduct.tasks.regular import OPERATORS, check_arithmetic

# Tokens of expressions modulo m: the digits, then these.
MARKS = (*OPERATORS, "(", ")")
OPENS, CLOSES = MARKS.index("("), MARKS.index(")")
POP = 2  # of the stack's symbols 0 1 POP PUSH0 PUSH1


def expressions(
    batch: int, size: int, generator: torch.Generator, *, modulus: int = 5, operators: str = OPERATORS
) -> tuple[Tensor, Tensor]:
    """Fully bracketed expressions [batch,size] and their values modulo m [batch].

    With less than five symbols left an expression is d, -d, (d) or (-d), by their number; else (L op R), with L of any
    size that leaves one for R, as likely as another. That is the published code's distribution; here, all sequences
    and all brackets of one depth are drawn together.
    """
    mark = {symbol: modulus + i for i, symbol in enumerate(MARKS)}
    usable = torch.tensor([mark[operator] for operator in sorted(set(operators))], device=generator.device)
    start = torch.arange(batch, device=generator.device) * size  # of each expression in the flat text
    sizes = torch.full_like(start, size)
    text = start.new_zeros(batch * size)
    levels = []
    while start.numel():
        digit = uniform(modulus, 1, len(start), generator)[0]
        split = sizes >= 5
        plain, negative, bracketed = ~split, ~split & (sizes % 2 == 0), (sizes >= 3)
        text[start[bracketed]] = mark["("]
        text[(start + sizes - 1)[bracketed]] = mark[")"]
        at = start + (plain & bracketed)  # of the sign or the digit, behind an opening bracket
        text[(at + negative)[plain]] = digit[plain]
        text[at[negative]] = mark["-"]
        begin, inner = start[split], sizes[split]
        left = uniform_up_to(inner - 4, generator)
        operator = usable[uniform(len(usable), 1, len(begin), generator)[0]]
        text[begin + 1 + left] = operator
        levels.append((split, torch.where(negative, -digit, digit), operator))
        start = torch.cat([begin + 1, begin + 2 + left])
        sizes = torch.cat([left, inner - 3 - left])
    values = text.new_zeros(0)
    for split, leaf, operator in reversed(levels):  # the innermost first: what they are worth, the next level uses
        a, b = values.chunk(2) if len(values) else (values, values)
        results = torch.where(operator == mark["*"], a * b, torch.where(operator == mark["-"], a - b, a + b))
        values = leaf.masked_scatter(split, results) % modulus
    return text.view(batch, size), values


def mod_arithmetic_brackets(
    batch: int, length: int, generator: torch.Generator, *, modulus: int = 5, operators: str = OPERATORS
) -> tuple[Tensor, Tensor]:
    """The value mod 5 of an expression of (L op R), d, -d, (d) and (-d).

    With *, more than 1/5 of the expressions are worth 0, because a product with a factor 0 is: .31 of those of lengths
    40 to 256. The papers scale with 1/5 all the same, and so does `chance`; a model that always says 0 thus has a
    scaled accuracy of .13.

    ( 2 * ( - 3 ) ) = → 4
    ( ( 1 + 4 ) - 2 ) = → 3
    """
    text, values = expressions(batch, length - 1, generator, modulus=modulus, operators=operators)
    return ended(text, modulus + len(MARKS)), values


def mod_arithmetic_brackets_task(name: str, modulus: int = 5, operators: str = OPERATORS) -> FormalTask:
    """Modular arithmetic with brackets, as a task called `name`. The published code's operators are + and −.

    Raises UsageError when m is not 2 … 10, or an operator is not one of + - *.
    """
    check_arithmetic(modulus, operators)
    digits = tuple(str(d) for d in range(modulus))
    draw = partial(mod_arithmetic_brackets, modulus=modulus, operators=operators)
    summary = f"the value modulo {modulus} of an expression in brackets with {' '.join(operators)}"
    return answer_task(name, summary, (*digits, *MARKS, "="), digits, draw)


def solve_equation(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The digit x, mod 5, that makes an equation true: an expression in brackets with + and −, = and its value.

    The value is the last token, where the answer is asked for. Without * there is always one solution. The digit that x
    replaces is the first at or after a place drawn uniformly, going round, as in the published code.

    ( x + 3 ) = 2 → 4
    - x = 1 → 4
    """
    n = length - 2
    text, values = expressions(batch, n, generator, operators="+-")
    place = uniform(n, batch, 1, generator)
    distance = (torch.arange(n, device=text.device) - place) % n
    x = distance.masked_fill(text >= len(DIGITS), n).argmin(dim=1, keepdim=True)
    solution = text.gather(1, x)[:, 0]
    equals, unknown = len(DIGITS) + len(MARKS), len(DIGITS) + len(MARKS) + 1
    equation = ended(text.scatter(1, x, unknown), equals)
    return torch.cat([equation, values[:, None]], dim=1), solution


def reverse_string(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A string of bits, the last first.

    0 0 1 = _ _ _ → 1 0 0
    0 1 1 1 = _ _ _ _ → 1 1 1 0
    """
    bits = uniform(2, batch, n, generator)
    return bits, bits.flip(1)


def stack_manipulation(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A stack of bits, bottom first, then what is done to it; its content afterwards, top first, and "end".

    The stack has from 1 to n−1 of the n symbols, each number as likely as another; POP, PUSH0 and PUSH1 are the rest.
    POP does nothing to an empty stack. n+1 outputs are room for the fullest stack and its end.

    0 1 PUSH1 = _ _ _ _ → 1 1 0 end
    1 POP POP = _ _ _ _ → end
    """
    bits, actions = uniform(2, batch, n, generator), 2 + uniform(3, batch, n, generator)
    filled = uniform_up_to(bits.new_full((batch, 1), max(1, n - 1)), generator)
    inputs = torch.where(torch.arange(n, device=bits.device) < filled, bits, actions)
    stack, depth = bits.new_zeros((batch, n + 1)), bits.new_zeros((batch, 1))
    for symbol in inputs.split(1, dim=1):
        # Above the top anything may stand, so a POP may write there too.
        stack.scatter_(1, depth, symbol % 3)  # 0, 1, -, 0, 1
        depth = torch.where(symbol == POP, (depth - 1).clamp(min=0), depth + 1)
    room = torch.arange(n + 1, device=bits.device)
    outputs = stack.gather(1, (depth - 1 - room).clamp(min=0))
    outputs = torch.where(room < depth, outputs, torch.where(room == depth, 2, UNSCORED))
    return inputs, outputs


def _half_with_end(length: int) -> int:
    return (length - 2) // 2


TASKS = {
    task.name: task
    for task in (
        mod_arithmetic_brackets_task("mod_arithmetic_brackets"),
        mod_arithmetic_brackets_task("mod_arithmetic_brackets_no_star", operators="+-"),
        answer_task("solve_equation", "the x modulo 5 that solves an equation", (*DIGITS, *MARKS, "=", "x"), DIGITS,
                    solve_equation, min_length=3),
        transduction("reverse_string", "a string of bits backwards", BITS, reverse_string,
                     half, min_length=3),
        transduction("stack_manipulation", "a stack after pushing and popping, top first",
                     (*BITS, "POP", "PUSH0", "PUSH1"), stack_manipulation, _half_with_end,
                     min_length=4, answers=(*BITS, "end")),
    )
}  # fmt: skip
