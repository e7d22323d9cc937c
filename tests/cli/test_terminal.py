"""What reaches a terminal: foreign names without control characters, in any encoding; Ctrl-C; pipes that are closed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

import deltaproduct
from deltaproduct.cli.main import INTERRUPTED
from deltaproduct.cli.outputs import plain, say
from deltaproduct.errors import UsageError, shown

ROOT = Path(deltaproduct.__file__).parent.parent
# An escape sequence, a C1 control, an override and an isolate of the writing direction, a line separator, a surrogate.
HOSTILE = "\x1b[31m\x9b2J\u202eabc\u2066\u2028\r\x07\udcff"
ESCAPED = r"\x1b[31m\x9b2J\u202eabc\u2066\u2028\r\x07\udcff"


def program(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "deltaproduct", *arguments], capture_output=True, cwd=ROOT, **options)


def is_clean(text):
    return all(c.isprintable() or c == "\n" for c in text)


# --- Names that others chose ------------------------------------------------------------------------------------------


def test_what_is_no_visible_character_is_shown_as_its_escape():
    assert shown(HOSTILE) == ESCAPED
    assert shown("a\nb\tc") == r"a\nb\tc"
    assert shown("S3 → β ≥ 0.5 ü 漢 🙂") == "S3 → β ≥ 0.5 ü 漢 🙂"


def test_every_refusal_is_escaped(capsys, tmp_path):
    hostile = HOSTILE.replace("\r", "")  # white space would only be folded
    name = tmp_path / hostile
    for arguments in (
        [hostile], [f"--{hostile}"], ["lm", hostile], ["train", f"--{hostile}"], ["train", "--out", "a", hostile],
        ["train", "--steps", hostile, "--out", "a"], ["evaluate", name], ["verify", name], ["lm", "generate", name],
        ["extract", name, "--out", "a"], ["tasks", "show", hostile], ["explain", "--group", hostile],
        ["compile", "--regex", hostile, "--out", tmp_path / "a"], ["reproduce", hostile, "--list"],
        ["reproduce", "s3", "--list", "--only", hostile], ["bench", "ops", "--against", hostile],
        ["train", "--mixer", hostile, "--out", tmp_path / "b"],
        ["compile", "--automaton", name, "--out", tmp_path / "a"],
        ["lm", "convert", tmp_path, "--to", hostile, "--out", tmp_path / "a"],
    ):  # fmt: skip
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == "" and err.count("\n") == 1, arguments
        assert is_clean(err) and r"\x1b" in err, (arguments, err)


def test_names_from_files_are_escaped_where_they_are_printed(capsys, tmp_path):
    """A task from a file whose states and symbols hold escapes, in a folder whose name does too."""
    folder = tmp_path / "\x1b[31mred"
    folder.mkdir()
    automaton = {
        "alphabet": ["a", "\x1b[2J"],
        "states": ["\u202eq", "p\x9b"],
        "initial": "\u202eq",
        "accepting": ["p\x9b"],
        "transitions": [["\u202eq", "a", "p\x9b"], ["\u202eq", "\x1b[2J", "\u202eq"],
                        ["p\x9b", "a", "\u202eq"], ["p\x9b", "\x1b[2J", "p\x9b"]],
    }  # fmt: skip
    from deltaproduct.tasks.automaton_format import JSON_EXAMPLE

    example = json.loads(JSON_EXAMPLE)
    if isinstance(example["transitions"], dict):
        nested = {}
        for state, symbol, target in automaton["transitions"]:
            nested.setdefault(state, {})[symbol] = target
        automaton["transitions"] = nested
    path = folder / "automaton.json"
    path.write_text(json.dumps({key: automaton[key] for key in example}))
    status, out, err = run(capsys, "tasks", "show", f"automaton:{path}")
    assert status == 0 and is_clean(out), (out, err)
    assert r"\x1b[2J" in out and r"\x1b[31mred" in out
    status, out, err = run(capsys, "compile", "--automaton", path, "--out", folder / "compiled")
    assert status == 0 and is_clean(out) and r"\x1b[31mred" in out, err
    status, out, _ = run(capsys, "evaluate", folder / "compiled", "--task", f"automaton:{path}", "--lengths", "4",
                         "--sequences", "2")  # fmt: skip
    assert is_clean(out) and r"\x1b[31mred" in out


def test_cells_and_lines_are_escaped_and_hold_no_markup(capsys):
    from rich.console import Console
    from rich.table import Table

    table = Table("name")
    table.add_row(plain("[/red]\x1b[2J"))
    screen = io.StringIO()
    Console(file=screen, width=60).print(table)
    assert r"[/red]\x1b[2J" in screen.getvalue() and is_clean(screen.getvalue())
    say("a\x1bb\nc")
    assert capsys.readouterr().out == "a\\x1bb\\nc\n"


def test_progress_shows_names_escaped_and_without_markup(monkeypatch):
    from rich.console import Console

    from deltaproduct import progress

    screens = []

    def console(**_):
        screens.append(Console(file=io.StringIO(), force_terminal=True, width=100, no_color=True))
        return screens[-1]

    monkeypatch.setattr(progress, "Console", console)
    with progress.progress_bar("[/b]\u202etask", 3) as bar:
        bar.update(1, "[/b]")
        bar.say("a line\x9b")
    printed = screens[0].file.getvalue()
    assert r"[/b]\u202etask" in printed and r"a line\x9b" in printed and "\u202e" not in printed


def test_generated_text_is_escaped_on_a_terminal_only(monkeypatch, capsys):
    from deltaproduct.cli.lm_generate import LmGenerate

    command = LmGenerate(source=Path("x"))
    command._show("a\x1b[2J\n\tü")
    assert capsys.readouterr().out == "a\x1b[2J\n\tü"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command._show("a\x1b[2J\n\tü")
    assert capsys.readouterr().out == "a\\x1b[2J\n\tü"


# --- Encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.slow("processes")
@pytest.mark.parametrize("setting", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_our_own_characters_need_no_utf8(setting):
    environment = {**os.environ, "PYTHONCOERCECLOCALE": "0", **setting}
    done = program("lm", "--help", env=environment)
    assert done.returncode == 0 and done.stderr == b""
    assert b"\\u2192" in done.stdout  # the arrow of lm export
    done = program("train", "--nonsense", "→", env=environment)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


@pytest.mark.slow("processes")
def test_names_that_are_no_utf8_are_shown():
    """On Linux a file's name is bytes; those that are no text reach Python as lone surrogates."""
    for arguments in ([b"tr\xffain"], [b"train", b"--out", b"a\xff", b"--steps", b"b\xff"]):
        command = [sys.executable.encode(), b"-m", b"deltaproduct", *arguments]
        done = subprocess.run(command, capture_output=True, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"\\udcff" in done.stderr


def test_a_prompt_that_is_no_text_is_refused(capsys):
    status, _, err = run(capsys, "lm", "generate", "nothing", "--prompt", "a\udcff")
    assert status == 2 and "--prompt holds bytes that are not text in UTF-8" in err


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "where", "error", "said"),
    [
        ("explain --group S3", "deltaproduct.theory.theorems.explanation.explain", KeyboardInterrupt(), "interrupted."),
        ("explain --group S3", "deltaproduct.cli.main.import_module", KeyboardInterrupt(), "interrupted."),
        ("reproduce s3 --out @", "deltaproduct.experiments.runner.run_jobs", KeyboardInterrupt(),
         "interrupted. Run the same command again to continue."),
        ("train --out @", "deltaproduct.training.loop.train", KeyboardInterrupt(), "interrupted."),
        ("train --out @", "deltaproduct.training.loop.train", KeyboardInterrupt("interrupted; step 3 is saved in X."),
         "interrupted; step 3 is saved in X."),
    ],
)  # fmt: skip
def test_an_interrupted_command_says_only_what_is_true(capsys, monkeypatch, tmp_path, arguments, where, error, said):
    def interrupted(*_, **__):
        raise error

    monkeypatch.setattr(where, interrupted)
    status, out, err = run(capsys, *arguments.replace("@", str(tmp_path / "out")).split())
    assert status == INTERRUPTED and out == "" and err.splitlines()[-1] == f"deltaproduct: {said}"
    assert "Traceback" not in err


