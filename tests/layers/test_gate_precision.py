"""Gates, decays and step sizes of low-precision weights: what float64 makes of the same numbers, to float32 rounding.

Each case names the functions through which a mixer's recurrence is called. What they are given is compared with the
formula in float64, from the same bfloat16 or float16 weights and from what the mixer's full-width projections gave.
"""

from contextlib import contextmanager

import pytest
import torch
from mixer_cases import build
from torch.nn import functional as F

from deltaproduct.layers import MIXERS
from deltaproduct.layers import deltaproduct as deltaproduct_file
from deltaproduct.layers import gla as gla_file
from deltaproduct.layers import mamba as mamba_file
from deltaproduct.layers import mamba2 as mamba2_file
from deltaproduct.layers import mlstm as mlstm_file
from deltaproduct.layers import rwkv7 as rwkv7_file
from deltaproduct.layers import titans as titans_file

pytestmark = pytest.mark.numerical

B, T, D = 2, 30, 12
# float32 rounds by 2⁻²⁴. A logit is a sum of at most 32 products of size 1 or so, off by 32 · 2⁻²⁴ = 2e-6; exp and
# softplus make of that as much of their result, and the functions that follow enlarge it by their arguments' size, at
# most 10. bfloat16 rounds by 2⁻⁸ = 4e-3, float16 by 2⁻¹¹ = 5e-4.
ABSOLUTE, RELATIVE = 2e-6, 2e-5
PRECISIONS = ["bfloat16", "float16", "autocast"]


def prepare(name: str, precision: str, **options):
    """(the mixer, x, its weights in float64); every parameter is far enough from 0 and 1 to show in the result."""
    mixer = build(name, options, torch.float32)
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    x = torch.randn(B, T, D, generator=generator).to(dtype)
    mixer = mixer.to(dtype)
    return mixer, x, {n: p.detach().double() for n, p in mixer.named_parameters()}


@contextmanager
def watched(module, name: str, monkeypatch):
    """What the function `name` of `module` is called with: a list of positional arguments followed by named ones."""
    calls, true = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append([*args, *kwargs.values()])
        return true(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    yield calls
    monkeypatch.undo()


def run(mixer, x, precision: str, *modules):
    """Run the mixer; returns what each of `modules` was given and gave, in float64: [(input, output), …]."""
    found: list[list] = [[] for _ in modules]
    for module, entry in zip(modules, found, strict=True):
        module.register_forward_hook(lambda _, given, out, e=entry: e.append((given[0].double(), out.double())))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        mixer(x)
    return [entry[0] for entry in found]


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= ABSOLUTE + RELATIVE * want.abs()).all()


@pytest.fixture(params=PRECISIONS)
def precision(request) -> str:
    return request.param


