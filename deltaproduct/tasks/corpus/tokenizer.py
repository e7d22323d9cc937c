"""Text to token ids and back: bytes, a BPE of one's own, a tokenizer.json, or one of transformers'.

A tokenizer's folder holds what its library reads and `META`, which says which library that is, how many tokens there
are, and which of them starts a document. transformers' `AutoTokenizer.from_pretrained` reads every such folder too. It
gives the same ids for every text, except where a file or a tokenizer of the hub adds special tokens of its own there.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError
from deltaproduct.files import read_json, replaced_folder, verified_folder, write_json, write_text

META = "corpus_tokenizer.json"
LIBRARY_FILE = "tokenizer.json"  # the name that both libraries use
LIBRARY_CONFIG = "tokenizer_config.json"  # transformers' own settings beside it
DOCUMENT = "<|document|>"
# What the published vocabularies call the token that starts a text, or stands between two.
DOCUMENT_NAMES = (DOCUMENT, "<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]")
BYTES = 256
SPECS = "bytes, bpe:VOCAB, the path of a tokenizer.json, or hf:NAME"


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: ids are 0 … vocab_size − 1.
        document_token: the id that starts every document; no text is ever encoded to it.
    """

    kind: str
    vocab_size: int
    document_token: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without a document token; names of special tokens in the text are text as any other."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; document tokens are left out, and bytes that are no UTF-8 become U+FFFD."""
        return self._decode([i for i in ids if i != self.document_token])

    def save(self, folder: Path) -> None:
        """Write the tokenizer to a folder of its own, from which `load_tokenizer` reads it."""
        with replaced_folder(folder) as fresh:
            self._write(fresh)
            meta = {"kind": self.kind, "vocab_size": self.vocab_size, "document_token": self.document_token}
            write_json(fresh / META, meta)

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str: ...

    @abstractmethod
    def _write(self, folder: Path) -> None: ...


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, and the document token after them."""

    kind = "bytes"
    vocab_size = BYTES + 1
    document_token = BYTES

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def _write(self, folder: Path) -> None:
        """The same tokenizer for the tokenizers library, which is not needed for that; `META` says it all to us.

        It is a byte-level BPE without merges: its 256 letters stand for the bytes, and a letter's id is its byte.
        """
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        special = {"id": BYTES, "content": DOCUMENT, "single_word": False, "lstrip": False, "rstrip": False,
                   "normalized": False, "special": True}  # fmt: skip
        vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())} | {DOCUMENT: BYTES}
        values: dict[str, Any] = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": vocabulary, "merges": [],
            },
        }  # fmt: skip
        write_text(folder / LIBRARY_FILE, json.dumps(values, ensure_ascii=False, separators=(",", ":")))
        _write_library_config(folder, DOCUMENT)


class LibraryTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`: a BPE trained here, or one from a file."""

    kind = "tokenizers"

    def __init__(self, inner: Any, document_token: int):
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # a text that spells out a special token must not start a document
        self.inner = inner
        self.vocab_size: int = inner.get_vocab_size()
        self.document_token = document_token

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def _write(self, folder: Path) -> None:
        self.inner.save(str(folder / LIBRARY_FILE))
        _write_library_config(folder, self.inner.id_to_token(self.document_token))

    @classmethod
    def from_file(cls, path: Path) -> "LibraryTokenizer":
        """Read a tokenizer.json; where it has none of `DOCUMENT_NAMES`, `DOCUMENT` is added to its vocabulary."""
        inner = _read_library_file(path)
        ids = (inner.token_to_id(name) for name in DOCUMENT_NAMES)
        known = next((i for i in ids if i is not None), None)
        if known is None:
            inner.add_special_tokens([DOCUMENT])
            known = inner.token_to_id(DOCUMENT)
        return cls(inner, known)


class HubTokenizer(Tokenizer):
    """A tokenizer of transformers', from a local folder or by its name on the hub."""

    kind = "transformers"

    def __init__(self, inner: Any, document_token: int | None = None):
        """`document_token` None: the tokenizer's own BOS, or else its EOS; `UsageError` if it has neither."""
        self.inner = inner
        self.vocab_size = len(inner)
        own = inner.eos_token_id if inner.bos_token_id is None else inner.bos_token_id
        self.document_token = own if document_token is None else document_token
        if self.document_token is None:
            raise UsageError(f"The tokenizer {inner.name_or_path} has no BOS or EOS token that could start a document.")

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _write(self, folder: Path) -> None:
        self.inner.save_pretrained(str(folder))

    @classmethod
    def from_name(cls, name: str) -> "HubTokenizer":
        """Load by folder or hub name; `UsageError` if there is no such tokenizer."""
        return cls(_auto_tokenizer(name))


