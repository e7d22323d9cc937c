"""What a model and a run take is known from the configuration (models/size.py, training/memory.py, memory.py), what
cannot fit is refused before any of it is taken, and what fits is not."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from commands import run

from deltaproduct import memory
from deltaproduct.analysis import extract
from deltaproduct.errors import UsageError
from deltaproduct.evaluation import evaluate_lengths, evaluate_range
from deltaproduct.files import replaced_folder, write_json
from deltaproduct.layers.registry import MIXERS
from deltaproduct.memory import check_memory, format_bytes, why_out_of_memory
from deltaproduct.models import ModelConfig, SequenceModel, size
from deltaproduct.models.size import activation_bytes, check_stored, model_bytes, num_parameters, stored_shapes
from deltaproduct.tasks import get_task
from deltaproduct.theory.compiler import compile_group
from deltaproduct.theory.constructions import circuit
from deltaproduct.theory.verification import verify
from deltaproduct.training import LanguageConfig, Run, TrainConfig, train
from deltaproduct.training.loop import check_fits_memory

CPU = torch.device("cpu")
SMALL = {"vocab_size": 7, "num_labels": 6, "hidden_size": 16, "num_heads": 2, "head_dim": 4}


def there(monkeypatch, size):
    """Have so many bytes of memory, and look at the smallest request."""
    monkeypatch.setattr(memory, "available_memory", lambda device=None: size)
    monkeypatch.setattr(memory, "ALWAYS", 0)


def one_line(call, *words):
    with pytest.raises(UsageError) as e:
        call()
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)
    return str(e.value)


# --- Parameters


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_parameters_are_those_of_the_model(mixer):
    config = ModelConfig.build(7, 6, defaults=SMALL, mixer=mixer, num_hidden_layers=3)
    assert num_parameters(config) == SequenceModel(config).num_parameters


@pytest.mark.parametrize(
    "fields",
    [{"tie_word_embeddings": True, "num_labels": 7}, {"intermediate_size": 0}, {"num_hidden_layers": 5},
     {"mixer": ["attention", "deltaproduct", "deltaproduct"], "intermediate_size": [None, None, 5]},
     {"mixer": [{"name": "deltaproduct", "num_householder": 5}]}],
)  # fmt: skip
def test_parameters_of_other_configurations(fields):
    config = ModelConfig.build(**SMALL | fields)
    assert num_parameters(config) == SequenceModel(config).num_parameters


def test_parameters_are_counted_without_building_layers_or_numbers(monkeypatch):
    """However many there are, and beyond what PyTorch can count."""
    many = ModelConfig.build(**SMALL, num_hidden_layers=60_000)
    built = []
    before = torch.get_rng_state()
    real = size._of_block
    monkeypatch.setattr(size, "_of_block", lambda config: built.append(1) or real(config))
    one = num_parameters(ModelConfig.build(**SMALL, num_hidden_layers=2)) - num_parameters(ModelConfig.build(**SMALL))
    assert num_parameters(many) == num_parameters(ModelConfig.build(**SMALL)) + 59_999 * one and len(built) == 4
    huge = ModelConfig.build(**SMALL | {"hidden_size": 2**26, "num_hidden_layers": 60_000})
    assert num_parameters(huge) == memory.ENDLESS and torch.equal(torch.get_rng_state(), before)


# --- Bounds hold


def most_taken(code):
    """How much more memory than before a child process needed, in bytes, while it ran `code` after `begin()`."""
    head = (
        "import re, torch\ntorch.set_num_threads(1)\n"
        # Not ru_maxrss, which a child has from its parent.
        "def most(): return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "def begin():\n    global first\n    first = most()\n"
    )
    done = subprocess.run([sys.executable, "-c", head + code + "\nprint(most() - first)"], capture_output=True,
                          text=True, check=True)  # fmt: skip
    return int(done.stdout.split()[-1])


@pytest.mark.slow("processes")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_takes_no_less_than_its_bound():
    """A bound that is too high would refuse what fits: measured, at a size far above what else a process takes."""
    fields = SMALL | {"hidden_size": 64, "num_hidden_layers": 2}
    batch, length = 32, 512
    taken = most_taken(
        "from deltaproduct.models import ModelConfig, SequenceModel\n"
        "from deltaproduct.tasks import get_task\nfrom deltaproduct.training.objectives.task import masked_loss\n"
        f"model = SequenceModel(ModelConfig.build(**{fields!r}))\n"
        "def step(b, t):\n"
        "    x = get_task('S3').sample(b, t, generator=torch.Generator())\n"
        "    masked_loss(model(x[0])[0], *x[1:]).backward()\n"
        f"step(1, 16)\nbegin()\nstep({batch}, {length})"
    )
    bound = batch * (1 + length) * activation_bytes(ModelConfig.build(**fields))
    assert 64 << 20 < bound < taken, (bound, taken)


def test_a_model_takes_no_less_than_its_bound():
    config = ModelConfig.build(**SMALL, num_hidden_layers=2)
    model = SequenceModel(config)
    assert model_bytes(config) == 4 * model.num_parameters + 2 * size.BLOCK
    objects = sum(sys.getsizeof(m) + sum(sys.getsizeof(x) for x in vars(m).values()) for m in model.blocks[0].modules())
    assert objects > size.BLOCK / 2  # the dictionaries' own contents, and tensors, come on top


# --- What is refused, and what is not


def test_check_memory_at_its_border(monkeypatch):
    there(monkeypatch, 1000)
    check_memory("X", 1000, "y")
    assert one_line(lambda: check_memory("X", 1001, "y")) == (
        "X needs at least 1001 bytes of memory, and there are 1000 bytes on this machine; lower y."
    )
    monkeypatch.setattr(memory, "available_memory", lambda device=None: None)
    check_memory("X", 10**30, "y")  # where nothing says how much there is, nothing is refused
    assert [format_bytes(n) for n in (5, 1023, 1024, 3 << 29, 10**15, 10**40)] == [
        "5 bytes", "1023 bytes", "1.0 KiB", "1.5 GiB", "909.5 TiB", "1,024 PiB"
    ]  # fmt: skip


def test_a_run_at_the_border_of_memory(monkeypatch):
    model = ModelConfig.build(**SMALL)
    settings = TrainConfig(lengths=(8, 128), batch_sizes=(256, 64), grad_accumulation=2)
    config = Run(settings, model)
    needed = num_parameters(model) * size.TRAINED + size.BLOCK + 32 * 129 * activation_bytes(model)
    there(monkeypatch, needed)
    check_fits_memory(config, CPU)
    there(monkeypatch, needed - 1)
    one_line(lambda: check_fits_memory(config, CPU), "4,128 tokens", "batch_sizes", "grad_accumulation")
    half = Run(TrainConfig(lengths=(8, 128), batch_sizes=(256, 64), grad_accumulation=4), model)
    check_fits_memory(half, CPU)


def test_a_language_run_at_the_border_of_memory(monkeypatch):
    model = ModelConfig.build(**SMALL | {"num_labels": 7})
    config = Run(LanguageConfig(context=64, batch_size=8), model)
    weights, token = num_parameters(model), activation_bytes(model)
    there(monkeypatch, weights * size.TRAINED + size.BLOCK + 512 * token - 1)
    one_line(lambda: check_fits_memory(config, CPU), "512 tokens", "context")
    check_fits_memory(config, CPU, processes=2)
    check_fits_memory(config, CPU, gradient_checkpointing=True)
    assert activation_bytes(model, gradient_checkpointing=True) < token


HOSTILE = [
    ("train", "--hidden-size", "100000000"), ("train", "--num-hidden-layers", "10000000"),
    ("train", "--batch-sizes", "100000000"), ("train", "--lengths", "99999999999", "--batch-sizes", "64"),
    ("train", "--num-heads", "100000000", "--head-dim", "100000000"), ("train", "--num-householder", "100000000"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", HOSTILE, ids=" ".join)
def test_commands_of_hostile_sizes_leave_nothing(arguments, tmp_path, capsys, monkeypatch):
    there(monkeypatch, 1 << 40)
    status, _, err = run(capsys, *arguments, "--out", tmp_path / "run")
    assert status == 2 and len(err.splitlines()) == 1 and err.startswith("deltaproduct: ")
    assert not (tmp_path / "run").exists()


def test_evaluation_verification_and_extraction(monkeypatch):
    task = get_task("S3")
    model = SequenceModel(ModelConfig.build(**SMALL)).eval()
    there(monkeypatch, 1 << 34)
    one_line(lambda: evaluate_lengths(model, task, [10**14]), "tokens; lower one of them")
    one_line(lambda: evaluate_lengths(model, task, [8], sequences=10**12), "1,000,000,000,000 tokens")
    one_line(lambda: evaluate_lengths(model, task, [10**10], sequences=1), "length 10,000,000,000", "GiB of memory")
    one_line(lambda: evaluate_range(model, task, (8, 16), sequences=10**12), "memory")
    one_line(lambda: extract(model, task, max_length=10**9), "TiB of memory", "max_length")
    compiled = compile_group("Z3")
    one_line(lambda: verify(compiled, length=10**15), "memory", "length or words")
    assert evaluate_lengths(model, task, [8], sequences=4)[8].sequences == 4
    assert verify(compiled, length=8).wrong == 0
    there(monkeypatch, 2_000)
    one_line(lambda: evaluate_lengths(model, task, [8], sequences=4), "lengths or sequences")


def test_constructions_are_refused_before_their_weights(monkeypatch):
    """Z1000's permutation matrices alone would be 8 GB; its rotations are small, and are what is taken."""
    one_line(lambda: compile_group("Z300", "permutation"), "slots of width", "16,384")
    monkeypatch.setattr(circuit, "MAX_WEIGHTS", 100)
    one_line(lambda: compile_group("Z12", "rotation"), "a projection has", "at most 100")