def test_a_program_that_a_signal_ended_says_what_was_saved(capsys, monkeypatch):
    class Ended(SystemExit):
        message = "interrupted; step 5 is saved."

    def work(*_, **__):
        raise Ended(143)

    monkeypatch.setattr("deltaproduct.cli.doctor.Doctor.run", work)
    status, _, err = run(capsys, "doctor")
    assert status == 143 and err == "deltaproduct: interrupted; step 5 is saved.\n"


@pytest.mark.slow("kills")
def test_ctrl_c_while_pytorch_is_imported_is_one_line():
    """The signal comes from the import itself, so that it always comes there."""
    code = (
        "import sys, signal, os\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from deltaproduct.cli.main import main\n"
        "main(['tasks', 'show', 'S3'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == INTERRUPTED and done.stderr == "deltaproduct: interrupted.\n"


# --- Pipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow("processes")
@pytest.mark.ci("tasks list")
@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version", "tasks list"])
def test_a_reader_that_has_gone_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)  # as `head` does when it has enough
    command = [sys.executable, "-m", "deltaproduct", *arguments.split()]
    # Buffered, as for everybody: what is printed last is written when the program ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, env=environment)
    finally:
        os.close(write)
    assert done.stderr == b"" and done.returncode in (0, 1)  # 1 where rich prints the table


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("Storage size calculation overflowed with sizes=[1000000000000]"),
        RuntimeError("CUDA out of memory. Tried to allocate 5 GiB"),
        ValueError("Maximum allowed dimension exceeded"),
    ],
)
def test_want_of_memory_is_one_line(capsys, monkeypatch, error):
    def work(*_):
        raise error

    monkeypatch.setattr("deltaproduct.cli.doctor.Doctor.run", work)
    status, _, err = run(capsys, "doctor")
    assert status == 2 and err.count("\n") == 1 and "not enough memory" in err


def test_other_errors_keep_their_traceback(monkeypatch):
    def work(*_):
        raise RuntimeError("a mistake of this library's")

    monkeypatch.setattr("deltaproduct.cli.doctor.Doctor.run", work)
    from deltaproduct.cli.main import main

    with pytest.raises(RuntimeError, match="a mistake of this library's") as caught:
        main(["doctor"])
    assert not isinstance(caught.value, UsageError)
