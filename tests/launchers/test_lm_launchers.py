"""`lm train` by a launcher: the numbers of plain processes, one line for what goes wrong, nothing lost or left running.

SLURM's own programs are stood in for by scripts, or by submitit's processes of this machine.
"""

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import run as command
from corpora import corpus_of_words
from ranks import on_ranks
from run_folder import metrics, steps_done

from deltaproduct.corpus import Corpus
from deltaproduct.corpus.writer import prepare
from deltaproduct.errors import UsageError
from deltaproduct.files import read_json
from deltaproduct.launchers import get_rank_launcher
from deltaproduct.launchers.options import parse_options
from deltaproduct.launchers.ranks import LostRank, cause, followed
from deltaproduct.machine import command_line
from deltaproduct.models import SequenceModel
from deltaproduct.training import Run, loop
from deltaproduct.training.distributed import Ranks
from deltaproduct.training.objectives.language import LanguageObjective

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
STEPS = 60
FLAGS = (f"--device cpu --context 32 --batch-size 4 --warmup-steps 4 --steps {STEPS} --log-every 1 "
         "--checkpoint-every 3 --hidden-size 32 --num-hidden-layers 2 --num-heads 2 --head-dim 8 "
         "--intermediate-size 48").split()  # fmt: skip
TWO = {"slurm": "cluster=local,tasks_per_node=2", "ray": "num_workers=2"}  # options for two ranks of this machine
# What the processes of ranks have in their command lines.
PROGRAM = {"slurm": b"submitit.core._submit", "ray": b"RayTrainWorker"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return corpus_of_words(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def ray_here():
    """Ray once for all tests, as starting it takes seconds."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("ray.train")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        # Ray's processes have the environment that it was started in, whichever test is the first to need it.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def launcher(request, monkeypatch):
    """The name of a launcher that can be used here, or a skip."""
    # For the functions of this file, and for a checkout that is not the one installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if request.param == "slurm":
        pytest.importorskip("submitit", reason="submitit is not installed")
    else:
        request.getfixturevalue("ray_here")
    return request.param


BOTH = pytest.mark.parametrize("launcher", TWO, indirect=True)
# Ray takes longer to start here than all else together.
RAY_IS_SLOW = pytest.mark.parametrize(
    "launcher", ["slurm", pytest.param("ray", marks=pytest.mark.slow("ray"))], indirect=True
)


def train(capsys, corpus: Path, out: Path, launcher: str, *more: str, options: str | None = None):
    asked = options if options is not None else TWO[launcher]
    flags = ("--launcher", launcher, *(("--launcher-options", asked) if asked else ()), *more)
    return command(capsys, "lm", "train", "--data", corpus, "--out", out, *FLAGS, *flags)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out)]


def plainly(corpus: Path, out: Path, run: Path) -> None:
    """The run of another folder, on whatever ranks this is called on."""
    config = Run.from_dict(read_json(run / "config.json"))
    with Ranks.started("cpu") as ranks:
        loop.train(config, out, LanguageObjective(config.training, Corpus.open(corpus)), ranks, log_every=1, show=False)


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """(folder of a run) → folder of the same one by two processes that no launcher has started; trained once."""
    out = tmp_path_factory.mktemp("plain") / "run"

    def trained(run: Path) -> Path:
        if not out.exists():
            on_ranks(2, plainly, corpus, out, run)
        assert read_json(run / "config.json") == read_json(out / "config.json")
        return out

    return trained


def assert_same(out: Path, plain: Path) -> None:
    """The ranks add the same float32 numbers in the same order, so 1e-6 leaves room for nothing but their last bits."""
    assert len(losses(out)) == STEPS and losses(out) == pytest.approx(losses(plain), abs=1e-6)
    expected = SequenceModel.from_pretrained(plain / "checkpoint").state_dict()
    for name, x in SequenceModel.from_pretrained(out / "checkpoint").state_dict().items():
        torch.testing.assert_close(x, expected[name], atol=1e-6, rtol=0)


@pytest.mark.slow("launchers")
@RAY_IS_SLOW
def test_the_ranks_of_a_launcher_train_as_plain_processes_do(corpus, tmp_path, monkeypatch, capsys, plain, launcher):
    monkeypatch.chdir(tmp_path)
    out = Path("run")  # relative: another folder in a process that lies elsewhere
    status, said, error = train(capsys, corpus, out, launcher)
    assert status == 0, error
    assert said.startswith(f"run: {STEPS * 4 * 32:,} tokens in ") and said.count("\n") == 1
    assert all(line.startswith("run seed 0: ") for line in error.splitlines())  # progress, and nothing else
    assert_same(out, plain(out))
    record = read_json(out / "run.json")
    assert record["processes"] == 2 and record["command"] == command_line()
    status, said, error = train(capsys, corpus, out, launcher)
    assert status == 2 and "already holds a run; add --resume" in error


@pytest.mark.slow("launchers")
@BOTH
def test_a_mistake_that_only_one_rank_sees_is_one_line(tmp_path, capsys, launcher):
    """The first rank alone compares the corpus with its sums; the others wait for it."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("the old sea " * 200)
    (folder / "b.txt").write_text("the old moon " * 200)
    prepare([f"text:{folder}/*.txt"], "bytes", tmp_path / "corpus", validation_share=0.5)
    shard = next((tmp_path / "corpus").glob("train-*.bin"))
    data = bytearray(shard.read_bytes())
    data[2] ^= 1  # not of the first token, which every rank looks at
    shard.write_bytes(data)
    more = ",max_failures=3" if launcher == "ray" else ""
    begun = time.monotonic()
    status, said, error = train(capsys, tmp_path / "corpus", tmp_path / "run", launcher, options=TWO[launcher] + more)
    assert status == 2 and said == "" and error.count("\n") == 1, error
    assert shard.name in error and "does not match" in error
    assert not (tmp_path / "run" / "config.json").exists()
    assert time.monotonic() - begun < 100, "the rank that saw no mistake has been waited for"


def processes(launcher: str) -> list[int]:
    """Of ranks; of all tests that run on this machine, so that a test looks for new ones."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if PROGRAM[launcher] in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


def when(out: Path, step: int, act) -> threading.Thread:
    """Call `act` when a run has come to a step."""

    def wait() -> None:
        while steps_done(out) < step:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def strike(launcher: str, others: list[int], signals: list[signal.Signals]) -> None:
    """Send the signals to the ranks' processes, but to no others."""
    ranks = [pid for pid in processes(launcher) if pid not in others]
    for pid, what in zip(reversed(ranks), signals, strict=False):
        os.kill(pid, what)


@pytest.mark.slow("kills")
@BOTH
def test_a_killed_rank_loses_nothing(corpus, tmp_path, capsys, plain, launcher):
    out = tmp_path / "run"
    struck = when(out, 20, partial(strike, launcher, processes(launcher), [signal.SIGKILL]))
    status, _, error = train(capsys, corpus, out, launcher)
    struck.join()
    last = error.splitlines()[-1]
    assert status == 2 and last.startswith("deltaproduct: Rank ") and "killed" in last, error
    assert 20 <= steps_done(out) < STEPS
    status, _, error = train(capsys, corpus, out, launcher, "--resume")
    assert status == 0, error
    assert_same(out, plain(out))


@pytest.mark.slow("ray")
@pytest.mark.parametrize("launcher", ["ray"], indirect=True)
def test_ray_starts_lost_ranks_again(corpus, tmp_path, capsys, plain, launcher):
    out = tmp_path / "run"
    when(out, 20, partial(strike, launcher, processes(launcher), [signal.SIGKILL]))
    status, _, error = train(capsys, corpus, out, launcher, options="num_workers=2,max_failures=1")
    assert status == 0, error
    assert_same(out, plain(out))


@pytest.mark.slow("kills")
@pytest.mark.parametrize("launcher", ["slurm"], indirect=True)
def test_a_job_whose_time_is_over_goes_on_from_its_checkpoint(corpus, tmp_path, capsys, plain, launcher):
    out = tmp_path / "run"
    before = processes(launcher)
    when(out, 20, partial(strike, launcher, before, [signal.SIGUSR2] * 2))  # as SLURM and submitit signal it
    status, _, error = train(capsys, corpus, out, launcher)
    assert status == 0, error
    assert_same(out, plain(out))
    log = "".join(path.read_text() for path in (out / "slurm").glob("*_0_log.*"))
    assert "Requeued job" in log


def endless(folder: Path) -> dict:
    (folder / f"{os.getpid()}.began").touch()
    time.sleep(300)
    return {}


@pytest.mark.slow("kills")
@BOTH
def test_an_interrupt_leaves_nothing_running(tmp_path, launcher):
    place = get_rank_launcher(launcher, tmp_path, parse_options(TWO[launcher]))
    before, sent = signal.getsignal(signal.SIGINT), []

    def tick() -> None:
        if len(list(tmp_path.glob("*.began"))) == 2 and not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        place.run(partial(endless, tmp_path), tick)
    assert signal.getsignal(signal.SIGINT) is before
    began = {int(path.stem) for path in tmp_path.glob("*.began")}
    deadline = time.monotonic() + 20
    while (left := began & set(processes(launcher))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(began) == 2 and not left


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


@pytest.fixture
def slurm_programs(tmp_path, monkeypatch):
    """A folder of programs that do what SLURM's do, for a job of two nodes with a task each."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    folder = tmp_path / "bin"
    folder.mkdir()
    program(
        folder,
        "sbatch",
        f"""cp "$1" {folder}/script
export SLURM_JOB_ID=78 SLURM_NTASKS=2 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST=n[7,9]
bash "$1" > {folder}/said 2>&1 < /dev/null &
echo Submitted batch job 78""",
    )
    program(
        folder,
        "srun",
        """while [[ "$1" == --* ]]; do [[ "$1" == *=* || "$1" == --unbuffered ]] || shift; shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_NODEID=$i SLURM_LOCALID=0 "$@" & done
wait""",
    )
    program(folder, "sacct", 'echo "JobID|State|NodeList"; echo "78|OUT_OF_MEMORY|n"')
    program(folder, "scancel", f'echo "$1" >> {folder}/cancelled')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return folder


def told(folder: Path) -> dict:
    """What the environment says to a rank."""
    names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps([os.environ.get(name) for name in names]))
    return {}


def failing(folder: Path) -> dict:
    """A mistake that one rank sees, and another that waits for it until the job is cancelled."""
    if os.environ["RANK"] == "1":
        raise UsageError("There is no such thing.")
    until = time.monotonic() + 60
    while time.monotonic() < until and not (folder / "bin" / "cancelled").exists():
        time.sleep(0.1)
    return {}


@pytest.mark.slow("launchers")
@pytest.mark.ci
@pytest.mark.filterwarnings("error:Setting")  # submitit's of a parameter that it has to rename
def test_slurm_gets_one_job_whose_tasks_are_ranks(tmp_path, monkeypatch, slurm_programs):
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJob.watcher.is_done", lambda *a, **k: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    options = parse_options("nodes=2,partition=gpu,timeout_min=30,gpus_per_node=1,cpus_per_task=3")
    launcher = get_rank_launcher("slurm", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    launcher.run(partial(told, tmp_path), lambda: None)
    first, second = (read_json(tmp_path / f"rank{i}.json") for i in range(2))
    assert first == second and first[:3] == ["2", "0", "n7"] and 20000 <= int(first[3]) <= 60000
    assert first[4] == "0,1,2,3"  # as SLURM gave them to the machine: a rank chooses by LOCAL_RANK
    script = (slurm_programs / "script").read_text()
    for asked in ("nodes=2", "ntasks-per-node=1", "partition=gpu", "time=30", "gpus-per-node=1", "cpus-per-task=3",
                  "signal=USR2@90"):  # fmt: skip
        assert f"#SBATCH --{asked}\n" in script
    assert "--kill-on-bad-exit=1 --wait=60" in script and "--array" not in script
    assert not (slurm_programs / "cancelled").exists()


@pytest.mark.slow("launchers")
def test_a_mistake_cancels_slurms_job(tmp_path, monkeypatch, slurm_programs):
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJob.watcher.is_done", lambda *a, **k: False)
    launcher = get_rank_launcher("slurm", tmp_path / "out", {"nodes": 2})
    with pytest.raises(UsageError) as error:
        launcher.run(partial(failing, tmp_path), lambda: None)
    assert str(error.value) == "There is no such thing."
    assert (slurm_programs / "cancelled").read_text().split() == ["78"]


def test_a_job_that_slurm_ends_is_one_line(tmp_path, monkeypatch, slurm_programs):
    program(slurm_programs, "sbatch", "echo Submitted batch job 78")
    monkeypatch.setattr("deltaproduct.launchers.slurm_ranks.SLOW_DISK", 0.0)
    launcher = get_rank_launcher("slurm", tmp_path / "out", {"nodes": 2})
    with pytest.raises(UsageError, match=r"^Rank 0: SLURM ended it \(OUT_OF_MEMORY\); its log is .*78_0_log.err.$"):
        launcher.run(partial(told, tmp_path), lambda: None)


def test_an_interrupt_cancels_slurms_job(tmp_path, slurm_programs):
    program(slurm_programs, "sbatch", "echo Submitted batch job 79")
    launcher = get_rank_launcher("slurm", tmp_path / "out", {"nodes": 2})

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher.run(partial(told, tmp_path), interrupt)
    assert (slurm_programs / "cancelled").read_text().split() == ["79"]


def test_what_sbatch_refuses_is_one_line(tmp_path, slurm_programs):
    program(slurm_programs, "sbatch", "echo sbatch: error: invalid partition specified: gqu >&2\nexit 1")
    launcher = get_rank_launcher("slurm", tmp_path / "out", {"partition": "gqu"})
    with pytest.raises(UsageError, match="took no job: sbatch: error: invalid partition specified: gqu"):
        launcher.run(partial(told, tmp_path), lambda: None)


def test_a_job_that_comes_out_of_the_queue_again_makes_the_same_call():
    pytest.importorskip("submitit", reason="submitit is not installed")
    from deltaproduct.launchers.ranks import RankCall
    from deltaproduct.launchers.slurm_ranks import Task

    task = Task(RankCall(dict, ["deltaproduct"], 1))
    assert task.checkpoint().function == task


@pytest.mark.parametrize(
    ("launcher", "options", "words"),
    [
        ("slurm", "partition=gpu", ("sbatch", "cluster=local")),
        ("slurm", "cluster=local,colour=red", ("'colour'", "nodes", "tasks_per_node")),
        ("slurm", "cluster=local,nodes=2", ("nodes", "more than 1")),
        ("slurm", "cluster=local,tasks_per_node=0", ("tasks_per_node", "at least 1")),
        ("slurm", "cluster=local,tasks_per_node=two", ("tasks_per_node", "whole number", "'two'")),
        ("ray", "nodes=2", ("'nodes'", "num_workers")),
        ("ray", "num_workers=0", ("num_workers", "at least 1")),
        ("ray", "gpu=0.5", ("gpu", "whole number", "'0.5'")),
        ("local", "gpu=1", ("no options", "gpu")),
    ],
)
def test_what_cannot_be_had_is_one_line(capsys, corpus, tmp_path, monkeypatch, launcher, options, words):
    if launcher != "local":
        pytest.importorskip({"slurm": "submitit", "ray": "ray"}[launcher])
    monkeypatch.setenv("PATH", str(tmp_path))
    status, said, error = train(capsys, corpus, tmp_path / "out", launcher, options=options)
    assert status == 2 and said == "" and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--data", "nowhere"), "nowhere"),
        (("--lr", "-1"), "lr"),
        (("--checkpoint-every", "0"), "checkpoint_every must be at least 1"),
    ],
)
def test_what_can_be_refused_here_is_not_sent_to_a_queue(capsys, corpus, tmp_path, more, words):
    pytest.importorskip("submitit", reason="submitit is not installed")
    status, _, error = train(capsys, corpus, tmp_path / "out", "slurm", *more)
    assert status == 2 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_a_launcher_is_not_called_by_torchruns_processes(capsys, corpus, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("RANK", "0")
    status, _, error = train(capsys, corpus, tmp_path / "out", "slurm")
    assert status == 2 and "without torchrun" in error


@pytest.mark.slow("ray")
@pytest.mark.parametrize("launcher", ["ray"], indirect=True)
def test_more_than_ray_has_is_refused(capsys, corpus, tmp_path, launcher):
    status, _, error = train(capsys, corpus, tmp_path / "out", launcher, options="num_workers=5")
    assert status == 2 and "5 ranks were to have cpu=1 each, but Ray has 4 here in all" in error


@pytest.mark.parametrize(("launcher", "module"), [("slurm", "submitit"), ("ray", "ray.train")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, launcher, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"needs {module}: pip install 'deltaproduct\[dist\]'"):
        get_rank_launcher(launcher, tmp_path, parse_options(TWO[launcher]))


def test_there_is_no_other_launcher(tmp_path):
    assert get_rank_launcher("local", tmp_path) is None
    with pytest.raises(UsageError, match="no launcher 'kubernetes'"):
        get_rank_launcher("kubernetes", tmp_path)


def test_which_ranks_error_explains_the_others():
    heard = RuntimeError("[pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer\nat 0x1")
    refused = torch.distributed.DistNetworkError("The client socket has failed to connect")
    lost, full, mistake = LostRank("Rank 1: killed."), torch.OutOfMemoryError("CUDA out of memory"), UsageError("No.")
    assert cause({0: heard, 1: lost, 2: full, 3: mistake}) is mistake
    assert cause({0: heard, 1: lost, 2: full}) is full
    assert cause({0: refused, 1: lost, 2: heard}) is lost
    only = cause({1: heard})
    assert type(only) is LostRank and str(only).startswith("Rank 1 has lost the others: ") and "\n" not in str(only)


def test_progress_is_what_the_metrics_say(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("deltaproduct.progress.PLAIN_SECONDS", 0.0)
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 7, "loss": 1.25, "tokens_per_second": 1234.5}) + "\n"
    path.write_text(line)
    os.utime(path, (1, 1))
    with followed(path, "run", 9) as tick:
        tick()
        assert capsys.readouterr().err == "", "an earlier sitting's line is no progress"
        path.write_text(line + line.replace("7", "8"))
        os.utime(path, (2e9, 2e9))
        tick()
        tick()
    assert capsys.readouterr().err == "run: 8/9  loss 1.2500  1,234 tokens/s\n"
    with followed(tmp_path / "nothing", "run", 9) as tick:
        tick()