def test_deltaproduct(precision, monkeypatch):
    mixer, x, w = prepare("deltaproduct", precision, use_forget_gate=True, beta_bias_init=1.0)
    with watched(deltaproduct_file, "delta_product", monkeypatch) as calls:
        run(mixer, x, precision)
    _, _, _, beta, g, *_ = calls[0]
    x = x.double()
    assert_near(beta.flatten(2), 2 * torch.sigmoid(x @ w["b_proj.weight"].T + w["b_proj.bias"]))
    assert_near(g, -w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"]))


def test_gla(precision, monkeypatch):
    mixer, x, w = prepare("gla", precision)
    with watched(gla_file, "gated_linear_attention", monkeypatch) as calls:
        run(mixer, x, precision)
    logits = x.double() @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    assert_near(calls[0][3].flatten(2), F.logsigmoid(logits) / 16)


def test_mlstm(precision, monkeypatch):
    mixer, x, w = prepare("mlstm", precision)
    with watched(mlstm_file, "running_max", monkeypatch) as calls:
        (_, gate), (normal, _), (given, _) = run(mixer, x, precision, mixer.g_proj, mixer.o_norm, mixer.o_proj)
    log_f, log_i, *_ = calls[0]
    x = x.double()
    assert_near(log_f, F.logsigmoid(x @ w["f_proj.weight"].T + w["f_proj.bias"]))
    assert_near(log_i, x @ w["i_proj.weight"].T + w["i_proj.bias"])
    normal = F.layer_norm(normal, (4,), w["o_norm.weight"])
    out = torch.sigmoid(gate) * normal.flatten(2)
    # The output gate's result is rounded once, to the precision of the projection that follows.
    assert ((given - out).abs() <= (2**-8 + RELATIVE) * out.abs() + ABSOLUTE).all()


def test_mamba(precision, monkeypatch):
    mixer, x, w = prepare("mamba", precision)
    with watched(mamba_file, "selective_scan", monkeypatch) as calls:
        ((_, dbc),) = run(mixer, x, precision, mixer.x_proj)
    _, dt, a, *_ = calls[0]
    low = dbc[..., : mixer.rank]
    assert_near(dt, F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
    assert_near(a, -w["A_log"].exp())


def test_mamba2(precision, monkeypatch):
    mixer, x, w = prepare("mamba2", precision)
    with watched(mamba2_file, "gated_linear_attention", monkeypatch) as calls:
        ((_, projected),) = run(mixer, x, precision, mixer.in_proj)
    dt = F.softplus(projected[..., -mixer.num_heads :] + w["dt_bias"])
    a = calls[0][3]
    assert_near((a + 1) / 2, (-dt * w["A_log"].exp()).exp())


def test_rwkv7(precision, monkeypatch):
    mixer, x, w = prepare("rwkv7", precision)
    with watched(rwkv7_file, "generalised_delta_rule", monkeypatch) as calls:
        (x_d, _), (x_a, _) = run(mixer, x, precision, mixer.w_lora, mixer.a_lora)
    _, _, _, log_w, u, removal, _ = calls[0]
    d = torch.tanh(x_d @ w["w_lora.down.weight"].T) @ w["w_lora.up.weight"].T + w["w_lora.up.bias"]
    a = torch.sigmoid(x_a @ w["a_lora.down.weight"].T @ w["a_lora.up.weight"].T + w["a_lora.up.bias"])
    assert_near(log_w.flatten(2), -(torch.tensor(-0.5).double().exp()) * torch.sigmoid(d))
    assert_near(u.flatten(2), -a * removal.double().flatten(2))


def test_titans(precision, monkeypatch):
    mixer, x, w = prepare("titans", precision)
    with watched(titans_file, "memory_scan", monkeypatch) as calls:
        run(mixer, x, precision)
    _, _, _, keep, momentum, beta, *_ = calls[0]
    alpha, eta, rho = torch.sigmoid(x.double() @ w["gate_proj.weight"].T + w["gate_proj.bias"]).chunk(3, -1)
    assert_near(keep, 1 - alpha)
    assert_near(momentum, eta)
    assert_near(beta, (2 - alpha) * rho)


def test_ttt_linear(precision, monkeypatch):
    mixer, x, w = prepare("ttt_linear", precision)
    with watched(mixer, "learn", monkeypatch) as calls:
        ((fed, _),) = run(mixer, x, precision, mixer.lr_proj)
    logits = calls[0][0][..., -mixer.num_heads :]
    assert_near(logits, fed @ w["lr_proj.weight"].T + w["lr_proj.bias"])


def test_slstm(precision, monkeypatch):
    mixer, x, w = prepare("slstm", precision)
    with watched(mixer, "run", monkeypatch) as calls:
        (_, zo), (_, i_f) = run(mixer, x, precision, mixer.zo_proj, mixer.if_proj)
    inputs = torch.cat((zo, i_f), -1).unflatten(-1, (4, 2, 4)).permute(0, 1, 3, 2, 4).flatten(3)
    assert_near(calls[0][0], inputs + w["bias"])


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("way", ["whole", "packed"])
def test_classical_rnns(name, way, precision):
    """Their gates are inside PyTorch's loop, so that the whole of it is compared: its state after 30 tokens."""
    mixer, x, w = prepare(name, precision)
    options = {"cu_seqlens": torch.tensor([0, 7, 7, 30])} if way == "packed" else {}
    x = x[:1] if way == "packed" else x
    exact = build(name, {}, torch.float64)
    exact.load_state_dict(w)
    with torch.no_grad():
        _, want = exact(x.double(), **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            _, got = mixer(x, **options)
    # A gate's derivative is below 1 and weights are below 1.5: the state's own error is not enlarged without limit.
    assert got.hidden.dtype == torch.float32
    assert (got.hidden - want.hidden).abs().max() <= RELATIVE * want.hidden.abs().max()
    if got.cell is not None:
        assert (got.cell - want.cell).abs().max() <= RELATIVE * want.cell.abs().max()


@pytest.mark.parametrize("name", MIXERS)
def test_states_are_never_below_float32(name, precision):
    mixer, x, _ = prepare(name, precision)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        y, state = mixer(x)
        y, state = mixer(x[:, :1], state)
    histories = ("history", "q_history", "k_history", "v_history", "previous", "keys", "values", "lengths", "position")
    dtypes = {field: s.dtype for field, s in zip(state._fields, state) if s is not None and field not in histories}
    assert set(dtypes.values()) == (set() if name == "attention" else {torch.float32})
    assert y.dtype == (torch.bfloat16 if precision == "autocast" else x.dtype)
