"""`deltaproduct lm prepare`: make a corpus for language models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from deltaproduct.cli.outputs import say
from deltaproduct.corpus.shakespeare import HELD_OUT
from deltaproduct.corpus.sidecar import Sidecar
from deltaproduct.corpus.source import DOCUMENT_SHARE, TAIL_SHARE
from deltaproduct.corpus.sources import KINDS
from deltaproduct.corpus.stdlib import MODULE_SHARE
from deltaproduct.corpus.tokenizer import SPECS
from deltaproduct.corpus.writer import SHARD_TOKENS, PreparationProgress, prepare

_SHARE = (
    f"of what is held out for validation; None: {DOCUMENT_SHARE} of the documents, or the last {TAIL_SHARE} of the "
    f"text where these are too few, {MODULE_SHARE} of the standard library's modules, and of shakespeare always "
    f"{', '.join(HELD_OUT)}"
)


@dataclass(kw_only=True)
class LmPrepare:
    """Make a corpus for language models: texts to token ids in memory-mapped shards, some held out for validation."""

    source: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(help=f"{KINDS}; given several times, one after the other"),
    ] = ()
    tokenizer: Annotated[str, tyro.conf.arg(help=SPECS)] = "bytes"
    out: Annotated[Path, tyro.conf.arg(help="folder of the corpus; created")]
    shard_tokens: Annotated[int, tyro.conf.arg(help="tokens in a file")] = SHARD_TOKENS
    validation_share: Annotated[float | None, tyro.conf.arg(help=_SHARE)] = None
    workers: Annotated[int, tyro.conf.arg(help="processes that encode; the result is the same")] = 1
    resume: Annotated[bool, tyro.conf.arg(help="go on with the corpus in --out, to the same bytes")] = False

    def run(self) -> None:
        from deltaproduct.corpus import Corpus

        try:
            sidecar = self._prepare()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"The same command with --resume goes on with the corpus in {self.out}.") from None
        corpus = Corpus.open(self.out, verify=False)
        say(f"{self.out}: {corpus.vocab_size:,} tokens in the vocabulary, {sidecar.dtype}, {corpus.fingerprint}")
        for name, split in sidecar.splits.items():
            print(f"  {name}: {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards")
        if not sidecar.splits["validation"].documents:
            print("  No document was held out, so nothing can be validated, and `lm train` needs that.")

    def _prepare(self) -> Sidecar:
        from deltaproduct.progress import progress_bar

        with progress_bar("lm prepare, %", 100) as bar:

            def show(progress: PreparationProgress) -> None:
                percent = 100 * progress.done // progress.total if progress.total else 0
                bar.update(percent, f"{progress.doing}, {progress.tokens:,} tokens")

            return prepare(
                self.source,
                self.tokenizer,
                self.out,
                shard_tokens=self.shard_tokens,
                validation_share=self.validation_share,
                workers=self.workers,
                resume=self.resume,
                progress=show,
                remark=bar.say,
            )
