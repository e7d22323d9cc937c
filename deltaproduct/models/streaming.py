"""A conversation with a language model: what has been read is a state of constant size, which can be saved.

T tokens · V size of the vocabulary.
"""

import hashlib
import warnings
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from deltaproduct.errors import UsageError, first_line
from deltaproduct.files import read_json, replaced_folder, verified_folder, write_json
from deltaproduct.layers.plain import unusual
from deltaproduct.models.config import ModelConfig, reasons, strict_converter, usage_error
from deltaproduct.models.decoding import Decoder, ModelDecoder, NotDecodable, decoder_for
from deltaproduct.models.sampling import Sampling, draw
from deltaproduct.models.sequence_model import SequenceModel
from deltaproduct.models.states import check_state, from_named, initial_state, named_tensors
from deltaproduct.models.weights import read_tensors, write_tensors
from deltaproduct.renamed import renamed_names

PIECE = 512  # tokens of a prompt that are read at once: memory is for so many, however long the prompt is
STREAM = "stream.json"
TENSORS = "stream.safetensors"
WHAT = "saved conversation"

_SAMPLING = strict_converter()


class Stream:
    """A language model that reads and writes one sequence, carrying the state of all that came before.

        stream = Stream(model, Sampling(temperature=0.8, top_p=0.95))
        stream.prefill([document_token, *tokenizer.encode("To be, or")])
        for token in stream.generate(100, stop=[document_token]): ...

    The state does not grow with what is read or written (a cache of attention does). Written tokens are part of what
    has been read, so that `prefill` and `generate` can follow one another in any order.

    Attributes:
        position: tokens read and written so far.
        logits: [V], what the next token will be drawn from; None before the first token.

    Raises:
        UsageError: the model's outputs are not its inputs, so that it does not say what comes next.
    """

    def __init__(self, model: SequenceModel, sampling: Sampling | None = None):
        inputs, outputs = model.config.vocab_size, model.config.num_labels
        if inputs != outputs:
            raise UsageError(
                f"The model labels {inputs} tokens with {outputs} labels; only one that predicts its own next token, "
                "with vocab_size equal to num_labels, can write."
            )
        self.model, self.position = model, 0
        self.logits: Tensor | None = None
        self.sampling = Sampling() if sampling is None else sampling
        self._generator = self.sampling.generator()
        self._decoder = decoder_for(model)

    @property
    def is_native(self) -> bool:
        """Whether tokens are decoded on the native engine."""
        return isinstance(self._decoder, Decoder)

    @property
    def state(self) -> tuple[Any, ...] | None:
        """The carried state, as `SequenceModel` takes and returns it; None before the first token."""
        return self._decoder.state if self.position else None

    def resample(self, sampling: Sampling) -> None:
        """Draw like this from here on; a seed other than the one so far begins its own random numbers."""
        if sampling.seed != self.sampling.seed:
            self._generator = sampling.generator()
        self.sampling = sampling

    def prefill(self, tokens: Iterable[int] | Tensor) -> None:
        """Read T tokens, a list or [T] ints or anything that yields them, in pieces: in constant memory.

        Raises:
            UsageError: something is no token of the vocabulary. The pieces before it have been read.
        """
        for piece in _pieces(tokens):
            self._check(piece)
            if len(piece) == 1:
                self._step(piece)
            else:
                self._read_piece(piece)

    def generate(self, tokens: int, stop: Container[int] = ()) -> Iterator[int]:
        """Draw so many tokens, one after the other, each as soon as it is known.

        A token in `stop` ends this early: it is neither given out nor read. Whoever leaves the loop finds in the state
        what the loop was given, and nothing more.

        Raises:
            UsageError: nothing has been read yet, or the number is negative.
        """
        if tokens < 0:
            raise UsageError(f"The number of tokens to write must be 0 or more, not {tokens}.")
        if self.logits is None:
            raise UsageError("Nothing has been read yet; let the model read its document token, which begins a text.")
        return self._generate(tokens, stop)

    def _generate(self, tokens: int, stop: Container[int]) -> Iterator[int]:
        for _ in range(tokens):
            assert self.logits is not None
            token = draw(self.logits, self.sampling, self._generator)
            if token in stop:
                return
            self._step(torch.tensor([token]))
            yield token

    def read(self, tokens: Iterable[int] | Tensor) -> None:
        """The old name of `prefill`."""
        _warn("read", "prefill")
        self.prefill(tokens)

    def write(self, tokens: int, stop: Container[int] = ()) -> Iterator[int]:
        """The old name of `generate`."""
        _warn("write", "generate")
        return self.generate(tokens, stop)

    def _check(self, piece: Tensor) -> None:
        if piece.dim() != 1 or piece.dtype not in (torch.int32, torch.int64):
            raise UsageError(f"Tokens must be one sequence of ints, not {piece.dtype} {list(piece.shape)}.")
        size = self.model.config.vocab_size
        wrong = piece[(piece < 0) | (piece >= size)]
        if len(wrong):
            raise UsageError(f"Token {int(wrong[0])} is not in the model's vocabulary, 0 … {size - 1}.")

    @torch.no_grad()
    def _read_piece(self, piece: Tensor) -> None:
        piece, model = piece[None].to(self.model.device), self.model
        if unusual(model, owner=SequenceModel) is None:
            x, state = model.hidden(piece, self.state)
            logits = model.head(x[:, -1])  # the others would be V numbers for each token
        else:
            logits, state = model(piece, self.state)
            logits = logits[:, -1]
        try:
            self._decoder.load(state)
        except NotDecodable:
            self._call_the_model(state)
        self.logits = logits[0].cpu()
        self.position += piece.shape[1]

    @torch.no_grad()
    def _step(self, token: Tensor) -> None:
        try:
            logits = self._decoder(token)
        except NotDecodable:  # since it was chosen, the model has become one that only the model can compute
            self._call_the_model(self.state)
            logits = self._decoder(token)
        self.logits = logits[0].cpu()
        self.position += 1

    def _call_the_model(self, state: tuple[Any, ...] | None) -> None:
        """From here on, in place of the native engine."""
        self._decoder = ModelDecoder(self.model)
        self._decoder.load(state)

    def save(self, folder: str | Path) -> None:
        """Write stream.json, stream.safetensors and manifest.json, replacing an earlier save in one step.

        Raises:
            UsageError: nothing has been read, or the folder holds something else or cannot be written; what was there
                before is untouched.
        """
        folder = Path(folder)
        if self.logits is None:
            raise UsageError("Nothing has been read yet, so there is no conversation to save.")
        check_conversation_folder(folder)
        state = {f"state.{name}": x for name, x in named_tensors(self.state).items()}
        tensors = state | {"logits": self.logits, "generator": self._generator.get_state()}
        with replaced_folder(folder) as fresh:
            # Clones: states may be views of one tensor, which the format does not have.
            write_tensors(fresh / TENSORS, {name: x.cpu().contiguous().clone() for name, x in tensors.items()})
            write_json(
                fresh / STREAM,
                {
                    "position": self.position,
                    "sampling": asdict(self.sampling),
                    "config": self.model.config.to_dict(),
                    "weights": fingerprint(self.model),
                },
            )

    @classmethod
    def load(cls, folder: str | Path, model: SequenceModel) -> Self:
        """Go on from what `save` wrote, exactly as the saved stream would have gone on.

        Raises:
            UsageError: it is missing or corrupt, or was written with another model than this.
        """
        folder = Path(folder)
        files = verified_folder(folder, WHAT)
        for name in (STREAM, TENSORS):
            if name not in files:
                raise UsageError(f"The {WHAT} {folder} has no {name}.")
        saved = read_json(folder / STREAM)
        _check_same(folder, saved, model)
        tensors = read_tensors(folder / TENSORS)
        try:
            sampling = _SAMPLING.structure(saved["sampling"], Sampling)
        except Exception as e:
            why = usage_error(e) or reasons(e, "sampling")
            raise UsageError(f"{folder / STREAM} is damaged or of another version of this library: {why}.") from e
        stream = cls(model, sampling)
        position = saved["position"]
        if not isinstance(position, int) or isinstance(position, bool) or not 1 <= position < 2**63:
            raise UsageError(f"{folder / STREAM} is damaged: its position is {position!r:.40}.")
        device = model.device
        template = initial_state(model, 1, device="meta")  # for its names alone
        wanted = {f"state.{name}" for name in named_tensors(template)} | {"logits", "generator"}
        if wanted != set(tensors):
            name = min(wanted ^ set(tensors))
            raise UsageError(
                f"The {WHAT} {folder} is of another version of this library: its tensors differ in {name}."
            )
        state = from_named(template, {n: x.to(device) for n, x in tensors.items()}, "state")
        try:
            check_state(model, state, 1, device)
            logits = tensors["logits"]
            if logits.shape != (model.config.vocab_size,) or not logits.is_floating_point():
                raise UsageError(f"It has logits of {logits.dtype} {list(logits.shape)}.")
            for name, x in tensors.items():
                if x.is_floating_point() and not bool(x.isfinite().all()):
                    raise UsageError(f"It has numbers in {name} that are not finite.")
            stream._generator.set_state(tensors["generator"])
        except (UsageError, RuntimeError, TypeError) as e:
            raise UsageError(f"The {WHAT} {folder} is damaged. {first_line(e)}") from e
        stream._decoder.load(state)
        stream.logits, stream.position = tensors["logits"], saved["position"]
        return stream


