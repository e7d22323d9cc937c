"""What every test here needs: one thread, and no GPU where a test does not ask for one."""

import os
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import pytest
import torch

# Before anything imports them: an assertion that fails there says as much as one in a test.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.glob("helpers/*.py")))

# Before anything imports the standard library's distutils, as pip does: setuptools, which PyTorch's compiler asks for,
# puts its own in that place and fails where the other is there already.
with suppress(ImportError):
    import setuptools  # noqa: F401

if not torch.cuda.is_available():
    # Triton decides on its own import whether its library can be interpreted, and whoever imports it first decides so
    # for all. Our kernels are interpreted where a test says so (test_triton.py).
    os.environ["TRITON_INTERPRET"] = "1"
    with suppress(ImportError):
        import triton.language  # noqa: F401
    del os.environ["TRITON_INTERPRET"]

# The shapes of tests are too small for a second thread to help, and test processes share the cores. tests/portable.py
# asks for two, to have sums divided in another way.
THREADS = int(os.environ.get("DELTAPRODUCT_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)


# Why a test is marked slow(kind): what it does that `make test` has no time for.
KINDS = {
    "processes": "starts other Python processes, and waits for what they import",
    "ranks": "trains on several processes that talk to each other",
    "kills": "kills or interrupts what runs, and goes on",
    "readers": "reads what another process is writing",
    "launchers": "starts a launcher's jobs, on this machine or on a SLURM of ours",
    "ray": "starts Ray",
    "graphs": "has PyTorch trace programs into graphs",
    "inductor": "has a C++ compiler compile such graphs",
    "kernels": "compiles Triton's kernels for a GPU",
    "interpreter": "runs Triton's interpreter for longer than the others",
    "export": "exports models",
    "native build": "builds or installs the package",
    "harness": "reads all tasks of lm-eval",
    "fuzz": "runs the program on damaged and hostile files of every kind",
    "exhaustive": "is what faster tests are, with more cases or larger ones, or trains until a task is learned",
}


# Of the parameters of each test in these files `make test` runs the first and about one in so many, always the same
# ones; the others are slow("exhaustive"). Their tests go through many like cases that take long. The mark one_in(N)
# says the same of a single test.
ONE_IN = {
    "analysis/test_effective_rank.py": 3,
    "analysis/test_extract.py": 4,
    "corpus/test_corpus.py": 3,
    "corpus/test_hostile_corpora.py": 3,
    "models/hf/test_hf.py": 3,
    "models/test_read_past_modules.py": 3,
    "models/test_run_in_pieces.py": 3,
    "models/test_saved_as_it_is.py": 4,
    "models/test_streaming.py": 4,
    "ops/test_scan.py": 3,
    "ops/test_transforms.py": 3,
    "ops/test_triton.py": 4,
    "tasks/test_expressions.py": 3,
    "tasks/test_tasks_text.py": 4,
    "theory/test_certificate.py": 4,
    "theory/test_compiler.py": 3,
    "theory/test_explain.py": 3,
    "theory/test_shared_situations.py": 4,
    "theory/test_strategies.py": 4,
    "theory/test_theorems.py": 4,
    "theory/test_theorems_in_numbers.py": 4,
    "theory/test_theory_acceptance.py": 3,
    "training/test_checkpoints.py": 4,
    "training/test_language_checkpoints.py": 3,
    "training/test_presets.py": 3,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "of the chosen tests every Nth, from the Kth on, and all of those that are marked numerical('whole')"
    parser.addoption("--sample", metavar="K/N", help=help)
    help = "of the slow tests those that are marked ci: some of each kind"
    parser.addoption("--each-kind", action="store_true", help=help)


def kinds_of(item: pytest.Item) -> set[str]:
    """Why it is slow; nothing for a test that is not."""
    kinds = [mark.args for mark in item.iter_markers("slow")]
    if any(len(args) != 1 or args[0] not in KINDS for args in kinds):
        raise pytest.UsageError(f"{item.nodeid}: slow(kind) takes one of {', '.join(map(repr, KINDS))}")
    return {args[0] for args in kinds}


def is_representative(item: pytest.Item) -> bool:
    """Whether it is marked `ci`, or `ci("id", …)` with the id of its own parameters."""
    return any(
        not mark.args or item.nodeid.endswith(tuple(f"[{id}]" for id in mark.args)) for mark in item.iter_markers("ci")
    )


def leave_to_test_all(items: list[pytest.Item]) -> None:
    """Mark as slow what ONE_IN leaves out."""
    here, seen = Path(__file__).parent, set()
    for item in items:
        function = item.nodeid.split("[")[0]
        one_in = ONE_IN.get(str(item.path.relative_to(here)), 1)
        if (mark := item.get_closest_marker("one_in")) is not None:
            one_in = mark.args[0]
        # By a sum of the name, so that no value of any parameter is left out for where it stands.
        if function in seen and crc32(item.nodeid.encode()) % one_in:
            item.add_marker(pytest.mark.slow("exhaustive"))
        seen.add(function)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    each_kind = config.getoption("--each-kind")
    leave_to_test_all(items)
    kinds = {item: kinds_of(item) for item in items}
    standing = {item: found for item, found in kinds.items() if is_representative(item)}
    if each_kind and (missing := KINDS.keys() - set().union(*standing.values())):
        raise pytest.UsageError(f"No test is marked both ci and slow of these kinds: {', '.join(sorted(missing))}")
    yield  # -m and -k
    if each_kind:
        items[:] = [item for item in items if standing.get(item)]
    if sample := config.getoption("--sample"):
        first, every = map(int, sample.split("/"))
        whole = [(mark := item.get_closest_marker("numerical")) is not None and "whole" in mark.args for item in items]
        items[:] = [item for i, item in enumerate(items) if whole[i] or i % every == first % every]


def pytest_report_header() -> str:
    from deltaproduct.ops.native.library import ENGINE  # not before Triton is imported

    kernels = "none" if ENGINE is None else ENGINE.kernels
    return f"numerics: ATen {torch.backends.cpu.get_cpu_capability()}, engine {kernels}, threads {THREADS}"


@pytest.fixture(autouse=True)
def threads_as_they_were():
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread():
    # On a shared machine torch's threads wait for each other's cores, and a run of 4 ms can take 80.
    torch.set_num_threads(1)


@pytest.fixture
def poisoned():
    """torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
