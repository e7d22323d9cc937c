"""Folders, single files and few documents as sources; files that cannot be read; what stays behind and what goes on."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deltaproduct.cli.lm_prepare import LmPrepare
from deltaproduct.corpus import Corpus, writer
from deltaproduct.corpus.file_sources import TextSource
from deltaproduct.corpus.source import TAIL_SHARE, is_held_out
from deltaproduct.corpus.sources import make_source
from deltaproduct.corpus.stdlib import StdlibSource
from deltaproduct.corpus.tokenizer import train_bpe
from deltaproduct.corpus.writer import prepare
from deltaproduct.errors import UsageError

PROSE = "".join(f"Line {i} of a text that goes on and on.\n" for i in range(300))


def texts(out: Path, name: str) -> list[str]:
    corpus = Corpus.open(out)
    split = corpus.split(name)
    edges = itertools.pairwise(split.document_offsets.tolist())
    return [corpus.tokenizer.decode(split.tokens(a, b).tolist()) for a, b in edges]


def put(folder: Path, **files: str | bytes) -> Path:
    """Files by name, a double underscore for a slash and a single one for a dot; the folder."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


# ------------------------------------------------------------------------------------------------- what is held out


def test_the_end_of_a_single_file_is_held_out_after_a_line(tmp_path):
    put(tmp_path, one_txt=PROSE)
    prepare([f"text:{tmp_path}/one.txt"], "bytes", tmp_path / "out")
    (train,), (validation,) = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "validation")
    assert train + validation == PROSE and train.endswith("\n")
    # A line has at most 41 characters, so that one ends within as many of the place that was meant.
    assert len(validation) == pytest.approx(TAIL_SHARE * len(PROSE), abs=41)
    described = json.loads((tmp_path / "out" / "corpus.json").read_text())["sources"][0]
    assert described["held_out"] == "the last 0.1 of the characters"


@pytest.mark.parametrize(
    ("text", "ends"),
    [("word " * 200, " "), ("x" * 1000, "x"), ("\u4e16" * 500, "\u4e16"), ("title\n" + "x" * 1000, "x"), ("ab", "a")],
)
def test_where_a_text_is_divided(text, ends, tmp_path):
    put(tmp_path, one_txt=text)
    first, second = TextSource(f"{tmp_path}/one.txt", 0.25).documents()
    assert first.text + second.text == text and (first.held_out, second.held_out) == (False, True)
    assert first.text.endswith(ends) and second.text.strip()
    # At most half of the part away from the place that was meant.
    assert len(second.text) == pytest.approx(max(1, len(text) / 4), abs=max(1, len(text) / 8))
    assert first.size + second.size == len(text.encode())


@pytest.mark.parametrize("share", [None, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
def test_few_files_have_both_splits_whatever_is_in_them(count, share, tmp_path):
    for i in range(count):
        put(tmp_path, **{f"texts__{i:02d}_txt": f"{i}{count} {share} " * 30 + "\n"})
    put(tmp_path, texts__blank_txt=" \n")
    prepare([f"text:{tmp_path}/texts"], "bytes", tmp_path / "out", validation_share=share)
    train, validation = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "validation")
    assert train and validation
    whole = [path.read_text() for path in sorted((tmp_path / "texts").glob("[0-9]*"))]
    keyed = [text for text in whole if is_held_out(text, 0.01 if share is None else share)]
    if keyed and len(keyed) < count:
        assert (train, validation) == ([text for text in whole if text not in keyed], keyed)
    else:
        assert "".join(train + validation) == "".join(whole)


def test_few_lines_of_json_have_both_splits(tmp_path):
    put(tmp_path, a_jsonl=json.dumps({"text": PROSE}) + "\n")
    prepare([f"jsonl:{tmp_path}/a.jsonl"], "bytes", tmp_path / "out")
    (train,), (validation,) = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "validation")
    assert train + validation == PROSE


def test_few_rows_of_a_dataset_have_both_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [PROSE]}).save_to_disk(str(tmp_path / "saved"))
    prepare([f"hf:{tmp_path / 'saved'}"], "bytes", tmp_path / "out")
    (train,), (validation,) = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "validation")
    assert train + validation == PROSE


