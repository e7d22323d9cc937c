"""What a folder is that was given in place of a run or a checkpoint, and what to type for it.

`models/folders.py` knows the folders that are taken for a checkpoint alone; this knows runs, and what else this library
writes.
"""

from pathlib import Path
from typing import Any, Literal

from deltaproduct.errors import UsageError
from deltaproduct.files import read_json, read_whole, whole_folder

# A run or a checkpoint, of anything; of any library's layout; of a task (or compiled); of a language model; what
# `compile` wrote; and a run, to be resumed, of either kind.
Wanted = Literal["model", "any layout", "task model", "language model", "compiled model", "task run", "language run"]
CONFIG, CHECKPOINT, TRAINING = "config.json", "checkpoint", "training.json"
# Of each kind of run: what its model is of, what it is, which command resumes it, and which commands take its model.
_KINDS = {
    "task": ("a task", "a run on a task", "train", ("evaluate", "extract")),
    "language": ("a language model", "the run of a language model", "lm train", ("lm evaluate", "lm generate")),
}


def why_not(folder: Path, wanted: Wanted) -> str | None:
    """One line that says what a folder is and what to type instead; None if it is what is wanted, or may be.

    Damage is none of its business: what looks like the right thing is read, and refused by whoever reads it.
    """
    return read_whole(folder, lambda there: _why_not(folder, there, wanted))


def _why_not(folder: Path, there: Path, wanted: Wanted) -> str | None:
    """`why_not` of a folder whose newest whole version is at `there`."""
    if there != folder:
        return None  # a writer died between two renames
    if not folder.exists():
        return f"{folder} does not exist." if not wanted.endswith("run") else None
    if not folder.is_dir():
        return f"{folder} is a file; give the folder of a run or of a checkpoint."
    if found := _written_by_others(folder, wanted):
        return found
    kind, is_run = _trained_on(folder)
    if wanted.endswith("run") and not is_run:
        if kind is not None or (folder / CONFIG).is_file():
            run = folder.absolute().parent
            of_a_run = folder.absolute().name == CHECKPOINT and (run / CONFIG).is_file()
            advice = f"give the run's folder, {run}" if of_a_run else "only a run can be resumed"
            return f"{folder} is a checkpoint and not a run; {advice}."
        return None
    what = "run" if is_run else "checkpoint"
    if wanted == "compiled model":
        if (folder / "automaton.json").exists() or kind is None:
            return None
        return f"{folder} is a {what} and not a compiled model; `deltaproduct {_KINDS[kind][3][0]}` takes it."
    other = {"task": "language", "language": "task"}.get(kind or "")
    if kind is not None and other is not None and wanted.startswith(other):
        called, as_a_run, resumed_by, takers = _KINDS[kind]
        if wanted.endswith("run"):
            return f"{folder} is {as_a_run}; `deltaproduct {resumed_by} --resume` continues it."
        commands = " and ".join(f"`deltaproduct {name}`" for name in takers)
        return f"{folder} is a {what} of {called}, not of {_KINDS[other][0]}; {commands} take it."
    if is_run or whole_folder(folder / CHECKPOINT).exists() or wanted.endswith("run") or wanted == "any layout":
        return None
    from deltaproduct.models.folders import why_no_checkpoint  # imports PyTorch

    return why_no_checkpoint(folder)


def _written_by_others(folder: Path, wanted: Wanted) -> str | None:
    """What to type for a folder that another command wrote."""

    def holds(*names: str) -> bool:
        return all((folder / name).exists() for name in names)

    if holds("corpus.json"):
        return (
            f"{folder} is a corpus; train a model on it: deltaproduct lm train --data {folder} --out RUN."
            if wanted != "language model"
            else f"{folder} is a corpus and goes with --data; give a run of a language model here."
        )
    if holds("unfinished.json"):
        return f"{folder} is a corpus that is not finished; run the command lm prepare with --resume."
    if holds("corpus_tokenizer.json"):
        return f"{folder} is a tokenizer's folder; give the run or the checkpoint beside it."
    if holds("step.json"):
        return f"{folder} holds an exported program and no model; give the run or the checkpoint it was exported from."
    if holds("stream.json"):
        return f"{folder} holds a saved conversation: deltaproduct lm generate RUN --load-state {folder} continues it."
    if holds("extract.json"):
        return (
            f"{folder} holds an automaton that `extract` found and no model; make one: deltaproduct compile "
            f"--automaton {folder / 'automaton.json'} --out NEW_FOLDER."
        )
    if holds("evaluation.json"):
        return f"{folder} holds the report of an evaluation and no model; give the run that was evaluated."
    if holds("automaton.json", CONFIG) and (wanted.startswith("language") or wanted.endswith("run")):
        return (
            f"{folder} is a compiled model, which is not trained and cannot be resumed; `deltaproduct verify` and "
            "`deltaproduct evaluate --task` take it."
            if wanted.endswith("run")
            else f"{folder} is a compiled model, not a language model; `deltaproduct verify` takes it."
        )
    runs = folder / "runs" if holds("runs") else folder
    if not holds(CONFIG) and not holds(CHECKPOINT) and (within := _runs_in(runs)):
        what = "is an experiment's folder" if runs != folder else "holds runs and is none itself"
        return f"{folder} {what}; give one of its runs, such as {within[0]}."
    return None


def _runs_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _is_run(_read(path / CONFIG)))
    except OSError:
        return []


def _trained_on(folder: Path) -> tuple[Literal["task", "language"] | None, bool]:
    """What the model in a run's or a checkpoint's folder was trained on, if that is said; and whether it is a run."""
    values = _read(folder / CONFIG)
    if _is_run(values):
        return _kind(values), True
    training = _read(folder / TRAINING)
    values = training.get("config") if isinstance(training, dict) else None
    return (_kind(values) if _is_run(values) else None), False


def _is_run(values: Any) -> bool:
    return isinstance(values, dict) and isinstance(values.get("training"), dict) and "model" in values


def _kind(values: Any) -> Literal["task", "language"] | None:
    if "task" in values["training"]:
        return "task"
    return "language" if "corpus" in values["training"] else None


def _read(path: Path) -> Any:
    try:
        return read_json(path) if path.is_file() else None
    except (UsageError, OSError):
        return None
