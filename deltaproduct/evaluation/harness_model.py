"""A language model as lm-eval sees it: log-likelihoods and greedy text, from states that are carried.

B sequences · T tokens · D hidden size · V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, Self, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from tqdm import tqdm

from deltaproduct.corpus import Tokenizer
from deltaproduct.errors import UsageError
from deltaproduct.layers.states import device_of
from deltaproduct.models import SequenceModel, evaluating, run_in_pieces
from deltaproduct.models.sequence_model import Piece

PIECE_TOKENS = 2048  # read, and turned into logits, at once: what bounds memory, whatever a text's length

Item = TypeVar("Item")


class Reading(NamedTuple):
    """What B sequences have come to."""

    x: Tensor  # [B,D] what the head sees at the last token of each
    state: Any  # the mixers', batch first

    def rows(self, index: Sequence[int]) -> Self:
        """Those of the sequences, in this order; one may be there several times."""
        chosen = torch.tensor(index, dtype=torch.long, device=self.x.device)
        return tree_map(lambda x: None if x is None else x[chosen], self)


class Stop(NamedTuple):
    """When a generated text ends."""

    strings: tuple[str, ...]
    most: int  # tokens

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """From lm-eval's `gen_kwargs`; `UsageError` if they ask for sampling."""
        known = normalize_gen_kwargs(options)
        if known["do_sample"]:
            raise UsageError("Texts are generated greedily here, but the task asks for sampling (do_sample).")
        return cls(tuple(string for string in known["until"] if string), known["max_gen_toks"])

    def cut(self, text: str) -> str:
        """The text up to the first of the strings."""
        for string in self.strings:
            text = text.split(string)[0]
        return text


