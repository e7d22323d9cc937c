"""The command line: finds the command, and turns every mistake of the user's into one line and exit status 2.

Only the module of the command that was asked for is imported, and that imports PyTorch only when the command runs: help
and the answer to a misspelt word need not wait for it.
"""

import contextlib
import io
import os
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import deltaproduct
from deltaproduct.errors import UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

INTERRUPTED = 130  # what a shell reports for a program that was interrupted
PROGRAM = "deltaproduct"
DESCRIPTION = "DeltaProduct: linear RNNs with Householder products, and how far they track state."


class Command(NamedTuple):
    """Where a command is, and the first paragraph of its help."""

    module: str  # below deltaproduct.cli
    name: str  # of its class
    summary: str


class CommandGroup(NamedTuple):
    """Commands that share their first word."""

    summary: str
    commands: "Mapping[str, Command]"


COMMANDS: "dict[str, Command | CommandGroup]" = {
    "reproduce": Command("reproduce", "Reproduce", "Train and evaluate the runs of an experiment; writes summary.json, "
                         "a table and accuracy.png."),
    "train": Command("train", "Train", "Train one model on one task. The defaults are the recipe that tracks S3 on a "
                     "laptop."),
    "evaluate": Command("evaluate", "Evaluate", "Token accuracy and prefix-exact sequence accuracy by length, on data "
                        "that no training run can have seen."),
    "compile": Command("compile", "Compile", "Write a checkpoint that follows a group or an automaton exactly, with "
                       "automaton.json beside the weights."),
    "verify": Command("verify", "Verify", "Compare every label of a compiled model with its automaton's state; exit "
                      "status 1 if one is wrong."),
    "extract": Command("extract", "Extract", "Find the automaton that a trained model follows; writes automaton.json, "
                       ".dot and .png, and extract.json."),
    "explain": Command("explain", "Explain", "Say what is proven about a class of models and a group: possible, "
                       "impossible or open, and by which theorem."),
    "tasks": CommandGroup("Which tasks there are, and what one looks like.", {
        "list": Command("tasks", "TasksList", "List the forms that a task's name can take."),
        "show": Command("tasks", "TasksShow", "Describe one task, with a worked example."),
    }),
    "mixers": CommandGroup("Which sequence mixers there are, and what options one has.", {
        "list": Command("mixers", "MixersList", "List the sequence mixers."),
        "show": Command("mixers", "MixersShow", "Describe one mixer: its recurrence and its options."),
    }),
    "bench": CommandGroup("Measure this machine and the operator on it.", {
        "ops": Command("bench", "BenchOps", "Every backend of the operator and other implementations of it: "
                       "correctness first, then interleaved timings and the roofline. With --step, one token of the "
                       "operator instead."),
        "scaling": Command("bench", "BenchScaling", "One backend at growing sequence length: the time per token, which "
                           "stays the same where cost is linear."),
        "generate": Command("bench", "BenchGenerate", "Decoding one token with a whole model, beside the time of "
                            "streaming its weights and states from memory."),
        "train": Command("bench", "BenchTrain", "A whole training step of `deltaproduct reproduce s3`, with each "
                         "backend, and its parts; or with each mixer."),
    }),
    "lm": CommandGroup("Language models: their data, training, evaluation and use.", {
        "prepare": Command("lm_prepare", "LmPrepare", "Make a corpus for language models: texts to token ids in "
                           "memory-mapped shards, some held out for validation."),
        "train": Command("lm_train", "LmTrain", "Train a language model on a corpus that `lm prepare` made."),
        "evaluate": Command("lm_evaluate", "LmEvaluate", "How well a language model predicts a held-out text, within "
                            "its training context and beyond; --out keeps the data and a figure."),
        "generate": Command("lm_generate", "LmGenerate", "Let a language model write: token by token, from a state of "
                            "constant size, until a document ends."),
        "export": Command("lm_export", "LmExport", "Write the step (tokens, state) → (logits, state) for any number of "
                          "sequences at a time, with a description."),
        "convert": Command("lm_convert", "LmConvert", "Write a checkpoint of this library (or a run's) in "
                           "flash-linear-attention's layout, or one of its own in ours."),
    }),
    "seal": Command("seal", "Seal", "Accept what was changed in a checkpoint's folder on purpose: its files are "
                    "checked by what they are now."),
    "doctor": Command("doctor", "Doctor", "Say what this machine is, which backends of the operator it can run, and "
                      "which optional packages are here."),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `deltaproduct` program."""
    command = None
    try:
        # What the terminal's encoding lacks is written as an escape, such as \u2192: no name can end in a traceback.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        command = _parse(sys.argv[1:] if arguments is None else arguments)
        if command is not None:
            from deltaproduct.machine import keep_freed_memory  # imports PyTorch

            keep_freed_memory()
            command.run()
        sys.stdout.flush()
    except UsageError as e:
        _fail(str(e))
    except KeyboardInterrupt as e:
        # A command that saved something on the way out says so itself; one that can be continued says how.
        _complain(str(e) or f"interrupted. {getattr(type(command), 'interrupted', '')}")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        _drop_output()
    except SystemExit as e:
        if message := getattr(e, "message", None):  # of training that was ended by a signal
            _complain(message)
        with _unless_nobody_reads():
            sys.stdout.flush()
        raise
    except (MemoryError, RuntimeError, TypeError, ValueError) as e:
        from deltaproduct.memory import why_out_of_memory

        if not (reason := why_out_of_memory(e)):
            raise
        _fail(reason)
    except OSError as e:
        _fail(f"{e.filename or 'the system'}: {e.strerror or e}.")


def _parse(arguments: "Sequence[str]") -> Any:
    """The command that the arguments describe, as an object with a `run` method; None if all is said already."""
    if list(arguments) in (["--version"], ["-V"]):
        print(f"{PROGRAM} {deltaproduct.__version__}")
        return None
    from deltaproduct.cli.renamed import with_new_command

    commands: Mapping[str, Command | CommandGroup] = COMMANDS
    names: list[str] = []
    summary, rest = DESCRIPTION, with_new_command(arguments, _complain) or ["--help"]
    while True:
        if rest and (rest[0] in ("-h", "--help")):
            _help(" ".join([PROGRAM, *names]), summary, commands)
        found = commands.get(rest[0]) if rest else None
        if found is None:
            from deltaproduct.cli.mistakes import no_command

            group, flags = " ".join(names), [word for word in rest if word.startswith("-")]
            if not rest or rest[:1] == flags[:1]:  # there is no command, perhaps a flag of one
                asked = f"{flags[0]} belongs behind a command" if flags else f"{group} needs a command"
                _fail(f"{asked}: {', '.join(commands)}; for help: {' '.join([PROGRAM, *names])} --help")
            _fail(no_command(rest[0], commands, group))
        names.append(rest.pop(0))
        if isinstance(found, Command):
            return _command(" ".join(names), found, rest)
        commands, summary = found.commands, found.summary


def _command(name: str, found: Command, arguments: list[str]) -> Any:
    """The command of that name with the values of its flags."""
    import tyro

    from deltaproduct.cli.flags import flattened, grouped, nested
    from deltaproduct.cli.mistakes import what_is_wrong
    from deltaproduct.cli.renamed import with_new_flags

    arguments = with_new_flags(name, arguments, _complain)
    module = import_module(f"deltaproduct.cli.{found.module}")
    # Which flags there are can depend on other flags: on --mixer.
    kind = module.command(arguments) if hasattr(module, "command") else getattr(module, found.name)
    asks_for_help = not {"-h", "--help"}.isdisjoint(arguments)
    if not asks_for_help and (wrong := what_is_wrong(name, kind, arguments, only_values=True)):
        _fail(wrong)
    # What the flags default to can depend on other flags: on the run that --resume continues, on --preset.
    defaults = getattr(module, "defaults", None)
    given = None if defaults is None else defaults(arguments)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            groups = grouped(kind)
            default = given if groups is None or given is None else nested(given, groups)
            command: Any = tyro.cli(
                groups or kind,
                prog=f"{PROGRAM} {name}",
                args=arguments,
                **({} if default is None else {"default": default}),
                config=(tyro.conf.OmitArgPrefixes,),
            )
            command = command if groups is None else flattened(command, kind)
    except SystemExit as e:
        if e.code in (0, None):
            sys.stderr.write(errors.getvalue())
            raise
        _fail(what_is_wrong(name, kind, arguments, given) or _one_line(errors.getvalue()))
    if hasattr(module, "check"):
        module.check(command, arguments)
    return command


def _help(program: str, summary: str, commands: "Mapping[str, Command | CommandGroup]") -> NoReturn:
    """Print what commands there are."""
    from dataclasses import make_dataclass
    from typing import Annotated, Union

    import tyro

    def listed(name: str, summary: str) -> Any:
        kind = make_dataclass(name, [])
        kind.__doc__ = summary
        return Annotated[kind, tyro.conf.subcommand(name)]

    kinds = tuple(listed(name, found.summary) for name, found in commands.items())
    tyro.cli(Union[kinds], prog=program, args=["--help"], description=summary)  # type: ignore[call-overload] # noqa: UP007
    raise AssertionError("help ends the program")


def _one_line(message: str) -> str:
    """The parser draws its errors in a titled box of several lines; a log wants one."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines()
    inside = [line.strip("│ ") for line in plain if not line.startswith(("╭", "╰"))]
    text = " ".join(" ".join(line for line in inside if line.strip("─")).split())
    return re.sub(r" For full helptext,? (?:run|see):? ", "; for help: ", text) or "not understood; try --help."


def _fail(message: str) -> NoReturn:
    _complain(message)
    raise SystemExit(2)


def _complain(message: str) -> None:
    """One line on standard error."""
    with _unless_nobody_reads():
        line = shown(" ".join(message.split()))
        # What files say may be of any length.
        print(f"{PROGRAM}: {line if len(line) < 1500 else f'{line[:1000]} … {line[-300:]}'}", file=sys.stderr)


@contextlib.contextmanager
def _unless_nobody_reads() -> "Iterator[None]":
    try:
        yield
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """The reader, such as `head`, has gone. Python would complain once more on closing standard output."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
