"""`deltaproduct lm generate`: a language model goes on with a prompt, or with a conversation that was saved."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from deltaproduct.cli.outputs import check_folder
from deltaproduct.errors import UsageError, shown
from deltaproduct.files import make_folder, read_text

if TYPE_CHECKING:
    from deltaproduct.corpus import Tokenizer
    from deltaproduct.models import SequenceModel
    from deltaproduct.models.sampling import Sampling
    from deltaproduct.models.streaming import Stream

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no character, or not yet one
MOST_BYTES = 4  # bytes of a character in UTF-8, and so the most tokens that it can be spread over


class TextStream:
    """Text out of tokens as they come: a character appears with the token that completes it.

    All that came so far, and `rest` at the end, is what the tokenizer makes of all tokens together.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._recent: list[int] = []  # what follows is decoded behind these, so that a character can be completed
        self._shown = 0  # characters of their text that have been given out

    def add(self, token: int) -> str:
        """The text that this token brings."""
        recent = [*self._recent, token]
        text = self._tokenizer.decode(recent)
        # An unfinished character is decoded as a single replacement, whatever is there of its bytes.
        new = text.removesuffix(UNFINISHED)[self._shown :]
        self._recent = recent[-MOST_BYTES:]
        self._shown = len(self._tokenizer.decode(self._recent).removesuffix(UNFINISHED))
        return new

    def rest(self) -> str:
        """What is held back: a replacement for a character that was never completed."""
        return self._tokenizer.decode(self._recent)[self._shown :]


