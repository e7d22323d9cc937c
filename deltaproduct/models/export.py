"""One step of a model, (tokens, state) → (logits, state), as a program that runs without this library.

`onnx` writes a graph for ONNX Runtime and its like, `aotinductor` a compiled library for PyTorch alone, from Python or
C++. The batch size is free. States are inputs and outputs of their own, named "layer.field" and "next.layer.field".

B sequences · V labels.
"""

import importlib.util
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

import deltaproduct
from deltaproduct.errors import UsageError
from deltaproduct.files import replaced_folder, write_json, write_text
from deltaproduct.models.config import ModelConfig
from deltaproduct.models.sequence_model import SequenceModel, write_tensors
from deltaproduct.models.states import from_named, initial_state, named_tensors
from deltaproduct.renamed import renamed_names

TOLERANCE = 1e-5  # of a step from the model's, where nothing larger follows from the model's size
STEPS, BATCHES, TRACED_BATCH = 32, (1, 3), 2  # what is checked; the batch that is traced is none of those checked
DESCRIPTION, INITIAL = "step.json", "initial_state.safetensors"
TOKENS, LOGITS, NEXT = "tokens", "logits", "next."

Program = Callable[..., list[Tensor]]  # called with tokens [B] and the state's tensors; gives logits [B,V] and theirs


class DecodingStep(nn.Module):
    """One token of each sequence: forward(tokens [B], *state) → (logits [B,V], *state), the state as plain tensors."""

    def __init__(self, model: SequenceModel):
        super().__init__()
        self.model = model
        self._template = initial_state(model, 1)
        named = named_tensors(self._template)
        # A convolution of width 1 has an empty history, of which a program knows nothing.
        self.names = [name for name, x in named.items() if x.numel()]
        self._empty = {name: x for name, x in named.items() if not x.numel()}

    def initial(self, batch_size: int) -> list[Tensor]:
        """The state of `batch_size` sequences before their first token."""
        # Clones: a mixer may begin with one tensor of zeros in two places, which tracing would take for one input.
        return [x.contiguous().clone() for x in self._full(initial_state(self.model, batch_size))]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, state, strict=True))
        given |= {name: x.new_zeros(tokens.shape[0], *x.shape[1:]) for name, x in self._empty.items()}
        logits, carried = self.model(tokens[:, None], from_named(self._template, given))
        # Contiguous, as compiled code takes its inputs to be: a convolution's history is a view that leaves gaps.
        return tuple(x.contiguous() for x in (logits[:, 0], *self._full(carried)))

    def _full(self, state: tuple[Any, ...]) -> list[Tensor]:
        named = named_tensors(state)
        return [named[name] for name in self.names]


def trace_step(step: DecodingStep) -> ExportedProgram:
    """The step as a graph of PyTorch's own operators, for any batch size.

    Raises:
        UsageError: the state grows with the tokens, the precision is below float32, or a mixer cannot be traced.
    """
    model = step.model
    if model.state_size_after(1) != model.state_size:
        raise UsageError("This model's state grows with every token, and a step is exported with one of fixed size.")
    if model.head.weight.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"The model is {model.head.weight.dtype}; convert it to float32 to export its step.")
    state = step.initial(TRACED_BATCH)
    tokens = torch.zeros(TRACED_BATCH, dtype=torch.long, device=model.head.weight.device)
    batch = {0: torch.export.Dim("batch")}
    with _one_line("traced for any batch size"), torch.no_grad():
        program = torch.export.export(step, (tokens, *state), dynamic_shapes=(batch, tuple(batch for _ in state)))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    own = {str(node.target) for graph in graphs for node in graph.nodes if str(node.target).startswith("deltaproduct")}
    if own:
        raise UsageError(f"This model's step calls {min(own)}, which a program without this library does not have.")
    return program


