"""How the native engine is built, shipped, found and loaded, what the package says and does where that fails, and how
PyTorch's compiler sees the engine's operators."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from operator_cases import Problem, draw, leaves, options
from torch._dynamo.testing import CompileCounterWithBackend

from deltaproduct.errors import UsageError
from deltaproduct.ops import delta_product
from deltaproduct.ops.native import library
from deltaproduct.ops.native.library import ENGINE, WHY_NO_ENGINE, Engine

ROOT = Path(__file__).parents[2]
SOURCES = {p.name for pattern in ("*.cpp", "*.h") for p in (ROOT / "deltaproduct/ops/native").glob(pattern)}
COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
NO_COMPILER = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}

here = pytest.mark.skipif(ENGINE is None, reason=WHY_NO_ENGINE)
builds = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("setuptools", "pip"))), reason="needs setuptools, pip"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def python(*arguments: str, cwd: Path, path: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Another Python, whose packages are those of `path` first."""
    env = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"} | env
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=110)


def succeeded(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture
def source(tmp_path) -> Path:
    """The package's sources, as of a fresh clone."""
    target = tmp_path / "source"
    leave = shutil.ignore_patterns("*.so", "*.dylib", "not_built.txt", "__pycache__")
    shutil.copytree(ROOT / "deltaproduct", target / "deltaproduct", ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def installed(source: Path, **env: str) -> Path:
    """What `pip install` would put into site-packages: a wheel is a zip of it."""
    wheels, target = source.parent / "wheels", source.parent / "installed"
    pip = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(wheels), ".")
    succeeded(python(*pip, cwd=source, path=source.parent, **env))
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(target)
    return target


# What a user sees who computes, who asks for a reason, who insists, and who calls the doctor.
USE = """
import json, sys, torch, deltaproduct
from deltaproduct.cli.main import main
from deltaproduct.errors import UsageError
from deltaproduct.ops import delta_product, resolve_backend
x = [torch.ones(shape) for shape in ((1, 3, 1, 2), (1, 3, 2, 1, 2), (1, 3, 2, 1, 4), (1, 3, 2, 1))]
seen = {"file": deltaproduct.__file__, "auto": resolve_backend(), "o": delta_product(*x)[0].shape}
try:
    seen["cpu"] = delta_product(*x, backend="cpu")[0].shape
except UsageError as e:
    seen["cpu"] = str(e)
print(json.dumps(seen))
main(["doctor"])
"""


def used(cwd: Path, path: Path = ROOT, **env: str) -> tuple[dict, str]:
    seen, doctor = succeeded(python("-c", USE, cwd=cwd, path=path, **env)).split("\n", 1)
    return json.loads(seen), doctor


def assert_serves_without_engine(seen: dict, doctor: str, reason: str) -> None:
    name, why = seen["auto"]
    assert name == "chunkwise" and seen["o"] == [1, 3, 1, 4]
    for text in (why, seen["cpu"], doctor):
        assert "native CPU engine" in text and reason in text, text
    assert seen["cpu"].startswith("Backend 'cpu' cannot serve: ") and "\n" not in seen["cpu"]


@pytest.mark.skipif(COMPILER is None or sys.platform not in ("linux", "darwin"), reason="there is no compiler")
def test_the_engine_is_here_where_a_compiler_is():
    assert ENGINE is not None, f"{WHY_NO_ENGINE}; there is {COMPILER}: touch setup.py && make setup"


@pytest.mark.slow("native build")
@pytest.mark.ci
@builds
def test_installed_without_a_compiler_the_package_works_and_says_why_it_is_slower(source, tmp_path):
    target = installed(source, **NO_COMPILER)
    native = target / "deltaproduct/ops/native"
    assert {p.name for p in native.iterdir()} >= SOURCES | {"not_built.txt"}
    assert not list(native.glob("_engine*"))
    assert "/nowhere/c++" in (native / "not_built.txt").read_text()
    seen, doctor = used(tmp_path, target)
    assert Path(seen["file"]).is_relative_to(target)
    assert_serves_without_engine(seen, doctor, "/nowhere/c++")


@pytest.mark.slow("native build")
@builds
@pytest.mark.parametrize(("compiler", "reason"), [("/nowhere/c++", "/nowhere/c++"), ("false", "'false'")])
def test_built_in_place_the_reason_stays_beside_the_sources_until_a_build_succeeds(source, compiler, reason):
    build = ("setup.py", "-q", "build_ext", "--inplace")
    succeeded(python(*build, cwd=source, path=source, CC=compiler, CXX=compiler))
    native = source / "deltaproduct/ops/native"
    assert reason in (native / "not_built.txt").read_text() and not list(native.glob("_engine*"))
    # A compiler that writes whatever file it is asked for, with nothing in it.
    fake = source.parent / "fake-c++"
    fake.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : >"$2"; shift; done\n')
    fake.chmod(0o755)
    succeeded(python(*build, cwd=source, path=source, CC=str(fake), CXX=str(fake)))
    assert not (native / "not_built.txt").exists() and list(native.glob("_engine*"))


@pytest.mark.slow("native build")
@builds
def test_source_distribution_has_what_a_build_needs(source):
    succeeded(python("setup.py", "-q", "sdist", cwd=source, path=source))
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as opened:
        files = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    assert files >= {Path("deltaproduct/ops/native", name) for name in SOURCES} | {Path("setup.py")}


@pytest.mark.slow("native build")  # compiles
@builds
@pytest.mark.skipif(COMPILER is None, reason="there is no compiler")
def test_installed_with_a_compiler_the_engine_serves(source, tmp_path):
    target = installed(source, DELTAPRODUCT_CXXFLAGS="-O0")
    native = target / "deltaproduct/ops/native"
    assert not (native / "not_built.txt").exists() and len(list(native.glob("_engine*"))) == 1
    seen, doctor = used(tmp_path, target)
    assert Path(seen["file"]).is_relative_to(target) and seen["auto"][0] == "cpu" and seen["cpu"] == [1, 3, 1, 4]
    assert "yes (native CPU engine)" in doctor


@pytest.mark.slow("native build")
def test_a_library_that_does_not_load_is_reported_and_not_fatal(tmp_path):
    bad = tmp_path / "bad.so"
    bad.write_bytes(b"")
    seen, doctor = used(tmp_path, DELTAPRODUCT_ENGINE=str(bad))
    assert_serves_without_engine(seen, doctor, str(bad))


@pytest.mark.parametrize("content", [None, b"", b"not a library " * 1000], ids=["missing", "empty", "nonsense"])
def test_why_a_library_does_not_load(content, tmp_path, monkeypatch):
    path = tmp_path / "bad.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("DELTAPRODUCT_ENGINE", str(path))
    engine, why = library._load()
    assert engine is None and why.startswith(f"the native CPU engine does not load: {path}: ")


def test_a_library_of_something_else_is_reported(monkeypatch):
    other = importlib.util.find_spec("_ctypes").origin
    if not other or not other.endswith(".so"):
        pytest.skip("this Python has no shared library of its own to try")
    monkeypatch.setenv("DELTAPRODUCT_ENGINE", other)
    engine, why = library._load()
    assert engine is None and "does not load" in why and "deltaproduct_" in why


@here
def test_a_library_of_another_version_is_reported(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = (("call", library.EngineCall), ("new", ctypes.c_int64))

    monkeypatch.setattr(library, "EngineCall", Longer)
    monkeypatch.setenv("DELTAPRODUCT_ENGINE", str(ENGINE.path))
    engine, why = library._load()
    assert engine is None and f"{ENGINE.path} belongs to another version of this package" in why


@here
def test_kernels_are_chosen_by_name(tmp_path, monkeypatch):
    names, best = ENGINE.kernels_here(), ENGINE.kernels
    assert names[-1] == "portable" and len(set(names)) == len(names) and best in names
    assert os.environ.get("DELTAPRODUCT_KERNELS", names[0]) == best
    try:
        for name in names:
            ENGINE.use_kernels(name)
            assert ENGINE.kernels == name
        with pytest.raises(UsageError, match=r"no kernels 'sse9' for this processor; there are .*portable\.$"):
            ENGINE.use_kernels("sse9")
        assert ENGINE.kernels == "portable"
    finally:
        ENGINE.use_kernels(best)
    for name in names:
        monkeypatch.setenv("DELTAPRODUCT_KERNELS", name)
        copy = tmp_path / name  # loaded beside the original, with variables of its own
        assert Engine(shutil.copy(ENGINE.path, copy)).kernels == name and ENGINE.kernels == best


@pytest.mark.slow("processes")
@here
def test_kernels_named_by_the_environment(tmp_path):
    ask = "from deltaproduct.ops.native.library import ENGINE; print(ENGINE.kernels)"
    assert succeeded(python("-c", ask, cwd=tmp_path, DELTAPRODUCT_KERNELS="portable")) == "portable\n"
    doctor = succeeded(python("-m", "deltaproduct", "doctor", cwd=tmp_path, DELTAPRODUCT_KERNELS="portable"))
    assert re.search(r"its kernels +portable \(DELTAPRODUCT_KERNELS names them; .*\)", doctor)
    wrong = python("-m", "deltaproduct", "doctor", cwd=tmp_path, DELTAPRODUCT_KERNELS="sse9")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "no kernels 'sse9' for this processor; there are " in wrong.stderr
    assert "Set DELTAPRODUCT_KERNELS to one of these" in wrong.stderr


# Threads are counted after PyTorch has started its own.
THREADS = """
import json, os, torch
torch.set_num_threads(2)
torch.randn(300, 300) @ torch.randn(300, 300); torch.randn(10**6).sin()
def seen():
    lines = open("/proc/self/maps").read().split("\\n")
    runtimes = {line.split()[5] for line in lines if "omp" in line.rsplit("/")[-1]}
    return sorted(runtimes), len(os.listdir("/proc/self/task"))
before = seen()
from deltaproduct.ops import delta_product
from deltaproduct.ops.native.library import ENGINE
shapes = (4, 90, 2, 8), (4, 90, 2, 2, 8), (4, 90, 2, 2, 8), (4, 90, 2, 2)
delta_product(*(torch.randn(shape).requires_grad_() for shape in shapes), backend="cpu")[0].sum().backward()
print(json.dumps([before, seen(), ENGINE.openmp is not None]))
"""


@pytest.mark.slow("processes")
@here
@linux
def test_the_engine_runs_on_pytorchs_threads_and_loads_no_runtime_of_its_own(tmp_path):
    before, after, found = json.loads(succeeded(python("-c", THREADS, cwd=tmp_path)))
    assert before == after and before[0] and found


@pytest.mark.slow("graphs")
@here
@pytest.mark.parametrize("how", ["plain", "packed", "no gate", "strided", "value heads"])
def test_custom_operators_are_well_formed(how):
    cu = (0, 2, 2, 9) if how == "packed" else None
    p = Problem(T=9, B=1, H=1 if how == "value heads" else 2, gate=how != "no gate", initial=how != "no gate", cu=cu)
    x = {n: a.float() for n, a in draw(p).items()}
    if how == "strided":
        x = {n: a.movedim(-1, 0).contiguous().movedim(0, -1) for n, a in x.items()}
    if norm := how == "value heads":
        x |= {n: x[n].bfloat16() for n in ("q", "k", "initial_state")}
    inputs = [x.get(n) for n in ("q", "k", "v", "beta", "g", "initial_state")]
    cu_seqlens, ops = options(p)["cu_seqlens"], torch.ops.deltaproduct
    learnt = [a if a is None else a.clone().requires_grad_() for a in inputs]
    torch.library.opcheck(ops.cpu_forward.default, (*learnt, cu_seqlens, 0.3, True, norm))
    torch.library.opcheck(ops.cpu_forward.default, (*inputs, cu_seqlens, 0.3, False, norm))
    _, _, states = ops.cpu_forward(*inputs, cu_seqlens, 0.3, True, norm)
    for d_final in (x["d_final"], None):
        backward = (x["d_o"], d_final, *inputs[:5], states, cu_seqlens, 0.3, norm)
        torch.library.opcheck(ops.cpu_backward.default, backward)


class Whole(torch.nn.Module):
    def forward(self, x: dict) -> tuple:
        return delta_product(**x, output_final_state=True, backend="cpu")


@here
def test_exported_with_any_length_equals_eager():
    inputs = {T: {n: a for n, a in draw(Problem(T=T)).items() if not n.startswith("d_")} for T in (20, 170)}
    lengths = {n: None if n == "initial_state" else {1: torch.export.Dim.AUTO} for n in inputs[20]}
    program = torch.export.export(Whole(), (inputs[20],), dynamic_shapes=(lengths,))
    for x in inputs.values():
        assert all(torch.equal(a, b) for a, b in zip(program.module()(x), Whole()(x)))


@pytest.mark.slow("graphs")
@here
def test_compiled_for_any_length_equals_eager():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Whole(), fullgraph=True, dynamic=True, backend=counter)
    for length in (20, 170, 33):
        results = []
        for run in (compiled, Whole()):
            x = leaves(draw(Problem(T=length)))
            o, final = run(x)
            results.append([o, final, *torch.autograd.grad((o.sum(), final.sum()), list(x.values()))])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert counter.frame_count == 1, "a length was compiled anew"


PACKED = """
import sys, torch
from deltaproduct.ops import delta_product
def f(q, k, v, beta, cu_seqlens):
    return delta_product(q, k, v, beta, cu_seqlens=cu_seqlens, backend="cpu")[0]
x = [torch.randn(shape) for shape in ((1, 9, 1, 4), (1, 9, 2, 1, 4), (1, 9, 2, 1, 4), (1, 9, 2, 1))]
compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
compiled(*x, torch.tensor([0, 4, 9]))
for bad in ([0, 4, 200000], [0, 7, 3, 9], [-5, 4, 9], [0, 4, 8]):
    try:
        compiled(*x, torch.tensor(bad))
    except Exception as e:
        print("cu_seqlens" in str(e))
"""


@pytest.mark.slow("graphs")
@here
def test_bad_cu_seqlens_in_a_compiled_graph_are_refused(tmp_path):
    # The compiler traces no check of values, so that the operator has to check before C++ reads memory by them.
    assert succeeded(python("-c", PACKED, cwd=tmp_path)) == "True\n" * 4
