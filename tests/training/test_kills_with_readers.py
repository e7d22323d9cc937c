"""A hundred kills of a run that saves all the time, while others read it all the time."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from run_folder import metrics

HELPERS = Path(__file__).parents[1] / "helpers"

KILLED = """
    import contextlib, io, json, os, sys, traceback
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from kills import kill_and_resume, warmed_up
    from run_folder import steps_done
    from deltaproduct.cli.main import main

    place, kills_wanted, steps = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    run, stop = place / "run", place / "stop"

    def evaluate(folder):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(["evaluate", str(folder), "--lengths", "2", "--sequences", "1", "--json"])
        return json.loads(out.getvalue())

    def read_on(number):
        # Until it is told to stop; what it is told instead of an answer goes to a file.
        reads = 0
        with open(place / f"reader-{number}", "w") as said, contextlib.redirect_stderr(said):
            while not stop.exists():
                try:
                    evaluate(run if number else run / "checkpoint")
                except SystemExit:
                    pass  # the reason has been written
                except BaseException:
                    traceback.print_exc()
                reads += 1
        (place / f"reads-{number}").write_text(str(reads))
        os._exit(0)

    kills, readers = 0, []

    def begin_to_read(done):
        global kills
        kills = done
        if not readers and steps_done(run) > 1:  # there is a checkpoint to read
            for number in range(2):
                reader = os.fork()
                if reader == 0:
                    read_on(number)
                readers.append(reader)

    warmed_up(place, steps)
    evaluate(place / "warm")
    try:
        kill_and_resume(run, steps, kills_wanted, begin_to_read)
    finally:
        stop.touch()
    for reader in readers:
        os.waitpid(reader, 0)
    print(kills, *((place / f"reads-{number}").read_text() for number in range(2)))
"""


def killed(place: Path, kills: int, steps: int) -> list[int]:
    """Train, kill, resume; how many kills and reads of each reader there were."""
    arguments = [sys.executable, "-c", textwrap.dedent(KILLED), str(HELPERS), str(place), str(kills), str(steps)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=560, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return [int(n) for n in done.stdout.split()]


def check(place: Path, kills: int, steps: int) -> None:
    done, *reads = killed(place, kills, steps)
    assert done == kills and min(reads) > kills, f"{done} kills, {reads} reads"
    for number in range(2):
        assert (place / f"reader-{number}").read_text() == "", "a reader saw something that was not whole"
    for name in ("model.safetensors", "optimizer-0-of-1.safetensors"):
        warm, run = ((place / which / "checkpoint" / name).read_bytes() for which in ("warm", "run"))
        assert warm == run, name
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in metrics(place / which)]
             for which in ("warm", "run")]  # fmt: skip
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == list(range(1, steps + 1))
    left = {p.name for p in (place / "run").iterdir()}
    assert left == {p.name for p in (place / "warm").iterdir()}


@pytest.mark.slow("readers")
@pytest.mark.timeout(600)
def test_a_hundred_kills_beside_readers_lose_nothing_and_show_nothing_broken(tmp_path):
    check(tmp_path, kills=100, steps=400)