def _write_onnx(step: DecodingStep, path: Path) -> None:
    if step.model.head.weight.device.type != "cpu":
        raise UsageError("Exporting to ONNX takes a model on the CPU; the graph is for all devices.")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"Exporting to ONNX needs {' and '.join(missing)}; pip install 'deltaproduct[export]'.")
    program, batch = trace_step(step), {0: "batch"}
    with _one_line("converted to ONNX"):
        found = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[TOKENS, *step.names],
            output_names=[LOGITS, *(NEXT + name for name in step.names)],
            dynamic_shapes=(batch, tuple(batch for _ in step.names)),  # only to call that dimension so
        )  # fmt: skip
        assert found is not None
        found.save(path)


def _open_onnx(path: Path) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, arrays)]

    return run


def _write_aotinductor(step: DecodingStep, path: Path) -> None:
    program = trace_step(step)
    with _one_line("compiled by AOTInductor"), torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _open_aotinductor(path: Path) -> Program:
    return torch._inductor.aoti_load_package(str(path))


@dataclass(frozen=True)
class Format:
    """A way to write the program: the name of its file, what writes and opens it, and how a user calls it."""

    file: str
    write: Callable[[DecodingStep, Path], None]
    open: Callable[[Path], Program]
    usage: str


FORMATS = {
    "onnx": Format(
        "model.onnx",
        _write_onnx,
        _open_onnx,
        """\
import numpy
import onnxruntime
from safetensors.numpy import load_file

session = onnxruntime.InferenceSession("model.onnx")
names = [output.name for output in session.get_outputs()]
state = {name: x.repeat(2, axis=0) for name, x in load_file("initial_state.safetensors").items()}  # 2 sequences
for tokens in ([1, 2], [3, 0]):  # of each, its next token
    outputs = dict(zip(names, session.run(None, {"tokens": numpy.array(tokens)} | state)))
    logits, state = outputs["logits"], {name: outputs["next." + name] for name in state}
""",
    ),
    "aotinductor": Format(
        "model.pt2",
        _write_aotinductor,
        _open_aotinductor,
        """\
import json

import torch
from safetensors.torch import load_file

step = torch._inductor.aoti_load_package("model.pt2")
initial = load_file("initial_state.safetensors")
names = [entry["name"] for entry in json.load(open("step.json"))["inputs"][1:]]
state = [initial[name].repeat_interleave(2, dim=0) for name in names]  # 2 sequences
for tokens in ([1, 2], [3, 0]):  # of each, its next token
    logits, *state = step(torch.tensor(tokens), *state)
""",
    ),
}


def export_step(model: SequenceModel, folder: str | Path, to: str) -> dict[str, Any]:
    """Write the step of a model: the program, step.json (its inputs and outputs), initial_state.safetensors, README.md.

    The program is run beside the model before the folder is put in place, and has to be as near as `tolerance` says.

    Returns:
        What step.json holds.

    Raises:
        UsageError: the model cannot be exported, something that it takes is not installed, the program differs from
            the model, or the folder exists or cannot be written.
    """
    folder = Path(folder)
    if to not in FORMATS:
        raise UsageError(f"There is no format {to!r} to export to; choose from {', '.join(FORMATS)}.")
    if folder.exists():
        raise UsageError(f"{folder} already exists; choose another folder.")
    step = DecodingStep(model)
    with replaced_folder(folder) as fresh:
        try:
            return _write(step, fresh, to)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)  # nothing was there before that it could go back to
            raise


def _write(step: DecodingStep, folder: Path, to: str) -> dict[str, Any]:
    model, format = step.model, FORMATS[to]
    format.write(step, folder / format.file)
    difference, allowed = largest_difference(step, format.open(folder / format.file)), tolerance(model.config)
    if not difference <= allowed:
        raise UsageError(
            f"The exported program differs from the model by {difference:.1e} in a step, more than {allowed:.1e}; "
            "nothing was written."
        )
    description = describe(step) | {
        "format": to,
        "file": format.file,
        "initial_state": INITIAL,
        "checked": {"steps": STEPS, "batches": BATCHES, "largest_difference": difference, "tolerance": allowed},
        "config": model.config.to_dict(),
        "versions": {"deltaproduct": deltaproduct.__version__, "torch": torch.__version__},
    }
    write_json(folder / DESCRIPTION, description)
    first = zip(step.names, step.initial(1), strict=True)
    write_tensors(folder / INITIAL, {name: x.detach().cpu() for name, x in first})
    write_text(folder / "README.md", _readme(format))
    return description