# --- Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    SequenceModel(ModelConfig.build(**SMALL | {"num_labels": 7})).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def changed(folder, **fields):
    """The checkpoint with other sizes in its configuration, and a manifest that agrees."""
    values = json.loads((folder / "config.json").read_text()) | fields
    write_json(folder / "config.json", values)
    (folder / "manifest.json").unlink()
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    with replaced_folder(folder) as fresh:
        for name, data in kept.items():
            (fresh / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": 60_000}, {"vocab_size": 200_000_000}, {"hidden_size": 100_000_000}], ids=str
)
def test_a_small_checkpoint_that_says_it_is_large(fields, checkpoint, monkeypatch):
    changed(checkpoint, **fields)
    built = []
    real = SequenceModel.__init__
    monkeypatch.setattr(SequenceModel, "__init__", lambda self, config: built.append(1) or real(self, config))
    one_line(lambda: SequenceModel.from_pretrained(checkpoint), "does not fit its configuration")
    assert not built


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 60_000}, {"vocab_size": 10**8, "num_labels": 10**8}], ids=str)
def test_the_same_through_transformers(fields, checkpoint, monkeypatch):
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductForCausalLM
    from deltaproduct.models.hf import model as hf

    assert DeltaProductForCausalLM.from_pretrained(checkpoint).config.num_hidden_layers == 1
    changed(checkpoint, **fields)
    built = []
    monkeypatch.setattr(hf, "_drawn", built.append)
    one_line(lambda: DeltaProductForCausalLM.from_pretrained(checkpoint), "does not fit its configuration")
    assert not built


