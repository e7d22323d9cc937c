"""Whether a compiled model is what it claims to be: read back from disk, and run on words beside its automaton."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from deltaproduct.errors import UsageError
from deltaproduct.files import read_folder, read_json
from deltaproduct.memory import check_memory
from deltaproduct.models import SequenceModel, evaluating
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.automaton_task import lively_symbols, run_automaton
from deltaproduct.theory.compiler import AUTOMATON, CERTIFICATE, Compiled


@dataclass(frozen=True)
class Verification:
    """How a model did on words beside its automaton."""

    words: int
    length: int
    wrong: int  # tokens whose label is not the automaton's state
    first_wrong: int | None  # the earliest position of one, counting symbols from 1
    margin: float | None  # the right label's logit above the next, at least; None where there is but one label


def load(folder: str | Path, device: torch.device | str = "cpu") -> Compiled:
    """What `Compiled.save` wrote.

    Raises UsageError when it is missing or corrupt, or the model does not fit the automaton.
    """
    return read_folder(Path(folder), "compiled model", partial(_load, device=device))


def _load(folder: Path, files: list[str], *, device: torch.device | str) -> Compiled:
    if AUTOMATON not in files:
        raise UsageError(f"{folder} has no {AUTOMATON}: it is no compiled model.")
    automaton = Automaton.from_dict(read_json(folder / AUTOMATON))
    model = SequenceModel.read_files(folder, files).to(device).eval()
    sizes = len(automaton.alphabet) + 1, len(automaton.states)
    if (model.config.vocab_size, model.config.num_labels) != sizes:
        raise UsageError(f"{folder}: a model of {sizes[0]} tokens and {sizes[1]} labels would fit the automaton.")
    return Compiled(model, automaton)


def guaranteed_length(folder: str | Path, dtype: str) -> int | str | None:
    """The length to which a folder's certificate.json guarantees every word in this dtype, or "every length".

    None where there is no certificate, or it says nothing of the dtype. Raises UsageError when it is damaged.
    """
    path = Path(folder) / CERTIFICATE
    if not path.exists():
        return None
    try:
        by_dtype = {entry["dtype"]: entry["guaranteed"] for entry in read_json(path)["certificates"]}
    except (KeyError, TypeError) as e:
        raise UsageError(f"{path} is damaged: it has no certificates.") from e
    return "every length" if by_dtype.get(dtype, 0) is None else by_dtype.get(dtype)


def draw_words(automaton: Automaton, words: int, length: int, seed: int) -> np.ndarray:
    """Random words [words,length] of symbols.

    The first of every two is uniform. The other stays, where it can, among the states from which most others can still
    be reached: in most languages a uniform word soon ends up where nothing changes any more.
    """
    table, rng = np.array(automaton.transitions), np.random.default_rng(seed)
    order, count = lively_symbols(automaton)
    drawn = rng.integers(len(automaton.alphabet), size=(words, length))
    chance, state = rng.random((words // 2, length)), np.full(words // 2, automaton.initial)
    for t in range(length):
        drawn[1::2, t] = order[state, (chance[:, t] * count[state]).astype(int)]
        state = table[state, drawn[1::2, t]]
    return drawn


def verify(compiled: Compiled, *, length: int, words: int = 4, seed: int = 0) -> Verification:
    """Run the model on random words, streamed in pieces with the carried state, and compare every label.

    Raises UsageError when `length` or `words` is less than 1, or so many do not fit into memory.
    """
    if length < 1 or words < 1:
        raise UsageError(f"At least one word of at least one symbol is needed, not {words} of {length}.")
    # Symbols, states and one copy of either in the order of time, of 8 bytes.
    check_memory(f"Verifying {words:,} words of {length:,} symbols", 24 * words * length, "length or words")
    model, automaton = compiled.model, compiled.automaton
    symbols = torch.from_numpy(draw_words(automaton, words, length, seed))
    want = run_automaton(automaton, symbols)[..., None]
    wrong, first_wrong, margin = 0, None, float("inf")
    with evaluating(model):
        (bos,) = model.run_in_pieces(torch.full((words, 1), len(automaton.alphabet)))
        for begin, logits, _ in model.run_in_pieces(symbols, bos.state):
            scores, labels = logits.cpu(), want[:, begin : begin + logits.shape[1]]
            right = scores.gather(-1, labels)[..., 0]
            others = scores.scatter(-1, labels, -torch.inf).amax(-1)
            off = ~(right > others)  # and where a logit is no number
            margin = min(margin, float((right - others).min()))
            if off.any():
                wrong += int(off.sum())
                here = begin + int(off.any(0).nonzero()[0]) + 1
                first_wrong = here if first_wrong is None else first_wrong
    return Verification(words, length, wrong, first_wrong, None if model.config.num_labels == 1 else margin)
