"""Where a language run's corpus lies: noted in the run's folder, so that resuming it need not be told again.

The note is no part of the run's configuration: a corpus may be moved, and a run is the same on the copy of a corpus.
The fingerprint decides, which the configuration has.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from deltaproduct.corpus.sidecar import SIDECAR
from deltaproduct.errors import UsageError
from deltaproduct.files import read_json, write_json

PLACE = "data.json"


def note_corpus(run: Path, corpus: Path) -> None:
    """Write down where a run's corpus is, for `find_corpus`."""
    absolute = os.path.abspath(corpus)
    # The second is right where run and corpus are moved or mounted together.
    write_json(run / PLACE, {"corpus": absolute, "corpus_from_here": os.path.relpath(absolute, os.path.abspath(run))})


def is_corpus(folder: Path, fingerprint: str) -> bool:
    """Whether a folder holds the corpus of this fingerprint, as far as its corpus.json says."""
    path = folder / SIDECAR
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == fingerprint


def find_corpus(run: Path, fingerprint: str) -> Path:
    """The folder of the corpus that a run was trained on.

    Raises:
        UsageError: the run does not say where that was, or there is none, or another one now.
    """
    advice = "give the corpus' folder with --data"
    if not (run / PLACE).is_file():
        raise UsageError(f"{run} does not say where its corpus is; {advice}.")
    values = read_json(run / PLACE)
    values = values if isinstance(values, dict) else {}
    noted: list[Any] = [values.get(key) for key in ("corpus", "corpus_from_here")]
    if not all(isinstance(place, str) and place and "\0" not in place for place in noted):
        raise UsageError(f"{run / PLACE} is damaged: it does not say where the run's corpus is; {advice}.")
    places = [Path(noted[0]), Path(os.path.normpath(run.absolute() / noted[1]))]
    there = [place for place in places if (place / SIDECAR).is_file()]
    for place in there:
        if is_corpus(place, fingerprint):
            return place
    if there:
        raise UsageError(f"{run} was trained on another corpus than {there[0]} is now; {advice}.")
    raise UsageError(f"{run} was trained on the corpus {places[0]}, which is not there any more; {advice}.")
