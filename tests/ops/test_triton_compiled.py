"""The Triton kernels compiled for GPUs that need not be there: each fits into shared memory, and spills little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Bytes that a thread keeps outside its registers, as measured, most of them where there are gates (docs/LOG.md).
SPILLED = {"gradients_kernel": 340, "scan_kernel": 48, "prepare_kernel": 16}
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a block may have

ALL_COMPILED = [
    *((90, mode, (128, 2)) for mode in ("bfloat16", "precise", "float16", "float32")),
    *((90, "bfloat16", size) for size in ((16, 4), (64, 1), (64, 8), (128, 1), (128, 4), (256, 2))),
    *((90, mode, (256, 2)) for mode in ("precise", "float32")),
    *((capability, "bfloat16", (128, 2)) for capability in (80, 89)),
    (89, "float32", (128, 2)),
]


@pytest.mark.slow("kernels")
@pytest.mark.ci("90-bfloat16-size0-which0")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("capability", "mode", "size", "which"),
    [
        (90, "bfloat16", (128, 2), ["--first"]),
        *((*case, []) for case in ALL_COMPILED),
    ],
)
def test_every_kernel_compiles_and_fits(capability, mode, size, which, tmp_path):
    program = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, program, str(capability), mode, "--size", str(size[0]), "--steps", str(size[1]), *which],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {r["kernel"] for r in found} == {
        f"{name}_kernel" for name in ("gates", "prepare", "scan", "reverse", "segments", "gradients", "decode")
    }
    best: dict[str, int] = {}  # of what each kernel is compiled for, the candidate with the fewest spills that fits
    for r in found:
        if r["shared"] <= SHARED_MEMORY[capability]:
            purpose = f"{r['kernel']} {r['purpose']}"
            best[purpose] = min(best.get(purpose, r["stack"]), r["stack"])
    assert best.keys() == {f"{r['kernel']} {r['purpose']}" for r in found}
    if (capability, mode, size) == (90, "bfloat16", (128, 2)):  # what the candidates were chosen for
        for purpose, stack in best.items():
            assert stack <= SPILLED.get(purpose.split()[0], 0), best
