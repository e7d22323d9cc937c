"""Code evaluation: variables that change their values with each other, and what one of them is now."""

from collections.abc import Sequence
from functools import partial
from itertools import chain, combinations, product

import numpy as np
import torch
from torch import Tensor

from deltaproduct.tasks.swaps import draw_pairs, unordered
from deltaproduct.tasks.task import Task
from deltaproduct.tasks.text import EventTask, Story, TextTask, WordTokenizer, check_count, spelt

VARIABLES = tuple("abcdefgh")
_FLAGS = ("p", ",", "q", "=", "True", ",", "False", "\n")
_CONDITIONS = (("p",), ("q",), ("x", "<", "y"), ("y", "<", "x"))
_SWAP = ("x", ",", "y", "=", "y", ",", "x", "\n")
_TEMP = ("t", "=", "x", "\n"), ("x", "=", "y", "\n"), ("y", "=", "t", "\n")
_EVENTS = {  # what can be done to x and y
    "swaps": (_SWAP,),
    "temp": (tuple(chain(*_TEMP)),),
    "if": tuple(("if", *condition, ":", *_SWAP) for condition in _CONDITIONS),
}
_IN_WORDS = {"swaps": "are swapped", "temp": "are swapped by way of a temporary", "if": "are swapped under conditions"}


def code_task(name: str, form: str, variables: str, text: str | None) -> Task:
    """`code_swaps_N`, `code_temp_N`, `code_if_N` (lines of Python as tokens), and the same with `_text` (plain text).

    N variables a, b, c, … have the values 1, 2, 3, … at first. Lines that swap two of them come in three forms:

        swaps   a, b = b, a
        temp    t = a, then a = b, then b = t, each a line
        if      if p: a, b = b, a, or the same with `if q:`, `if a < b:` or `if b < a:`, where p is True and q False

    As tokens, a line is a token, and the label after each is the value of a. There are N(N−1)/2 tokens with "swaps",
    N(N+1) with "temp", 2N(N−1) with "if":

        a, b = b, a | b, c = c, b | a, b = b, a → 2 2 3
        t = a | a = b | b = t → 1 2 2
        if p: a, b = b, a | if a < b: a, b = b, a | if b < c: b, c = c, b → 2 2 2

    As text, after each swap any one of the variables is printed; the label, at the closing bracket, is what Python
    prints. Values are not drawn, since which variable has which would be a task of recall:

        a, b, c = 1, 2, 3
        c, a = a, c
        print(a)
        a, b = b, a
        print(c) → 3, 1

    Pairs to swap and conditions are drawn uniformly. With "if", p and a < b or b < a by chance make half of the swaps
    happen in any state, and the comparisons make it more than a permutation: what happens depends on the values.

    `chance` is 1/N: every variable is printed as often as another; with tokens, every value is soon as likely in a.
    Source: the figure of "The Illusion of State in State-Space Models" (arXiv 2404.08819).

    Raises UsageError when N is not 3 … 8; "if" takes 2 too.
    """
    n = int(variables)
    least, too_few = 3, "of fewer than 3 variables the number of lines tells the values"
    if form == "if":
        least, too_few = 2, "a single variable has nothing to be swapped with"
    check_count(name, n, least, len(VARIABLES), too_few, f"only {len(VARIABLES)} variables have names")
    names, values = VARIABLES[:n], tuple(str(v + 1) for v in range(n))
    if text is None:
        symbols = _lines(form, names)
        return EventTask(
            name=name, summary=f"the value of a while {n} variables {_IN_WORDS[form]}, a token for each line",
            symbols=symbols, answers=values, width=1, draw=partial(_draw_lines, form, n),
            vocab_size=len(symbols) + 2, num_labels=n, bos_id=len(symbols) + 1, chance=1 / n,
        )  # fmt: skip
    phrases = tuple(_phrase(event, x, y) for x, y in product(names, names) for event in _EVENTS[form])
    opening = (*(_FLAGS if form == "if" else ()), *_listed(names), "=", *_listed(values), "\n")
    printing = tuple(("print", "(", variable, ")") for variable in names)
    used = (word for phrase in (opening, *phrases, *printing) for word in phrase)
    tokenizer = WordTokenizer(tuple(dict.fromkeys((*values, *used, "#"))))
    size = len(tokenizer.words) + 2
    return TextTask(
        name=name, summary=f"what is printed while {n} variables {_IN_WORDS[form]}, in plain text",
        tokenizer=tokenizer, phrases=phrases, questions=printing, answers=values, around=(("#",), ()), end=("\n",),
        opening=len(opening), draw=partial(_program, form, n, tokenizer.table([opening])[0]),
        min_length=len(opening) + max(map(len, phrases)) + len(printing[0]) + 1,
        vocab_size=size, num_labels=n, bos_id=size - 1, chance=1 / n,
    )  # fmt: skip