def check_conversation_folder(folder: Path) -> None:
    """`UsageError` if something is there that a conversation may not be saved over: anything but an earlier one."""
    if folder.exists() and not (folder / STREAM).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something other than a {WHAT}; choose another folder.")


def fingerprint(model: SequenceModel) -> str:
    """The sha256 of all weights, with their names and dtypes; `UsageError` if they are quantised or offloaded."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        if not isinstance(x, Tensor) or x.is_meta or x.is_quantized:
            raise UsageError(
                f"A conversation is saved with the sha256 of the model's weights, and {name} cannot be read: it is "
                "quantised or offloaded. Use the plain model."
            )
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_same(folder: Path, saved: Any, model: SequenceModel) -> None:
    if not isinstance(saved, dict) or set(saved) != {"position", "sampling", "config", "weights"}:
        raise UsageError(f"{folder / STREAM} is of another version of this library: its entries are other ones.")
    for name, (theirs, ours) in ModelConfig.from_dict(saved["config"]).differences(model.config).items():
        raise UsageError(f"The {WHAT} {folder} is with another model: its {name} is {theirs}, this model's {ours}.")
    if saved["weights"] != fingerprint(model):
        raise UsageError(f"The {WHAT} {folder} is with a model of the same configuration but of other weights.")


def _pieces(tokens: Iterable[int] | Tensor) -> Iterator[Tensor]:
    """At most PIECE tokens at a time, of any length."""
    if isinstance(tokens, Tensor):
        if tokens.numel():
            yield from tokens.split(PIECE) if tokens.dim() else [tokens]
        return
    rest = iter(tokens)
    while piece := list(islice(rest, PIECE)):
        yield torch.tensor(piece)


def _warn(old: str, new: str) -> None:
    message = f"Stream.{old} is now Stream.{new}; the old name goes with the next release."
    warnings.warn(message, DeprecationWarning, stacklevel=3)


__getattr__ = renamed_names(
    __name__,
    {
        "check_place": "check_conversation_folder",
    },
)
