"""From a name to a task. A new kind of task is one file and one line of `FAMILIES`."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from deltaproduct.errors import UsageError, did_you_mean, quoted
from deltaproduct.tasks import (
    automaton_task,
    chess_moves,
    code_swaps,
    context_free,
    context_sensitive,
    entities,
    group_tasks,
    groups,
    recall,
    regular,
)
from deltaproduct.tasks.task import Task


class Family(NamedTuple):
    """The tasks whose names have one form.

    `regex` must match the whole name; `build(name, *the regex's groups)` makes the task, or raises a UsageError that
    says why there is none: so a regex takes in names that are well formed but impossible, such as S1. `kept` is whether
    a task that was built once serves again; not where a file decides, which can change.
    """

    pattern: str
    example: str
    description: str
    regex: str
    build: Callable[..., Task]
    kept: bool = True


_INT, _GROUP = groups.INTEGER, groups.GROUP_NAME
_BASE = rf"{_GROUP}(?:_only_swaps|_limit_to_{_INT})?"
_LONG_BASE = rf"({_BASE})_({_INT})"
_FORMAL: dict[str, Task] = {**regular.TASKS, **context_free.TASKS, **context_sensitive.TASKS}

FAMILIES = (
    Family("Sn", "S3", "all permutations of n points", rf"(S{_INT})", group_tasks.group_task),
    Family("An", "A5", "even permutations of n points", rf"(A{_INT})", group_tasks.group_task),
    Family("Zn", "Z60", "addition modulo n", rf"(Z{_INT})", group_tasks.group_task),
    Family("Dn", "D4", "symmetries of a regular n-gon (2n elements)", rf"(D{_INT})", group_tasks.group_task),
    Family("G_x_H", "S3_x_Z2", "direct product of two or more of these", rf"({_GROUP})", group_tasks.group_task),
    Family("Sn_only_swaps", "S5_only_swaps", "inputs are the swaps and the identity",
           rf"({_GROUP}_only_swaps)", group_tasks.group_task),
    Family("Sn_limit_to_k", "S5_limit_to_3", "inputs move at most k points",
           rf"({_GROUP}_limit_to_{_INT})", group_tasks.group_task),
    Family("G_k_tokens", "S3_2_tokens", "each symbol k times, labels delayed by k-1",
           rf"{_LONG_BASE}_tokens", group_tasks.repeated_task),
    Family("G_k_s_tokens", "S3_2_s_tokens", "k-1 fillers after each symbol; its label on the last, filler elsewhere",
           rf"{_LONG_BASE}_s_tokens", group_tasks.filler_task),
    Family("G_k_s_tokens_only_input", "S3_2_s_tokens_only_input", "the same input, a product as every label",
           rf"{_LONG_BASE}_s_tokens_only_input", group_tasks.filler_input_task),
    Family("Sn_hard", "S5_hard", "4 swaps in one token, then 3 identities, labels delayed by 3",
           rf"({_GROUP})(?:_only_swaps)?_hard", group_tasks.hard_task),
    Family("regex:R", "regex:(ab)*", "state of a regular expression's automaton; regex_accept:R, acceptance",
           r"regex(_accept)?:(.+)", automaton_task.regex_task),
    Family("random_automaton:NxS:SEED", "random_automaton:6x3:0",
           "the same for a random automaton of N states, S symbols",
           rf"random_automaton(_accept)?:({_INT})x({_INT}):({_INT})", automaton_task.random_automaton_task),
    Family("automaton:FILE", "automaton:machine.json", "the same for the automaton in a JSON or DOT file",
           r"automaton(_accept)?:(.+)", automaton_task.file_task, kept=False),
    Family("mqar_D_V", "mqar_8_64", "recall of D values by their keys, V tokens; mqar_D_V_random: no plain fillers",
           rf"mqar_({_INT})_({_INT})(_random)?", recall.recall_task),
    Family("code_swaps_N", "code_swaps_5", "N variables, lines a, b = b, a; code_swaps_N_text: as plain text",
           rf"code_(swaps)_({_INT})(_text)?", code_swaps.code_task),
    Family("code_temp_N", "code_temp_5", "the same by way of a temporary; code_temp_N_text",
           rf"code_(temp)_({_INT})(_text)?", code_swaps.code_task),
    Family("code_if_N", "code_if_5", "the same under an if; code_if_N_text",
           rf"code_(if)_({_INT})(_text)?", code_swaps.code_task),
    Family("entities_N", "entities_5", "N people who trade coins; entities_N_text: in plain English",
           rf"entities_({_INT})(_text)?", entities.entities_task),
    Family("chess_N", "chess_5", "N chess pieces that change places, a token a swap; chess_N_text: as plain text",
           rf"chess_({_INT})()(_text)?", chess_moves.chess_task),
    Family("chess_N_PARTS", "chess_5_st", "move by move: PARTS of piece, source, target; chess_N_PARTS_text",
           rf"chess_({_INT})_(p|p?s?t|p?s)(_text)?", chess_moves.chess_task),
    *(Family(name, name, task.summary, name, _FORMAL.__getitem__) for name, task in _FORMAL.items()),
)  # fmt: skip


def get_task(name: str) -> Task:
    """The task called `name`, such as "S3"; `list_tasks` shows the forms a name can take. Names are case-sensitive.

    Tasks are immutable, and a second call returns the same object, unless the name is that of a file.
    Raises UsageError when no family has a name of this form (with a suggestion when one is near), or when the name has
    the form but the task cannot exist, such as "S1".
    """
    for family in FAMILIES:
        if match := re.fullmatch(family.regex, name, re.ASCII):
            return _kept(family, name, match.groups()) if family.kept else family.build(name, *match.groups())
    raise UsageError(f"unknown task {quoted(name)}: {_suggestion(name)}`deltaproduct tasks list` shows them")


@lru_cache(maxsize=64)
def _kept(family: Family, name: str, parts: tuple[str | None, ...]) -> Task:
    return family.build(name, *parts)


def list_tasks() -> list[tuple[str, str, str]]:
    """(pattern, one-line description, an example name) of every family, in the order to show them."""
    return [(family.pattern, family.description, family.example) for family in FAMILIES]


def _suggestion(name: str) -> str:
    for family in FAMILIES:
        if re.fullmatch(family.regex, name, re.ASCII | re.IGNORECASE):
            return f"upper and lower case matter, and the nearest form is {family.pattern} (such as {family.example}); "
    near = did_you_mean(name, [family.example for family in FAMILIES]).strip(" ()")
    return f"{near} " if near else ""
