"""Reports that several tests look at, and backends and peers put in for one test."""

import dataclasses

import pytest
from cases import S3

from deltaproduct.benchmarks import PEERS, bench_ops, bench_step, bench_train, roofline
from deltaproduct.benchmarks.peers import Peer
from deltaproduct.ops import BACKENDS


@pytest.fixture
def add_backend(monkeypatch):
    """Put a backend with this `run` into the operator's table for one test."""

    def add(name, run):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS["reference"], name=name, run=run))

    return add


@pytest.fixture
def add_peer(monkeypatch):
    """The same among the peers."""

    def add(name, run, **fields):
        monkeypatch.setitem(PEERS, name, Peer(name, "for a test", lambda: run, **fields))

    return add


@pytest.fixture(scope="session")
def quick():
    return bench_ops(quick=True, device="cpu", repeats=2)


@pytest.fixture(scope="session")
def quick_step():
    return bench_step(quick=True, device="cpu", repeats=3)


@pytest.fixture(scope="session")
def quick_train():
    return bench_train(S3, quick=True, device="cpu", repeats=2)


@pytest.fixture(autouse=True)
def small_roofline(monkeypatch):
    """Tests of something else need not wait for a large product."""
    monkeypatch.setitem(roofline.SIZES, "cpu", (64,))
