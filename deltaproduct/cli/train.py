"""`deltaproduct train`: train one model on one task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from deltaproduct.cli.flags import (
    BackendName,
    check_given,
    chosen_mixers,
    config_flags,
    differing_options,
    model_flags,
    model_of,
    stored_values,
    value_of,
    values_of,
    with_options,
)
from deltaproduct.cli.outputs import check_folder, say
from deltaproduct.errors import UsageError
from deltaproduct.experiments.state_tracking import STATE_TRACKING
from deltaproduct.files import read_json
from deltaproduct.training.config import Run, TrainConfig
from deltaproduct.training.folder_kinds import CONFIG, why_not

_OF_THE_TASK = ("vocab_size", "num_labels")
_ModelFlags: Any = model_flags(STATE_TRACKING)
_TrainFlags: Any = config_flags("TrainFlags", TrainConfig, {}, group="training")
# What a run may be continued with that is not its own.
_NOT_OF_THE_RUN = ("out", "resume", "device", "backend", "log_every", "checkpoint_every")


@dataclass(kw_only=True)
class Train(_ModelFlags, _TrainFlags):  # type: ignore[misc]
    """Train one model on one task. The defaults are the recipe that tracks S3 on a laptop."""

    out: Annotated[Path, tyro.conf.arg(help="folder of the run; created")]
    resume: Annotated[
        bool, tyro.conf.arg(help="continue the run in --out, exactly; other flags default to its own")
    ] = False
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    backend: BackendName = "auto"
    log_every: Annotated[int, tyro.conf.arg(help="steps between metric lines")] = 10
    checkpoint_every: Annotated[int, tyro.conf.arg(help="steps between checkpoints")] = 100

    def run(self) -> None:
        for name in ("log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")
        check_folder(self.out)
        from deltaproduct.tasks import get_task
        from deltaproduct.training.loop import train

        if self.resume:
            if not (self.out / CONFIG).is_file():
                raise UsageError(_nothing_to_resume(self.out))
            stored = Run.from_dict(read_json(self.out / CONFIG))
            self._check_unchanged(stored)
        task = get_task(self.task)
        model = model_of(self, task.vocab_size, task.num_labels, stored.model if self.resume else None)
        config = Run(TrainConfig(**values_of(self, TrainConfig)), model)
        train(
            config,
            self.out,
            resume=self.resume,
            device=self.device,
            backend=self.backend,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
        )
        from deltaproduct.training.metrics import last_metrics
        from deltaproduct.training.run_folder import METRICS

        last = json.dumps(last_metrics(self.out / METRICS) or {})
        say(f"{self.out}: trained {task.name} for {self.steps} steps; last metrics {last}")

    def _check_unchanged(self, stored: Run[TrainConfig]) -> None:
        """`UsageError` where a flag asks for something else than the run that is to be continued."""
        from deltaproduct.training.run_folder import check_steps

        training = {f.name: (getattr(self, f.name), getattr(stored.training, f.name)) for f in fields(stored.training)}
        asked = model_of(self, stored.model.vocab_size, stored.model.num_labels, stored.model)
        changed = [
            (name, mine, theirs)
            for name, (mine, theirs) in (training | asked.differences(stored.model)).items()
            if mine != theirs
        ]
        if not changed:
            return
        names = [name for name, _, _ in changed]
        if names == ["steps"]:
            check_steps(self.out, stored, self.steps)
        flags = "; ".join(f"{_flag(name)} {_value(mine)}, stored {_value(theirs)}" for name, mine, theirs in changed)
        raise UsageError(
            f"The run in {self.out} has other settings ({flags}), which cannot be changed: leave out "
            f"{' and '.join(_flag(name) for name in names)} to resume it, or start a new run with another --out."
        )


def defaults(arguments: Sequence[str]) -> Train | None:
    """With --resume, the flags' defaults are those of the run in --out, if there is one to continue."""
    out, stored = value_of("--out", arguments), _stored(arguments)
    if out is None or stored is None:
        return None
    kind = command(arguments)
    values = vars(stored.training) | stored_values(stored.model, arguments)
    known = {f.name for f in fields(kind)}
    return kind(out=Path(out), resume=True, **{name: value for name, value in values.items() if name in known})


def command(arguments: Sequence[str]) -> type[Train]:
    """`Train` with the options of the mixers that are asked for, or that the run to be continued has.

    Raises:
        UsageError: a flag is given that none of these mixers has a use for.
    """
    stored = _stored(arguments)
    names = ("deltaproduct",) if stored is None else tuple(options.name for options in stored.model.mixers)
    mixers = chosen_mixers(arguments, names)
    check_given(mixers, arguments)
    return with_options(Train, mixers, STATE_TRACKING, () if stored is None else differing_options(stored.model))


def _stored(arguments: Sequence[str]) -> Run[TrainConfig] | None:
    """The run that --resume continues, if there is one."""
    out = value_of("--out", arguments)
    if "--resume" not in arguments or out is None or not (path := Path(out) / CONFIG).is_file():
        return None
    if found := why_not(Path(out), "task run"):
        raise UsageError(found)
    return Run.from_dict(read_json(path))


def _nothing_to_resume(out: Path) -> str:
    return why_not(out, "task run") or f"{out} holds no run to resume; leave out --resume to begin one."


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
