"""Launchers: each call settled once under its name whatever became of it, the same numbers wherever runs are carried
out, one line for what cannot be had, and nothing left running.

SLURM's own programs are stood in for by scripts, which carry out what `sbatch` is given.
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from commands import run as command

from deltaproduct.errors import UsageError
from deltaproduct.experiments.runner import run_jobs
from deltaproduct.experiments.task_job import EvaluationSpec, TaskJob
from deltaproduct.launchers import LAUNCHERS, default_workers, get_launcher, parse_options
from deltaproduct.launchers.launcher import carry_out, opened
from deltaproduct.models import ModelConfig
from deltaproduct.training import Run, TrainConfig

pytestmark = pytest.mark.timeout(170)  # under heavy load; each takes seconds where nothing else runs
CURVE = {"length": list(range(200)), "accuracy": [i / 7 for i in range(200)]}
HERE = {"local": {}, "slurm": {"cluster": "local"}, "ray": {}}  # options with which each serves on one machine
# Ray takes ten seconds and more where the others take one.
WITH_SLOW_RAY = [pytest.param(name, marks=pytest.mark.slow("ray") if name == "ray" else ()) for name in LAUNCHERS]


class Odd(Exception):
    """An error that can be pickled and then not be read."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def whole(folder):
    (folder / "whole").touch()
    return {"name": "whole", "curve": CURVE}


def mistaken():
    raise UsageError("The loss is no longer finite.")


def broken():
    raise RuntimeError("a fault\nin two lines")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def endless(folder):
    (folder / f"{os.getpid()}.began").touch()
    time.sleep(300)


@pytest.fixture(scope="module")
def ray_here():
    """Ray once for all tests, as starting it takes seconds."""
    tune = pytest.importorskip("ray.tune", reason="Ray is not installed")
    ray = pytest.importorskip("ray")
    assert tune
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        # Ray's processes have the environment that it was started in, whichever test is the first to need it.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def launch(request, monkeypatch):
    """(name of a launcher) → one that serves on this machine, or a skip."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the functions of this file
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def prepared(name, folder, workers=2, **options):
        if name == "slurm":
            pytest.importorskip("submitit", reason="submitit is not installed")
        if name == "ray":
            request.getfixturevalue("ray_here")
        return get_launcher(name, workers=workers, folder=folder, options=HERE[name] | options)

    return prepared


def outcomes(launcher, calls):
    """({name: what it returned, or the error}, number of ticks); a call settled twice fails here."""
    ends, ticks = {}, []

    def settle(name, outcome):
        assert name not in ends
        try:
            ends[name] = outcome()
        except Exception as e:
            ends[name] = e

    launcher.run(calls, settle, lambda: ticks.append(time.monotonic()))
    return ends, len(ticks)


@pytest.mark.slow("launchers")
@pytest.mark.ci("local", "ray")
@pytest.mark.parametrize("name", WITH_SLOW_RAY)
def test_every_call_is_settled_once_and_stops_no_other(launch, tmp_path, capfd, name):
    calls = {"mistaken": mistaken, "killed": killed, "broken": broken, "whole": partial(whole, tmp_path)}
    launcher = launch(name, tmp_path)
    capfd.readouterr()
    ends, ticks = outcomes(launcher, calls)
    assert ends.keys() == calls.keys() and ticks >= 1
    assert ends["whole"] == {"name": "whole", "curve": CURVE} and (tmp_path / "whole").exists()
    assert type(ends["mistaken"]) is UsageError and str(ends["mistaken"]) == "The loss is no longer finite."
    assert type(ends["broken"]) is RuntimeError and str(ends["broken"]) == "a fault\nin two lines"
    assert "raise RuntimeError" in "".join(ends["broken"].__notes__), "the traceback of the other process is lost"
    assert type(ends["killed"]) is UsageError and "was killed" in str(ends["killed"])
    assert capfd.readouterr() == ("", ""), "a launcher speaks in between the lines of progress"


def test_an_error_that_cannot_be_read_elsewhere_still_says_what_it_was():
    def odd():
        raise Odd("one", "two")

    with pytest.raises(RuntimeError) as caught:
        opened(carry_out(odd))
    assert str(caught.value) == "Odd: one and two" and "raise Odd" in "".join(caught.value.__notes__)
    with pytest.raises(Exception, match="pickle"):
        opened(carry_out(lambda: {"a": lambda: 0}))


def tiny(seed):
    model = ModelConfig.build(hidden_size=8, num_heads=1, head_dim=4, vocab_size=7, num_labels=6)
    training = TrainConfig(task="S3", steps=2, lengths=(4,), batch_sizes=(8,), seed=seed)
    return TaskJob(f"run-{seed}", "tiny", Run(training=training, model=model), EvaluationSpec((8,), sequences=4))


def numbers(results):
    return [{key: value for key, value in result.items() if key != "wall_seconds"} for result in results]


@pytest.mark.slow("kills")
@pytest.mark.parametrize("name", WITH_SLOW_RAY)
def test_a_stopped_sweep_continues_and_gives_the_same_numbers(launch, tmp_path, monkeypatch, name):
    launch(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    jobs, sweep = [tiny(0), tiny(1)], Path("sweep")  # relative: another folder in a process that lies elsewhere
    here = [job.run(tmp_path / "here", threads=1) for job in jobs]
    jobs[0].run(sweep, threads=1)
    result = sweep / "runs" / "run-0" / "result.json"
    before = result.stat().st_mtime_ns
    go = partial(run_jobs, jobs, sweep, experiment="t", launcher=name, launcher_options=HERE[name], show=False)
    for _ in range(2):  # the second time there is nothing left to do
        summary = go(workers=2)
        assert summary["failed"] == {} and numbers(summary["runs"]) == numbers(here)
        assert result.stat().st_mtime_ns == before
        result = sweep / "runs" / "run-1" / "result.json"
        before = result.stat().st_mtime_ns
    assert {p.name for p in tmp_path.iterdir()} == {"here", "sweep"}


def children():
    """Processes that this one has started and that have not ended, and theirs."""
    found, parents = set(), {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    new = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in new} - found:
        found |= new
    return found


@pytest.mark.slow("kills")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", WITH_SLOW_RAY)
def test_an_interrupt_leaves_nothing_running(launch, tmp_path, name):
    launcher = launch(name, tmp_path, workers=1)

    def tick():
        if list(tmp_path.glob("*.began")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher.run({n: partial(endless, tmp_path) for n in "abc"}, lambda *_: pytest.fail("settled"), tick)
    began = {int(path.stem) for path in tmp_path.glob("*.began")}
    deadline = time.monotonic() + 30  # a process that was told to end needs a core for it, and Ray's end after the call
    while began & children() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = began & children()
    for pid in left:  # or the tests' own process would wait for them
        os.kill(pid, signal.SIGKILL)
    assert len(began) == 1 and not left


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


@pytest.fixture
def slurm_programs(tmp_path, monkeypatch):
    """A folder of programs that do what SLURM's do: jobs run here, at once, as an array of number 77."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    folder = tmp_path / "bin"
    folder.mkdir()
    program(
        folder,
        "sbatch",
        f"""cp "$1" {folder}/script
last=$(sed -n 's/.*--array=0-\\([0-9]*\\).*/\\1/p' "$1")
for i in $(seq 0 "$last"); do
  export SLURM_JOB_ID=$((100 + i)) SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 SLURM_PROCID=0
  bash "$1" > /dev/null 2>&1 < /dev/null &
done
echo Submitted batch job 77""",
    )
    program(folder, "srun", 'while [[ "$1" == --* ]]; do [[ "$1" == --unbuffered ]] || shift; shift; done; exec "$@"')
    program(folder, "sacct", 'echo "JobID|State|NodeList"; echo "77_0|RUNNING|n"; echo "77_1|OUT_OF_MEMORY|n"')
    program(folder, "scancel", f'echo "$1" >> {folder}/cancelled')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return folder