def _listed(items: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for item in items for word in (item, ","))[:-1]


def _phrase(event: tuple[str, ...], x: str, y: str) -> tuple[str, ...]:
    return tuple({"x": x, "y": y}.get(word, word) for word in event)


def _lines(form: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the tokens, in the order of `_draw_lines`."""
    if form == "temp":
        both = [f"{x} = {y}" for x, y in product(names, names) if x != y]
        return (*(f"t = {x}" for x in names), *both, *(f"{y} = t" for y in names))
    pairs = combinations(names, 2)
    return tuple(spelt(_phrase(event, x, y)[:-1]) for x, y in pairs for event in _EVENTS[form])


# -------------------------------------------------------------------------------------------------------------- drawing


def run(start: Tensor, first: Tensor, second: Tensor, condition: Tensor | None, read: Tensor) -> Tensor:
    """The value that one of N variables has after each swap under a condition.

    start: [B,N] the values at first. first, second: [B,E] which are swapped. condition: [B,E] 0 always, 1 never, 2 if
    the first is less than the second, 3 if it is more; None for always. read: [B,E] whose value is wanted.
    Returns [B,E] int64 on the device of `start`.
    """
    batch, n = start.shape
    rows = np.arange(batch) * n
    # [E,B]: a step reads one row
    a, b, wanted = (np.ascontiguousarray(x.T.cpu().numpy()) + rows for x in (first, second, read))
    values, out = start.cpu().numpy().reshape(-1).copy(), np.empty_like(a)
    c = None if condition is None else np.ascontiguousarray(condition.T.cpu().numpy())
    for t in range(len(out)):
        x, y = values[a[t]], values[b[t]]
        if c is None:
            values[a[t]], values[b[t]] = y, x
        else:
            swap = (c[t] == 0) | np.where(x < y, c[t] == 2, c[t] == 3)
            values[a[t]], values[b[t]] = np.where(swap, y, x), np.where(swap, x, y)
        out[t] = values[wanted[t]]
    return torch.from_numpy(out.T.copy()).to(start.device)


def _draw_conditions(form: str, like: Tensor, generator: torch.Generator) -> Tensor | None:
    if form != "if":
        return None
    return torch.randint(len(_CONDITIONS), like.shape, generator=generator, device=like.device)


def _draw_lines(form: str, n: int, batch: int, events: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lines = len(_TEMP) if form == "temp" else 1
    first, second = draw_pairs(n, batch, -(-events // lines), generator)
    condition = _draw_conditions(form, first, generator)
    if form == "temp":
        tokens = torch.stack((first, n + first * (n - 1) + second - (second > first).long(), n * n + second), dim=2)
    else:
        # The first variable of a line is the earlier in the alphabet
        first, second = torch.minimum(first, second), torch.maximum(first, second)
        tokens = unordered(n, first, second)[..., None]
        if condition is not None:
            tokens = tokens * len(_CONDITIONS) + condition[..., None]
    start = torch.arange(n, device=first.device).repeat(batch, 1)
    after = run(start, first, second, condition, torch.zeros_like(first))
    labels = after[..., None]
    if form == "temp":
        before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], dim=1)
        labels = torch.stack((before, torch.where(first == 0, after, before), after), dim=2)  # a is written as x or y
    return tokens.flatten(1)[:, :events], labels.flatten(1)[:, :events]


def _program(form: str, n: int, constant: Tensor, batch: int, events: int, generator: torch.Generator) -> Story:
    first, second = draw_pairs(n, batch, events, generator)
    condition = _draw_conditions(form, first, generator)
    printed = torch.randint(n, first.shape, generator=generator, device=first.device)
    phrase = first * n + second
    if condition is not None:
        phrase = phrase * len(_CONDITIONS) + condition
    start = torch.arange(n, device=first.device).repeat(batch, 1)
    opening = constant.to(first.device).repeat(batch, 1)
    return Story(opening, phrase, printed, run(start, first, second, condition, printed))
