"""Certificates are the same on every machine: under other vector instructions, and other orders of sums."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from decimal import ROUND_CEILING, ROUND_FLOOR

import published_certificates
import pytest
import torch
from automaton_cases import from_maps
from published_certificates import MODELS, published

from deltaproduct.ops.inputs import l2_normalise
from deltaproduct.theory.certificate import _normalised, _rounded, certificates, certify
from deltaproduct.theory.compiler import compile_automaton, compile_group
from deltaproduct.theory.exploration import explore

# As PyTorch and MKL would choose on CPUs without AVX-512, and without AVX2; the first machine is this one as it is.
MACHINES: list[dict[str, str]] = [
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
]


def published_on(machine: dict[str, str], names: list[str]) -> list[str]:
    paths = os.pathsep.join([path for path in sys.path if path])
    command = [sys.executable, published_certificates.__file__, *names]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths} | machine, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def assert_the_same(names: list[str]) -> None:
    mine = [published(name) for name in names]
    for machine in MACHINES:
        for name, one, other in zip(names, mine, published_on(machine, names), strict=True):
            assert one == other, (name, machine)
    for one in mine:
        float32, bfloat16 = json.loads(one)
        assert float32["complete"] and not float32["wrong"] and float32["guaranteed"] > 1000
        assert not bfloat16["wrong"]


@pytest.mark.slow("processes")
@pytest.mark.timeout(300)
def test_the_machine_makes_no_difference():
    assert_the_same(["Z60", "a cascade"])


@pytest.mark.slow("processes")
@pytest.mark.timeout(1800)
def test_the_machine_makes_no_difference_to_what_the_readme_says():
    assert_the_same(list(MODELS))


def test_published_numbers_are_to_the_safe_side_and_without_noise():
    assert _rounded(1 / 3, ROUND_FLOOR) == 0.333333 and _rounded(1 / 3, ROUND_CEILING) == 0.333334
    assert _rounded(-1 / 3, ROUND_FLOOR) == -0.333334 and _rounded(0.0, ROUND_CEILING) == 0
    assert _rounded(0.1 + 0.2, ROUND_CEILING) == 0.3 == _rounded(0.3 - 2**-54, ROUND_FLOOR)
    assert _rounded(float("inf"), ROUND_FLOOR) == float("inf")


def test_keys_along_axes_are_float32s_own_and_others_exact():
    x = torch.tensor([[0.0, 1732.05], [1000.0, 0.0], [3.0, 4.0], [1234.5, 777.25]])
    found = _normalised(x)
    assert found.dtype == torch.float64
    assert torch.equal(found[:2], l2_normalise(x[:2]).double())
    want = x[2:].double() / (x[2:].double().square().sum(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(found[2:], want, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["S3", "A5"])
def test_the_bound_allows_for_what_float32_makes_of_keys(name):
    """Every entry of a projected key moved by a rounding or two, as another machine might: what a token does to the
    state then differs by less than the drift that was published, in which that is only one part."""
    compiled = compile_group(name)
    found = explore(compiled.model, compiled.automaton)
    drift = certify(compiled.model, compiled.automaton, found).drift
    mixer, n = compiled.model.blocks[0].mixer, len(compiled.automaton.alphabet)
    k = mixer.k_proj.weight.detach().double()[:, :n].T.unflatten(1, (mixer.num_householder, mixer.num_heads, -1))
    held = found.held[0][0]  # of the first head [U,K,V]
    beta = 2 * torch.sigmoid(mixer.b_proj.weight.detach().double()[:, :n].T * n**0.5).unflatten(
        1, (-1, mixer.num_heads)
    )

    def after(keys: torch.Tensor) -> torch.Tensor:
        state = held.expand(n, *held.shape)
        for step in range(mixer.num_householder):
            key = torch.nn.functional.normalize(keys[:, step, 0], dim=-1)
            recalled = torch.einsum("nk,nukv->nuv", key, state)
            state = state - beta[:, step, 0, None, None, None] * torch.einsum("nk,nuv->nukv", key, recalled)
        return state

    rng, scale = torch.Generator().manual_seed(0), float(held.flatten(1).norm(dim=1).max())
    worst = 0.0
    for _ in range(20):
        moved = k * (1 + 2 * 2**-24 * (torch.randint(3, k.shape, generator=rng) - 1))
        worst = max(worst, float((after(moved) - after(k)).flatten(2).norm(dim=2).max()) / scale)
    assert 2**-24 < worst < drift


def test_a_certificate_is_plain_numbers():
    compiled = compile_automaton(from_maps((1, 0), (0, 0)))
    first = asdict(certificates(compiled.model, compiled.automaton)[0])
    assert json.loads(json.dumps(first))["guaranteed"] is None