@pytest.mark.slow("launchers")
@pytest.mark.filterwarnings("error:Setting")  # submitit's of a parameter that it has to rename
def test_slurm_gets_one_array_with_the_options(tmp_path, monkeypatch, slurm_programs):
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJob._results_timeout_s", 0)
    options = parse_options("partition=gpu,exclude=n1,n2,timeout_min=30,gpus_per_node=1,cpus_per_task=3,mem_gb=8")
    launcher = get_launcher("slurm", workers=1, folder=tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()
    ends, ticks = outcomes(launcher, {"whole": partial(whole, tmp_path), "killed": killed})
    assert ends.keys() == {"whole", "killed"} and ends["whole"]["curve"] == CURVE and ticks
    assert type(ends["killed"]) is UsageError and "OUT_OF_MEMORY" in str(ends["killed"])
    lines = (slurm_programs / "script").read_text().splitlines()
    for asked in ("array=0-1%1", "partition=gpu", "exclude=n1,n2", "time=30", "gpus-per-node=1", "cpus-per-task=3",
                  "mem=8GB", "job-name=deltaproduct", f"output={tmp_path}/out/slurm/%A_%a_0_log.out"):  # fmt: skip
        assert f"#SBATCH --{asked}" in lines
    assert not (slurm_programs / "cancelled").exists()


def test_an_interrupt_cancels_slurms_jobs(tmp_path, slurm_programs):
    program(slurm_programs, "sbatch", "echo Submitted batch job 77")
    launcher = get_launcher("slurm", workers=2, folder=tmp_path / "out")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher.run(dict.fromkeys("ac", mistaken), lambda *_: None, interrupt)
    assert (slurm_programs / "cancelled").read_text().split() == ["77_0"]  # sacct says that the other has ended


def test_what_sbatch_refuses_is_one_line(tmp_path, slurm_programs):
    program(slurm_programs, "sbatch", "echo sbatch: error: invalid partition specified: gqu >&2\nexit 1")
    launcher = get_launcher("slurm", workers=2, folder=tmp_path / "out", options={"partition": "gqu"})
    with pytest.raises(UsageError, match="took no job: sbatch: error: invalid partition specified: gqu"):
        launcher.run(dict.fromkeys("ab", mistaken), lambda *_: None, lambda: None)


@pytest.mark.slow("launchers")
def test_a_machine_without_the_package_is_one_line(launch, tmp_path, monkeypatch):
    launcher = launch("slurm", tmp_path)
    monkeypatch.delenv("PYTHONPATH")  # this file's functions are in no package, so that the job cannot import them
    ends, _ = outcomes(launcher, {"whole": partial(whole, tmp_path)})
    said = str(ends["whole"])
    assert type(ends["whole"]) is UsageError and "\n" not in said
    assert said.startswith("ModuleNotFoundError: No module named 'test_launchers'; its log is ")
    assert "No module named" in Path(said.rpartition(" ")[2]).read_text()


def test_a_slurm_job_that_is_over_goes_back_into_the_queue():
    pytest.importorskip("submitit", reason="submitit is not installed")
    from deltaproduct.launchers.slurm import Resumable

    again = Resumable(partial(dict, a=1), 1).checkpoint()
    assert again.result() == Resumable(partial(dict, a=1), 1)()


@pytest.mark.slow("ray")
def test_more_than_ray_has_is_refused(launch, tmp_path, ray_here):
    with pytest.raises(UsageError, match="cpu=400"):
        launch("ray", tmp_path, cpu=400).run({"a": mistaken}, lambda *_: None, lambda: None)


@pytest.mark.slow("ray")
def test_ray_is_stopped_only_where_it_was_started(monkeypatch):
    ray = pytest.importorskip("ray")
    from deltaproduct.launchers.ray_cluster import connected

    done = []
    monkeypatch.setattr(ray, "init", lambda address, **settings: done.append(address))
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(KeyboardInterrupt), connected("auto"):
        raise KeyboardInterrupt
    assert done == ["auto", "shutdown"]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with connected("auto"):
        pass
    assert done == ["auto", "shutdown"]

    def unreachable(address, **settings):
        raise ConnectionError("no\nanswer")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(UsageError, match="'there:1': no answer"), connected("there:1"):
        pass


@pytest.mark.parametrize(
    ("launcher", "options", "words"),
    [
        ("slurm", "partition=gpu", ("sbatch", "cluster=local")),
        ("slurm", "cluster=mine", ("cluster", "'mine'")),
        ("slurm", "cluster=local,colour=red", ("'colour'", "partition")),
        ("slurm", "cluster=local,timeout_min=soon", ("timeout_min", "whole number", "'soon'")),
        ("slurm", "cluster=local,cpus_per_task=-1", ("cpus_per_task", "at least 0")),
        ("slurm", "cluster=local,mem_gb=nan", ("mem_gb", "at least 0")),
        ("slurm", "cluster=local,partition=", ("partition", "no value")),
        ("slurm", "qos=a,qos=b", ("qos", "twice")),
        ("ray", "gpu=half", ("gpu", "a number", "'half'")),
        ("ray", "partition=gpu", ("'partition'", "address")),
        ("ray", "gpu", ("NAME=VALUE", "'gpu'")),
        ("local", "gpu=1", ("no options", "gpu")),
    ],
)
def test_what_cannot_be_had_is_one_line(capsys, tmp_path, monkeypatch, launcher, options, words):
    if launcher != "local":
        pytest.importorskip({"slurm": "submitit", "ray": "ray"}[launcher])
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "out"
    status, said, error = command(
        capsys, "reproduce", "s3", "--out", out, "--launcher", launcher, "--launcher-options", options
    )
    assert status == 2 and said == "" and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not out.exists()


@pytest.mark.parametrize(("launcher", "module"), [("slurm", "submitit"), ("ray", "ray.tune")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, launcher, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"needs {module}: pip install 'deltaproduct\[dist\]'"):
        get_launcher(launcher, workers=1, folder=tmp_path, options=HERE[launcher])


def test_options_and_workers():
    assert parse_options(None) == {}
    for text in ("", " "):
        with pytest.raises(UsageError, match="NAME=VALUE,NAME=VALUE, and none is given"):
            parse_options(text)
    assert parse_options("nodelist=n[1-3,5],a=b=c") == {"nodelist": "n[1-3,5]", "a": "b=c"}
    assert default_workers(1) == 1 and default_workers(10**4) < 10**4
    assert default_workers(10**4, "slurm") == default_workers(10**4, "ray") == 10**4
    assert default_workers(10**4, "slurm", {"cluster": "local"}) == default_workers(10**4)
