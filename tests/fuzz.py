"""What files the library reads, how they are damaged at random, and what a command makes of them.

A `Kind` is a folder that is built once, and a command that reads it. Of every damaged copy the command either gives the
answer that it gives of the undamaged one, or ends with status 2 and one line on standard error.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpora import corpus_of_words
from run_folder import metrics

from deltaproduct.cli.main import main
from deltaproduct.errors import UsageError
from deltaproduct.experiments.job import Asked, Job, run_job
from deltaproduct.experiments.recipes import state_tracking_model
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.training.config import OptimiserConfig, RunConfig, TrainConfig

SECONDS = 30  # for one command, which takes about a tenth of one: whoever takes longer waits for something
TINY = ["--hidden-size", "16", "--num-heads", "2", "--head-dim", "4"]
TRAIN = ["--task", "S3", "--steps", "6", "--lengths", "4", "--batch-sizes", "4", "--warmup-steps", "2", *TINY]
LANGUAGE = ["--steps", "6", "--context", "8", "--batch-size", "2", "--warmup-steps", "2", "--num-hidden-layers", "1",
            *TINY]  # fmt: skip
OFTEN = ["--log-every", "1", "--checkpoint-every", "2"]


class Hang(BaseException):
    """The time of a command is up; nothing catches this by mistake."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command: its answer where the status is 0, and else what it said."""

    status: int
    answer: Any = None
    said: str = ""

    def problem(self, right: Any, *, may_differ: bool = False) -> str | None:
        """Why this is no good end for a damaged input, where `right` is the answer of the undamaged one."""
        if self.status == 0:
            return None if may_differ or self.answer == right else f"another answer: {self.answer!r:.300}"
        lines = self.said.splitlines()
        if self.status != 2 or len(lines) != 1 or "Traceback" in self.said:
            return f"status {self.status} and {len(lines)} lines: {self.said[-1500:]}"
        return None


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Args:
        build: makes it, and what belongs to it, in an empty folder.
        ask: reads a copy of that folder and answers.
        target: the part of it that is damaged.
        checked: whether a changed file has to be noticed; what people write by hand may be changed to something else.
    """

    name: str
    build: Callable[[Path], None]
    ask: Callable[[Path], Outcome]
    target: str
    checked: bool = True


def command(*arguments: Any, answer: Callable[[str], Any] = lambda out: out) -> Outcome:
    """A run of the program in this process."""
    out = io.StringIO()

    def run() -> Any:
        with contextlib.redirect_stdout(out):
            main([str(a) for a in arguments])
        return answer(out.getvalue())

    return call(run)


def call(function: Callable[[], Any], refusals: tuple[type[Exception], ...] = (UsageError,)) -> Outcome:
    """What a function answers, refuses with one of some exceptions, or ends the program with."""
    err = io.StringIO()
    with _alarm(), contextlib.redirect_stderr(err):
        try:
            return Outcome(0, function())
        except SystemExit as e:
            return Outcome(int(e.code or 0), said=err.getvalue())
        except refusals as e:
            return Outcome(2, said=str(e) if isinstance(e, UsageError) else " ".join(str(e).split()))
        except (Exception, Hang):
            return Outcome(1, said=err.getvalue() + traceback.format_exc())


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines_of(run: Path) -> list[dict]:
    """The metrics of a run without what a clock decides."""
    clocks = ("seconds", "tokens_per_second", "utilisation", "memory_gib", "mfu")
    return [{k: v for k, v in line.items() if k not in clocks} for line in metrics(run)]


# What is built. Training stops after the checkpoint of step 2 of 6, with step 3 logged, as a kill leaves it.


class _Cut(BaseException):
    pass


def _good(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.said


@contextlib.contextmanager
def _cut_off(module: Any, name: str, calls: int) -> Iterator[None]:
    """Leave at a function's call of this number."""
    whole, left = getattr(module, name), [calls]

    def cut(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise _Cut
        return whole(*args, **kwargs)

    setattr(module, name, cut)
    try:
        with contextlib.suppress(_Cut), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        setattr(module, name, whole)


def build_finished(root: Path) -> None:
    _good(command("train", "--out", root / "run", *TRAIN, *OFTEN))


def build_unfinished(root: Path) -> None:
    with _cut_off(OptimiserConfig, "learning_rate", 4):
        main(["train", "--out", str(root / "run"), *TRAIN, *OFTEN])


def _corpus(root: Path) -> None:
    texts = root / "texts"
    texts.mkdir()
    shutil.move(corpus_of_words(texts), root / "corpus")
    shutil.rmtree(texts)


def build_language(root: Path) -> None:
    _corpus(root)
    _good(command("lm", "train", "--out", root / "run", "--data", root / "corpus", *LANGUAGE, *OFTEN))


def build_unfinished_language(root: Path) -> None:
    _corpus(root)
    with _cut_off(OptimiserConfig, "learning_rate", 4):
        main(["lm", "train", "--out", str(root / "run"), "--data", str(root / "corpus"), *LANGUAGE, *OFTEN])


def build_conversation(root: Path) -> None:
    from deltaproduct.tasks.corpus.tokenizer import ByteTokenizer

    language_model().save_pretrained(root / "run" / "checkpoint")
    ByteTokenizer().save(root / "run" / "tokenizer")
    _good(command("lm", "generate", root / "run", "--prompt", "sun", "--max-tokens", 3, "--save-state", root / "said"))


def language_model() -> SequenceModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SequenceModel(
            ModelConfig(vocab_size=257, num_labels=257, hidden_size=16, num_heads=2, head_dim=4)
        ).eval()


def build_hf(root: Path, **options: Any) -> None:
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

    with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        config = DeltaProductConfig(vocab_size=11, hidden_size=16, num_heads=2, head_dim=4)
        DeltaProductForCausalLM(config).save_pretrained(root / "model", **options)


def build_fla(root: Path) -> None:
    build_conversation(root)
    _good(command("lm", "convert", root / "run", "--to", "fla", "--out", root / "model"))


def build_compiled(root: Path) -> None:
    _good(command("compile", "--group", "S3", "--out", root / "model"))


def build_experiment(root: Path) -> None:
    run_job(job(), root / "out")


def job() -> Job:
    training = TrainConfig(task="S3", steps=2, lengths=(4,), batch_sizes=(4,), warmup_steps=1)
    model = state_tracking_model(get_task("S3"), hidden_size=16, num_heads=2, head_dim=4)
    return Job("tiny", "tiny", RunConfig(training, model), Asked((4, 8), sequences=2))


def build_automata(root: Path) -> None:
    (root / "files").mkdir()
    _good(command("compile", "--regex", "(ab)*", "--out", root / "model"))
    shutil.copy(root / "model" / "automaton.json", root / "files" / "automaton.json")
    shutil.rmtree(root / "model")


# What is asked.


def ask_evaluate(root: Path) -> Outcome:
    return command("evaluate", root / "run", "--lengths", 4, "--sequences", 4, "--json")


def ask_resume(root: Path) -> Outcome:
    run = root / "run"
    done = lambda _: [sha(run / "checkpoint" / "model.safetensors"), lines_of(run)]  # noqa: E731
    return command("train", "--out", run, "--resume", *OFTEN, answer=done)


def ask_language(root: Path) -> Outcome:
    def figures(out: str) -> Any:
        return {name: value for name, value in json.loads(out).items() if "second" not in name}

    return command("lm", "evaluate", root / "run", "--what", "perplexity", "--data", root / "corpus", "--sequences", 2, "--json",
                   answer=figures)  # fmt: skip


def ask_resume_language(root: Path) -> Outcome:
    run = root / "run"
    done = lambda _: [sha(run / "checkpoint" / "model.safetensors"), lines_of(run)]  # noqa: E731
    return command("lm", "train", "--out", run, "--data", root / "corpus", "--resume", *OFTEN, answer=done)


def ask_generate(root: Path, *more: Any) -> Outcome:
    return command("lm", "generate", root / "run", "--max-tokens", 4, "--json", *more,
                   answer=lambda out: json.loads(out)["tokens"])  # fmt: skip


def ask_conversation(root: Path) -> Outcome:
    return ask_generate(root, "--load-state", root / "said")


def ask_prompt(root: Path) -> Outcome:
    return ask_generate(root, "--prompt", "the moon")


def ask_convert(root: Path, to: str = "ours") -> Outcome:
    done = lambda _: sha(root / "converted" / "model.safetensors")  # noqa: E731
    return command("lm", "convert", root / "model", "--to", to, "--out", root / "converted", answer=done)


def ask_transformers(root: Path) -> Outcome:
    from transformers import AutoModelForCausalLM

    def logits() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return AutoModelForCausalLM.from_pretrained(root / "model").eval()(torch.arange(9)[None]).logits.tolist()

    # A configuration that is not there, or no JSON, is transformers' to refuse.
    return call(logits, (UsageError, OSError, ValueError))


def ask_verify(root: Path) -> Outcome:
    return command("verify", root / "model", "--length", 64, "--words", 2, "--json",
                   answer=lambda out: {k: v for k, v in json.loads(out).items() if "second" not in k})  # fmt: skip


def ask_job(root: Path) -> Outcome:
    def result() -> Any:
        found = run_job(job(), root / "out")
        return json.dumps({k: v for k, v in found.items() if k != "wall_seconds"}, sort_keys=True)

    return call(result)


def ask_automaton(root: Path) -> Outcome:
    return command("tasks", "show", f"automaton:{root / 'files' / 'automaton.json'}")


KINDS = [
    Kind("task run, evaluated", build_finished, ask_evaluate, "run"),
    Kind("task run, resumed", build_unfinished, ask_resume, "run"),
    Kind("language run, evaluated", build_language, ask_language, "run"),
    Kind("language run, resumed", build_unfinished_language, ask_resume_language, "run"),
    Kind("corpus", build_unfinished_language, ask_resume_language, "corpus"),
    Kind("conversation", build_conversation, ask_conversation, "said"),
    Kind("tokenizer", build_conversation, ask_prompt, "run/tokenizer"),
    Kind("hf folder, here", build_hf, partial(ask_convert, to="fla"), "model"),
    Kind("hf folder, transformers", build_hf, ask_transformers, "model"),
    Kind("hf shards, transformers", partial(build_hf, max_shard_size="4KB"), ask_transformers, "model"),
    Kind("fla folder", build_fla, ask_convert, "model"),
    Kind("compiled", build_compiled, ask_verify, "model"),
    Kind("experiment", build_experiment, ask_job, "out"),
    Kind("automaton file", build_automata, ask_automaton, "files", checked=False),
]


class Bench:
    """Built kinds, of which copies are damaged."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._built: dict[Any, Path] = {}
        self._right: dict[str, Any] = {}
        self._copies = 0

    def copy(self, kind: Kind) -> Path:
        """A fresh copy of what a kind builds."""
        key = kind.build if not isinstance(kind.build, partial) else str(kind.build)
        if key not in self._built:
            root = self._folder / f"built-{len(self._built)}"
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            kind.build(root)
            self._built[key] = root
        shutil.rmtree(self._folder / "copy", ignore_errors=True)
        shutil.copytree(self._built[key], self._folder / "copy", symlinks=True)
        return self._folder / "copy"

    def right(self, kind: Kind) -> Any:
        """The answer of the undamaged input."""
        if kind.name not in self._right:
            outcome = kind.ask(self.copy(kind))
            assert outcome.status == 0, f"{kind.name}: {outcome.said}"
            self._right[kind.name] = outcome.answer
        return self._right[kind.name]


# Damages: each changes a file in place, and says what it did.


def flip(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return "nothing to flip"
    places = [chance.randrange(len(data)) for _ in range(chance.choice([1, 1, 1, 8]))]
    for place in places:
        data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"flip {places}"


def truncate(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    size = chance.choice([0, max(0, len(data) - 1), chance.randrange(len(data) + 1)])
    path.write_bytes(data[:size])
    return f"truncate to {size} of {len(data)}"


def extend(path: Path, chance: random.Random) -> str:
    more = chance.choice([b"\0", b"\n", b"{}", b"\xff\xfe", b"x" * 5000, path.read_bytes()])
    path.write_bytes(path.read_bytes() + more)
    return f"extend by {more[:10]!r}"


def overwrite(path: Path, chance: random.Random) -> str:
    """A piece of the file anew: zeros, or random bytes."""
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data) + 1)
    piece = data[at : at + chance.choice([1, 16, 4096])]
    data[at : at + len(piece)] = bytes(len(piece)) if chance.random() < 0.5 else chance.randbytes(len(piece))
    path.write_bytes(data)
    return f"overwrite {len(piece)} at {at}"


def digit(path: Path, chance: random.Random) -> str:
    """Another digit somewhere: text that stays valid and says something else."""
    data = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    if not places:
        return flip(path, chance)
    place = chance.choice(places)
    data[place] = chance.choice([d for d in range(48, 58) if d != data[place]])
    path.write_bytes(data)
    return f"another digit at {place}"


def delete(path: Path, chance: random.Random) -> str:
    path.unlink()
    return "delete"


def replace(path: Path, chance: random.Random) -> str:
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    if not others:
        return truncate(path, chance)
    other = chance.choice(others)
    if chance.random() < 0.5:
        shutil.copy(other, path)
        return f"replace by {other.name}"
    mine = path.read_bytes()
    shutil.copy(other, path)
    other.write_bytes(mine)
    return f"swap with {other.name}"


def folder(path: Path, chance: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def dangling(path: Path, chance: random.Random) -> str:
    path.unlink()
    path.symlink_to(chance.choice(["nowhere", path.name, "."]))
    return f"symbolic link to {os.readlink(path)}"


def fifo(path: Path, chance: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe that nobody writes to"


def unreadable(path: Path, chance: random.Random) -> str:
    path.chmod(0)
    return "chmod 0"


def lines(path: Path, chance: random.Random) -> str:
    """Lines in another order, one twice, or one missing."""
    data = path.read_bytes().splitlines(keepends=True)
    if len(data) < 2:
        return truncate(path, chance)
    i, j = chance.sample(range(len(data)), 2)
    how = chance.choice(["swap", "twice", "missing"])
    if how == "swap":
        data[i], data[j] = data[j], data[i]
    elif how == "twice":
        data.insert(i, data[j])
    else:
        del data[i]
    path.write_bytes(b"".join(data))
    return f"lines {how} {i} {j}"


DAMAGES = [flip, flip, truncate, extend, overwrite, digit, digit, delete, replace, folder, dangling, fifo, lines]
if os.name == "posix" and os.geteuid() != 0:
    DAMAGES.append(unreadable)


@dataclass(frozen=True)
class Case:
    """What was done to which file, and how it ended."""

    kind: Kind
    number: int
    file: str
    damage: str
    outcome: Outcome
    problem: str | None

    def __str__(self) -> str:
        return f"{self.kind.name} #{self.number}, {self.file}: {self.damage}: {self.problem or 'fine'}"


def damaged(bench: Bench, kind: Kind, number: int) -> Case:
    """Case `number` of a kind: one file damaged, chosen and changed by the number alone."""
    right, root = bench.right(kind), bench.copy(kind)
    chance = random.Random(f"{kind.name} {number}")
    file = chance.choice(sorted(p for p in (root / kind.target).rglob("*") if p.is_file()))
    name = str(file.relative_to(root))
    before = file.read_bytes()
    # A pipe that somebody names is read like any other file, as shells make them: <(command).
    did = chance.choice([damage for damage in DAMAGES if kind.checked or damage is not fifo])(file, chance)
    outcome = kind.ask(root)
    same = file.is_file() and not file.is_symlink() and file.read_bytes() == before
    problem = outcome.problem(right, may_differ=not kind.checked and not same)
    return Case(kind, number, name, did, outcome, problem)
