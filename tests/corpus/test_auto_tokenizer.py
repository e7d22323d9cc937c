"""Tokenizer folders load with transformers by themselves, and give the same ids and texts there."""

import json
import random
import shutil
from typing import Any

import pytest

from deltaproduct.corpus import load_tokenizer
from deltaproduct.corpus.tokenizer import DOCUMENT, META, ByteTokenizer, byte_letters, make_tokenizer, train_bpe
from deltaproduct.files import verified_folder, write_json

transformers = pytest.importorskip("transformers", minversion="5.17")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "", "a", " a", "two  spaces ", "tab\tand\nline\r\n", f"{DOCUMENT}", f"x{DOCUMENT} y", "<|endoftext|><s></s>",
    "'s 've don't", "naïve café", "e\u0301 é", "中文 и русский", "👩‍👩‍👧", "\x00\x01\x7f\x80\x9f\xa0\xad\xff",
    "\ufffd\ufeff", "".join(map(chr, range(0x300))), "1234567 89.0", "a . b , c ' d n't",
]  # fmt: skip


def words() -> Any:
    """A tokenizer.json of somebody else's, with a normalizer and no document token."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["?"], show_progress=False)
    made.train_from_iterator(["some words of a text"] * 3, trainer)
    return made


@pytest.fixture(params=["bytes", "bpe", "file", "hub"])
def folder(request, tmp_path):
    bpe = train_bpe(300, ["hello world " * 30, "ünïcode text "])
    if request.param == "bytes":
        ByteTokenizer().save(tmp_path / "t")
    elif request.param == "bpe":
        bpe.save(tmp_path / "t")
    elif request.param == "file":
        words().save(str(tmp_path / "words.json"))
        make_tokenizer(str(tmp_path / "words.json"), list).save(tmp_path / "t")
    else:
        bpe.save(tmp_path / "own")
        make_tokenizer(f"hf:{tmp_path / 'own'}", list).save(tmp_path / "t")
    return tmp_path / "t"


def test_transformers_loads_every_folder(folder):
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size
    assert theirs.bos_token_id == theirs.eos_token_id == ours.document_token
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids == theirs.encode(text), text
        assert theirs.decode(ids) == ours.decode([ours.document_token, *ids]), text
    assert set(theirs("a text")) == {"input_ids", "attention_mask"}


def test_bytes_that_are_no_text(tmp_path):
    """Any bytes at all, half of them such as begin or go on with a letter of UTF-8."""
    ours, draw = ByteTokenizer(), random.Random(0)
    ours.save(tmp_path / "t")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    some = [0x80, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2, 0x82, 0xED, 0xA0, 0xF0, 0x9F, 0xF4, 0x90, 0xFF]
    for _ in range(500):
        ids = [draw.choice(some) if draw.random() < 0.5 else draw.randrange(256) for _ in range(draw.randrange(1, 12))]
        assert theirs.decode(ids) == ours.decode(ids), ids
    assert theirs.convert_ids_to_tokens(list(range(256))) == byte_letters()
    assert sorted(byte_letters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_what_transformers_saves_again_is_the_same(folder, tmp_path):
    ours = load_tokenizer(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert all(theirs(text).input_ids == ours.encode(text) for text in TEXTS)
    assert not [p for p in folder.iterdir() if p.suffix in (".py", ".pkl", ".bin", ".model")]


def test_folders_from_before_load_as_ever(tmp_path):
    """Bytes wrote no file for transformers; a BPE's had three entries."""
    ByteTokenizer().save(tmp_path / "bytes")
    bpe = train_bpe(300, ["hello world " * 30])
    bpe.save(tmp_path / "bpe")
    shutil.copytree(tmp_path / "bytes", tmp_path / "old")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "old" / name).unlink()
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    manifest["files"] = {META: manifest["files"][META]}
    write_json(tmp_path / "old" / "manifest.json", manifest)
    assert verified_folder(tmp_path / "old", "tokenizer") == [META]
    assert load_tokenizer(tmp_path / "old").encode("é") == [0xC3, 0xA9]
    assert load_tokenizer(tmp_path / "bpe").encode("hello") == bpe.encode("hello")
