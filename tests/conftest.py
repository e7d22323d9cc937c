"""What every test here needs: one thread, and no GPU where a test does not ask for one."""

import os
from contextlib import suppress

import pytest
import torch

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


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "of the chosen tests every Nth, from the Kth on, and all of those that are marked numerical('whole')"
    parser.addoption("--sample", metavar="K/N", help=help)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
