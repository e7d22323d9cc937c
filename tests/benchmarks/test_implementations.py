"""Other implementations compute the same operator, from their own packages, and are reported where they cannot."""

import dataclasses
import functools
import importlib.util

import pytest
import torch
from cases import CPU, TINY, rows_of, shown

from deltaproduct.benchmarks import IMPLEMENTATIONS, bench_ops, textbook_loop
from deltaproduct.benchmarks.implementations import as_gated_delta_rule
from deltaproduct.errors import UsageError
from deltaproduct.ops import delta_product

pytestmark = pytest.mark.neighbours


def inputs(n, gate, length=40, dtype=torch.float32):
    """With grouped heads and V ≠ K; T·N is no multiple of the others' chunks of 64."""
    generator = torch.Generator().manual_seed(0)
    b, h, hv, k, v = 2, 2, 4, 8, 6

    def normal(*size):
        return torch.randn(b, length, *size, generator=generator, dtype=dtype)

    x = {
        "q": torch.nn.functional.normalize(normal(h, k), dim=-1),
        "k": torch.nn.functional.normalize(normal(n, h, k), dim=-1),
        "v": normal(n, hv, v),
        "beta": 2 * torch.sigmoid(normal(n, hv)),
    }
    if gate:
        x["g"] = torch.nn.functional.logsigmoid(normal(hv))
    return {name: y.requires_grad_() for name, y in x.items()}


def output_and_gradients(run, x):
    o = run(**x)
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
    return o, *torch.autograd.grad((o * weights).sum(), list(x.values()))


@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementations_are_the_operator(name, n, gate):
    package = {"transformers": "transformers", "fla-core": "fla"}.get(IMPLEMENTATIONS[name].distribution, "torch")
    if importlib.util.find_spec(package) is None:  # importing fla itself would need a Triton that suits it
        pytest.skip(f"{package} is not installed")
    if IMPLEMENTATIONS[name].gpu:
        assert IMPLEMENTATIONS[name].unsupported_reason(CPU, torch.float32) == "its kernels need a GPU"
        return
    assert IMPLEMENTATIONS[name].unsupported_reason(CPU, torch.float32) is None
    x = inputs(n, gate)
    wide = {name: y.detach().double().requires_grad_() for name, y in x.items()}
    want = output_and_gradients(lambda **y: delta_product(**y, backend="reference")[0], wide)
    # T·N steps, each with a rounding of 2⁻²⁴ of max|·|; 8 for the backward and for the largest of many entries.
    limit = 8 * 40 * n * 2.0**-24
    for have, wanted in zip(output_and_gradients(IMPLEMENTATIONS[name].load(), x), want, strict=True):
        assert have.dtype == torch.float32
        torch.testing.assert_close(have.double(), wanted, rtol=0, atol=limit * wanted.abs().max().item())


def test_textbook_loop_is_the_operator_in_float64():
    """And differentiable, by finite differences."""
    x = inputs(2, True, length=5, dtype=torch.float64)
    want, _ = delta_product(**x, backend="reference")
    torch.testing.assert_close(textbook_loop(**x), want, rtol=1e-12, atol=1e-12)  # a few hundred roundings of 1e-16
    assert torch.autograd.gradcheck(lambda *y: textbook_loop(*y), tuple(x.values()), fast_mode=True)


@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_delta_product_is_the_gated_delta_rule_on_a_longer_sequence(n, gate):
    x = inputs(n, gate, dtype=torch.float64)
    q, k, v, beta, g = as_gated_delta_rule(**({"g": None} | x))
    one = {"k": k.unsqueeze(2), "v": v.unsqueeze(2), "beta": beta.unsqueeze(2), "backend": "reference"}
    o, _ = delta_product(q, g=g, **one)
    want, _ = delta_product(**x, backend="reference")
    torch.testing.assert_close(o[:, n - 1 :: n], want, rtol=1e-12, atol=1e-12)
    assert k._base is x["k"] and v._base is x["v"] and beta._base is x["beta"]  # no copies on their account


FAKE_FLA = """
from deltaproduct.ops import delta_product

def naive_chunk_gated_delta_rule(q, k, v, g, beta):
    x = {"k": k.unsqueeze(2), "v": v.unsqueeze(2), "beta": beta.unsqueeze(2)}
    assert q.shape[2] == v.shape[2]
    return delta_product(q, g=g, **x, backend="reference")

def naive_recurrent_gated_delta_product(q, k, v, g, beta, scale, num_householder):
    n = num_householder
    x = {"k": k.unflatten(1, (-1, n)), "v": v.unflatten(1, (-1, n)), "beta": beta.unflatten(1, (-1, n))}
    assert q.shape[2] == v.shape[2]
    return delta_product(q, g=g, **x, scale=scale, backend="reference")
"""


