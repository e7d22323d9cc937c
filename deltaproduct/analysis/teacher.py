"""A sequence model as a teacher: words of symbols in, the model's label after each symbol out.

B words · T symbols in each · s symbols · k tokens that spell a symbol · F floats of the model's state.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel, run_in_pieces
from deltaproduct.models.sequence_model import PIECE_TOKENS, Piece
from deltaproduct.tasks import Task
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.group_tasks import BlockTask, GroupTask
from deltaproduct.tasks.groups import Group
from deltaproduct.tasks.task import check_fits

PIECE_FLOATS = 1 << 26  # of states that are held at once
SKETCH = 128  # numbers that a model's state is summed up in


@dataclass(frozen=True)
class Vocabulary:
    """What tokens and labels mean: a symbol is one or more tokens, and its label is the one at the last of them."""

    bos: int
    spelling: tuple[tuple[int, ...], ...]  # the k tokens of each of the s symbols
    symbols: tuple[str, ...]  # their names
    labels: tuple[str, ...]  # names of the model's labels
    bos_counts: bool = True  # whether the label at BOS means anything: that of the empty word
    accepting: tuple[int, ...] | None = None  # labels that accept; None: that of the state before the first symbol
    group: Group | None = None  # whose elements the labels are, in order,
    elements: tuple[int, ...] = ()  # and the element that each symbol is


def vocabulary(config: ModelConfig, source: Task | Automaton | None = None) -> Vocabulary:
    """The vocabulary of a model trained on a task, or compiled from an automaton (whose labels are its states).

    Without either, the last token is taken for BOS, and symbols and labels are called by their numbers. A group task's
    symbols are the elements that it draws; where it spends k tokens on each, a symbol is a block of k. No task scores
    the label at BOS, so that whatever a model trained on one says there is not counted.

    Raises UsageError when the model's sizes are not those of the task or the automaton.
    """
    if isinstance(source, Automaton):
        sizes = len(source.alphabet) + 1, len(source.states)
        if (config.vocab_size, config.num_labels) != sizes:
            raise UsageError(f"A model of {sizes[0]} tokens and {sizes[1]} labels would fit the automaton, not "
                             f"one of {config.vocab_size} and {config.num_labels}.")  # fmt: skip
        bos = len(source.alphabet)
        spelling = tuple((i,) for i in range(bos))
        return Vocabulary(bos, spelling, source.alphabet, source.states, accepting=source.accepting)
    if source is None:
        bos, numbers = config.vocab_size - 1, tuple(map(str, range(config.num_labels)))
        if bos < 1:
            raise UsageError("A model of one token, BOS, reads no symbols.")
        return Vocabulary(bos, tuple((i,) for i in range(bos)), tuple(map(str, range(bos))), numbers)
    check_fits(config, source)
    labels = tuple(source.label_name(i) for i in range(source.num_labels))
    if isinstance(source, GroupTask):
        elements, names = _elements(source), source.group.names
        blocks = tuple(_block(source, i) for i in elements)
        symbols = tuple(names[i] for i in elements)
        return Vocabulary(source.bos_id, blocks, symbols, labels, False, (source.identity,), source.group, elements)
    tokens = [i for i in range(source.vocab_size) if i != source.bos_id]
    return Vocabulary(source.bos_id, tuple((i,) for i in tokens), tuple(map(source.token_name, tokens)), labels, False)


def _elements(task: GroupTask) -> tuple[int, ...]:
    """What can come as a symbol: what is drawn, or any product where several draws are multiplied into one."""
    multiplied = isinstance(task, BlockTask) and task.draws_per_symbol > 1
    return tuple(range(len(task.elements))) if multiplied else task.inputs


def _block(task: GroupTask, element: int) -> tuple[int, ...]:
    if not isinstance(task, BlockTask):
        return (element,)
    filler = {"repeat": element, "filler": task.filler_id, "identity": task.identity}[task.filling]
    assert filler is not None  # a task that fills has a filler
    return (element, *[filler] * (task.block - 1))


class Teacher:
    """Answers what label the model gives after each symbol of a word.

    Attributes:
        symbols: s.
        num_labels: of the model; a word's labels are below it.
        asked: how many words were put to the model so far.
        before: the model's label at BOS, before the first symbol.
    """

    def __init__(self, model: SequenceModel, vocabulary: Vocabulary):
        self.model, self.symbols, self.num_labels = model, len(vocabulary.spelling), model.config.num_labels
        self.asked = 0
        self._bos, self._spelling = vocabulary.bos, torch.tensor(vocabulary.spelling)  # [s,k]
        self.before = int(self._read(self._begin(1)).x.argmax())

    def labels(self, words: np.ndarray) -> np.ndarray:
        """The label after each symbol of words [B,T]: [B,T]."""
        self.asked += len(words)
        k, found = self._spelling.shape[1], np.empty(words.shape, dtype=np.int64)
        rows = max(1, PIECE_TOKENS // (1 + k * words.shape[1]))
        for begin in range(0, len(words), rows):
            piece = self._spelling[torch.from_numpy(words[begin : begin + rows])].flatten(1)  # [rows,T·k]
            logits = self._read(torch.cat([self._begin(len(piece)), piece], dim=1)).x
            found[begin : begin + rows] = logits[:, k::k].argmax(-1).cpu().numpy()
        return found

    def sketches(self, words: np.ndarray) -> np.ndarray:
        """The model's recurrent state after each symbol of words [B,T], in short: [B,T,min(F,SKETCH)] float32.

        All F floats of all layers, each added with a random sign to one of SKETCH sums, which keeps distances about as
        they are ("feature hashing", arXiv 0902.2206). The signs are always the same.
        """
        found = np.empty((*words.shape, min(self.model.state_size, SKETCH)), dtype=np.float32)
        rows = max(1, PIECE_FLOATS // self.model.state_size)
        for begin in range(0, len(words), rows):
            spelled = self._spelling[torch.from_numpy(words[begin : begin + rows])]  # [rows,T,k]
            start = self._read(self._begin(len(spelled))).state
            pieces = run_in_pieces(self.model, spelled.flatten(1), start, piece=spelled.shape[2])
            for t, (_, _, state) in enumerate(pieces):
                flat = torch.cat([x.flatten(1).float().cpu() for x in _tensors(state)], dim=1)
                found[begin : begin + rows, t] = _sketch(flat).numpy()
        return found

    def _begin(self, words: int) -> Tensor:
        """BOS of so many words [B,1]."""
        return torch.full((words, 1), self._bos)

    def _read(self, tokens: Tensor) -> Piece:
        """What the model says of words [B,T], read at once."""
        return next(run_in_pieces(self.model, tokens, piece=tokens.shape[1]))


def _tensors(state: Any) -> list[Tensor]:
    """The tensors [B,…] of a model's state, which is tuples of tuples of them, or None where a layer has none."""
    if isinstance(state, Tensor):
        return [state]
    return [] if state is None else [x for part in state for x in _tensors(part)]


def _sketch(flat: Tensor) -> Tensor:
    """[B,F] → [B,min(F,SKETCH)]."""
    floats = flat.shape[1]
    if floats <= SKETCH:
        return flat
    rng = torch.Generator().manual_seed(0)
    bucket = torch.randint(SKETCH, (floats,), generator=rng)
    sign = 2 * torch.randint(2, (floats,), generator=rng) - 1
    return flat.new_zeros(len(flat), SKETCH).index_add_(1, bucket, flat * sign)
