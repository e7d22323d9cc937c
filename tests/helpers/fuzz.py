"""What files the library reads, how they are damaged at random, and what a command makes of them.

A `Kind` is a folder that is built once, and a command that reads it. Of every damaged copy the command either gives the
answer that it gives of the undamaged one, or ends with status 2 and one line on standard error.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
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
from safetensors.torch import load_file, save_file

from deltaproduct.cli.main import main
from deltaproduct.errors import UsageError
from deltaproduct.experiments.recipes import state_tracking_model
from deltaproduct.experiments.task_job import EvaluationSpec, TaskJob
from deltaproduct.files import MANIFEST
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.tasks import get_task
from deltaproduct.training.config import OptimizerConfig, Run, TrainConfig

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


def command(*arguments: Any, answer: Callable[[str], Any] = lambda out: out, answered: int = 0) -> Outcome:
    """A run of the program in this process; `answered`: a status beside 0 that comes with an answer."""
    out = io.StringIO()

    def run() -> Any:
        with contextlib.redirect_stdout(out):
            try:
                main([str(a) for a in arguments])
            except SystemExit as e:
                if e.code != answered:
                    raise
        return answer(out.getvalue())

    return call(run)


def call(function: Callable[[], Any]) -> Outcome:
    """What a function answers, refuses with a `UsageError`, or ends the program with."""
    err = io.StringIO()
    with _alarm(), contextlib.redirect_stderr(err):
        try:
            return Outcome(0, function())
        except SystemExit as e:
            return Outcome(int(e.code or 0), said=err.getvalue())
        except UsageError as e:
            return Outcome(2, said=str(e))
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
    with _cut_off(OptimizerConfig, "learning_rate", 4):
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
    with _cut_off(OptimizerConfig, "learning_rate", 4):
        main(["lm", "train", "--out", str(root / "run"), "--data", str(root / "corpus"), *LANGUAGE, *OFTEN])


def build_conversation(root: Path) -> None:
    from deltaproduct.corpus.tokenizer import ByteTokenizer

    language_model().save_pretrained(root / "run" / "checkpoint")
    ByteTokenizer().save(root / "run" / "tokenizer")
    _good(command("lm", "generate", root / "run", "--prompt", "sun", "--max-tokens", 3, "--save-state", root / "said"))


def language_model() -> SequenceModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ModelConfig.build(vocab_size=257, num_labels=257, hidden_size=16, num_heads=2, head_dim=4)
        return SequenceModel(config).eval()


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
    job().run(root / "out")


def job() -> TaskJob:
    training = TrainConfig(task="S3", steps=2, lengths=(4,), batch_sizes=(4,), warmup_steps=1)
    model = state_tracking_model(get_task("S3"), hidden_size=16, num_heads=2, head_dim=4)
    return TaskJob("tiny", "tiny", Run(training, model), EvaluationSpec((4, 8), sequences=2))


def build_automata(root: Path) -> None:
    (root / "files").mkdir()
    _good(command("compile", "--regex", "(ab)*", "--out", root / "model"))
    shutil.copy(root / "model" / "automaton.json", root / "files" / "automaton.json")
    shutil.rmtree(root / "model")


def build_dot(root: Path) -> None:
    (root / "files").mkdir()
    (root / "files" / "automaton.dot").write_text(
        "digraph parity {\n"
        '    start [shape=point];\n    even [shape=doublecircle, label="even number of 1"];\n    odd [shape=circle];\n'
        '    start -> even;\n    even -> even [label="0"];\n    even -> odd [label="1"];\n'
        '    odd -> odd [label="0"];\n    odd -> even [label="1"]; // back\n}\n'
    )


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

    flags = ["--what", "perplexity", "--data", root / "corpus", "--sequences", 2, "--json"]
    return command("lm", "evaluate", root / "run", *flags, answer=figures)


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
            try:
                model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
            except Exception as e:
                ours = any(f"{os.sep}deltaproduct{os.sep}" in f.filename for f in traceback.extract_tb(e.__traceback__))
                if not ours or isinstance(e, OSError):  # what transformers refuses by itself, in its own words
                    raise UsageError(" ".join(str(e).split())[:300]) from e
                raise
            return model(torch.arange(9)[None]).logits.tolist()

    return call(logits)


def ask_verify(root: Path) -> Outcome:
    return command("verify", root / "model", "--length", 64, "--words", 2, "--json", answered=1,
                   answer=lambda out: {k: v for k, v in json.loads(out).items() if "second" not in k})  # fmt: skip


def ask_job(root: Path) -> Outcome:
    def result() -> Any:
        found = job().run(root / "out")
        return json.dumps({k: v for k, v in found.items() if k != "wall_seconds"}, sort_keys=True)

    return call(result)


def ask_automaton(root: Path, name: str) -> Outcome:
    return command("tasks", "show", f"automaton:{root / 'files' / name}")


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
    Kind("automaton file", build_automata, partial(ask_automaton, name="automaton.json"), "files", checked=False),
    Kind("DOT file", build_dot, partial(ask_automaton, name="automaton.dot"), "files", checked=False),
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
    # A run whose metrics somebody has removed goes on without them.
    gone = did == "delete" and file.name == "metrics.jsonl"
    problem = outcome.problem(right, may_differ=gone or (not kind.checked and not same))
    return Case(kind, number, name, did, outcome, problem)


# Hostile inputs: files that say what they should not, behind a manifest that fits them.

MARKER = "executed"  # a file beside the inputs, which code that is hidden in them would write

NUMBERS = ["-1", "0", "1", "0.5", "true", "null", "-0.0", "1e300", "1e999", "-1e999", "NaN", "Infinity", "-Infinity",
           "9" * 5000, str(10**19), "-" + "9" * 30, str(2**31), str(2**63), "4.0"]  # fmt: skip
TEXTS = ['""', '"a"', '"../../outside"', '"/etc/passwd"', r'"a\u0000b"', r'"\ud800"', r'"\u001b[2J\u001b[31mred"',
         '"' + "x" * 100_000 + '"', '"\\n\\n\\n"', '"64"', '"__class__"', '"os.system"']  # fmt: skip
NESTS = ["[]", "{}", "[" * 5000 + "]" * 5000, "[" + ",".join(["1"] * 50_000) + "]", '{"a": {"a": {"a": 1}}}', "[null]",
         '{"a": 1, "a": 2}', "[[0, 1], [1]]"]  # fmt: skip


def hostile_entry(path: Path, chance: random.Random) -> str:
    """One entry of a JSON file, or of a line of JSON, is another value, is missing, or is one too many."""
    text = path.read_text()
    whole = text.splitlines() if path.suffix == ".jsonl" else [text]
    row = chance.randrange(len(whole))
    value = json.loads(whole[row])
    holders = list(_holders(value))
    holder = chance.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    raw = chance.choice(chance.choice([NUMBERS, NUMBERS, TEXTS, NESTS]))
    how = chance.choice(["value", "value", "value", "value", "missing", "more"])
    key: Any = chance.choice(keys) if keys else "more"
    if how == "missing" and keys:
        del holder[key]
    elif isinstance(holder, dict):
        holder[key if how == "value" and keys else "\N{SNOWMAN}"] = _HERE
    elif how == "value" and keys:
        holder[key] = _HERE
    else:
        holder.append(_HERE)
    whole[row] = json.dumps(value).replace(f'"{_HERE}"', raw)
    path.write_text("\n".join(whole) + "\n")
    return f"{how} of {key!r}: {raw[:40]}"


_HERE = "@here@"


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def hostile_tensor(path: Path, chance: random.Random) -> str:
    """One tensor, or all, of another kind, shape, name or value."""
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    x = tensors[name]
    how, change = chance.choice([
        ("int64", lambda x: x.long()), ("bool", lambda x: x != 0), ("uint8", lambda x: x.byte()),
        ("half", lambda x: x.half()), ("bfloat16", lambda x: x.bfloat16()), ("double", lambda x: x.double()),
        ("complex64", lambda x: x.to(torch.complex64)), ("float8", lambda x: x.to(torch.float8_e4m3fn)),
        ("longer", lambda x: torch.cat([x.flatten(), x.flatten()])), ("flat", lambda x: x.flatten()[:-1]),
        ("none", lambda x: x.flatten()[:0]), ("one more dimension", lambda x: x[None]),
        ("nan", lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x.fill_(255)),
        ("infinite", lambda x: torch.full_like(x, torch.inf) if x.is_floating_point() else x.fill_(0)),
        ("negative", lambda x: -x.abs() - 1 if x.is_floating_point() else x.fill_(7)),
        ("missing", None), ("renamed", None), ("more", None), ("double everywhere", None), ("int everywhere", None),
    ])  # fmt: skip
    odd = chance.choice(["../../outside", "/outside", "a\x1b[31mb", "0.step.more", "x.exp_avg", "", "1", "é" * 300])
    if how == "missing":
        del tensors[name]
    elif how == "renamed":
        tensors[odd] = tensors.pop(name)
    elif how == "more":
        tensors[odd] = x.clone()
    elif how.endswith("everywhere"):
        kind = torch.float64 if how.startswith("double") else torch.int32
        tensors = {n: y.to(kind) for n, y in tensors.items()}
    else:
        tensors[name] = change(x).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name!r} {how}" + (f" {odd[:20]!r}" if how in ("renamed", "more") else "")


def hostile_header(path: Path, chance: random.Random) -> str:
    """A safetensors file whose header lies."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size]
    how, found = chance.choice([
        ("empty", b""), ("of 10^18 bytes", (10**18).to_bytes(8, "little") + data[8:]),
        ("of -1 bytes", b"\xff" * 8 + data[8:]), ("of nothing", (2).to_bytes(8, "little") + b"{}"),
        ("nested", _headed(b"[" * 9000 + b"]" * 9000)), ("no JSON", _headed(b"\xff\x00" * 8)),
        ("other kinds", _headed(header.replace(b"F32", b"F64")) + data[8 + size :]),
        ("unknown kinds", _headed(header.replace(b"F32", b"Q17")) + data[8 + size :]),
        ("four bits", _headed(header.replace(b"F32", b"F4")) + data[8 + size :]),
        ("beyond the end", data[:-4]), ("with more behind", data + b"0000"),
        ("overlapping", _headed(header.replace(b'"data_offsets":[', b'"data_offsets":[0,4],"x":[')) + data[8 + size :]),
    ])  # fmt: skip
    path.write_bytes(found)
    return f"header {how}"


