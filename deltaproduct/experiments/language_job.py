"""A run of an experiment on language: a model trained on a corpus, and its loss far beyond the training context."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from deltaproduct.corpus import Corpus
from deltaproduct.corpus.sidecar import SIDECAR
from deltaproduct.corpus.writer import prepare
from deltaproduct.errors import UsageError
from deltaproduct.evaluation.perplexity import loss_by_position, smoothing_window, thinned_curve
from deltaproduct.experiments.job import Figures, Job, Result
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.training import LanguageConfig, Run

CORPORA = "corpora"  # beside the runs' folder
CURVE_POINTS = 256


@dataclass(frozen=True)
class LanguageJob(Job):
    """A language model on a corpus that is prepared in the experiment's folder.

    Its result has "loss" by octaves of positions, and a "curve" of the loss by position.

    Attributes:
        source, tokenizer: as `lm prepare` takes them.
        model: what `ModelConfig.build` takes, but for the vocabulary, which is the corpus'.
        training: how; its corpus is filled in.
        length: positions up to which the loss is measured, on windows of the validation split.
        sequences: how many windows; None: what `evaluation.windows.evenly_spaced` takes.
    """

    source: str
    tokenizer: str
    model: Mapping[str, Any]
    training: LanguageConfig
    length: int
    sequences: int | None = None
    entries: ClassVar[tuple[str, ...]] = (
        "name", "label", "task", "mixer", "num_householder", "parameters", "seed", "steps", "tokens",
        "training_length", "checkpoint",
    )  # fmt: skip

    def train(self, folder: Path) -> None:
        from deltaproduct.training.distributed import Ranks
        from deltaproduct.training.loop import train
        from deltaproduct.training.objectives.language import LanguageObjective

        with Ranks.started() as ranks:
            run = self.run_config(folder)
            objective = LanguageObjective(run.training, self._corpus(folder))
            train(run, folder, objective, ranks, resume=True, show=False)

    def measure(self, model: SequenceModel, folder: Path) -> Result:
        text = self._corpus(folder).split("validation")
        curve = loss_by_position(model, text, length=self.length, sequences=self.sequences)
        thinned = thinned_curve(curve, smoothing_window(self.length), CURVE_POINTS)
        return {"loss": octaves(curve), "curve": thinned}

    @property
    def steps(self) -> int:
        return self.training.steps

    def run_config(self, folder: Path) -> Run[LanguageConfig]:
        corpus = self._corpus(folder)
        training = replace(self.training, corpus=corpus.fingerprint)
        return Run(training, ModelConfig.build(corpus.vocab_size, corpus.vocab_size, **self.model))

    def asked(self) -> dict[str, Any]:
        return {"length": self.length, "sequences": self.sequences}

    def figures(self) -> Figures:
        tables = {"loss": octave_ends(self.length)}
        return Figures(tables=tables, curve=("position", "loss", "cumulative_perplexity"))

    def details(self, config: Run[Any], model: SequenceModel) -> dict[str, Any]:
        return {
            "task": f"{self.source}, {self.tokenizer}",
            "tokens": self.training.steps * self.training.tokens_per_step,
            "training_length": self.training.context,
        }

    def changed(
        self, *, steps: int | None = None, lengths: tuple[int, ...] | None = None, sequences: int | None = None
    ) -> Self:
        training = self.training if steps is None else replace(self.training, steps=steps)
        if lengths is not None and len(lengths) != 1:
            raise UsageError(f"{self.name} is measured up to one length; give --lengths a single number.")
        length = self.length if lengths is None else lengths[0]
        return replace(self, training=training, length=length, sequences=sequences or self.sequences)

    def prepare(self, out: Path) -> None:
        folder = self._corpus_folder(out)
        if not (folder / SIDECAR).exists():
            prepare([self.source], self.tokenizer, folder, resume=True)
        super().prepare(out)

    def format_progress(self, metrics: Mapping[str, Any]) -> str:
        return f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"

    def format_figures(self, result: Result) -> str:
        return "  ".join(f"{n}: {loss:.3f}" for n, loss in result["loss"].items())

    def _corpus_folder(self, out: Path) -> Path:
        return out / CORPORA / f"{self.source}-{self.tokenizer}".replace(":", "-").replace("/", "-")

    def _corpus(self, folder: Path) -> Corpus:
        """The corpus beside the folder of its run, out/runs/NAME."""
        return Corpus.open(self._corpus_folder(folder.parents[1]), verify=False)


def octaves(curve: Tensor) -> dict[str, float]:
    """The mean loss over the second half of the first L, L/2, L/4, … positions of a curve [L], down to 128; by where
    each ends."""
    return {str(end): float(curve[end // 2 : end].mean()) for end in map(int, octave_ends(len(curve)))}


def octave_ends(length: int) -> list[str]:
    """Where the octaves of so many positions end, in increasing order."""
    ends = []
    while length >= 128:
        ends.append(str(length))
        length //= 2
    return ends[::-1]
