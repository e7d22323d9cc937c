"""A hundred kills of a run that saves all the time, while others read it all the time."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from run_folder import metrics

HELPERS = Path(__file__).parents[1] / "helpers"

# Processes are forked off one that has imported and computed everything once, so that a start costs milliseconds.
KILLED = """
    import contextlib, io, json, os, random, signal, sys, time, traceback
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    from run_folder import steps_done
    from runs import run_config
    from deltaproduct.cli.main import main
    from deltaproduct.training import train

    place, kills_wanted, steps = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    config, run, stop = run_config(steps=steps), place / "run", place / "stop"

    def evaluate(folder):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(["evaluate", str(folder), "--lengths", "2", "--sequences", "1", "--json"])
        return json.loads(out.getvalue())

    train(config, place / "warm", checkpoint_every=steps, log_every=1, show=False)
    evaluate(place / "warm")

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

    def train_on():
        try:
            train(config, run, resume=True, checkpoint_every=1, log_every=1, show=False)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    chance, kills, readers = random.Random(0), 0, []
    while True:
        child = os.fork()
        if child == 0:
            train_on()
        if kills < kills_wanted:
            # Some steps and a part of one: however fast the machine is, the run must not end before the last kill.
            moment = steps_done(run) + chance.randrange(3)
            while steps_done(run) < moment and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.0005)
            time.sleep(chance.uniform(0.0, 0.01))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif status:
            stop.touch()
            sys.exit(f"resuming failed after {kills} kills")
        else:
            break
        if not readers and steps_done(run) > 1:  # there is a checkpoint to read
            for number in range(2):
                reader = os.fork()
                if reader == 0:
                    read_on(number)
                readers.append(reader)
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
    for name in ("model.safetensors", "optimizer.safetensors"):
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
