"""Old names of flags do what the new ones do, and say so in one line each."""

from dataclasses import fields

import pytest
from commands import run

from deltaproduct.cli import main, renamed
from deltaproduct.cli.lm_train import LmTrain

NEEDED = ("lm", "train", "--data", "corpus", "--out", "runs/lm")


def told(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("given", "name", "value", "old", "new"),
    [
        (("--spans", "4"), "context_parallel", 4, "--spans", "--context-parallel"),
        (("--spans=4",), "context_parallel", 4, "--spans", "--context-parallel"),
        (("--recompute",), "gradient_checkpointing", True, "--recompute", "--gradient-checkpointing"),
        (("--no_recompute",), "gradient_checkpointing", False, "--no-recompute", "--no-gradient-checkpointing"),
    ],
)
def test_an_old_flag_sets_the_new_field(capsys, given, name, value, old, new):
    command = main._parse([*NEEDED, *given])
    assert getattr(command, name) == value
    assert told(capsys) == [f"deltaproduct: {old} is now {new}; the old name goes with the next release."]


def test_a_flag_is_named_once_and_new_flags_are_not(capsys):
    command = main._parse([*NEEDED, "--context-parallel", "2", "--gradient-checkpointing"])
    assert (command.context_parallel, command.gradient_checkpointing) == (2, True) and told(capsys) == []
    lines: list[str] = []
    found = renamed.with_new_flags("lm train", ["--spans", "2", "--spans", "3", "spans", "x--spans"], lines.append)
    assert found == ["--context-parallel", "2", "--context-parallel", "3", "spans", "x--spans"] and len(lines) == 1


def test_other_commands_do_not_have_the_old_flag(capsys):
    status, _, err = run(capsys, "train", "--out", "a", "--spans", "2")
    assert status == 2 and err.startswith("deltaproduct: train has no flag --spans")


def test_a_mistake_names_the_new_flag(capsys):
    status, _, err = run(capsys, *NEEDED, "--spans", "two")
    assert status == 2 and err.splitlines()[1:] == ["deltaproduct: --context-parallel must be a whole number, not two."]


def test_every_new_name_is_a_flag_and_no_old_one_is():
    (commands,) = renamed.FLAGS.items()  # another command's table needs its class here
    assert commands[0] == "lm train"
    known = {"--" + f.name.replace("_", "-") for f in fields(LmTrain)}
    for old, new in commands[1].items():
        assert new.replace("--no-", "--") in known and old.replace("--no-", "--") not in known