def _headed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


class _Evil:
    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self._marker}'",)


def planted_code(path: Path, chance: random.Random) -> str:
    """A pickle in place of a file or beside it, under a name that somebody might read; or a module."""
    root = next(p for p in path.parents if p.name == "copy")
    evil = pickle.dumps(_Evil(root.parent / MARKER))
    if chance.random() < 0.3:
        path.write_bytes(evil)
        return "a pickle in its place"
    names = ["pytorch_model.bin", ".metadata", "__0_0.distcp", "optimizer.pt", "training_args.bin", "rng_state.pth",
             "model.pt", "scheduler.bin", "tokenizer.pkl"]  # fmt: skip
    for name in names:
        (path.parent / name).write_bytes(evil)
    code = f"open({str(root.parent / MARKER)!r}, 'w')\n"
    for name in ("modeling_deltaproduct.py", "tokenization.py", "conftest.py", "sitecustomize.py"):
        (path.parent / name).write_text(code)
    for file in path.parent.glob("*config.json"):
        values = json.loads(file.read_text())
        if isinstance(values, dict) and "training" not in values and "config" not in values:
            auto = {"AutoTokenizer": ["tokenization.X", "tokenization.X"], "AutoConfig": "tokenization.X"}
            file.write_text(json.dumps(values | {"auto_map": auto}))
    if chance.random() < 0.5 and path.suffix == ".safetensors":
        path.unlink()
        return "code beside, and itself gone"
    return "code beside"