class HarnessModel(LM):
    """A `SequenceModel` and its tokenizer behind lm-eval's three questions, answered in evaluation mode.

    Every text begins with the document token, as in training. A context is read once, whatever the number of its
    continuations: each goes on from the context's state. Texts of any length are one stream, in pieces, and nothing is
    cut off.

    Raises:
        UsageError: the model has a hook or a forward of its own, which would not be called.
    """

    def __init__(self, model: SequenceModel, tokenizer: Tokenizer, batch_size: int = 8):
        super().__init__()
        if reason := _why_not_by_parts(model):
            raise UsageError(f"The harness calls the parts of a model and not the model itself, and this one {reason}.")
        self.model, self.codec, self.batch_size = model, tokenizer, batch_size
        self._device = device_of(model)  # lm-eval's own word for it

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln p(continuation | context), and whether it is the greedy one."""
        return self._answers([self._pair(*request.args) for request in requests], "log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """ln p(text) for each text, whole."""
        start = [self.codec.document_token]
        pairs = [(start, self.codec.encode(request.args[0])) for request in requests]
        return [score for score, _ in self._answers(pairs, "rolling log-likelihoods")]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """For each (context, options): greedy text up to a stop string, the document token or the most tokens."""
        prompts = [self._encode(request.args[0]) for request in requests]
        stops = [Stop.of(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        with evaluating(self.model), _bar(len(requests), "texts") as bar:
            for part in _batches(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), self.batch_size):
                written = self._generate([prompts[i] for i in part], [stops[i] for i in part])
                for i, text in zip(part, written, strict=True):
                    texts[i] = text
                bar.update(len(part))
        return texts

    def _encode(self, text: str) -> list[int]:
        return [self.codec.document_token, *self.codec.encode(text)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # Spaces at a context's end belong to the next word: most tokenizers have no token for them there.
        before = self._encode(context.rstrip())
        return before, self._encode(context + continuation)[len(before) :]

    def _answers(self, pairs: Sequence[tuple[list[int], list[int]]], what: str) -> list[tuple[float, bool]]:
        """`_score` for each pair of context and continuation, both ids."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(pairs):
            by_context.setdefault(tuple(context), []).append(i)
        answers = [(0.0, True)] * len(pairs)
        with evaluating(self.model), _bar(len(pairs), what) as bar:
            # Those of one length together, the longest first: what does not fit in memory fails at once.
            for contexts in _batches(sorted(by_context, key=len, reverse=True), self.batch_size):
                reading = self._read(contexts)
                asked = [(row, i) for row, context in enumerate(contexts) for i in by_context[context]]
                for part in _batches(sorted(asked, key=lambda x: -len(pairs[x[1]][1])), self.batch_size):
                    rows, numbers = zip(*part, strict=True)
                    scores = self._score(reading.rows(rows), [pairs[i][1] for i in numbers])
                    for i, score in zip(numbers, scores, strict=True):
                        answers[i] = score
                    bar.update(len(part))
        return answers

    def _pieces(self, rows: Sequence[Sequence[int]], state: Any) -> Iterator[Piece]:
        """Read rows of ids, of any lengths, after `state`. Behind a row's end its x means nothing and its state
        stays."""
        tokens, real = _padded(rows)
        piece = max(1, PIECE_TOKENS // len(rows))
        return run_in_pieces(self.model, tokens, state, piece=piece, mask=real, hidden=True)

    def _read(self, rows: Sequence[Sequence[int]]) -> Reading:
        """Read rows of ids, none empty, from the beginning."""
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        each = torch.arange(len(rows), device=self.device)
        reading = None
        for start, x, state in self._pieces(rows, None):
            place = last - start
            here = x[each, place.clamp(0, x.shape[1] - 1)]
            # A row that has ended keeps what it had; of one that goes on, a later piece replaces it.
            reading = Reading(here if reading is None else torch.where((place >= 0)[:, None], here, reading.x), state)
        assert reading is not None
        return reading

    def _score(self, before: Reading, rows: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """For each row of ids after a context: ln of its probability in nats, and whether each id is the likeliest."""
        targets, real = (x.to(self.device) for x in _padded(rows))
        total = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        # The context predicts the first id, and each id the next.
        after = ((start + 1, x) for start, x, _ in self._pieces([row[:-1] for row in rows], before.state))
        for start, x in chain([(0, before.x[:, None])], after):
            columns = slice(start, start + x.shape[1])
            wanted, counts = targets[:, columns], real[:, columns]
            logits = self.model.head(x[:, : wanted.shape[1]])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            found = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
            total += found.masked_fill(~counts, 0).sum(1, dtype=torch.float64)
            greedy &= ((logits.argmax(-1) == wanted) | ~counts).all(1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _generate(self, prompts: Sequence[Sequence[int]], stops: Sequence[Stop]) -> list[str]:
        """The texts after rows of ids, a token of each at a time; those that have ended are no longer computed."""
        written: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        going = [i for i, stop in enumerate(stops) if stop.most > 0]  # the prompt that each row of `reading` is of
        reading = self._read(prompts).rows(going)
        while going:
            tokens = self.model.head(reading.x).argmax(-1)
            for i, token in zip(going, tokens.tolist(), strict=True):
                written[i].append(token)
                texts[i] = self.codec.decode(written[i])
            rows = [row for row, i in enumerate(going) if not self._has_ended(written[i], texts[i], stops[i])]
            going, reading = [going[row] for row in rows], reading.rows(rows)
            if going:
                x, state = self.model.hidden(tokens[rows, None], reading.state)
                reading = Reading(x[:, 0], state)
        return [stop.cut(text) for stop, text in zip(stops, texts, strict=True)]

    def _has_ended(self, ids: Sequence[int], text: str, stop: Stop) -> bool:
        return (
            len(ids) >= stop.most
            or ids[-1] == self.codec.document_token
            or any(string in text for string in stop.strings)
        )


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens [B,T] with zeros behind the shorter rows, real [B,T] bool)."""
    tokens = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, disable=None)  # None: only on a terminal


def _why_not_by_parts(model: SequenceModel) -> str | None:
    """Why `hidden` and `head` are not all that a call of the model computes; None if they are."""
    first = next(base for base in type(model).__mro__ if vars(base).keys() & {"forward", "hidden"})
    if "forward" in vars(model) or "hidden" not in vars(first):
        return "has a forward of its own"
    if model._forward_hooks or model._forward_pre_hooks:
        return "has a hook, which may change what it computes"
    return None
