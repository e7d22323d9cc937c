"""flash-linear-attention's call layout gives what `delta_product` gives on the same numbers, in the hard regime.

Its signatures, release by release: tests/ops/test_fla_signatures.py.
"""

import pytest
import torch
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.ops import delta_product, fla_api

pytestmark = pytest.mark.neighbours

RULES = ("chunk_delta_rule", "fused_recurrent_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")

# The same numbers. The regime of state tracking: keys from two directions, β in [1.9, 2], mostly no decay.

B, T, H, HV, K, V = 2, 33, 2, 4, 8, 6
ENDS = [0, 5, 5, 33]
# s = T·N ≤ 99 Householder steps, each rounding to u = 6e-8: s·u = 6e-6 where all roundings pull one way, once each in
# the state, the output and the gradient's own loop; relative to the largest entry.
TOLERANCE = 3e-5


def hard(n: int = 1, *, gate: bool, packed: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs in the operator's own shapes, float64, rounded to what float32 holds."""
    rng = torch.Generator().manual_seed(seed)
    batch, states = (1, len(ENDS) - 1) if packed else (B, B)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    directions = F.normalize(normal(2, K), dim=-1)
    x = {
        "q": F.normalize(normal(batch, T, H, K), dim=-1),
        "k": directions[torch.randint(2, (batch, T, n, H), generator=rng)],
        "v": normal(batch, T, n, HV, V),
        "beta": 1.9 + 0.1 * torch.rand(batch, T, n, HV, generator=rng, dtype=torch.float64),
        "initial_state": normal(states, HV, K, V),
    }
    if gate:
        x["g"] = -0.01 * torch.rand(batch, T, HV, generator=rng, dtype=torch.float64)
    return {name: a.float().double() for name, a in x.items()}


def leaves(x: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: a.to(dtype, copy=True).requires_grad_() for name, a in x.items()}


def pull(o: torch.Tensor, state: torch.Tensor, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output, state and all gradients of a function of both that treats no two entries alike."""
    weights = [torch.linspace(-1, 1, a.numel(), dtype=torch.float64).sin().view(a.shape) for a in (o, state)]
    loss = (o.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(x.values()))
    return {"o": o, "state": state} | {f"d {name}": grad for name, grad in zip(x, grads, strict=True)}


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, a in want.items():
        assert got[name].shape == a.shape, name
        error = (got[name].double() - a).abs().max() / a.abs().max()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


def reference(x: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None = None, **options) -> dict[str, torch.Tensor]:
    x = leaves(x, torch.float64)
    o, state = delta_product(**x, cu_seqlens=cu_seqlens, output_final_state=True, backend="reference", **options)
    return pull(o, state, x)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("gate", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_delta_product(n, gate, packed):
    x = hard(n, gate=gate, packed=packed)
    cu_seqlens = torch.tensor(ENDS) if packed else None
    y = leaves(x, torch.float32)
    inputs = {"g": None} | y | {name: y[name].flatten(1, 2) for name in ("k", "v", "beta")}  # [B,T·n,…]
    o, state = fla_api.chunk_gated_delta_product(
        **inputs, num_householder=n, output_final_state=True, cu_seqlens=cu_seqlens
    )
    assert o.dtype == state.dtype == torch.float32
    assert_close(pull(o, state, y), reference(x, cu_seqlens))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("name", RULES)
def test_delta_rules(name, packed):
    x = hard(gate="gated" in name, packed=packed)
    cu_seqlens = torch.tensor(ENDS) if packed else None
    y = leaves(x, torch.float32)
    inputs = y | {key: y[key][:, :, 0] for key in ("k", "v", "beta")}
    inputs["k"] = 3 * inputs["k"]  # so that the normalisation shows, as does a scale that is not the default
    o, state = getattr(fla_api, name)(
        **inputs, scale=0.25, output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens
    )
    tripled = leaves(x, torch.float64)
    arguments = tripled | {"k": 3 * tripled["k"]}
    want = delta_product(
        **arguments, scale=0.25, output_final_state=True, qk_l2norm=True, cu_seqlens=cu_seqlens, backend="reference"
    )
    assert_close(pull(o, state, y), pull(*want, tripled))


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("neg", [False, True])
def test_gates_in_the_kernel_and_states_with_v_first(name, neg):
    x = hard(gate=True)
    raw = {"g": -x["g"], "beta": torch.logit(x["beta"] - 1), "A_log": torch.tensor([-3.0, -2.0, -1.0, 0.0])}
    raw |= {"dt_bias": torch.tensor([-4.0, -3.0, -2.0, -1.0])}
    inputs = {key: a.float() for key, a in (x | raw).items()}
    want = x | {
        "beta": (2 if neg else 1) * torch.sigmoid(raw["beta"].float().double()),
        "g": -raw["A_log"].double().exp() * F.softplus(raw["g"] + raw["dt_bias"].double()),
    }
    inputs |= {key: inputs[key][:, :, 0] for key in ("k", "v", "beta")}
    inputs["initial_state"] = inputs["initial_state"].mT
    o, state = getattr(fla_api, name)(
        **inputs, output_final_state=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=neg, state_v_first=True,
    )  # fmt: skip
    o_want, state_want = delta_product(**want, output_final_state=True, backend="reference")
    assert_close({"o": o, "state": state}, {"o": o_want, "state": state_want.mT})


def test_without_beta_every_step_projects():
    x = hard(gate=False)
    q, k, v = x["q"], x["k"][:, :, 0], x["v"][:, :, 0]
    want, _ = delta_product(q, x["k"], x["v"], torch.ones_like(x["beta"]), backend="reference")
    for name in ("fused_recurrent_delta_rule", "fused_recurrent_gated_delta_rule"):
        o, state = getattr(fla_api, name)(q, k, v)
        assert state is None  # it was not asked for
        torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)


def test_positional_calls_mean_what_they_mean_there():
    x = hard(2, gate=True)
    k, v, beta = (x[name].flatten(1, 2) for name in ("k", "v", "beta"))
    o, state = fla_api.chunk_gated_delta_product(x["q"], k, v, x["g"], beta, 2, 0.5, x["initial_state"], True, True)
    want = delta_product(**x, scale=0.5, output_final_state=True, qk_l2norm=True)
    assert torch.equal(o, want[0]) and torch.equal(state, want[1])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("chunk_delta_rule", {"head_first": True}, "head_first has been removed"),
        ("chunk_delta_rule", {"chunk_size": 48}, "chunk_size must be one of 16, 32, 64, not 48"),
        ("chunk_gated_delta_rule", {"cp_context": object()}, "cp_context is not supported"),
        ("chunk_gated_delta_rule", {"allow_neg_eigval": True}, "needs use_beta_sigmoid_in_kernel"),
        ("chunk_gated_delta_rule", {"use_gate_in_kernel": True}, "needs both g and A_log"),
        ("fused_recurrent_gated_delta_rule", {"gk": torch.ones(1)}, "gk is not supported"),
        ("fused_recurrent_gated_delta_rule", {"gv": torch.ones(1)}, "gv is not supported"),
        ("fused_recurrent_gated_delta_rule", {"head_first": True}, "head_first has been removed"),
        ("fused_recurrent_gated_delta_rule", {"beta": torch.ones(B, T, HV, V)}, "beta has 4 dimensions and needs 3"),
        ("chunk_gated_delta_product", {"num_householder": 0}, "num_householder must be at least 1"),
        ("chunk_gated_delta_product", {"num_householder": 2}, "k has 33 steps in time, but 33 tokens of 2"),
        ("chunk_gated_delta_product", {"cp_context": object(), "num_householder": 1}, "cp_context is not supported"),
    ],
)
def test_refusals(name, options, match):
    x = hard(gate=True)
    inputs = {"q": x["q"]} | {key: x[key][:, :, 0] for key in ("k", "v", "beta")}
    if "gated" in name:
        inputs["g"] = x["g"]
    with pytest.raises(UsageError, match=match) as error:
        getattr(fla_api, name)(**(inputs | options))
    assert "\n" not in str(error.value)