def describe(step: DecodingStep) -> dict[str, Any]:
    """The names, shapes and dtypes of what goes in and comes out, in order; "batch" stands for the number of sequences.

    `initial` says what a sequence's state begins with: "zeros", or the file that holds it.
    """

    def port(name: str, x: Tensor, **more: str) -> dict[str, Any]:
        return {"name": name, "shape": ["batch", *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")} | more

    state = step.initial(1)
    named = list(zip(step.names, state, strict=True))
    config, weight = step.model.config, step.model.head.weight
    return {
        "inputs": [
            {"name": TOKENS, "shape": ["batch"], "dtype": "int64", "below": config.vocab_size},
            *(port(name, x, initial=INITIAL if x.any() else "zeros") for name, x in named),
        ],
        "outputs": [
            port(LOGITS, weight.new_empty(1, config.num_labels)),
            *(port(NEXT + name, x, becomes=name) for name, x in named),
        ],
    }


def tolerance(config: ModelConfig) -> float:
    """How far a step in float32 may be from another order of the same sums: 8·u·L·(√n + N), or TOLERANCE if more.

    L layers, n the longest sum, N Householder steps, u = 2^-24. The bound is that of `bench generate`, for one token.
    """
    heads = max(getattr(x, "num_heads", 0) * getattr(x, "head_dim", 0) for x in config.mixers)
    longest = max(config.hidden_size, config.mlp_size, heads)
    steps = max(getattr(x, "num_householder", 1) for x in config.mixers)
    return max(TOLERANCE, 8 * 2**-24 * config.num_hidden_layers * (longest**0.5 + steps))


@torch.no_grad()
def largest_difference(step: DecodingStep, program: Program) -> float:
    """How far a program's steps are from the model's, over STEPS random tokens, each from the state that the model has.

    Not from a state of the program's own: where nothing decays, rounding adds up, so that after a few dozen tokens
    through three layers the model itself is 2e-5 from exact arithmetic.

    Returns:
        Of each tensor, the difference relative to its largest number, or to 1 where all are smaller; the largest of
        all, infinite where shapes or dtypes differ, and NaN where any number is.
    """
    generator, differences = torch.Generator().manual_seed(0), []
    device = step.model.head.weight.device
    for batch_size in BATCHES:
        state = step.initial(batch_size)
        for _ in range(STEPS):
            tokens = torch.randint(step.model.config.vocab_size, (batch_size,), generator=generator).to(device)
            want, got = step(tokens, *state), program(tokens, *state)
            for x, y in zip(want, got, strict=True):
                if x.shape != y.shape or x.dtype != y.dtype:
                    return float("inf")
                differences.append((x - y).abs().max() / x.abs().max().clamp(min=1))
            state = list(want[1:])
    return float(torch.stack(differences).max())  # which is NaN if one is


def _readme(format: Format) -> str:
    return (
        f"One step of a sequence model, `{format.file}`: a token of each sequence and the state so far give the\n"
        f"logits after it and the new state. `{DESCRIPTION}` names all inputs and outputs, which are contiguous, and\n"
        f"`{INITIAL}` is the state of one sequence before its first token.\n\n```python\n{format.usage}```\n"
    )


@contextmanager
def _one_line(done: str) -> Iterator[None]:
    """Whatever PyTorch's exporters raise becomes one line, and what they print, log and warn of is not shown."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    except UsageError:
        raise
    except Exception as e:
        sentence = re.split(r"[.!](?:\s|$)|\n", str(e).strip())[0] or type(e).__name__
        raise UsageError(f"This model's step cannot be {done}: {sentence}.") from e
    finally:
        logging.disable(disabled)


__getattr__ = renamed_names(__name__, {"Step": "DecodingStep", "trace": "trace_step"})