@dataclass(kw_only=True)
class LmGenerate:
    """Let a language model write: token by token, from a state of constant size, until a document ends.

    Text goes to standard output, figures to standard error. The sampling of a conversation that is loaded is kept but
    for what is given here. Ctrl-C ends the text early; with --save-state, the conversation up to there is saved.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="a run's folder, or a checkpoint's that has a "
                                                                     "folder `tokenizer` beside it")]  # fmt: skip
    prompt: Annotated[str | None, tyro.conf.arg(help="what to go on with; None: nothing, or the saved text")] = None
    prompt_file: Annotated[Path | None, tyro.conf.arg(help="the same from a file, of any length")] = None
    max_tokens: Annotated[int, tyro.conf.arg(help="to write, at most")] = 256
    temperature: Annotated[float | None, tyro.conf.arg(help="0: always the likeliest token; None: 1")] = None
    top_k: Annotated[int | None, tyro.conf.arg(help="of the likeliest tokens only so many; None: all")] = None
    top_p: Annotated[float | None, tyro.conf.arg(help="only the fewest of this probability; None: 1")] = None
    seed: Annotated[int | None, tyro.conf.arg(help="of the draws; None: 0")] = None
    save_state: Annotated[Path | None, tyro.conf.arg(help="a folder for the conversation, to go on later")] = None
    load_state: Annotated[Path | None, tyro.conf.arg(help="a conversation to go on with, saved so")] = None
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    json: Annotated[bool, tyro.conf.arg(help="print one JSON object at the end and nothing else")] = False

    def run(self) -> None:
        prompt = self._prompt()
        model, tokenizer = load_language_model(self.source, self.device)
        stream = self._stream(model)
        read = tokenizer.encode(prompt)
        if stream.position == 0:
            read = [tokenizer.document_token, *read]
        started = perf_counter()
        stream.prefill(read)
        reading = perf_counter() - started

        text, pieces, tokens = TextStream(tokenizer), [], []
        started = perf_counter()
        with _interrupts_counted() as interrupts:
            for token in stream.generate(self.max_tokens, stop=(tokenizer.document_token,)):
                tokens.append(token)
                pieces.append(text.add(token))
                self._show(pieces[-1])
                if interrupts:
                    break
            writing = perf_counter() - started
            pieces.append(text.rest())
            self._show(pieces[-1] + "\n")
            if self.save_state is not None:
                stream.save(self.save_state)
        if interrupts:
            saved = "" if self.save_state is None else f" The conversation up to there is saved in {self.save_state}."
            raise KeyboardInterrupt(f"interrupted.{saved}")
        figures = {
            "prompt_tokens": len(read),
            "written_tokens": len(tokens),
            "tokens_read_per_second": len(read) / reading if read else None,
            "tokens_written_per_second": len(tokens) / writing if tokens else None,
            "position": stream.position,
            "ended": "max_tokens" if len(tokens) == self.max_tokens else "document",
            "native": stream.is_native,
        }
        if self.json:
            print(json.dumps({"text": "".join(pieces), "tokens": tokens} | figures))
        else:
            print(_format_figures(figures), file=sys.stderr)

    def _prompt(self) -> str:
        """The prompt, after checking what can be before anything takes time."""
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("Give --prompt or --prompt-file, not both.")
        if self.max_tokens < 0:
            raise UsageError(f"max_tokens must be 0 or more, not {self.max_tokens}.")
        from deltaproduct.models.sampling import Sampling
        from deltaproduct.models.streaming import check_conversation_folder

        if self.save_state is not None:
            check_folder(self.save_state)
            check_conversation_folder(self.save_state)
            make_folder(self.save_state.absolute().parent)
        self._sampling(Sampling())
        if self.prompt_file is not None:
            return read_text(self.prompt_file)
        try:
            (self.prompt or "").encode()
        except UnicodeEncodeError as e:
            raise UsageError("--prompt holds bytes that are not text in UTF-8.") from e
        return self.prompt or ""

    def _sampling(self, base: Sampling) -> Sampling:
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
        return replace(base, **{name: value for name, value in given.items() if value is not None})

    def _stream(self, model: SequenceModel) -> Stream:
        from deltaproduct.models.sampling import Sampling
        from deltaproduct.models.streaming import Stream

        if self.load_state is None:
            return Stream(model, self._sampling(Sampling()))
        stream = Stream.load(self.load_state, model)
        stream.resample(self._sampling(stream.sampling))
        return stream

    def _show(self, text: str) -> None:
        if not self.json:
            # A model may write what a terminal would obey; into a file or a pipe its text goes as it is.
            visible = "".join(c if c in "\n\t" else shown(c) for c in text) if sys.stdout.isatty() else text
            print(visible, end="", flush=True)


@contextmanager
def _interrupts_counted() -> Iterator[list[int]]:
    """Ctrl-C ends the text after the token that is being written, so that what was read and written can be saved; a
    second one ends the program at once."""
    found: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield found
        return

    def note(number: int, frame: FrameType | None) -> None:
        if found:
            raise KeyboardInterrupt
        found.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def load_language_model(source: Path, device: str = "auto") -> tuple[SequenceModel, Tokenizer]:
    """The model and the tokenizer of a run's folder, or of a checkpoint that has a tokenizer's folder beside it.

    Raises:
        UsageError: one of them is missing or corrupt, or they do not belong together.
    """
    from deltaproduct.corpus import TOKENIZER, load_tokenizer
    from deltaproduct.machine import choose_device
    from deltaproduct.models import SequenceModel
    from deltaproduct.training.run_folder import locate

    found = locate(source, "language model")
    checkpoint, run = found.checkpoint, found.run or found.checkpoint.absolute().parent
    model = SequenceModel.from_pretrained(checkpoint, device=choose_device(device))
    if not (run / TOKENIZER).is_dir():
        raise UsageError(f"{checkpoint} has no tokenizer beside it: {run / TOKENIZER} is not a folder.")
    tokenizer = load_tokenizer(run / TOKENIZER)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"The tokenizer {run / TOKENIZER} has {tokenizer.vocab_size} tokens and the model {checkpoint} "
            f"{model.config.vocab_size}; they do not belong together."
        )
    return model, tokenizer


def _format_figures(figures: dict[str, Any]) -> str:
    def rate(name: str) -> str:
        per_second = figures[f"tokens_{name}_per_second"]
        return "" if per_second is None else f" ({per_second:,.0f} tokens/s)"

    way = "native engine" if figures["native"] else "PyTorch"
    end = "the document ended" if figures["ended"] == "document" else "there may be more"
    return (
        f"read {figures['prompt_tokens']:,} tokens{rate('read')}, wrote {figures['written_tokens']:,}{rate('written')} "
        f"with {way}; position {figures['position']:,}; {end}"
    )