def test_shapes_are_read_from_headers(checkpoint, tmp_path):
    shapes = stored_shapes(checkpoint)
    model = SequenceModel.from_pretrained(checkpoint)
    assert shapes == {name: tuple(x.shape) for name, x in model.state_dict().items()}
    check_stored(model.config, shapes, checkpoint)
    assert stored_shapes(tmp_path) is None
    parts = dict(enumerate(model.state_dict().items()))
    for i, (name, x) in parts.items():
        safetensors.torch.save_file({name: x.contiguous()}, tmp_path / f"part{i}.safetensors")
    places = {name: f"part{i}.safetensors" for i, (name, _) in parts.items()}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": places})
    assert stored_shapes(tmp_path) == shapes
    (tmp_path / "part0.safetensors").write_bytes(b"nonsense")
    assert stored_shapes(tmp_path) is None


# --- How much there is


def test_limits_of_control_groups_and_of_the_process(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 999 kB\nMemAvailable:  8000 kB\nSwapFree: 1000 kB\n")
    process, groups = tmp_path / "self", tmp_path / "cgroup"
    inner = groups / "a" / "b"
    inner.mkdir(parents=True)
    process.mkdir()
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "PROCESS", process)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    assert memory._of_machine() == 9000 * 1024
    (process / "cgroup").write_text("0::/a/b\n")
    assert memory._of_groups() == []
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5\n")
    (groups / "a" / "memory.max").write_text("1000000\n")
    (groups / "a" / "memory.current").write_text("400000\n")
    (groups / "a" / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert memory._of_groups() == [650_000]
    (groups / "a" / "memory.swap.max").write_text("30000\n")
    (groups / "a" / "memory.swap.current").write_text("10000\n")
    assert memory._of_groups() == [670_000]
    assert memory.available_memory() <= 670_000
    old = groups / "memory" / "c"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2000\n")
    (old / "memory.usage_in_bytes").write_text("500\n")
    (process / "cgroup").write_text("4:cpu,memory:/c\n3:pids:/c\n")
    assert memory._of_groups() == [1500]


@pytest.mark.slow("processes")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of addresses is Linux's")
def test_a_limit_of_addresses_is_known_and_kept(tmp_path):
    """A whole command under 4 GiB of addresses: refused in one line, before it takes them."""
    code = (
        "import resource, torch\nfrom deltaproduct.cli.main import main\n"
        "used = 4096 * int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2)\n"
        f"main(['train', '--batch-sizes', '2000000', '--out', {str(tmp_path / 'run')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "A step of" in done.stderr and not (tmp_path / "run").exists()


MESSAGES = [
    (MemoryError(), "This machine"),
    (MemoryError("Unable to allocate 7.28 TiB for an array with shape (10,) and data type int64"), "7.28 TiB"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 7992000000 bytes. Error code 12 (Cannot allocate memory)"), "7992000000 bytes"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "20.00 GiB"),
    (RuntimeError("CUDA error: out of memory"), "The GPU"),
    (RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"), "No machine"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "word"), MESSAGES, ids=lambda x: str(x)[:20])
def test_what_still_runs_out_of_memory_is_one_line(error, word, tmp_path, capsys, monkeypatch):
    reason = why_out_of_memory(error)
    assert word in reason and "lower" in reason and "\n" not in reason

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("deltaproduct.training.loop.train", fails)
    status, _, err = run(capsys, "train", "--out", tmp_path / "run")
    assert status == 2 and err == f"deltaproduct: {reason}\n"


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("memory"), OSError(12, "x")):
        assert why_out_of_memory(error) is None


def test_real_errors_of_python_numpy_and_torch_are_known():
    import numpy as np

    for call in (lambda: torch.empty(1 << 55), lambda: np.empty(1 << 57), lambda: torch.empty(1 << 62, 1 << 62),
                 lambda: bytearray(1 << 60)):  # fmt: skip
        with pytest.raises((MemoryError, RuntimeError)) as e:
            call()
        assert why_out_of_memory(e.value), e.value


def test_a_check_costs_nothing_where_little_is_asked_for(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device=None: pytest.fail("looked"))
    get_task("S3").sample(64, 128, generator=torch.Generator())
    check_memory("X", memory.ALWAYS, "y")


def test_training_that_fits_is_not_refused(tmp_path):
    model = ModelConfig.build(**SMALL)
    train(Run(TrainConfig(lengths=(4,), batch_sizes=(2,), steps=1, warmup_steps=0), model), tmp_path / "r",
          show=False)  # fmt: skip
    assert (tmp_path / "r" / "run.json").exists()