def hostile_manifest(path: Path, chance: random.Random) -> str:
    """A manifest that lists what does not lie in its folder, or nothing that can be read."""
    manifest = path.parent / MANIFEST
    if not manifest.exists():
        return hostile_bytes(path, chance)
    values = json.loads(manifest.read_text())
    outside = path.parent.parent / "outside"
    outside.write_text("something")
    entry = {"bytes": 9, "sha256": hashlib.sha256(b"something").hexdigest()}
    name = chance.choice(["../outside", str(outside), "a\0b", "\x1b[2J", "..", ".", "", "a/../../outside", "\ud800",
                          "x" * 5000, "."])  # fmt: skip
    how = chance.choice(["name", "name", "entry", "files", "format", "whole"])
    if how == "name":
        values["files"][name] = entry
        del values["files"][chance.choice(sorted(values["files"]))]
    elif how == "entry":
        values["files"][chance.choice(sorted(values["files"]))] = chance.choice([None, [], "x", 1, {}, {"bytes": -1}])
    elif how == "files":
        values["files"] = chance.choice([None, [], {}, "x", [["config.json", entry]]])
    elif how == "format":
        values["format"] = chance.choice([None, "1", 2, 10**40, True])
    else:
        values = chance.choice([None, [], 1, "x", {}])
    manifest.write_text(json.dumps(values))
    return f"manifest: {how} {name[:20]!r}"


