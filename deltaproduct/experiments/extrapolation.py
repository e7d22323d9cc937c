"""Do more Householder steps predict further than a language model was trained for? (arXiv 2502.10297, section 5.)

Models of equal size, n_h 1 to 3 and a Transformer, learn bytes in windows of 512 and read the held-out text up to
4,096. On a laptop with one seed, on plays alone, and at the longer scale with all seeds, on plays and on Python.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deltaproduct.experiments.experiment import Experiment, Runs, Scale
from deltaproduct.experiments.language_job import LanguageJob
from deltaproduct.experiments.tables import loss_table
from deltaproduct.models.config import known_fields
from deltaproduct.plots.language import loss_by_position_figure
from deltaproduct.training.config import LanguageConfig
from deltaproduct.training.presets import preset_model

LENGTH = 4096
# Attention's four projections of 128 × 128 and a wider MLP are as many parameters as the recurrent blocks'.
MODELS: dict[str, dict[str, Any]] = {
    "n1": preset_model("tiny", 1),
    "n2": preset_model("tiny", 2),
    "n3": preset_model("tiny", 3),
    "transformer": known_fields("attention", preset_model("tiny", 2))
    | {"mixer": "attention", "num_heads": 4, "intermediate_size": 352},
}
LABELS = {"n1": "DeltaNet[-1,1]", "n2": "DeltaProduct_2[-1,1]", "n3": "DeltaProduct_3[-1,1]",
          "transformer": "Transformer"}  # fmt: skip


def extrapolation(scale: Scale, seeds: Sequence[int]) -> list[LanguageJob]:
    """The runs of `deltaproduct reproduce extrapolation`."""
    quick = scale == "cpu"
    return [
        LanguageJob(
            f"{source}-{name}-seed{seed}",
            LABELS[name],
            source,
            "bytes",
            model,
            LanguageConfig(steps=600, seed=seed, context=512, batch_size=8, lr=4e-3, warmup_steps=60),
            LENGTH,
        )
        for seed in (seeds[:1] if quick else seeds)
        for source in (("shakespeare",) if quick else ("shakespeare", "stdlib"))
        for name, model in MODELS.items()
    ]


def draw(runs: Runs, path: Path) -> None:
    """Loss against tokens read: a figure for each corpus, the first in `path` itself."""
    for task in dict.fromkeys(run["task"] for run in runs):
        mine = [run for run in runs if run["task"] == task]
        curves = {label: [run["curve"] for run in mine if run["label"] == label] for label in _labels(mine)}
        source = task.split(",")[0]
        target = path if task == runs[0]["task"] else path.with_stem(f"{path.stem}-{source}")
        trained = mine[0]["training_length"]
        closer = [label for label in curves if label != LABELS["transformer"]]
        closer = closer if len(closer) < len(curves) else []
        loss_by_position_figure(curves, target, trained_at=trained, title=f"Loss by position: {source}", closer=closer)


def _labels(runs: Runs) -> list[str]:
    return list(dict.fromkeys(run["label"] for run in runs))


EXTRAPOLATION = Experiment(
    name="extrapolation",
    summary="a language model's loss by position, to 8 times the training context (arXiv 2502.10297, section 5)",
    jobs=extrapolation,
    table=partial(loss_table, title="Nats per token in the second half of so many tokens"),
    draw=draw,
    scales=("cpu", "cpu-long"),
)
