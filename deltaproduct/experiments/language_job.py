"""One run of an experiment on language: a model trained on a corpus, and its loss far beyond the training context."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltaproduct.corpus import Corpus
from deltaproduct.corpus.sidecar import SIDECAR
from deltaproduct.corpus.writer import prepare
from deltaproduct.errors import UsageError
from deltaproduct.evaluation.perplexity import loss_by_position, smoothing_window, thinned_curve
from deltaproduct.experiments.job import RESULT, RUNS, mixer_facts, read_result, wall_seconds
from deltaproduct.files import make_folder, seal_folder, write_json
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.training.config import LanguageConfig, LanguageRun
from deltaproduct.training.run_folder import CHECKPOINT, CONFIG, METRICS, RUN, is_finished, open_run

CORPORA = "corpora"  # beside the runs' folder


@dataclass(frozen=True)
class LanguageJob:
    """A language model on a corpus that is prepared in the experiment's folder.

    Attributes:
        source, tokenizer: as `lm prepare` takes them.
        model: what `ModelConfig.build` takes, but for the vocabulary, which is the corpus'.
        training: how; its corpus is filled in.
        length: positions up to which the loss is measured, on windows of the validation split.
        sequences: how many windows; None: what `evaluation.windows.evenly_spaced` takes.
    """

    name: str
    label: str
    source: str
    tokenizer: str
    model: Mapping[str, Any]
    training: LanguageConfig
    length: int
    sequences: int | None = None

    @property
    def steps(self) -> int:
        return self.training.steps

    def changed(
        self, *, steps: int | None = None, lengths: tuple[int, ...] | None = None, sequences: int | None = None
    ) -> "LanguageJob":
        training = self.training if steps is None else replace(self.training, steps=steps)
        if lengths is not None and len(lengths) != 1:
            raise UsageError(f"{self.name} is measured up to one length; give --lengths a single number.")
        length = self.length if lengths is None else lengths[0]
        return replace(self, training=training, length=length, sequences=sequences or self.sequences)

    def prepare(self, out: Path) -> None:
        folder = self._corpus_folder(out)
        if not (folder / SIDECAR).exists():
            prepare([self.source], self.tokenizer, folder, resume=True)
        if (out / RUNS / self.name).exists():
            open_run(self._config(self._corpus(out)), out / RUNS / self.name, resume=True)

    def finished(self, out: Path) -> dict[str, Any] | None:
        folder = out / RUNS / self.name
        if not (folder / RESULT).exists() or not is_finished(folder, self._config(self._corpus(out))):
            return None
        curve = ("position", "loss", "cumulative_perplexity")
        return read_result(folder / RESULT, self.name, self._asked(), (), {"loss": octave_ends(self.length)}, curve)

    def run(self, out: Path, *, threads: int | None = None) -> dict[str, Any]:
        from deltaproduct.training.distributed import Ranks  # takes seconds to import
        from deltaproduct.training.language import train_language

        if threads is not None:
            torch.set_num_threads(threads)
        if (result := self.finished(out)) is not None:
            return result
        folder, corpus = out / RUNS / self.name, self._corpus(out)
        config = self._config(corpus)
        if not is_finished(folder, config):
            make_folder(folder.parent)
            with Ranks.started() as ranks:
                train_language(config, corpus, folder, ranks, resume=True, show=False)
        model = SequenceModel.from_pretrained(folder / CHECKPOINT)
        curve = loss_by_position(model, corpus.split("validation"), length=self.length, sequences=self.sequences)
        result = {
            "name": self.name,
            "label": self.label,
            "task": f"{self.source}, {self.tokenizer}",
            **{key: mixer_facts(config.model)[key] for key in ("mixer", "num_householder")},
            "parameters": model.num_parameters,
            "seed": self.training.seed,
            "steps": self.training.steps,
            "tokens": self.training.steps * self.training.tokens_per_step,
            "training_length": self.training.context,
            "checkpoint": str(Path(RUNS) / self.name / CHECKPOINT),
            "wall_seconds": wall_seconds(folder),
            "loss": octaves(curve),
            "curve": thinned_curve(curve, smoothing_window(self.length), 256),
            "asked": self._asked(),
        }
        write_json(folder / RESULT, result)
        seal_folder(folder, [CONFIG, RUN, METRICS, RESULT])
        return result

    def in_training(self, metrics: Mapping[str, Any]) -> str:
        return f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"

    def in_short(self, result: Mapping[str, Any]) -> str:
        figures = "  ".join(f"{n}: {loss:.3f}" for n, loss in result["loss"].items())
        return f"{self.label} seed {self.training.seed}  {figures}  ({result['wall_seconds']:.0f} s)"

    def _asked(self) -> dict[str, Any]:
        return {"length": self.length, "sequences": self.sequences}

    def _corpus_folder(self, out: Path) -> Path:
        return out / CORPORA / f"{self.source}-{self.tokenizer}".replace(":", "-").replace("/", "-")

    def _corpus(self, out: Path) -> Corpus:
        return Corpus.open(self._corpus_folder(out), verify=False)

    def _config(self, corpus: Corpus) -> LanguageRun:
        model = ModelConfig.build(corpus.vocab_size, corpus.vocab_size, **self.model)
        return LanguageRun(replace(self.training, corpus=corpus.fingerprint), model)


def octaves(curve: torch.Tensor) -> dict[str, float]:
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
