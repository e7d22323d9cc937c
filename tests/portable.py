"""The numerical tests as other machines would run them: `python tests/portable.py [--all | --at-once] [pytest's]`.

A processor decides which instructions PyTorch's own loops (ATen), its matrix products (MKL), its convolutions (oneDNN)
and our engine use, and so in which order they sum. Each way below takes one of these choices away from the processor.
A tolerance that holds for one order of summation alone fails in one of them. Without --all, each way has the tests of
the operator and every sixth of the others, another sixth in each. With --at-once, which CI has time for, there is one
way that takes all choices away together, with as many tests as each of these; where it fails, the others say why.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaproduct.ops.native.library import ENGINE

ROOT = Path(__file__).parents[1]
MARK = "pytest.mark.numerical"
# Collecting the others takes ten seconds in each way.
FILES = sorted(str(path) for path in Path(__file__).parent.rglob("test_*.py") if MARK in path.read_text("utf-8"))
SAMPLE = 6
EVERYTHING, AT_ONCE = "--all", "--at-once"
THREADS = "DELTAPRODUCT_TEST_THREADS"  # read by conftest.py


@dataclass(frozen=True)
class Way:
    """One way to compute: environment variables, and what the tests' first lines then say that they compute with."""

    name: str
    variables: dict[str, str]
    shows: str | None = None  # None: there is nothing to be seen of it
    kernels: str | None = None  # the engine's, which this processor has to have
    alone: bool = False  # has more than one thread, which would wait for the cores of other ways

    def why_not(self) -> str | None:
        """Why this machine cannot compute so; None if it can."""
        if self.kernels and (ENGINE is None or self.kernels not in ENGINE.kernels_here()):
            return f"the engine has no {self.kernels} kernels here"
        if self.shows and not self.kernels and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return "this processor is none of x86-64 with AVX2"
        return None


WAYS = (
    Way("ATen without vector instructions", {"ATEN_CPU_CAPABILITY": "default"}, shows="ATen DEFAULT"),
    Way("ATen with AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}, shows="ATen AVX2"),
    Way("MKL with AVX2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    Way("oneDNN with AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Way("engine with AVX2", {"DELTAPRODUCT_KERNELS": "avx2"}, shows="engine avx2", kernels="avx2"),
    Way(
        "engine with portable kernels, two threads",
        {"DELTAPRODUCT_KERNELS": "portable", THREADS: "2"},
        shows="engine portable, threads 2",
        kernels="portable",
        alone=True,
    ),
)

# What differs most from the processors that tests otherwise run on: no vector instructions, and a second thread.
TOGETHER = Way(
    "all of it at once",
    {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DELTAPRODUCT_KERNELS": "portable",
        THREADS: "2",
    },
    shows="ATen DEFAULT, engine portable, threads 2",
    kernels="portable",
    alone=True,
)


def run(way: Way, part: int, arguments: list[str]) -> bool:
    """Run the numerical tests, or this part of SAMPLE parts of them, in one way; print their outcome in one line, and
    what they said where they failed."""
    if why := way.why_not():
        print(f"left out: {way.name}: {why}", flush=True)
        return True
    chosen = ["-m", "numerical"] if EVERYTHING in arguments else ["-m", "numerical and not slow"]
    if EVERYTHING not in arguments:
        chosen += ["--sample", f"{part}/{SAMPLE}"]
    chosen += [argument for argument in arguments if argument not in (EVERYTHING, AT_ONCE)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *FILES, *chosen]
    environment = os.environ | {"OMP_NUM_THREADS": "1", THREADS: "1"} | way.variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    header = next((line for line in lines if line.startswith("numerics: ")), "")
    taken = way.shows is None or way.shows in header
    passed = done.returncode == 0 and taken
    print(f"{'passed' if passed else 'FAILED'}: {way.name}: {lines[-1].strip('= ') if lines else ''}", flush=True)
    if not passed:
        variables = " ".join(f"{name}={value}" for name, value in way.variables.items())
        if not taken:
            print(f"{variables} had no effect: {header or 'the tests did not begin'}")
        print(f"{done.stdout[-20000:]}{done.stderr[-2000:]}")
        print(f"To repeat it: {variables} python -m pytest {shlex.join(chosen)}", flush=True)
    return passed


def main() -> int:
    arguments = sys.argv[1:]
    if AT_ONCE in arguments:
        return 0 if run(TOGETHER, 0, arguments) else 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        together = [pool.submit(run, way, n, arguments) for n, way in enumerate(WAYS) if not way.alone]
        outcomes = [future.result() for future in together]
    outcomes += [run(way, n, arguments) for n, way in enumerate(WAYS) if way.alone]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
