"""`deltaproduct train`: train one model on one task."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deltaproduct.cli.flags import BackendName, config_flags, value_of, values_of
from deltaproduct.errors import UsageError
from deltaproduct.experiments.recipes import STATE_TRACKING
from deltaproduct.files import read_json
from deltaproduct.models import ModelConfig
from deltaproduct.tasks import get_task
from deltaproduct.training import RunConfig, TrainConfig, train
from deltaproduct.training.log import last_metrics
from deltaproduct.training.run_folder import CONFIG, METRICS

_OF_THE_TASK = ("vocab_size", "num_labels", "layer_overrides")
_ModelFlags: Any = config_flags("ModelFlags", ModelConfig, STATE_TRACKING, leave_out=_OF_THE_TASK)
_TrainFlags: Any = config_flags("TrainFlags", TrainConfig, {})


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
        task = get_task(self.task)
        model = ModelConfig(vocab_size=task.vocab_size, num_labels=task.num_labels, **values_of(self, ModelConfig))
        config = RunConfig(TrainConfig(**values_of(self, TrainConfig)), model)
        train(
            config,
            self.out,
            resume=self.resume,
            device=self.device,
            backend=self.backend,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
        )
        last = json.dumps(last_metrics(self.out / METRICS) or {})
        print(f"{self.out}: trained {task.name} for {self.steps} steps; last metrics {last}")


def resumed_defaults(arguments: list[str]) -> Train | None:
    """With --resume, the flags' defaults are those of the run in --out, if there is one to continue."""
    if "--resume" not in arguments:
        return None
    out = value_of("--out", arguments)
    if out is None or not (Path(out) / CONFIG).is_file():
        return None
    stored = RunConfig.from_dict(read_json(Path(out) / CONFIG))
    model = {k: v for k, v in vars(stored.model).items() if k not in _OF_THE_TASK}
    return Train(out=Path(out), resume=True, **vars(stored.training), **model)
