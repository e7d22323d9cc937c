"""The ways in which an operator with a native kernel is computed: in PyTorch, and by each set of kernels here."""

from contextlib import contextmanager

from deltaproduct.ops import cpu

NATIVE = cpu.ENGINE is not None
KERNELS = cpu.ENGINE.kernels_here() if NATIVE else []
WAYS = ["pytorch", *KERNELS]


@contextmanager
def computed_by(way, monkeypatch):
    """`way` is one of WAYS. The engine that a test takes away comes back with the test's end."""
    if way == "pytorch":
        monkeypatch.setattr(cpu, "ENGINE", None)
        yield
        return
    before = cpu.ENGINE.kernels
    cpu.ENGINE.use_kernels(way)
    yield
    cpu.ENGINE.use_kernels(before)
