"""Tokenizers are data: code that comes with one is never run, nobody is asked, and damage is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltaproduct.corpus import encode, load_tokenizer
from deltaproduct.corpus.sources import make_source
from deltaproduct.corpus.tokenizer import ByteTokenizer, HubTokenizer, LibraryTokenizer, make_tokenizer, train_bpe
from deltaproduct.errors import UsageError
from deltaproduct.files import seal_folder

CODE = """
from pathlib import Path
Path(__file__).with_name("MARKER").touch()
Path({marker!r}).touch()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast):
    pass
class EvilConfig:
    pass
"""
PREPARE = """
import sys
from pathlib import Path
from deltaproduct.cli.main import main
main(sys.argv[1:])
"""


def hostile(folder: Path, marker: Path, **settings) -> Path:
    """A tokenizer that works, and whose settings name a class of a file beside it, which plants a marker."""
    train_bpe(300, ["hello world " * 30]).save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    (folder / "manifest.json").unlink()
    return folder


def prepared(folder: Path, out: Path, answers: str | None) -> subprocess.CompletedProcess:
    (out.parent / "texts").mkdir(exist_ok=True)
    (out.parent / "texts" / "a.txt").write_text("hello world, and more of it " * 20)
    command = [sys.executable, "-c", PREPARE, "lm", "prepare", "--source", f"text:{out.parent}/texts/a.txt",
               "--tokenizer", f"hf:{folder}", "--out", str(out)]  # fmt: skip
    given = {"stdin": subprocess.DEVNULL} if answers is None else {"input": answers}
    where = {"HF_HOME": str(out.parent / "hub"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=os.environ | where, capture_output=True, text=True, timeout=100, **given)


# With the fast class alone, with a class that transformers has beside it, in the form of old, and in the model's
# settings, which transformers reads as well.
WAYS = {
    "a class of its own": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}},
    "a class of a library": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    "a list": {"tokenizer_class": "Evil", "auto_map": ["evil.Evil", "evil.Evil"]},
    "another repository": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "some/one--evil.Evil"]}},
}


@pytest.mark.parametrize("way", WAYS)
def test_code_of_a_tokenizer_is_refused(way, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    folder = hostile(tmp_path / "evil", tmp_path / "MARKER", **WAYS[way])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(UsageError, match="brings Python code of its own") as error:
        make_tokenizer(f"hf:{folder}", list)
    assert "\n" not in str(error.value) and "tokenizer.json" in str(error.value)
    assert not (tmp_path / "MARKER").exists() and capsys.readouterr().out == ""


@pytest.mark.slow("processes")
@pytest.mark.parametrize("answers", ["y\ny\ny\n", None])
def test_the_command_asks_nobody_and_runs_nothing(answers, tmp_path):
    pytest.importorskip("transformers")
    folder = hostile(tmp_path / "evil", tmp_path / "MARKER", **WAYS["a class of its own"])
    done = prepared(folder, tmp_path / "out", answers)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.count("brings Python code of its own") == 1 and "[y/N]" not in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()[-1]) < 600
    assert not (tmp_path / "MARKER").exists() and not (tmp_path / "out" / "corpus.json").exists()


def test_code_in_a_corpus_or_a_run_is_refused_as_well(tmp_path, monkeypatch):
    """`load_tokenizer` hands a folder to transformers where it says so, and its manifest can be made to fit."""
    pytest.importorskip("transformers")
    train_bpe(300, ["hello world " * 30]).save(tmp_path / "own")
    HubTokenizer.from_name(str(tmp_path / "own")).save(tmp_path / "t")
    load_tokenizer(tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    changed = config | WAYS["a class of its own"]
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(changed))
    (tmp_path / "t" / "evil.py").write_text(CODE.format(marker=str(tmp_path / "MARKER")))
    seal_folder(tmp_path / "t")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(UsageError, match="brings Python code of its own"):
        load_tokenizer(tmp_path / "t")
    assert not (tmp_path / "MARKER").exists()


def test_a_models_code_beside_a_tokenizer_is_left_alone(tmp_path, monkeypatch):
    """As in the folders that `models.hf` saves: the tokenizer itself needs none of it, and it works."""
    pytest.importorskip("transformers")
    folder = hostile(tmp_path / "evil", tmp_path / "MARKER")
    model = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(model))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    tokenizer = make_tokenizer(f"hf:{folder}", list)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert not (tmp_path / "MARKER").exists()


def test_a_dataset_with_a_script_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(CODE.format(marker=str(tmp_path / "MARKER")))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        make_source(f"hf:{tmp_path / 'set'}")
    assert "\n" not in str(error.value) and not (tmp_path / "MARKER").exists()


COUNT = '{"splits": {"train": {"num_examples": "many"}}, "features": {"text": {"dtype": "string", "_type": "Value"}}}'
DATASETS = [
    ("dataset_info.json", "[]"), ("dataset_info.json", '{"features": 7}'), ("dataset_info.json", "[" * 100_000),
    ("dataset_info.json", COUNT), ("state.json", "{}"),
    ("state.json", '{"_data_files": [{"filename": "../../../etc/passwd"}], "_fingerprint": "x"}'),
    ("data-00000-of-00001.arrow", "no arrow"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), DATASETS, ids=range(len(DATASETS)))
def test_damaged_datasets_are_one_line_or_change_nothing(name, content, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [f"text {i}" for i in range(300)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / name).is_file()
    (tmp_path / "saved" / name).write_text(content)
    try:
        source = make_source(f"hf:{tmp_path / 'saved'}")
        source.scan()
        found = [document.text for document in source.documents()]
    except UsageError as e:
        assert "\n" not in str(e)
    else:
        assert found == rows and (source.total is None or type(source.total) is int)


DAMAGED = {
    "no JSON": "nul", "a list": "[]", "deep": "[" * 100_000, "too large an id": '{"a": 5000000000}',
    "a number of 5,000 digits": '{"version": ' + "9" * 5000 + "}", "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_of_a_library_are_one_line(kind, name, tmp_path):
    pytest.importorskip("transformers")
    train_bpe(300, ["hello world " * 30]).save(tmp_path / "own")
    HubTokenizer.from_name(str(tmp_path / "own")).save(tmp_path / "t")
    (tmp_path / "t" / name).write_text(DAMAGED[kind])
    seal_folder(tmp_path / "t")
    try:
        loaded = load_tokenizer(tmp_path / "t")
    except UsageError as e:
        assert "\n" not in str(e) and str(tmp_path / "t") in str(e)
    else:  # transformers can do without its settings where they hold nothing
        assert name == "tokenizer_config.json" and kind == "too large an id"
        assert loaded.decode(loaded.encode("hello")) == "hello"


META = {
    "text for a number": {"vocab_size": "257"}, "a truth for a number": {"document_token": True},
    "a number that is none": {"document_token": float("nan")}, "a token beyond": {"document_token": 257},
    "a negative token": {"document_token": -1}, "another token": {"document_token": 3},
    "another size": {"vocab_size": 300}, "another kind": {"kind": "\x1b[31mred"}, "a list for a kind": {"kind": []},
}  # fmt: skip


@pytest.mark.parametrize("change", META)
def test_what_a_tokenizers_folder_says_of_itself(change, tmp_path):
    ByteTokenizer().save(tmp_path / "t")
    path = tmp_path / "t" / "corpus_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | META[change]))
    seal_folder(tmp_path / "t")
    with pytest.raises(UsageError) as error:
        load_tokenizer(tmp_path / "t")
    assert str(error.value).isprintable(), str(error.value)


def test_ids_that_leave_others_out(tmp_path):
    """The number of entries is not how many ids there are: a shard of 2 bytes an id would hold 70,000 as 4,464."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0, "b": 70_000, "<s>": 5}, unk_token="a")).save(str(tmp_path / "words.json"))
    tokenizer = LibraryTokenizer.from_file(tmp_path / "words.json")
    assert tokenizer.vocab_size == 70_001 and tokenizer.encode("b") == [70_000]
    tokenizer.vocab_size = 3  # as one that says so of itself
    batch = encode.DocumentBatch()
    batch.texts["train"].append("b")
    with pytest.raises(UsageError, match="has 3 tokens, but gives the token 70000"):
        encode.encode_batch(tokenizer, batch)


def test_half_a_surrogate_pair_is_one_line():
    pytest.importorskip("tokenizers")
    for tokenizer in (ByteTokenizer(), train_bpe(300, ["a b"])):
        with pytest.raises(UsageError, match=r"half of a surrogate pair at character 1, '\\ud800'"):
            tokenizer.encode("a\ud800")


def test_a_vocabulary_too_large_for_any_memory(tmp_path):
    with pytest.raises(UsageError, match=r"at most 1,048,576 tokens"):
        make_tokenizer("bpe:999999999", list)
