"""What ends `reproduce` while it trains: every run saves the step that it has done."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from run_folder import steps_done

from deltaproduct.files import read_json

HELPERS = Path(__file__).parents[1] / "helpers"

REPRODUCE = """
    import sys
    from dataclasses import replace
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from runs import run_config
    from deltaproduct.experiments.runner import run_jobs
    from deltaproduct.experiments.task_job import EvaluationSpec, TaskJob

    if __name__ == "__main__":
        spec = EvaluationSpec((4,), sequences=2)
        jobs = [TaskJob(f"seed{i}", "a", run_config(steps=1_000_000, seed=i), spec) for i in range(2)]
        try:
            run_jobs(jobs, Path(sys.argv[2]), experiment="x", workers=2, show=False)
        except KeyboardInterrupt:
            sys.exit(130)
"""


@pytest.mark.slow("kills")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_every_run_is_saved_when_reproduce_ends(tmp_path, number):
    """By Ctrl-C, or by a signal that only the process hears which started the others."""
    script = tmp_path / "reproduce.py"  # the runs' processes import it again
    script.write_text(textwrap.dedent(REPRODUCE))
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(HELPERS), str(out)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    runs = [out / "runs" / f"seed{i}" for i in range(2)]
    while any(steps_done(run) < 2 for run in runs):  # a line every ten steps
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]  # the runs' processes have it open until they end, too
    assert process.returncode == (130 if number == signal.SIGINT else -number) and "Traceback" not in err
    for run in runs:
        saved = read_json(run / "checkpoint" / "training.json")["progress"]["step"]
        assert saved >= 10 * steps_done(run) >= 20 and not (run / ".lock").exists()
