"""Every Triton kernel, compiled for a GPU that need not be there: what the interpreter does not see.

A program of its own, because Triton decides once per process whether it compiles or interprets:
`python compile_kernels.py CAPABILITY MODE [--size K] [--steps N] [--first]` prints a JSON list, an object for each
kernel, purpose and candidate, or first candidate. MODE is a dtype, or precise: bfloat16 with all bits. V is K.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltaproduct.ops.triton import operator

KERNELS = tuple(f"{n}_kernel" for n in ("gates", "prepare", "scan", "reverse", "segments", "gradients", "decode"))
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Recorder:
    """In a kernel's place: what it was launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.kernel, args, constants))


def launches(mode: str, size: int = 128, steps: int = 2) -> list:
    """All that the operator and its backward launch, dense and gated, packed and not, undivided and in segments."""
    found: list = []
    for name in KERNELS:
        setattr(operator, name, Recorder(getattr(operator, name), found))
    dtype = torch.bfloat16 if mode == "precise" else getattr(torch, mode)
    tokens = 4096

    def call(gate: bool, packed: bool, processors: int) -> None:
        operator.processors = lambda device: processors  # type: ignore[assignment]
        q, v = torch.empty(1, tokens, 1, size, dtype=dtype), torch.empty(1, tokens, steps, 1, size, dtype=dtype)
        g = torch.empty(1, tokens, 1) if gate else None
        cu = torch.tensor([0, 5, tokens]) if packed else None
        x = (q, v.clone(), v, torch.empty(1, tokens, steps, 1, dtype=dtype), g)
        precise = mode == "precise"
        o, _, kept, summary = operator.triton_forward(*x, None, cu, 1.0, True, gate, precise)
        operator.triton_backward(o, None, *x, kept, summary, cu, 1.0, gate, precise)

    call(gate=False, packed=False, processors=1)
    call(gate=True, packed=True, processors=1)
    call(gate=False, packed=False, processors=16)
    x = (torch.empty(1, 1, size, dtype=dtype), *(torch.empty(1, steps, 1, size, dtype=dtype) for _ in range(2)))
    operator.triton_step(*x, torch.empty(1, steps, 1), None, torch.empty(1, 1, size, size), 1.0, True)
    return found


def compile_for(capability: int, kernel, args, constants: dict, config) -> dict:
    """One kernel with one candidate, and what the assembler says of it."""
    function = kernel.fn
    values = dict(zip(function.arg_names, args, strict=False)) | constants | config.kwargs
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif name not in constants and name not in config.kwargs and isinstance(value, int):
            signature[name] = "i32"
        elif name not in constants and isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name], fixed[name] = "constexpr", value
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert used is not None, text
    purpose = [name for name, value in fixed.items() if value is True]
    return {"kernel": function.__name__, "purpose": purpose, "candidate": str(config), "registers": int(used[1]),
            "stack": int(used[2]), "shared": compiled.metadata.shared}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("mode", choices=("bfloat16", "precise", "float16", "float32"))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--first", action="store_true")
    asked = parser.parse_args()
    found, seen = [], set()
    for kernel, args, constants in launches(asked.mode, asked.size, asked.steps):
        meta = dict(zip(kernel.fn.arg_names, args, strict=False)) | constants
        tensors = [name for name, value in meta.items() if isinstance(value, torch.Tensor)]
        key = (kernel.fn.__name__, str(tensors), str(sorted((n, str(v)) for n, v in constants.items())))
        if key in seen:
            continue
        seen.add(key)
        configs = kernel.early_config_prune(kernel.configs, {}, **constants)
        for config in configs[:1] if asked.first else configs:
            found.append(compile_for(asked.capability, kernel, args, constants, config))
            print(found[-1], file=sys.stderr, flush=True)
    print(json.dumps(found))


main()
