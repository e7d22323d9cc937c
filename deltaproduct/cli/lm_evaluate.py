"""`deltaproduct lm evaluate`: perplexity, loss beyond the training context, the rank of states, and the harness."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from deltaproduct.cli.flags import BackendName
from deltaproduct.cli.outputs import check_new_folder, plain, say
from deltaproduct.errors import UsageError
from deltaproduct.files import replaced_folder, write_bytes, write_json

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table
    from torch import Tensor

    from deltaproduct.corpus import Corpus, Split
    from deltaproduct.evaluation.perplexity import Bucket
    from deltaproduct.evaluation.windows import TokensDone
    from deltaproduct.models import SequenceModel
    from deltaproduct.training.run_folder import Located

REPORT, ARRAYS = "evaluation.json", "arrays.npz"
LOSS_FIGURE, RANK_FIGURE = "loss_by_position.png", "effective_rank.png"
EXTRAPOLATION = 8  # times the training context
BUCKETS = 8  # of positions

What = Literal["perplexity", "length-extrapolation", "effective-rank", "harness"]
# The flags that not everything takes, and what does.
TAKEN_BY: dict[str, tuple[What, ...]] = {
    "data": ("perplexity", "length-extrapolation", "effective-rank"),
    "length": ("perplexity", "length-extrapolation", "effective-rank"),
    "sequences": ("perplexity", "length-extrapolation"),
    "smooth": ("length-extrapolation",),
    "tasks": ("harness",),
    "limit": ("harness",),
}


@dataclass
class _Found:
    """What an evaluation came to."""

    figures: dict[str, Any]  # for JSON
    heading: str  # for a reader, with the table below it
    table: Table
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    draw: Callable[[Path], None] = lambda folder: None  # writes its picture, if it has one, into a folder


@dataclass(kw_only=True)
class LmEvaluate:
    """How well a language model predicts a held-out text, within its training context and beyond; --out keeps the data
    and a figure."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="a run's folder, or a checkpoint's")]
    what: Annotated[
        What,
        tyro.conf.arg(help="loss within the training context; to 8 times that; the states' rank; or lm-eval's tasks"),
    ]
    data: Annotated[Path | None, tyro.conf.arg(help="the folder that `lm prepare` wrote; all but harness need it")] = (
        None
    )
    split: Annotated[str, tyro.conf.arg(help="of the data: validation or train")] = "validation"
    length: Annotated[
        int | None, tyro.conf.arg(help="tokens of a window; None: the training context, 8 times that, or 16384")
    ] = None
    sequences: Annotated[
        int | None, tyro.conf.arg(help="windows; None: the whole split, or up to 256 that may overlap")
    ] = None
    smooth: Annotated[
        int | None, tyro.conf.arg(help="positions that the curve is averaged over; None: length/16, at most 501")
    ] = None
    tasks: Annotated[
        tuple[str, ...], tyro.conf.arg(help="of lm-eval, or papers for all of theirs; none: our own offline")
    ] = ()
    limit: Annotated[int | None, tyro.conf.arg(help="examples of each task; None: all")] = None
    out: Annotated[Path | None, tyro.conf.arg(help="the folder to write, which must not exist yet")] = None
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    backend: BackendName = "auto"
    json: Annotated[bool, tyro.conf.arg(help="print one JSON object and nothing else")] = False

    def run(self) -> None:
        self._check_flags()
        import numpy as np
        from rich.console import Console

        from deltaproduct.machine import command_line, describe_machine

        model = self._model()
        began = time.perf_counter()
        found = {
            "perplexity": self._perplexity,
            "length-extrapolation": self._length_extrapolation,
            "effective-rank": self._effective_rank,
            "harness": self._harness,
        }[self.what](model)
        report = {
            "what": self.what,
            "source": str(self.source),
            "parameters": model.num_parameters,
            **found.figures,
            "seconds": round(time.perf_counter() - began, 3),
            "command": command_line(),
            "machine": describe_machine(),
        }
        if self.out is not None:
            with replaced_folder(self.out) as fresh:
                check_new_folder(self.out)  # another process may have made it meanwhile
                write_json(fresh / REPORT, report)
                if found.arrays:
                    buffer = io.BytesIO()
                    np.savez_compressed(buffer, allow_pickle=False, **found.arrays)
                    write_bytes(fresh / ARRAYS, buffer.getvalue())
                found.draw(fresh)
        if self.json:
            print(json.dumps(report))
        else:
            say(found.heading)
            Console().print(found.table)

    def _check_flags(self) -> None:
        for flag, takers in TAKEN_BY.items():
            if getattr(self, flag) not in (None, ()) and self.what not in takers:
                raise UsageError(f"--what {self.what} has no use for --{flag}; it is for {' and '.join(takers)}.")
        if self.data is None and self.what in TAKEN_BY["data"]:
            raise UsageError(f"--what {self.what} needs --data, the folder that `deltaproduct lm prepare` wrote.")
        if self.smooth is not None and self.smooth < 1:
            raise UsageError(f"smooth must be at least 1, not {self.smooth}.")
        if self.out is not None:
            check_new_folder(self.out)
            if self.what in ("length-extrapolation", "effective-rank"):
                from deltaproduct.plots.style import pyplot

                pyplot()  # where it is missing, better now than after all the work
        self._located()

    def _located(self) -> Located:
        from deltaproduct.training.run_folder import locate

        return locate(self.source, "language model")

    def _model(self) -> SequenceModel:
        from deltaproduct.machine import choose_device
        from deltaproduct.models import SequenceModel

        folder = self._located().checkpoint
        return SequenceModel.from_pretrained(folder, device=choose_device(self.device)).use_backend(self.backend)

    def _text(self, model: SequenceModel) -> tuple[Corpus, Split]:
        from deltaproduct.corpus import Corpus
        from deltaproduct.evaluation.windows import check_vocabulary

        assert self.data is not None  # `_check_flags`
        corpus = Corpus.open(self.data)
        check_vocabulary(model.config, corpus.vocab_size)
        split = corpus.split(self.split)
        if not split.num_tokens:
            raise UsageError(f"The corpus {self.data} has no tokens in its split {self.split!r}.")
        return corpus, split

    def _of_the_data(self, corpus: Corpus, length: int) -> dict[str, Any]:
        return {
            "data": str(self.data),
            "fingerprint": corpus.fingerprint,
            "split": self.split,
            "training_context": self._training_context(),
            "length": length,
        }

    def _training_context(self) -> int | None:
        """What the checkpoint says; None for one that came from no language run."""
        from deltaproduct.training.config import LanguageConfig

        trained = self._located().trained_as()
        settings = None if trained is None else trained.training
        return settings.context if isinstance(settings, LanguageConfig) else None

    def _length(self, times: int) -> int:
        """--length, or so many times the training context."""
        if self.length is not None:
            return self.length
        context = self._training_context()
        if context is None:
            raise UsageError(f"{self.source} does not say at what context it was trained; give a --length.")
        return times * context

    def _perplexity(self, model: SequenceModel) -> _Found:
        from deltaproduct.evaluation.perplexity import perplexity

        context = self._length(1)
        corpus, split = self._text(model)
        total = split.num_tokens - 1 if self.sequences is None else self.sequences * context
        with self._progress(total) as progress:
            found = perplexity(
                model, split, corpus.tokenizer.decode, context=context, sequences=self.sequences, progress=progress
            )
        figures = {
            "tokens": found.tokens,
            "bytes": found.bytes,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "byte_perplexity": found.byte_perplexity,
        }
        buckets = _buckets(found.by_position, found.predicted)
        heading = (f"{found.perplexity:.3f} per token ({found.loss:.4f} nats), {found.bits_per_byte:.4f} bits per byte "
                   f"({found.byte_perplexity:.3f}), over {found.tokens:,} tokens of {self.split}")  # fmt: skip
        return _Found(
            {**self._of_the_data(corpus, context), **figures, "buckets": [b._asdict() for b in buckets]},
            heading,
            _bucket_table(buckets),
            {"loss": found.by_position.numpy(), "predicted": found.predicted.numpy()},
        )

    def _length_extrapolation(self, model: SequenceModel) -> _Found:
        from deltaproduct.evaluation.perplexity import loss_by_position, smoothing_window, thinned_curve
        from deltaproduct.evaluation.windows import evenly_spaced
        from deltaproduct.plots.language import loss_by_position_figure

        length = self._length(EXTRAPOLATION)
        corpus, split = self._text(model)
        windows = len(evenly_spaced(split, length, self.sequences))
        smooth = smoothing_window(length) if self.smooth is None else self.smooth
        with self._progress(windows * length) as progress:
            loss = loss_by_position(model, split, length=length, sequences=windows, progress=progress)
        curve, buckets = thinned_curve(loss, smooth), _buckets(loss)
        figures = {"sequences": windows, "smooth": smooth, "buckets": [b._asdict() for b in buckets], "curve": curve}
        trained_at = self._training_context()

        def draw(folder: Path) -> None:
            loss_by_position_figure({self.source.resolve().name: [curve]}, folder / LOSS_FIGURE, trained_at=trained_at)

        heading = f"{windows} windows of {length:,} tokens of {self.split}"
        return _Found(
            {**self._of_the_data(corpus, length), **figures},
            heading,
            _bucket_table(buckets),
            {"loss": loss.numpy()},
            draw,
        )

    def _effective_rank(self, model: SequenceModel) -> _Found:
        import numpy as np

        from deltaproduct.analysis.effective_rank import PAPERS_LENGTH, effective_ranks
        from deltaproduct.plots.language import effective_rank_figure

        length = PAPERS_LENGTH if self.length is None else self.length
        corpus, split = self._text(model)
        with self._progress(length) as progress:
            found = effective_ranks(model, split, length=length, progress=progress)
        context = self._training_context()
        ranks = {layer: of_layer.numpy() for layer, of_layer in found.ranks.items()}
        means = {"mean": found.means()}
        if context is not None and context < length:
            means |= {"mean_within_context": found.means(0, context), "mean_beyond": found.means(context)}

        def draw(folder: Path) -> None:
            effective_rank_figure(
                ranks, folder / RANK_FIGURE, document_starts=found.document_starts, trained_at=context,
                title=f"Effective rank of each head's state: {self.source.resolve().name}",
            )  # fmt: skip

        arrays = {f"layer_{layer}": of_layer.astype(np.float32) for layer, of_layer in ranks.items()}
        return _Found(
            {**self._of_the_data(corpus, length), "document_starts": found.document_starts, **means},
            f"each head's effective rank over {length:,} tokens of {self.split}",
            _rank_table(means),
            arrays,
            draw,
        )

    def _harness(self, model: SequenceModel) -> _Found:
        from deltaproduct.corpus import TOKENIZER, load_tokenizer
        from deltaproduct.evaluation.harness import evaluate_harness  # lm-eval is slow to import
        from deltaproduct.evaluation.windows import check_vocabulary

        tokenizer = load_tokenizer(self.source / TOKENIZER)
        check_vocabulary(model.config, tokenizer.vocab_size)
        results = evaluate_harness(model, tokenizer, self.tasks or ("offline",), limit=self.limit)
        return _Found(results, f"{len(results['tasks'])} tasks of lm-eval", _result_table(results))

    @contextmanager
    def _progress(self, tokens: int) -> Iterator[TokensDone]:
        from deltaproduct.progress import progress_bar

        with progress_bar(f"{self.what}, tokens", tokens, show=not self.json) as bar:
            yield lambda done: bar.update(done, "")


def _buckets(loss: Tensor, predicted: Tensor | None = None) -> list[Bucket]:
    """Perplexity in eighths of the window."""
    from deltaproduct.evaluation.perplexity import perplexity_in_buckets

    return perplexity_in_buckets(loss, -(-len(loss) // BUCKETS), predicted)


def _bucket_table(buckets: list[Bucket]) -> Table:
    from rich.table import Table

    table = Table()
    for column in ("tokens read", "perplexity"):
        table.add_column(column, justify="right")
    for bucket in buckets:
        table.add_row(f"{bucket.start + 1:,} – {bucket.stop:,}", f"{bucket.perplexity:.3f}")
    return table


def _rank_table(means: dict[str, dict[int, list[float]]]) -> Table:
    from rich.table import Table

    table = Table("layer", *(name.replace("_", " ") for name in means))
    for layer in means["mean"]:
        shown = ("  ".join(f"{rank:.2f}" for rank in of_layers[layer]) for of_layers in means.values())
        table.add_row(str(layer), *shown)
    return table


def _result_table(results: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("task", "metric", "value")
    for task, metrics in results["tasks"].items():
        for metric, value in metrics.items():
            table.add_row(plain(task), plain(metric), f"{value:.4f}")
    return table