@pytest.fixture
def fresh_loaders(monkeypatch):
    """Implementations that look anew for what they need."""
    for name, other in IMPLEMENTATIONS.items():
        if hasattr(other.load, "__wrapped__"):
            monkeypatch.setitem(IMPLEMENTATIONS, name, dataclasses.replace(other, load=other.load.__wrapped__))


def test_fla_is_used_although_its_package_cannot_be_imported(fresh_loaders, monkeypatch, tmp_path):
    """Its __init__ needs Triton; the two files do not. Here they are ours, with its conventions."""
    for op in ("gated_delta_rule", "gated_delta_product"):
        (tmp_path / "fla" / "ops" / op).mkdir(parents=True)
        (tmp_path / "fla" / "ops" / op / "naive.py").write_text(FAKE_FLA)
    (tmp_path / "fla" / "__init__.py").write_text("import no_such_triton")
    spec = importlib.util.spec_from_file_location(
        "fla", tmp_path / "fla" / "__init__.py", submodule_search_locations=[str(tmp_path / "fla")]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    x = inputs(3, True)
    want, _ = delta_product(**x, backend="reference")
    for name in ("fla_chunkwise", "fla_loop"):
        assert IMPLEMENTATIONS[name].unsupported_reason(CPU, torch.float32) is None
        torch.testing.assert_close(IMPLEMENTATIONS[name].load()(**x), want, rtol=1e-5, atol=1e-5)
    (tmp_path / "fla" / "ops" / "gated_delta_rule" / "naive.py").unlink()
    assert "has no ops/gated_delta_rule/naive.py" in IMPLEMENTATIONS["fla_chunkwise"].unsupported_reason(
        CPU, torch.float32
    )


def test_implementations_that_are_not_installed_are_reported(fresh_loaders, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = bench_ops([TINY], device="cpu", repeats=1)
    reasons = {other.backend: other.reason for other in report.unavailable}
    assert reasons["transformers"] == "transformers is not installed"
    assert reasons["fla_loop"] == reasons["fla_chunkwise"] == "flash-linear-attention is not installed"
    assert "fla_loop cannot serve: flash-linear-attention is not installed." in shown(report)
    with pytest.raises(UsageError, match="transformers is not installed"):
        bench_ops([TINY], backends=["transformers"], device="cpu")


def test_transformers_own_code_is_timed_and_no_kernel_in_its_place(fresh_loaders, monkeypatch):
    """Where flash-linear-attention is installed, transformers' name leads to its GPU kernel."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

    @functools.wraps(module.torch_chunk_gated_delta_rule)
    def kernel(*args, **kw):
        raise AssertionError("a kernel")

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", kernel)
    assert IMPLEMENTATIONS["transformers"].load()(**inputs(2, True)).shape == (2, 40, 4, 6)


def test_implementations_that_compute_in_float32_are_not_run_in_float64():
    for name in ("transformers", "fla_chunkwise", "fla_loop"):
        assert "float32" in IMPLEMENTATIONS[name].unsupported_reason(CPU, torch.float64)
    assert IMPLEMENTATIONS["textbook_loop"].unsupported_reason(CPU, torch.float64) is None


def test_another_implementation_that_fails_or_is_wrong_is_a_finding(add_implementation):
    def broken(**x):
        raise RuntimeError("shapes\nand more")

    add_implementation("broken", broken)
    add_implementation("off", lambda **x: 1.01 * textbook_loop(**x))
    report = bench_ops([TINY], backends=["broken", "off", "textbook_loop"], device="cpu", repeats=1)
    rows = rows_of(report)
    assert rows["broken"].status == "failed" and rows["broken"].reason == "RuntimeError: shapes"
    assert rows["off"].status == "wrong" and "above" in rows["off"].reason
    assert rows["textbook_loop"].status == "timed"
    assert "broken is failed and was not timed" in shown(report)


def test_versions_of_implementations_are_in_the_report(add_implementation):
    add_implementation("installed", textbook_loop, distribution="torch")
    add_implementation("elsewhere", textbook_loop, distribution="no-such-distribution")
    report = bench_ops([TINY], backends=["installed", "elsewhere", "chunkwise"], device="cpu", repeats=1)
    assert set(report.versions) == {"installed"} and report.versions["installed"] in torch.__version__
    assert "Other implementations: installed" in shown(report)