def hostile_bytes(path: Path, chance: random.Random) -> str:
    found = chance.choice([b"", b"\xef\xbb\xbf{}", b"\xff" * 100, b"[" * 200_000, b'{"a":' * 100_000, b"null",
                           b"\0" * 999, b'"\\ud800"', b"1" * 10_000, "{}".encode("utf-16"), b"{}", b"[]"])  # fmt: skip
    path.write_bytes(found)
    return f"content {found[:20]!r}"


def hostile(bench: Bench, kind: Kind, number: int) -> Case:
    """Case `number` of a kind: something hostile in one file, with all manifests made to fit."""
    bench.right(kind)
    root = bench.copy(kind)
    chance = random.Random(f"hostile {kind.name} {number}")
    (root.parent / MARKER).unlink(missing_ok=True)
    files = sorted(p for p in (root / kind.target).rglob("*") if p.is_file() and p.name != MANIFEST)
    file = chance.choice(files)
    changes: list[Callable[[Path, random.Random], str]] = [hostile_bytes, planted_code, hostile_manifest]
    if file.suffix in (".json", ".jsonl"):
        changes += [hostile_entry] * 12
    if file.suffix == ".safetensors":
        changes += [hostile_tensor] * 8 + [hostile_header] * 3
    change = chance.choice(changes)
    did = change(file, chance)
    if change is not hostile_manifest:
        for manifest in sorted((root / kind.target).rglob(MANIFEST)):
            names = [p.name for p in manifest.parent.iterdir() if p.is_file() and p.name != MANIFEST]
            entries = {name: _entry(manifest.parent / name) for name in names}
            manifest.write_text(json.dumps({"format": 1, "files": entries}))
    before = _around(root)
    outcome = kind.ask(root)
    problem = outcome.problem(None, may_differ=True)
    if (root.parent / MARKER).exists():
        problem = "code was executed"
    elif _around(root) != before:
        problem = f"written outside: {sorted(_around(root) ^ before)}"
    elif not all(c.isprintable() or c == "\n" for c in outcome.said) and outcome.status == 2:
        problem = f"control characters in {outcome.said!r:.300}"
    elif len(outcome.said) > 2000 and outcome.status == 2:
        problem = f"a line of {len(outcome.said)} characters: {outcome.said[:200]}"
    return Case(kind, number, str(file.relative_to(root)), f"{change.__name__}, {did}", outcome, problem)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha(path)}


def _around(root: Path) -> set[Path]:
    """What lies beside a copy, and in the folder that the tests run in."""
    return {*root.parent.iterdir(), *Path.cwd().iterdir()}
