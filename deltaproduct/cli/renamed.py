"""Old names of commands and flags: they go on working for one release, with a line on standard error."""

from collections.abc import Callable, Sequence

# Old words → new words.
COMMANDS = {
    ("bench", "decode"): ("bench", "ops", "--step"),
    ("bench", "step"): ("bench", "generate"),
}

# Command → old flag → new flag. A switch is listed with and without its "no-".
FLAGS: dict[str, dict[str, str]] = {
    "lm train": {
        "--no-recompute": "--no-gradient-checkpointing",
        "--recompute": "--gradient-checkpointing",
        "--spans": "--context-parallel",
    },
}


def with_new_command(arguments: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The program's arguments with a command's new name for its old one, which `say` is told."""
    for old, new in COMMANDS.items():
        if tuple(arguments[: len(old)]) == old:
            say(f"{' '.join(old)} is now {' '.join(new)}; the old name goes with the next release.")
            return [*new, *arguments[len(old) :]]
    return list(arguments)


def with_new_flags(command: str, arguments: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """A command's arguments with each old flag under its new name; `say` is told once of each.

    Args:
        command: its words behind the program's name, such as "lm train".
    """
    names = FLAGS.get(command, {})
    found: list[str] = []
    told: set[str] = set()
    for word in arguments:
        flag, equals, value = word.partition("=")
        old = flag.replace("_", "-")  # the parser takes either
        if old in names:
            if old not in told:
                say(f"{old} is now {names[old]}; the old name goes with the next release.")
            told.add(old)
            word = names[old] + equals + value
        found.append(word)
    return found
