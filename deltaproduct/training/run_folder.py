"""A run's folder: what lies in it, whose run it is, who may write there, and where its checkpoint is.

config.json says what was asked for, metrics.jsonl how it went, checkpoint/ how far it is, and run.json by which command
and on which machine. When a run has ended, manifest.json holds the sums of the three files.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError
from deltaproduct.files import (
    MANIFEST,
    locked,
    make_folder,
    read_json,
    read_whole,
    recover_folder,
    seal_folder,
    verified_folder,
    whole_folder,
    write_json,
)
from deltaproduct.machine import command_line, describe_machine
from deltaproduct.training.checkpoint import trained_run, training_entries
from deltaproduct.training.config import LanguageConfig, Run
from deltaproduct.training.folder_kinds import CHECKPOINT, CONFIG, TRAINING, Wanted, why_not

RUN, METRICS = "run.json", "metrics.jsonl"
LOCK = ".lock"


@dataclass(frozen=True)
class Located:
    """A trained model on disk.

    Attributes:
        checkpoint: the folder for `SequenceModel.from_pretrained`.
        run: the folder of the run that it belongs to, if it lies in one.
    """

    checkpoint: Path
    run: Path | None

    def trained_as(self) -> Run[Any] | None:
        """The configuration of the run that the checkpoint came from; None if it did not come from one.

        Raises:
            UsageError: it is damaged.
        """
        return trained_as(self.checkpoint)

    def task(self) -> str | None:
        """The task that it was trained on; None where nothing says.

        Raises:
            UsageError: it was trained on a corpus.
        """
        trained = self.trained_as()
        if trained is not None and isinstance(trained.training, LanguageConfig):
            raise UsageError(
                f"{self.run or self.checkpoint} is a language run, which has no task. `deltaproduct lm evaluate` "
                "measures it, and `deltaproduct lm generate` has it write."
            )
        return None if trained is None else trained.training.task


def locate(source: Path, wanted: Wanted = "model") -> Located:
    """The checkpoint in a folder that is a run's or a checkpoint's, also where a writer has died in the middle of it.

    Args:
        wanted: what the model has to be of.

    Raises:
        UsageError: there is no such folder, it is a run without a checkpoint, or it is something else than `wanted`;
            the message says what takes it.
    """
    if reason := why_not(source, wanted):
        raise UsageError(reason)
    inner = source / CHECKPOINT
    if whole_folder(inner).exists():
        return Located(inner, source)
    if whole_folder(source).is_dir() and not source.is_dir():
        pass  # a checkpoint's folder between two renames
    elif not source.exists():
        raise UsageError(f"{source} does not exist.")
    elif (source / METRICS).exists() or _holds_a_run(source):
        raise UsageError(f"{source} is a run that has no checkpoint yet; train it further, with --resume.")
    within = source.name == CHECKPOINT and _holds_a_run(source.absolute().parent)
    return Located(source, source.absolute().parent if within else None)


def _holds_a_run(folder: Path) -> bool:
    with suppress(UsageError):
        values = read_json(folder / CONFIG)
        return isinstance(values, dict) and set(values) == {"training", "model"}
    return False


def trained_as(checkpoint: Path) -> Run[Any] | None:
    """The configuration of the run that a checkpoint came from; None if it did not come from one."""

    def read(folder: Path) -> Run[Any] | None:
        if not os.path.lexists(folder / TRAINING):
            return None
        return trained_run(folder, training_entries(folder))

    return read_whole(checkpoint, read)


def read_run(out: Path) -> Run[Any]:
    """The configuration in a run's folder; `UsageError` if there is none, or it is damaged."""
    try:
        return Run.from_dict(read_json(out / CONFIG))
    except UsageError as e:
        raise UsageError(f"{out / CONFIG}: {e}") from e


@contextmanager
def writing_run(run: Run[Any], out: Path, resume: bool) -> Iterator[None]:
    """Have `out` be this run's folder, and this process the only one that writes there, for the time of a `with`.

    Raises:
        UsageError: as `open_run`, or another process writes there.
    """
    make_folder(out)
    with locked(out / LOCK, f"The run {out}"):
        for left in out.glob(".*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        recover_folder(out / CHECKPOINT)
        open_run(run, out, resume)
        yield


def open_run(run: Run[Any], out: Path, resume: bool) -> None:
    """Make `out` this run's folder; `UsageError` if it holds another run, or any run without `resume`."""
    checkpoint = out / CHECKPOINT
    if (out / CONFIG).exists():
        if not resume:
            raise UsageError(f"{out} already holds a run; add --resume to continue it, or choose another folder.")
        stored = read_run(out)
        if stored != run:
            differences = "; ".join(run.differences(stored))
            raise UsageError(f"{out} holds a run with another configuration ({differences}).")
        trained = trained_as(checkpoint)
        if trained is not None and trained != run:
            raise UsageError(
                f"{out / CONFIG} is not what {checkpoint} was trained with ({'; '.join(run.differences(trained))}): it "
                "was changed after the run began. Put it back, or begin another run."
            )
    elif whole_folder(checkpoint).exists():
        raise UsageError(f"{out} holds a checkpoint but no {CONFIG}; choose another folder.")
    else:
        write_json(out / CONFIG, run.to_dict())


def is_finished(out: Path, run: Run[Any]) -> bool:
    """Whether `out` holds this very run, trained to its end; `UsageError` where its files are not what was written."""
    if not (out / RUN).exists() or not (out / CONFIG).exists():
        return False
    if (out / MANIFEST).exists():
        verified_folder(out, "run")
    values = read_json(out / RUN)
    says_so = isinstance(values, dict) and values.get("finished") is True and read_run(out) == run
    return says_so and _steps_done(out / CHECKPOINT) == run.training.steps


def check_steps(out: Path, stored: Run[Any], steps: int) -> None:
    """`UsageError` where `out` holds the run `stored`, which has ended, and another number of steps is asked for."""
    if stored.training.steps != steps and is_finished(out, stored):
        raise UsageError(
            f"The run in {out} finished with {stored.training.steps} steps, and the steps of a run cannot be changed: "
            f"start a new run of {steps} steps with another --out."
        )


def _steps_done(checkpoint: Path) -> Any:
    """What a checkpoint says of its steps; None if it says nothing."""
    if not whole_folder(checkpoint).exists():
        return None
    progress = read_whole(checkpoint, training_entries).get("progress")
    return progress.get("step") if isinstance(progress, dict) else None


def begin_record(out: Path) -> dict[str, Any]:
    """Note in run.json which command begins a run, or goes on with it; returns the commands, for `end_record`."""
    before = read_json(out / RUN) if (out / RUN).is_file() else {}
    if isinstance(before, dict) and isinstance(before.get("command"), str):
        earlier = before.get("resumed")
        commands = {
            "command": before["command"],
            "resumed": [*(earlier if isinstance(earlier, list) else []), command_line()],
        }
    else:
        commands = {"command": command_line(), "resumed": []}
    write_json(out / RUN, {"finished": False, **commands})
    return commands


def end_record(out: Path, run: Run[Any], seconds: float, commands: dict[str, Any], **figures: Any) -> None:
    """Say in run.json that a run has ended, after so many seconds of training, and seal the files of its folder."""
    settings = run.training
    write_json(
        out / RUN,
        {"finished": True, "seed": settings.seed, "steps": settings.steps, "wall_seconds": round(seconds, 2)}
        | commands
        | figures
        | {"machine": describe_machine()},
    )
    seal_folder(out, [CONFIG, RUN, METRICS])
