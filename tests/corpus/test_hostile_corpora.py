"""Corpora and journals of other people: no name leads out of the folder, no change goes unnoticed, and no traceback.

What `deltaproduct lm prepare` notes of itself has a seal, so that a change is refused as one. A seal can be made to
fit, as everything in a folder can: what is then said must still be possible, or is refused in one line as well.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaproduct.corpus import Corpus, PackedDocuments, encode, writer
from deltaproduct.corpus.journal import JOURNAL
from deltaproduct.corpus.sidecar import SIDECAR, sealed
from deltaproduct.corpus.tokenizer import train_bpe
from deltaproduct.corpus.writer import prepare
from deltaproduct.errors import UsageError
from deltaproduct.files import seal_folder, write_json

TEXTS = [f"Text {i}: " + "the cat, the hat\n" * (i % 7 + 1) for i in range(40)]
SETTINGS = {"shard_tokens": 500, "validation_share": 0.2}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with `texts`, the corpus `out`, and `cut`, a corpus that a kill left unfinished."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "texts" / f"{i:02d}.txt").write_text(text)
    prepare([f"text:{folder}/texts"], "bytes", folder / "out", **SETTINGS)

    def kill(progress):
        if progress.tokens > 2500:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(encode, "BATCH_CHARACTERS", 300)
        patch.setattr(writer, "JOURNAL_SECONDS", 0.0)
        prepare([f"text:{folder}/texts"], "bytes", folder / "cut", progress=kill, **SETTINGS)
    return folder


@pytest.fixture
def corpus(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def cut(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "cut", tmp_path / "cut"))


def refusal(folder: Path, *, verify: bool = True) -> str:
    with pytest.raises(UsageError) as error:
        opened = Corpus.open(folder, verify=verify)
        for name in ("train", "validation"):
            split = opened.split(name)
            split.tokens(0, split.num_tokens)
            _ = split.document_offsets
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000, message
    return message


def resumed(made: Path, cut: Path) -> None:
    prepare([f"text:{made}/texts"], "bytes", cut, resume=True, **SETTINGS)


def rewrite(path: Path, change: Callable[[Any], Any], *, seal: bool = True) -> None:
    values = json.loads(path.read_text())
    values.pop("seal")
    values = change(values) or values
    path.write_text(json.dumps(sealed(values) if seal else values))


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all plain values."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for k, v in inner for found in leaves(v, (*path, k))]
    return [path]


def replaced(values: Any, path: tuple, new: Any) -> Any:
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return values


def other(value: Any) -> Any:
    """Something as plausible in its place."""
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1") if value else "a"
    return 0.5 if value is None or isinstance(value, float) else value + 1


def entries(values: Any) -> list[Any]:
    return [e for split in values["splits"].values() for e in (*split["shards"], split["offsets"])]


# -------------------------------------------------------------------------------------------------------------- names

NAMES = ["../outside.bin", "/etc/passwd", "sub/inside.bin", "a\0b", "\x1b]0;title\x07.bin", "train-00001.bin", "", ".",
         "x" * 5000, "\ud800.bin", "train-00000.bin\n"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_in_corpus_json_lead_nowhere_else(name, corpus):
    """The file is there, whole and as listed, wherever a file of that name can be."""
    for at in (0, -1):  # a shard of the first split, and the offsets of the last one
        folder = corpus.with_name(f"copy{at}")
        shutil.copytree(corpus, folder)
        values = json.loads((folder / SIDECAR).read_text())
        entry = entries(values)[at]
        if name == entry["name"]:
            continue
        if name in ("../outside.bin", "sub/inside.bin"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(folder / entry["name"], folder / name)
        entry["name"] = name
        rewrite(folder / SIDECAR, lambda _, values=values: {k: v for k, v in values.items() if k != "seal"})
        message = refusal(folder)
        assert "names a file" in message or (name == "\ud800.bin" and "half of a surrogate pair" in message)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "a\0b", "\x1b[2J", "train-00001.bin"])
def test_names_in_a_journal_lead_nowhere_else(name, made, cut):
    outside = cut.parent / "outside.bin"
    outside.write_bytes(b"as it was")

    def change(values):
        values["splits"]["train"]["shards"][0]["name"] = name

    rewrite(cut / JOURNAL, change)
    with pytest.raises(UsageError, match="names a file") as error:
        resumed(made, cut)
    assert str(error.value).isprintable() and outside.read_bytes() == b"as it was"


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-documents.npy", SIDECAR, "tokenizer"])
def test_links_out_of_a_corpus_are_refused(name, corpus):
    outside = corpus.parent / "outside"
    shutil.move(corpus / name, outside)
    (corpus / name).symlink_to(outside)
    for verify in (True, False):
        assert f"{name} is a link that leads out of the corpus" in refusal(corpus, verify=verify)
    outside.rename(corpus / "elsewhere")
    (corpus / name).unlink()
    (corpus / name).symlink_to("elsewhere")
    if name != "tokenizer":
        Corpus.open(corpus)
    (corpus / name).unlink()
    (corpus / name).symlink_to(name)  # a ring
    refusal(corpus)


def test_a_corpus_may_lie_behind_a_link(corpus):
    link = corpus.with_name("link")
    link.symlink_to(corpus)
    assert Corpus.open(link).fingerprint == Corpus.open(corpus).fingerprint


@pytest.mark.parametrize("name", ["train-documents.npy.partial", "validation-00000.bin"])
def test_nothing_is_written_through_a_link_of_an_unfinished_corpus(name, made, cut):
    victim = cut.parent / "victim"
    shutil.move(cut / name, victim)
    before = victim.read_bytes()
    (cut / name).symlink_to(victim)
    with pytest.raises(UsageError, match=f"{name} is a link that leads out of the corpus"):
        resumed(made, cut)
    assert victim.read_bytes() == before


def test_no_regular_file_is_waited_for(corpus):
    (corpus / "train-00000.bin").unlink()
    os.mkfifo(corpus / "train-00000.bin")
    assert "train-00000.bin is missing" in refusal(corpus)


# ------------------------------------------------------------------------------------------------- changes are noticed


def test_a_change_of_any_value_of_corpus_json_is_noticed(corpus):
    values = json.loads((corpus / SIDECAR).read_text())
    paths = leaves(values)
    assert len(paths) > 40 and {"vocab_size", "dtype", "document_token", "tokenizer", "seal"} <= {p[0] for p in paths}
    for path in paths:
        value = values
        for key in path:
            value = value[key]
        (corpus / SIDECAR).write_text(json.dumps(replaced(values, path, other(value))))
        assert SIDECAR in refusal(corpus, verify=False), path
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        if isinstance(inner, dict):  # the same without it
            changed = copy.deepcopy(values)
            without = changed
            for key in path[:-1]:
                without = without[key]
            del without[path[-1]]
            (corpus / SIDECAR).write_text(json.dumps(changed))
            assert SIDECAR in refusal(corpus, verify=False), path


def test_a_change_of_any_value_of_a_journal_is_noticed(made, cut):
    values = json.loads((cut / JOURNAL).read_text())
    for path in leaves(values):
        value = values
        for key in path:
            value = value[key]
        (cut / JOURNAL).write_text(json.dumps(replaced(values, path, other(value))))
        with pytest.raises(UsageError, match=JOURNAL):
            resumed(made, cut)
    (cut / JOURNAL).write_text(json.dumps(values))
    resumed(made, cut)
    assert Corpus.open(cut).fingerprint == Corpus.open(made / "out").fingerprint


def test_splits_that_were_exchanged(corpus):
    def change(values):
        splits = values["splits"]
        splits["train"], splits["validation"] = splits["validation"], splits["train"]

    rewrite(corpus / SIDECAR, change)
    assert "names a file" in refusal(corpus)


def test_another_tokenizer_of_the_same_size(tmp_path):
    """It decides what is written and read: two of 265 tokens are not alike."""
    pytest.importorskip("tokenizers")
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    prepare([f"text:{tmp_path}/*.txt"], "bpe:265", tmp_path / "out", **SETTINGS)
    assert Corpus.open(tmp_path / "out").vocab_size == 265
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    train_bpe(265, ["quite another text, of other words " * 9, "xyz " * 50]).save(tmp_path / "out" / "tokenizer")
    for verify in (True, False):
        assert "is not the one that the corpus was made with" in refusal(tmp_path / "out", verify=verify)


@pytest.mark.parametrize("name", ["validation-00000.bin", "train-documents.npy.partial"])
def test_an_unfinished_corpus_whose_files_were_changed(name, made, cut):
    data = bytearray((cut / name).read_bytes())
    data[3] ^= 1
    (cut / name).write_bytes(data)
    with pytest.raises(UsageError, match="is not what was written to it, so this corpus cannot be resumed"):
        resumed(made, cut)


def test_an_unfinished_corpus_whose_tokenizer_was_changed(made, cut):
    pytest.importorskip("tokenizers")
    shutil.rmtree(cut / "tokenizer")
    train_bpe(300, TEXTS).save(cut / "tokenizer")
    with pytest.raises(UsageError, match=r"tokenizer in .* is not the one that this corpus was begun with"):
        resumed(made, cut)


def test_sources_whose_contents_were_changed_at_the_same_size(made, tmp_path):
    for name in ("texts", "cut"):
        shutil.copytree(made / name, tmp_path / name)
    path = tmp_path / "texts" / "00.txt"
    settings = json.loads((tmp_path / "cut" / JOURNAL).read_text())["settings"]["sources"][0]
    path.write_text(path.read_text().replace("cat", "dog"))
    text = prepare([f"text:{tmp_path}/texts"], "bytes", tmp_path / "new", **SETTINGS).sources[0]
    assert text["bytes"] == settings["bytes"] and text["sha256"] != settings["sha256"]
    with pytest.raises(UsageError, match="source 1, sha256: "):
        prepare([f"text:{tmp_path}/texts"], "bytes", tmp_path / "cut", resume=True, **SETTINGS)


# -------------------------------------------------------------------------------- what cannot be so, whatever the seal

HUGE = int("9" * 4000)
WRONG = [None, True, -1, HUGE, 2**63, 2.5, float("nan"), float("inf"), "7", "\ud800", "\x1b[31m", [], {}, [[[[]]]],
         {"a": {"b": 1}}]  # fmt: skip


def test_wrong_values_everywhere_are_one_line_or_change_nothing(corpus):
    """A seal that fits. What describes the corpus may be anything of its type; no value may end in a traceback."""
    values = json.loads((corpus / SIDECAR).read_text())
    values.pop("seal")
    draw = random.Random(0)
    paths = [path[:n] for path in leaves(values) for n in range(1, len(path) + 1)]
    free = ("sources", "versions", "tokenizer", "validation_share")
    refused = 0
    for path in dict.fromkeys(paths):
        for wrong in draw.sample(WRONG, 5):
            try:
                (corpus / SIDECAR).write_text(json.dumps(sealed(replaced(values, path, wrong))))
                opened = Corpus.open(corpus, verify=False)
            except UsageError as e:
                assert str(e).isprintable() and len(str(e)) < 1000
                refused += 1
            else:
                assert path[0] in free or wrong == _value(values, path), (path, wrong)
                assert opened.split("train").num_tokens == values["splits"]["train"]["tokens"]
    assert refused > 250  # of about 300 draws; those that change nothing are few


def _value(values: Any, path: tuple) -> Any:
    for key in path:
        values = values[key]
    return values


def test_wrong_values_everywhere_in_a_journal(made, cut):
    values = json.loads((cut / JOURNAL).read_text())
    values.pop("seal")
    draw = random.Random(0)
    for path in dict.fromkeys(p[:n] for p in leaves(values) for n in range(1, len(p) + 1)):
        for wrong in draw.sample(WRONG, 2):
            if wrong == _value(values, path) or (wrong is None and path[-1].__class__ is str and "sha256" in path[-1]):
                continue  # None is how an older version says that it noted no sum
            (cut / JOURNAL).write_text(json.dumps(sealed(replaced(values, path, wrong))))
            with pytest.raises(UsageError) as error:
                resumed(made, cut)
            assert str(error.value).isprintable() and len(str(error.value)) < 1000


RAW = {
    "a list": "[]", "a number": "7", "nothing": "", "deep": "[" * 100_000, "a number of 5,000 digits": "9" * 5000,
    "deep within": '{"format": 2, "sources": ' + "[" * 900 + "]" * 900 + "}", "no text": "\udcff",
    "a format of its own": '{"format": "\\u001b[31m"}', "a format of many digits": '{"format": ' + "9" * 4000 + "}",
}  # fmt: skip


@pytest.mark.parametrize("kind", RAW)
def test_files_that_hold_no_such_thing(kind, made, corpus, cut):
    (corpus / SIDECAR).write_text(RAW[kind], errors="surrogateescape")
    refusal(corpus)
    (cut / JOURNAL).write_text(RAW[kind], errors="surrogateescape")
    with pytest.raises(UsageError) as error:
        resumed(made, cut)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def shrunk(path: Path, size: int = 0) -> None:
    os.truncate(path, size)


def rewritten(folder: Path, name: str, data: bytes) -> None:
    """A file of the corpus with other contents, and corpus.json as if it had always had them."""
    import hashlib

    (folder / name).write_bytes(data)

    def change(values):
        (entry,) = [e for e in entries(values) if e["name"] == name]
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    rewrite(folder / SIDECAR, change)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("token", [257, 65535])
def test_tokens_beyond_the_vocabulary(token, verify, corpus):
    ids = np.fromfile(corpus / "train-00001.bin", "<u2")
    ids[100] = token
    rewritten(corpus, "train-00001.bin", ids.tobytes())
    message = refusal(corpus, verify=verify)
    assert f"train-00001.bin is damaged: it holds the token {token}, but the vocabulary has 257" in message


def test_a_split_that_does_not_begin_with_a_document(corpus):
    ids = np.fromfile(corpus / "train-00000.bin", "<u2")
    ids[0] = 7
    rewritten(corpus, "train-00000.bin", ids.tobytes())
    assert "train does not start with the document token 256" in refusal(corpus, verify=False)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("at, value", [(0, 1), (5, 0), (5, -3), (7, 10**9), (-1, 3), (3, 4)])
def test_documents_that_do_not_start_one_after_the_other(at, value, verify, corpus):
    offsets = np.load(corpus / "train-documents.npy")
    offsets[at] = offsets[at + 1] if (at, value) == (3, 4) else value
    np.save(corpus / "new.npy", offsets)
    rewritten(corpus, "train-documents.npy", (corpus / "new.npy").read_bytes())
    assert "train-documents.npy is damaged" in refusal(corpus, verify=verify)
    with pytest.raises(UsageError, match="is damaged"):
        PackedDocuments(Corpus.open(corpus, verify=False).split("train"), 64, seed=0).batch(0, 4)


ARRAYS = {
    "floats": lambda a: a.astype(float),
    "32 bits": lambda a: a.astype(np.int32),
    "big-endian": lambda a: a.astype(">i8"),
    "a table": lambda a: a[:, None],
    "one number": lambda a: a[0],
    "none": lambda a: a[:0],
    "objects": lambda a: a.astype(object),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_offsets_of_another_kind(kind, corpus):
    np.save(corpus / "new.npy", ARRAYS[kind](np.load(corpus / "train-documents.npy")), allow_pickle=True)
    rewritten(corpus, "train-documents.npy", (corpus / "new.npy").read_bytes())
    assert "train-documents.npy is damaged" in refusal(corpus)


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117) + b"\n"


HEADERS = [
    b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04" + bytes(40), bytes(200),
    npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999999999,)}"),
    npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}"), npy(b"__import__('os').system('true')"),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(HEADERS)))
def test_offsets_with_a_header_that_is_none(at, corpus):
    rewritten(corpus, "train-documents.npy", HEADERS[at])
    assert "train-documents.npy is damaged" in refusal(corpus)


def test_shards_that_are_empty_or_shorter(corpus):
    size = (corpus / "train-00000.bin").stat().st_size
    for left in (0, 1, size - 1):
        shrunk(corpus / "train-00000.bin", left)
        assert f"has {left} bytes and should have {size}" in refusal(corpus, verify=False)
    rewritten(corpus, "train-00000.bin", b"")
    assert "sizes of the shards" in refusal(corpus)


def test_a_shard_that_shrinks_after_the_corpus_was_opened(corpus):
    opened = Corpus.open(corpus, verify=False)
    fresh = Corpus.open(corpus, verify=False).split("train")
    del fresh.__dict__["_shards"]  # as in a process that was handed the split
    shrunk(corpus / "train-00001.bin", 10)
    with pytest.raises(UsageError, match=r"train-00001\.bin is not what it was when the corpus was opened"):
        fresh.tokens(0, fresh.num_tokens)
    assert opened.fingerprint


# ------------------------------------------------------------------------------------------------- corpora from before


def of_format_1(folder: Path) -> None:
    """As the version before wrote it."""
    values = json.loads((folder / SIDECAR).read_text())
    for key in ("seal", "tokenizer_sha256"):
        del values[key]
    for source in values["sources"]:
        del source["sha256"]
    write_json(folder / SIDECAR, values | {"format": 1})


def test_corpora_from_before_open_as_ever(made, corpus):
    of_format_1(corpus)
    opened, new = Corpus.open(corpus), Corpus.open(made / "out")
    assert opened.fingerprint != new.fingerprint  # the file's own, as the runs on it have noted
    for name in ("train", "validation"):
        ours, theirs = opened.split(name), new.split(name)
        assert (ours.tokens(0, ours.num_tokens) == theirs.tokens(0, theirs.num_tokens)).all()
    resumed(made, corpus)  # it is finished, with the same settings
    assert Corpus.open(corpus).fingerprint == opened.fingerprint
    values = json.loads((corpus / SIDECAR).read_text())
    write_json(corpus / SIDECAR, values | {"tokenizer_sha256": "0" * 64})
    assert "format 1 has no tokenizer_sha256" in refusal(corpus)


def test_unfinished_corpora_from_before_go_on(made, cut):
    values = json.loads((cut / JOURNAL).read_text())
    for key in ("seal", "format", "tokenizer_sha256"):
        del values[key]
    for state in values["splits"].values():
        del state["shard_sha256"], state["offsets_sha256"]
    del values["settings"]["sources"][0]["sha256"]
    write_json(cut / JOURNAL, values)
    resumed(made, cut)
    assert {p.name: p.read_bytes() for p in cut.glob("*.bin")} == {
        p.name: p.read_bytes() for p in (made / "out").glob("*.bin")
    }
    assert Corpus.open(cut).split("train").num_documents == Corpus.open(made / "out").split("train").num_documents


def test_a_manifest_that_names_files_elsewhere(corpus):
    shutil.copy(corpus / "tokenizer" / "corpus_tokenizer.json", corpus / "outside.json")
    manifest = json.loads((corpus / "tokenizer" / "manifest.json").read_text())
    entry = manifest["files"]["corpus_tokenizer.json"]
    for name in ("../outside.json", str(corpus / "outside.json"), "a\0b", "\x1b[2J", "x" * 5000, "\u00e9" * 200):
        write_json(corpus / "tokenizer" / "manifest.json", {"format": 1, "files": manifest["files"] | {name: entry}})
        refusal(corpus)
    seal_folder(corpus / "tokenizer")
    Corpus.open(corpus)
