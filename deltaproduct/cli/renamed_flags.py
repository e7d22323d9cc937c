"""Old names of flags: they go on working for one release, with a line on standard error."""

from collections.abc import Callable, Sequence

# Command → old flag → new flag. A switch is listed with and without its "no-".
RENAMED: dict[str, dict[str, str]] = {
    "lm train": {
        "--no-recompute": "--no-gradient-checkpointing",
        "--recompute": "--gradient-checkpointing",
        "--spans": "--context-parallel",
    },
}


def with_new_names(command: str, arguments: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """A command's arguments with each old flag under its new name; `say` is told once of each.

    Args:
        command: its words behind the program's name, such as "lm train".
    """
    names = RENAMED.get(command, {})
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
