"""Readers beside writers, locks, modes, links and leftovers of `deltaproduct.files`."""

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from deltaproduct import files
from deltaproduct.errors import UsageError
from deltaproduct.files import (
    MANIFEST,
    beside,
    is_plain_name,
    locked,
    make_folder,
    read_folder,
    read_json,
    replaced_folder,
    seal_folder,
    updated_folder,
    verified_folder,
    write_json,
    write_text,
)
from deltaproduct.models import ModelConfig, SequenceModel

BOTH = {"replaced": replaced_folder, "updated": updated_folder}


def write(path, text, *, how=replaced_folder, names=("a", "b")):
    with how(path) as fresh:
        for name in names:
            write_text(fresh / name, text)


def read(folder, names):
    return {(folder / name).read_text() for name in names}


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def background(code, *arguments):
    """A process that runs `code`, and has printed a line once it is under way."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    return process


WRITER = """
    import sys, time
    from pathlib import Path
    from deltaproduct import files
    from deltaproduct.files import replaced_folder, updated_folder, write_text
    if sys.argv[4] == "renamed":
        files._exchanged = lambda *_: False  # as on a file system that cannot exchange names
    how = {"replaced": replaced_folder, "updated": updated_folder}[sys.argv[2]]
    print("begun", flush=True)
    end = time.monotonic() + float(sys.argv[3])
    i = 0
    while time.monotonic() < end:
        i += 1
        with how(Path(sys.argv[1])) as fresh:
            for name in "ab":
                write_text(fresh / name, str(i) * 1000)
    print(i)
"""


@pytest.mark.slow("readers")
@pytest.mark.ci("replaced-exchanged")
@pytest.mark.parametrize(("how", "step"), [("replaced", "exchanged"), ("replaced", "renamed"), ("updated", "")])
def test_a_reader_beside_a_writer_sees_the_old_or_the_new_and_never_an_error(tmp_path, how, step):
    write(tmp_path / "x", "0" * 1000, how=BOTH[how])
    writer = background(WRITER, tmp_path / "x", how, 2, step)
    seen = []
    while writer.poll() is None:
        found = read_folder(tmp_path / "x", "folder", read)
        assert len(found) == 1  # both files of one time
        seen.append(found.pop())
    written = int(writer.stdout.read())
    assert writer.returncode == 0
    assert written > 5 and len(set(seen)) > 2, "the two never met"
    assert hidden(tmp_path) == []


@pytest.mark.slow("readers")
@pytest.mark.skipif(sys.platform != "linux", reason="exchanging names in one step is Linux's")
def test_where_names_can_be_exchanged_the_folder_is_there_at_every_moment(tmp_path):
    """For programs that know nothing of `read_folder`, such as transformers."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not files._exchanged(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    write(tmp_path / "x", "0")
    writer = background(WRITER, tmp_path / "x", "replaced", 1, "exchanged")
    while writer.poll() is None:
        assert (tmp_path / "x").is_dir()
    assert int(writer.stdout.read()) > 3


@pytest.mark.parametrize("newest", ["new", "old"])
def test_a_reader_renames_nothing(tmp_path, newest):
    write(tmp_path / "x", "old")
    os.rename(tmp_path / "x", beside(tmp_path / "x", "old"))
    write(tmp_path / "y", "new")
    if newest == "old":
        (tmp_path / "y" / MANIFEST).unlink()
    os.rename(tmp_path / "y", beside(tmp_path / "x", "new"))
    before = hidden(tmp_path)
    assert read_folder(tmp_path / "x", "folder", read) == {newest}
    assert hidden(tmp_path) == before == [".x.new", ".x.old"] and not (tmp_path / "x").exists()
    write(tmp_path / "x", "newer")  # who writes clears up
    assert hidden(tmp_path) == [] and read_folder(tmp_path / "x", "folder", read) == {"newer"}


def test_what_is_read_while_the_folder_is_replaced_is_read_again(tmp_path):
    write(tmp_path / "x", "old")
    calls = []

    def reader(folder, names):
        calls.append(first := (folder / "a").read_text())
        if len(calls) == 1:
            write(tmp_path / "x", "new")
        return first, (folder / "b").read_text()

    assert read_folder(tmp_path / "x", "folder", reader) == ("new", "new")
    assert calls == ["old", "new"]


def test_a_folder_that_is_always_written_anew_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "READER_PATIENCE", 0.3)
    count = itertools.count()
    write(tmp_path / "x", "old")
    with pytest.raises(UsageError, match="more often than it can be read"):
        read_folder(tmp_path / "x", "folder", lambda *_: write(tmp_path / "x", str(next(count))))


def test_damage_is_named_at_once_and_sealing_accepts_it(tmp_path):
    write(tmp_path / "x", "good")
    (tmp_path / "x" / "a").write_text("mine")
    begun = time.monotonic()
    with pytest.raises(UsageError, match=r"corrupt: a does not match .*`deltaproduct seal"):
        verified_folder(tmp_path / "x", "folder")
    assert time.monotonic() - begun < files.PATIENCE
    assert seal_folder(tmp_path / "x") == ["a", "b"]
    assert read_folder(tmp_path / "x", "folder", read) == {"mine", "good"}
    with pytest.raises(UsageError, match="not a folder"):
        seal_folder(tmp_path / "nothere")


