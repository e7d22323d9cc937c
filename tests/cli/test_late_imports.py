"""Help, and the answer to a misspelt word, need neither PyTorch nor the modules of other commands."""

import ast
import importlib
import inspect
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import deltaproduct
from deltaproduct.cli.main import COMMANDS, Command
from deltaproduct.experiments.names import EXPERIMENT_NAMES
from deltaproduct.experiments.registry import EXPERIMENTS
from deltaproduct.ops import BACKENDS
from deltaproduct.ops.names import BACKEND_NAMES

ROOT = Path(deltaproduct.__file__).parent
LATE = ["analysis", "benchmarks", "evaluation", "layers", "models", "ops", "tasks", "theory", "training"]
LATE += ["corpus"]
EVERY = {name: found for name, found in COMMANDS.items() if isinstance(found, Command)} | {
    f"{group} {name}": found
    for group, commands in COMMANDS.items()
    if not isinstance(commands, Command)
    for name, found in commands.commands.items()
}
# Runs the program with each of the argument lists in turn; prints the modules that are there at the end.
PROGRAM = """
import contextlib, io, json, sys
from deltaproduct.cli.main import main
statuses = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(arguments)
            statuses.append(0)
        except SystemExit as e:
            statuses.append(e.code)
print(json.dumps([statuses, sorted(sys.modules)]))
"""


def after(*arguments):
    """(exit statuses, modules imported) of a process that runs the program once for each list of arguments."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    statuses, modules = json.loads(done.stdout)
    return statuses, set(modules)


@pytest.mark.slow("processes")
def test_help_and_misspelt_words_import_no_pytorch():
    helps = [["--help"], [], ["--version"], *([group, "--help"] for group in ("tasks", "bench", "lm"))]
    helps += [[*name.split(), "--help"] for name in EVERY]
    wrong = [["trian"], ["lm", "trian"], ["lm"], ["--nonsense"]]
    wrong += [[*name.split(), "--nonsense", "5"] for name in EVERY]
    statuses, modules = after(*helps, *wrong)
    assert statuses == [0] * len(helps) + [2] * len(wrong)
    assert "tyro" in modules and not modules & {"torch", "transformers", "sympy", "matplotlib"}


@pytest.mark.slow("processes")
def test_only_the_command_that_is_asked_for_is_imported():
    shared = {"main", "mistakes", "flags", "outputs", "renamed"}
    for name in ("train", "lm generate"):
        _, modules = after([*name.split(), "--stpes", "5"])
        ours = {m.removeprefix("deltaproduct.cli.") for m in modules if m.startswith("deltaproduct.cli.")}
        assert ours <= shared | {EVERY[name].module}
    _, modules = after(["--help"], ["lm", "--help"], ["trian"])
    assert {m for m in modules if m.startswith("deltaproduct.cli.")} <= {f"deltaproduct.cli.{m}" for m in shared}


@pytest.mark.slow("processes")
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--stpes", "5"]])
def test_the_answer_takes_less_than_a_second_of_the_processor(arguments):
    """A third of a second on this project's machines; importing PyTorch alone takes more than a second and a half."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "deltaproduct", *arguments], capture_output=True, cwd=ROOT.parent)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1


def test_names_that_help_shows_are_the_real_ones():
    assert tuple(BACKENDS) == BACKEND_NAMES
    assert tuple(EXPERIMENTS) == EXPERIMENT_NAMES


@pytest.mark.parametrize("name", EVERY)
def test_summaries_of_commands_are_their_own(name):
    found = EVERY[name]
    doc = inspect.getdoc(getattr(importlib.import_module(f"deltaproduct.cli.{found.module}"), found.name))
    assert " ".join(doc.split("\n\n")[0].split()) == found.summary


@pytest.mark.parametrize("room", LATE)
def test_late_packages_export_what_they_say(room):
    """The names in `__all__`, those that type checkers see, and those that are found when used are the same."""
    package = importlib.import_module(f"deltaproduct.{room}")
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    seen = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package.__name__}."):
            seen |= {alias.asname or alias.name: node.module for alias in node.names}
    assert sorted(seen) == sorted(package.__all__)
    for name, module in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
        # A module of that name below the package would take the name's place as soon as it is imported.
        folder = Path(package.__file__).parent
        assert not (folder / f"{name}.py").exists() and not (folder / name).is_dir()
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = package.Nonsense