def test_too_little_for_two_splits_is_said_before_anything_is_written(tmp_path):
    put(tmp_path, one_txt="x", blank_txt=" \n")
    for name, why in (("one", "too little text"), ("blank", "no document to train on")):
        with pytest.raises(UsageError, match=why):
            prepare([f"text:{tmp_path}/{name}.txt"], "bytes", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    prepare([f"text:{tmp_path}/one.txt"], "bytes", tmp_path / "out", validation_share=0.0)
    assert texts(tmp_path / "out", "train") == ["x"] and texts(tmp_path / "out", "validation") == []


def test_modules_of_which_none_is_held_out(tmp_path, monkeypatch):
    put(tmp_path, lib__a_py="a = 1\n", lib__b_py="b = 2\n")
    source = StdlibSource(1e-9, tmp_path / "lib")
    monkeypatch.setattr(writer, "make_source", lambda *_, **__: source)
    with pytest.raises(UsageError, match="too few modules"):
        prepare(["stdlib"], "bytes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- folders and names


def test_a_folder_is_read_in_order_and_what_is_skipped_is_said(tmp_path):
    folder = put(
        tmp_path / "texts", b_txt="second", a__z_md="first", c__d__e="third", _hidden="no", _git__config="no",
        image_png=b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", empty_txt="",
    )  # fmt: skip
    (folder / "link").symlink_to(folder / "a", target_is_directory=True)
    (folder / "gone.txt").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe")
    said = []
    prepare([f"text:{folder}"], "bytes", tmp_path / "out", validation_share=0.0, remark=said.append)
    assert texts(tmp_path / "out", "train") == ["first", "second", "third"]
    (line,) = said
    assert line.startswith(f"text:{folder}: 4 files are read, and skipped are {folder}/.git (hidden), ")
    for name, why in ((".hidden", "hidden"), ("gone.txt", "no file"), ("image.png", "binary")):
        assert f"{folder / name} ({why})" in line
    assert line.endswith(" and 1 more")  # the pipe, of which nothing is read


def test_a_folder_as_a_pattern_for_its_files_gives_the_same(tmp_path):
    folder = put(tmp_path / "texts", b_txt="second", a__z_txt="first", c_txt="third")
    found = [[d.text for d in make_source(f"text:{folder}{rest}", 0.0).documents()] for rest in ("", "/**/*.txt")]
    assert found[0] == found[1] == ["first", "second", "third"]


def test_a_folder_of_json_lines(tmp_path):
    put(tmp_path / "data", a_jsonl='{"text": "one"}\n', b__c_jsonl='{"text": "two"}\n', readme_txt="not JSON")
    prepare([f"jsonl:{tmp_path}/data"], "bytes", tmp_path / "out", validation_share=0.0)
    assert texts(tmp_path / "out", "train") == ["one", "two"]
    with pytest.raises(UsageError, match=r"has no \.jsonl files; skipped are .*z\.txt \(not \.jsonl\)"):
        make_source(f"jsonl:{put(tmp_path / 'other', z_txt='a')}")
    with pytest.raises(UsageError, match="has no text files"):
        make_source(f"text:{put(tmp_path / 'binary', z_txt=bytes(9))}")


def test_the_corpus_itself_is_no_source_of_it(tmp_path):
    put(tmp_path, one_txt="one", two_txt="two")
    for _ in range(2):
        prepare([f"text:{tmp_path}"], "bytes", tmp_path / "out", validation_share=0.0, resume=True)
    assert texts(tmp_path / "out", "train") == ["one", "two"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    put(tmp_path, **{"[a]_txt": "one", "a_txt": "two"})
    assert [d.text for d in make_source(f"text:{tmp_path}/[a].txt", 0.0).documents()] == ["one"]


def test_names_that_are_none(tmp_path):
    for name in ("a\0b", "x" * 5000, "no/such", "\x1b[31m.txt"):
        with pytest.raises(UsageError) as error:
            make_source(f"text:{name}")
        assert str(error.value).isprintable() and len(str(error.value)) < 300


# ---------------------------------------------------------------------------------- files that cannot be read, settings


@pytest.mark.parametrize(
    ("kind", "name", "content", "why"),
    [
        ("text", "m_txt", b"caf\xe9 au lait", r"m\.txt is not text in UTF-8: byte 3 is 0xe9\. Convert it"),
        ("text", "m_txt", "sixteen bits".encode("utf-16"), "byte 0 is 0xff"),
        ("jsonl", "m_jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"m\.jsonl, line 2, is not valid JSON"),
        ("jsonl", "m_jsonl", b'{"text": "a"}\n{"text": 7}\n', r'm\.jsonl, line 2, has no field "text"'),
        ("jsonl", "m_jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", r"m\.jsonl, line 1, is not valid JSON"),
        ("jsonl", "m_jsonl", b"[" * 100_000, r"m\.jsonl, line 1, is not valid JSON"),
    ],
)
def test_a_bad_file_among_many_is_found_before_anything_is_written(kind, name, content, why, tmp_path):
    for i in range(30):
        row = f"text {i} " * 20
        put(tmp_path / "in", **{f"{chr(97 + i % 26)}{i}_{'txt' if kind == 'text' else 'jsonl'}":
                                row if kind == "text" else json.dumps({"text": row}) + "\n"})  # fmt: skip
    put(tmp_path / "in", **{name: content})
    for tokenizer in ("bytes", "bpe:300"):
        with pytest.raises(UsageError, match=why) as error:
            prepare([f"{kind}:{tmp_path}/in"], tokenizer, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    put(tmp_path / "in", **{name: b'{"text": "mended"}\n'})
    prepare([f"{kind}:{tmp_path}/in"], "bytes", tmp_path / "out")  # without --resume
    assert sum("mended" in text for text in texts(tmp_path / "out", "train") + texts(tmp_path / "out", "validation"))


def test_plays_that_are_no_text(tmp_path):
    for path, content in (("a_gut.txt", b"caf\xe9"), ("b_gut.txt", b"\xff")):
        (tmp_path / path).write_bytes(content)
        with pytest.raises(UsageError, match=f"{path} is not text in UTF-8: byte "):
            make_source(f"shakespeare:{tmp_path}")
        (tmp_path / path).unlink()


def test_a_file_of_the_standard_library_in_no_encoding(tmp_path):
    put(tmp_path, lib__a_py="a = 1\n", lib__b_py=b"# coding: nonsense\nb = 2\n", two__b_py=b"b = '\xe9'\n")
    for folder, name in (("lib", "b.py"), ("two", "b.py")):
        with pytest.raises(UsageError, match=f"{name} is not in the encoding that it names"):
            StdlibSource(0.5, tmp_path / folder).scan()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shard_tokens", 0), ("shard_tokens", -1), ("shard_tokens", 10**30), ("workers", 0), ("workers", -3),
        ("workers", 10**6), ("validation_share", float("nan")), ("validation_share", 1.5), ("validation_share", -1.0),
        ("validation_share", float("inf")),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(option, value, tmp_path):
    put(tmp_path, a_txt=PROSE)
    with pytest.raises(UsageError, match=f"^{option} must be at least ") as error:
        prepare([f"text:{tmp_path}/a.txt"], "bytes", tmp_path / "out", **{option: value})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_names_that_are_not_utf_8(tmp_path):
    Tokenizer = pytest.importorskip("tokenizers").Tokenizer
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.json")
    put(tmp_path, a_txt=PROSE)
    train_bpe(300, [PROSE]).inner.save(str(tmp_path / "own.json"))
    try:
        (tmp_path / "own.json").rename(name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text(PROSE)
    out = tmp_path / os.fsdecode(b"caf\xe9")
    for _ in range(2):
        prepare([f"text:{tmp_path}/caf*.txt"], name, out, resume=True)
    assert "".join(texts(out, "train") + texts(out, "validation")) == PROSE
    # As the library writes it.
    saved = Tokenizer.from_str((out / "tokenizer" / "tokenizer.json").read_text())
    saved.save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == (out / "tokenizer" / "tokenizer.json").read_bytes()


def test_an_out_that_is_taken_or_cannot_be_made_is_said_before_the_sources_are_read(tmp_path, monkeypatch):
    put(tmp_path, a_txt=PROSE, file="a file", thesis__a_tex="years of work")
    prepare([f"text:{tmp_path}/a.txt"], "bytes", tmp_path / "done")
    monkeypatch.setattr(TextSource, "_texts", lambda _: pytest.fail("a source was read"))
    for out, why in (("file", "cannot be written"), ("file/out", "cannot be written"), ("done", "already holds"),
                     ("thesis", "no corpus")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            prepare([f"text:{tmp_path}/a.txt"], "bytes", tmp_path / out)


def test_files_follow_the_umask(tmp_path):
    put(tmp_path, a_txt=PROSE)
    before = os.umask(0o027)
    try:
        prepare([f"text:{tmp_path}/a.txt"], "bytes", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes.pop("tokenizer") == 0o750 and set(modes.values()) == {0o640}, modes
    assert not [name for name in modes if name.startswith(".")]


# --------------------------------------------------------------------------------------------- two at once, and Ctrl-C


def test_a_second_preparation_of_the_same_folder_is_refused(tmp_path, monkeypatch):
    from deltaproduct import files

    monkeypatch.setattr(files, "PATIENCE", 0.2)
    put(tmp_path, a_txt=PROSE)
    begun, goes_on, failed = threading.Event(), threading.Event(), []

    def slowly(_):
        begun.set()
        goes_on.wait(60)

    def first() -> None:
        try:
            prepare([f"text:{tmp_path}/a.txt"], "bytes", tmp_path / "out", progress=slowly)
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    try:
        for resume in (False, True):
            with pytest.raises(UsageError, match=rf"out is being written by process {os.getpid()} on .*; wait"):
                prepare([f"text:{tmp_path}/a.txt"], "bytes", tmp_path / "out", resume=resume)
    finally:
        goes_on.set()
        thread.join()
    assert not failed and "".join(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "validation")) == PROSE
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


INTERRUPTED = """
import os, sys
from pathlib import Path
from deltaproduct.cli.main import main
from deltaproduct.corpus import encode, writer
encode.BATCH_CHARACTERS, writer.JOURNAL_SECONDS = 300, 0.0
shown = writer.PreparationProgress
def progress(doing, done, total, tokens):
    if tokens > 4000 and not Path("told").exists():
        Path("told").touch()
        import time; time.sleep(60)
    return shown(doing, done, total, tokens)
writer.PreparationProgress = progress
main(sys.argv[1:])
"""


@pytest.mark.slow("kills")
def test_an_interrupted_command_goes_on(tmp_path):
    put(tmp_path, **{f"in__{i:02d}_txt": f"text {i} " * 30 for i in range(60)})
    flags = ["lm", "prepare", "--source", f"text:{tmp_path}/in", "--shard-tokens", "500", "--validation-share", "0.2"]
    command = [sys.executable, "-c", INTERRUPTED, *flags, "--out", "cut"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not (tmp_path / "told").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "" and "Traceback" not in error, error
    assert "--resume" in error.splitlines()[-1], error
    LmPrepare(source=(f"text:{tmp_path}/in",), out=tmp_path / "cut", shard_tokens=500, validation_share=0.2,
              resume=True).run()  # fmt: skip
    prepare([f"text:{tmp_path}/in"], "bytes", tmp_path / "whole", shard_tokens=500, validation_share=0.2)
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.*"))
    assert names == sorted(path.name for path in (tmp_path / "cut").glob("*.*")) and len(names) > 8
    assert all((tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_what_an_interrupted_command_says(tmp_path, monkeypatch):
    put(tmp_path, a_txt=PROSE)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("deltaproduct.cli.lm_prepare.prepare", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"The same command with --resume goes on with .*{tmp_path.name}/out"):
        LmPrepare(source=(f"text:{tmp_path}/a.txt",), out=tmp_path / "out").run()