HOLDER = """
    import sys, time
    from pathlib import Path
    from deltaproduct.files import replaced_folder
    with replaced_folder(Path(sys.argv[1])) as fresh:
        (fresh / "a").write_text("theirs")
        print("begun", flush=True)
        time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow("processes")
def test_a_second_writer_is_refused_by_name_and_the_first_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    first = background(HOLDER, tmp_path / "x", 3)
    for how in BOTH.values():
        with pytest.raises(UsageError, match=f"x is being written by process {first.pid} on "):
            write(tmp_path / "x", "mine", how=how)
    assert first.wait() == 0
    assert (tmp_path / "x" / "a").read_text() == "theirs"
    write(tmp_path / "x", "mine")
    assert hidden(tmp_path) == []


@pytest.mark.slow("kills")
def test_a_killed_writer_holds_no_lock_and_its_leftovers_go(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    first = background(HOLDER, tmp_path / "x", 60)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert hidden(tmp_path) == [".x.lock", ".x.new"]
    write(tmp_path / "x", "mine")
    assert hidden(tmp_path) == [] and read_folder(tmp_path / "x", "folder", read) == {"mine"}


@pytest.mark.slow("readers")
def test_only_one_of_many_has_a_lock_at_any_time(tmp_path):
    """Lock files are removed by who gives them up, so another may hold a file that is no longer there."""
    code = """
        import sys, time
        from pathlib import Path
        from deltaproduct.files import locked
        folder = Path(sys.argv[1])
        print("begun", flush=True)
        for _ in range(100):
            with locked(folder / "lock", "It"):
                (folder / "inside").mkdir()  # fails where another is inside
                (folder / "inside").rmdir()
    """
    several = [background(code, tmp_path) for _ in range(3)]
    assert [process.wait() for process in several] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="without locks"), locked(tmp_path / "lock", "It"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_and_folders_have_the_modes_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        for how in BOTH:
            with BOTH[how](tmp_path / how) as fresh:
                os.close(os.open(fresh / "private", os.O_CREAT | os.O_WRONLY, 0o600))  # as some libraries do
                write_text(fresh / "other", "")
        write_json(make_folder(tmp_path / "made") / "plain.json", {})
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("how", BOTH)
def test_a_link_to_a_folder_stays_a_link(tmp_path, how):
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")  # leads to nothing yet
    for text in ("one", "two", "three"):
        write(tmp_path / "x", text, how=BOTH[how])
        assert read_folder(tmp_path / "x", "folder", read) == {text}
    assert (tmp_path / "x").is_symlink() and hidden(tmp_path) == hidden(tmp_path / "disk") == []


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_nothing_stays_behind_where_writing_fails(tmp_path, how, there, error):
    if there:
        write(tmp_path / "x", "old")
    with pytest.raises((error, UsageError)), BOTH[how](tmp_path / "x") as fresh:
        write_text(fresh / "a", "new")
        raise error
    assert hidden(tmp_path) == []
    assert not there or read_folder(tmp_path / "x", "folder", read) == {"old"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_no_temporary_file_stays_behind(tmp_path, monkeypatch, error):
    def failing(*_):
        raise error

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises((error, UsageError)):
        write_text(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_folder_is_tried_without_writing_into_it(tmp_path):
    folder = make_folder(tmp_path / "x")
    before = folder.stat().st_mtime_ns
    make_folder(folder)
    assert folder.stat().st_mtime_ns == before
    write_text(tmp_path / "file", "")
    with pytest.raises(UsageError, match="cannot be written"):
        make_folder(tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "sub/a", "", ".", "..", "a\\b", "a\x1b[2Jb", "a\0b", "a\nb", "\u202e"]
)
def test_a_manifest_names_only_files_of_its_own_folder(tmp_path, name):
    write(tmp_path / "x", "good")
    (tmp_path / "outside").write_text("secret")
    manifest = read_json(tmp_path / "x" / MANIFEST)
    manifest["files"][name] = {"bytes": 6, "sha256": "0"}
    (tmp_path / "x" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="not in its own folder") as e:
        verified_folder(tmp_path / "x", "folder")
    assert str(e.value).isprintable()
    assert not is_plain_name(name)


def test_odd_json_is_one_line(tmp_path):
    for text in ("[" * 100_000, "1" * 5000, "{", "\ufeff{}", '{"a": nope}'):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="not valid JSON"):
            read_json(tmp_path / "x.json")


def test_a_checkpoint_in_a_folder_whose_name_is_no_utf8_is_read(tmp_path):
    model = SequenceModel(ModelConfig.build(5, 5, hidden_size=8, num_heads=1, head_dim=4))
    folder = tmp_path / os.fsdecode(b"run \xff \xc3\xa9")
    model.save_pretrained(folder)
    loaded = SequenceModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in model.state_dict().items())


def test_text_that_is_no_utf8_is_kept_as_escapes(tmp_path):
    write_json(tmp_path / "x.json", {"command": os.fsdecode(b"train \xff")})
    assert read_json(tmp_path / "x.json") == {"command": os.fsdecode(b"train \xff")}
