"""Text to token ids and back: bytes, a BPE of one's own, a tokenizer.json, or one of transformers'.

A tokenizer's folder holds what its library reads and `META`, which says which library that is, how many tokens there
are, and which of them starts a document. transformers' `AutoTokenizer.from_pretrained` reads every such folder too. It
gives the same ids for every text, except where a file or a tokenizer of the hub adds special tokens of its own there.

A tokenizer is data. Code that a folder or a repository of the hub brings along is never run, and nobody is asked to.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from deltaproduct.errors import UsageError, first_line, quoted
from deltaproduct.files import read_folder, read_json, replaced_folder, write_json, write_text

META = "corpus_tokenizer.json"
LIBRARY_FILE = "tokenizer.json"  # the name that both libraries use
LIBRARY_CONFIG = "tokenizer_config.json"  # transformers' own settings beside it
DOCUMENT = "<|document|>"
# What the published vocabularies call the token that starts a text, or stands between two.
DOCUMENT_NAMES = (DOCUMENT, "<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "[CLS]")
BYTES = 256
# The library reserves memory for as many before it learns any. The largest published vocabularies have 2^18.
LARGEST_BPE = 2**20
MOST_TOKENS = 2**32  # ids are stored in 4 bytes at most
CUSTOM_CODE = "auto_map"  # in transformers' settings: which classes of a folder's own Python files to import
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
        """The ids of a text, without a document token; names of special tokens in the text are text as any other.

        Raises:
            UsageError: the text has half of a surrogate pair, which no encoding of Unicode can express.
        """

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
        return list(_utf8(text))

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
        self.vocab_size: int = _beyond_all(inner.get_vocab().values())
        self.document_token = document_token

    def encode(self, text: str) -> list[int]:
        _utf8(text)  # the library's own error is about Python's types
        return self.inner.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def _write(self, folder: Path) -> None:
        write_text(folder / LIBRARY_FILE, self.inner.to_str(pretty=True))
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
        self.vocab_size = _beyond_all(inner.get_vocab().values())
        own = inner.eos_token_id if inner.bos_token_id is None else inner.bos_token_id
        self.document_token = own if document_token is None else document_token
        if self.document_token is None:
            raise UsageError(f"The tokenizer {inner.name_or_path} has no BOS or EOS token that could start a document.")

    def encode(self, text: str) -> list[int]:
        _utf8(text)
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
    return read_folder(folder, "tokenizer", _load)


def _load(folder: Path, files: list[str]) -> Tokenizer:
    meta = read_json(folder / META) if META in files else None
    if not isinstance(meta, dict) or not {"kind", "vocab_size", "document_token"} <= set(meta):
        raise UsageError(f"{folder} is not a tokenizer that this library saved: {META} is missing or damaged.")
    kind, vocab_size, document_token = meta["kind"], meta["vocab_size"], meta["document_token"]
    if type(vocab_size) is not int or type(document_token) is not int or not 0 <= document_token < vocab_size:
        raise UsageError(
            f"{folder / META} is damaged: it names the document token {quoted(document_token)} of {quoted(vocab_size)}."
        )
    tokenizer: Tokenizer
    if kind == ByteTokenizer.kind:
        tokenizer = ByteTokenizer()
    elif kind == LibraryTokenizer.kind:
        tokenizer = LibraryTokenizer(_read_library_file(folder / LIBRARY_FILE), document_token)
    elif kind == HubTokenizer.kind:
        tokenizer = HubTokenizer(_auto_tokenizer(str(folder)), document_token)
    else:
        raise UsageError(f"The tokenizer {folder} is of a kind that this version does not know: {quoted(kind)}.")
    if tokenizer.vocab_size != vocab_size:
        raise UsageError(
            f"The tokenizer {folder} has {tokenizer.vocab_size} tokens, but {vocab_size} when it was saved."
        )
    if tokenizer.document_token != document_token:
        raise UsageError(
            f"The tokenizer {folder} starts documents with {tokenizer.document_token}, but with {document_token} when "
            "it was saved."
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
    elif spec != "bytes" and not spec.startswith("hf:") and not _is_file(spec):
        raise UsageError(f"There is no tokenizer {quoted(spec)}: it should be {SPECS}.")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a name that is too long for one
        return False


def bpe_size(spec: str) -> int:
    """The size in `bpe:VOCAB`, document token included; `UsageError` unless it has room for all bytes, and memory has
    room for it."""
    size = spec.removeprefix("bpe:")
    if not re.fullmatch(r"[0-9]{1,9}", size) or int(size) <= BYTES:
        raise UsageError(f"The tokenizer {spec!r} needs a size of at least {BYTES + 1}, as in bpe:4096.")
    if int(size) > LARGEST_BPE:
        raise UsageError(f"The tokenizer {spec!r} is too large: a BPE has at most {LARGEST_BPE:,} tokens here.")
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
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())  # the library opens no file whose name is not UTF-8
    except Exception as e:  # the library raises nothing more specific
        raise UsageError(f"{path} is not a tokenizer.json of the tokenizers library: {first_line(e)}") from e


def _auto_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise UsageError("Tokenizers of the hub need transformers: pip install 'deltaproduct[lm]'.") from e
    if names_code(Path(name) / LIBRARY_CONFIG):
        raise UsageError(_refused(name))
    try:
        # With None, transformers asks on standard input. A folder of this machine has no need of the network.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=Path(name).is_dir())
    except Exception as e:  # what a damaged file makes transformers raise can be anything
        if "trust_remote_code" in str(e):
            raise UsageError(_refused(name)) from e
        raise UsageError(
            f"The tokenizer {name!r} is neither a folder of a tokenizer nor to be had from the hub: {first_line(e)}"
        ) from e


def names_code(config: Path) -> bool:
    """Whether a tokenizer's settings name Python code of their own, which transformers would import."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # transformers says what is wrong with it
        return False
    named = values.get(CUSTOM_CODE) if isinstance(values, dict) else None
    return (named.get("AutoTokenizer") if isinstance(named, dict) else named) is not None


def _refused(name: str) -> str:
    return (
        f"The tokenizer {name!r} brings Python code of its own ({CUSTOM_CODE} in {LIBRARY_CONFIG}), which is never run "
        f"here; name its {LIBRARY_FILE} in place of it, if it has one."
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise UsageError(
            f"The text has half of a surrogate pair at character {e.start}, {text[e.start]!r}, which is no character."
        ) from e


def _beyond_all(ids: Iterable[int]) -> int:
    """How many ids there are from 0 to the largest: a vocabulary may leave some out."""
    return max(ids, default=-1) + 1


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
