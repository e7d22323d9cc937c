"""Reports that several tests look at, and backends and implementations put in for one test."""

import dataclasses

import pytest
from cases import S3

from deltaproduct.benchmarks import IMPLEMENTATIONS, bench_generate, bench_ops, bench_train, roofline
from deltaproduct.benchmarks.implementations import Implementation
from deltaproduct.ops import BACKENDS


@pytest.fixture
def add_backend(monkeypatch):
    """Put a backend with this `run` into the operator's table for one test."""

    def add(name, run):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS["reference"], name=name, run=run))

    return add


@pytest.fixture
def add_implementation(monkeypatch):
    """The same among the other implementations."""

    def add(name, run, **fields):
        monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation(name, "for a test", lambda: run, **fields))

    return add


@pytest.fixture(scope="session")
def quick():
    return bench_ops(quick=True, device="cpu", repeats=2)


@pytest.fixture(scope="session")
def quick_generate():
    return bench_generate(quick=True, device="cpu", repeats=3)


@pytest.fixture(scope="session")
def quick_train():
    return bench_train(S3, quick=True, device="cpu", repeats=2)


@pytest.fixture(autouse=True)
def small_roofline(monkeypatch):
    """Tests of something else need not wait for a large product."""
    monkeypatch.setitem(roofline.SIZES, "cpu", (64,))