def byte_letters() -> list[str]:
    """The 256 letters in which a byte-level vocabulary writes the bytes 0 … 255 (GPT-2's `bytes_to_unicode`): those of
    Latin-1 that can be seen stand for themselves, and the letters from U+0100 on for the others, in order."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in seen else next(others)) for byte in range(BYTES)]


def _write_library_config(folder: Path, document: str) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": document,
        "eos_token": document,
        "split_special_tokens": True,  # a text that spells out the document token must not start a document
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / LIBRARY_CONFIG, config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Raises:
        UsageError: the folder is no tokenizer's, is damaged, or its library is not installed.
    """
    files = verified_folder(folder, "tokenizer")
    meta = read_json(folder / META) if META in files else None
    if not isinstance(meta, dict) or not {"kind", "vocab_size", "document_token"} <= set(meta):
        raise UsageError(f"{folder} is not a tokenizer that this library saved: {META} is missing or damaged.")
    tokenizer: Tokenizer
    if meta["kind"] == ByteTokenizer.kind:
        tokenizer = ByteTokenizer()
    elif meta["kind"] == LibraryTokenizer.kind:
        tokenizer = LibraryTokenizer(_read_library_file(folder / LIBRARY_FILE), meta["document_token"])
    elif meta["kind"] == HubTokenizer.kind:
        tokenizer = HubTokenizer(_auto_tokenizer(str(folder)), meta["document_token"])
    else:
        raise UsageError(f"The tokenizer {folder} is of a kind that this version does not know: {meta['kind']!r}.")
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise UsageError(
            f"The tokenizer {folder} has {tokenizer.vocab_size} tokens, but {meta['vocab_size']} when it was saved."
        )
    return tokenizer


def make_tokenizer(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that `--tokenizer` names.

    Args:
        spec: one of `SPECS`.
        texts: the training split's texts, read only where a vocabulary has to be learnt from them.

    Raises:
        UsageError: the name is none of those, or what it names cannot be had.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        return train_bpe(bpe_size(spec), texts())
    if spec.startswith("hf:"):
        return HubTokenizer.from_name(spec.removeprefix("hf:"))
    return LibraryTokenizer.from_file(Path(spec))


def check_tokenizer(spec: str) -> None:
    """`UsageError` where a spec is sure to fail, so that no time is spent on reading texts for it."""
    if spec.startswith("bpe:"):
        bpe_size(spec)
    elif spec != "bytes" and not spec.startswith("hf:") and not Path(spec).is_file():
        raise UsageError(f"There is no tokenizer {spec!r}: it should be {SPECS}.")


def bpe_size(spec: str) -> int:
    """The size in `bpe:VOCAB`, document token included; `UsageError` unless it has room for all bytes."""
    size = spec.removeprefix("bpe:")
    if not re.fullmatch(r"[0-9]{1,9}", size) or int(size) <= BYTES:
        raise UsageError(f"The tokenizer {spec!r} needs a size of at least {BYTES + 1}, as in bpe:4096.")
    return int(size)


def train_bpe(vocab_size: int, texts: Iterable[str]) -> LibraryTokenizer:
    """Byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), learnt from texts.

    The same texts give the same vocabulary: one smaller than `vocab_size` where they have too few pairs to merge.
    """
    tokenizers = _tokenizers()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),  # every byte, seen or not: nothing is unknown
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return LibraryTokenizer(inner, inner.token_to_id(DOCUMENT))


def _read_library_file(path: Path) -> Any:
    tokenizers = _tokenizers()
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises nothing more specific
        raise UsageError(f"{path} is not a tokenizer.json of the tokenizers library: {e}.") from e


def _auto_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise UsageError("Tokenizers of the hub need transformers: pip install 'deltaproduct[lm]'.") from e
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        first = str(e).strip().splitlines()[0]
        raise UsageError(f"The tokenizer {name!r} is neither a folder nor to be had from the hub: {first}") from e


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as e:
        raise UsageError("BPE needs the tokenizers library: pip install 'deltaproduct[lm]'.") from e
    return tokenizers
