"""The command line: finds the command, and turns every mistake of the user's into one line and exit status 2."""

import contextlib
import io
import os
import re
import sys
from typing import Annotated, Any

import tyro

import deltaproduct
from deltaproduct.errors import UsageError

INTERRUPTED = 130  # what a shell reports for a program that was interrupted


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `deltaproduct` program."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["--version"], ["-V"]):
        print(f"deltaproduct {deltaproduct.__version__}")
        return
    try:
        command = _parse(arguments)
        from deltaproduct.machine import keep_freed_memory  # as all that imports torch: --version need not wait for it

        keep_freed_memory()
        command.run()
    except UsageError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        print("deltaproduct: interrupted; what was saved is whole: the same command goes on, training with --resume.",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Python would complain once more on closing standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        _fail(f"{e.filename or 'the system'}: {e.strerror or e}.")


def _parse(arguments: list[str]) -> Any:
    """The command that the arguments describe, as an object with a `run` method."""
    from deltaproduct.cli.bench import BenchDecode, BenchOps, BenchScaling, BenchStep, BenchTrain
    from deltaproduct.cli.compile import Compile
    from deltaproduct.cli.doctor import Doctor
    from deltaproduct.cli.evaluate import Evaluate
    from deltaproduct.cli.explain import Explain
    from deltaproduct.cli.extract import Extract
    from deltaproduct.cli.flags import check_given
    from deltaproduct.cli.lm_convert import LmConvert
    from deltaproduct.cli.lm_evaluate import LmEvaluate
    from deltaproduct.cli.lm_export import LmExport
    from deltaproduct.cli.lm_generate import LmGenerate
    from deltaproduct.cli.lm_prepare import LmPrepare
    from deltaproduct.cli.lm_train import LmTrain, train_defaults
    from deltaproduct.cli.reproduce import Reproduce
    from deltaproduct.cli.seal import Seal
    from deltaproduct.cli.tasks import TasksList, TasksShow
    from deltaproduct.cli.train import Train, resumed_defaults
    from deltaproduct.cli.verify import Verify

    defaults = resumed_defaults(arguments[1:]) if arguments[:1] == ["train"] else None
    lm_defaults = train_defaults(arguments[2:]) if arguments[:2] == ["lm", "train"] else None
    sub = tyro.conf.subcommand
    tasks = Annotated[TasksList, sub("list")] | Annotated[TasksShow, sub("show")]
    bench = (
        Annotated[BenchOps, sub("ops")]
        | Annotated[BenchScaling, sub("scaling")]
        | Annotated[BenchDecode, sub("decode")]
        | Annotated[BenchStep, sub("step")]
        | Annotated[BenchTrain, sub("train")]
    )
    lm = (
        Annotated[LmPrepare, sub("prepare")]
        | Annotated[LmTrain, sub("train", default=lm_defaults) if lm_defaults else sub("train")]
        | Annotated[LmEvaluate, sub("evaluate")]
        | Annotated[LmGenerate, sub("generate")]
        | Annotated[LmExport, sub("export")]
        | Annotated[LmConvert, sub("convert")]
    )
    commands: Any = (
        Annotated[Reproduce, sub("reproduce")]
        | Annotated[Train, sub("train", default=defaults) if defaults else sub("train")]
        | Annotated[Evaluate, sub("evaluate")]
        | Annotated[Compile, sub("compile")]
        | Annotated[Verify, sub("verify")]
        | Annotated[Extract, sub("extract")]
        | Annotated[Explain, sub("explain")]
        | Annotated[_group("Tasks", tasks, "Which tasks there are, and what one looks like."), sub("tasks")]
        | Annotated[_group("Bench", bench, "Measure this machine and the operator on it."), sub("bench")]
        | Annotated[_group("Lm", lm, "Language models: their data, training, evaluation and use."), sub("lm")]
        | Annotated[Seal, sub("seal")]
        | Annotated[Doctor, sub("doctor")]
    )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            command: Any = tyro.cli(
                commands,
                prog="deltaproduct",
                args=arguments or ["--help"],
                description="DeltaProduct: linear RNNs with Householder products, and how far they track state.",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as e:
        if e.code not in (0, None):
            _fail(_one_line(errors.getvalue()))
        sys.stderr.write(errors.getvalue())
        raise
    inner = getattr(command, "command", command)
    if isinstance(inner, Train | LmTrain):
        check_given(inner.mixer, arguments)
    return command


def _group(name: str, commands: Any, doc: str) -> type:
    """A command that only holds commands of its own."""
    from dataclasses import make_dataclass

    group = make_dataclass(name, [("command", commands)], namespace={"run": lambda self: self.command.run()})
    group.__doc__ = doc
    return group


def _one_line(message: str) -> str:
    """The parser draws its errors in a titled box of several lines; a log wants one."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines()
    inside = [line.strip("│ ") for line in plain if not line.startswith(("╭", "╰"))]
    text = " ".join(" ".join(line for line in inside if line.strip("─")).split())
    return re.sub(r" For full helptext,? (?:run|see):? ", "; for help: ", text) or "not understood; try --help."


def _fail(message: str) -> None:
    # Names and values from files may be of any length, and hold what a terminal would obey.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"deltaproduct: {line if len(line) < 1500 else f'{line[:1000]} … {line[-300:]}'}", file=sys.stderr)
    raise SystemExit(2)
