"""The mixers beside other people's code, and beside float64 loops written from the papers' equations.

Other people's code computes in float32 and in another order: 1e-4 of the largest output, a few hundred roundings of
6e-8 enlarged by a norm. Loops are float64 like the mixers: 1e-11, as in test_mixers.py.
"""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from mixer_cases import mixer_of
from mixer_oracles import plain_modeling
from torch import Tensor
from torch.nn.functional import softplus

pytestmark = [pytest.mark.numerical, pytest.mark.neighbours]

FOREIGN, EXACT = 1e-4, 1e-11
B, T, D = 2, 70, 32


def build(name: str, **settings):
    torch.manual_seed(0)
    defaults = {"num_heads": 2, "head_dim": 8, "allow_neg_eigval": False}
    mixer = mixer_of(name, D, defaults | settings, settings.get("norm_eps", 1e-5))
    with torch.no_grad():  # biases and norms that start at 0 or 1 would hide where they are applied
        for parameter_name, p in mixer.named_parameters():
            if parameter_name.endswith(("bias", "norm.weight", "norm_weight", "D")):
                p += 0.3 * torch.randn_like(p)
    return mixer


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool(want.abs().max() > 1e-2) and bool((got - want).abs().max() <= tolerance * want.abs().max())


def copy_weights(theirs: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    assert set(weights) == {name for name, _ in theirs.named_parameters()}
    theirs.load_state_dict(weights)


def some_input(dtype=torch.float32) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def in_pieces(mixer, x: Tensor):
    """(y, state) of x [B,T,D] in three pieces with the carried state, the last of them one token."""
    outputs, state = [], None
    for piece in x.split((41, T - 42, 1), 1):
        y, state = mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


# Other people's code


def mamba_weights(mixer) -> dict[str, Tensor]:
    """Our names are theirs, but for the convolution's bias."""
    weights = dict(mixer.named_parameters())
    return {name.replace("conv_bias", "conv1d.bias"): p.detach() for name, p in weights.items()}


@pytest.mark.parametrize(
    "sizes", [{}, {"ssm_state_size": 5, "expand": 3, "conv_size": 3, "time_step_rank": 7}], ids=str
)
def test_mamba_is_that_of_transformers(sizes):
    modeling = plain_modeling("mamba")
    mixer = build("mamba", **sizes)
    config = modeling.MambaConfig(
        hidden_size=D, state_size=sizes.get("ssm_state_size", 16), expand=sizes.get("expand", 2), num_hidden_layers=1,
        conv_kernel=sizes.get("conv_size", 4), time_step_rank=sizes.get("time_step_rank", 2),
    )  # fmt: skip
    theirs = modeling.MambaMixer(config, 0).eval()
    copy_weights(theirs, mamba_weights(mixer))
    x = some_input()
    with torch.no_grad():
        assert close(mixer(x)[0], theirs(x), FOREIGN)


@pytest.mark.parametrize("sizes", [{}, {"ssm_state_size": 5, "expand": 3, "conv_size": 3, "head_dim": 16}], ids=str)
def test_mamba2_is_that_of_transformers(sizes):
    modeling = plain_modeling("mamba2")
    mixer = build("mamba2", **sizes)
    config = modeling.Mamba2Config(
        hidden_size=D, state_size=sizes.get("ssm_state_size", 16), expand=sizes.get("expand", 2), n_groups=1,
        conv_kernel=sizes.get("conv_size", 4), head_dim=mixer.head_dim, num_heads=mixer.num_heads, chunk_size=16,
        layer_norm_epsilon=1e-5, num_hidden_layers=1,
    )  # fmt: skip
    theirs = modeling.Mamba2Mixer(config, 0).eval()
    copy_weights(theirs, mamba_weights(mixer))
    x = some_input()
    with torch.no_grad():
        assert close(mixer(x)[0], theirs(x), FOREIGN)


def test_mlstm_is_that_of_transformers():
    modeling = plain_modeling("xlstm")  # with the xlstm package, it has no layer of its own
    mixer = build("mlstm", head_dim=16)
    config = modeling.xLSTMConfig(
        hidden_size=D, num_heads=2, qk_dim_factor=1.0, v_dim_factor=1.0, norm_eps=1e-5, eps=1e-9, gate_soft_cap=1e6,
        weight_mode="single", mode="inference", chunkwise_kernel="chunkwise--native_autograd", num_hidden_layers=1,
        sequence_kernel="native_sequence__native", step_kernel="native",
    )  # fmt: skip
    theirs = modeling.xLSTMLayer(config).eval()
    with torch.no_grad():
        mixer.g_proj.bias.zero_()  # theirs has none
        renamed = {
            "q_proj.": "q.", "k_proj.": "k.", "v_proj.": "v.", "g_proj.": "ogate_preact.", "i_proj.": "igate_preact.",
            "f_proj.": "fgate_preact.", "o_proj.": "out_proj.", "o_norm.": "multihead_norm.",
        }  # fmt: skip
        weights = {}
        for name, p in mixer.named_parameters():
            if name != "g_proj.bias":
                first, last = name.split(".")
                weights[renamed[first + "."] + last] = p.repeat(2) if first == "o_norm" else p
        copy_weights(theirs, weights)
        x = some_input()
        assert close(mixer(x)[0], theirs(x)[0], FOREIGN)


def qwen3_next_weights(mixer) -> dict[str, Tensor]:
    """Fused key head by key head: its q and k, the v and output gates of its value heads; and their β and decays."""

    def fused(*weights: Tensor) -> Tensor:
        return torch.cat([w.view(mixer.num_heads, -1, D) for w in weights], 1).flatten(0, 1)

    q, k, v = mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight
    beta, decay = mixer.b_proj.weight, torch.zeros(mixer.num_v_heads, D)
    no_decay = {"A_log": torch.full((mixer.num_v_heads,), -torch.inf), "dt_bias": torch.zeros(mixer.num_v_heads)}
    if mixer.use_forget_gate:
        decay, no_decay = mixer.a_proj.weight, {"A_log": mixer.A_log, "dt_bias": mixer.dt_bias}
    filters = torch.ones(len(q) + len(k) + len(v), 1, 1)  # theirs always convolves; of width 1 and weight 1 it does not
    if mixer.use_short_conv:
        filters = torch.cat([conv.weight for conv in (mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d)])
    return no_decay | {
        "in_proj_qkvz.weight": fused(q, k, v, mixer.g_proj.weight),
        "in_proj_ba.weight": fused(beta, decay),
        "conv1d.weight": filters,
        "norm.weight": mixer.o_norm.weight,
        "out_proj.weight": mixer.o_proj.weight,
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gated_deltanet", {}),
        ("gated_deltanet", {"num_v_heads": 4, "expand_v": 2.0, "conv_size": 3}),
        ("gated_deltanet", {"num_v_heads": 6, "use_short_conv": False}),
        ("deltanet", {"num_v_heads": 4, "use_output_gate": True}),  # theirs has no layer without an output gate
    ],
    ids=str,
)
def test_gated_deltanet_is_that_of_transformers(name, settings):
    modeling = plain_modeling("qwen3_next")
    mixer = build(name, **settings)
    with torch.no_grad():  # queries and keys so short that the eps of their norm shows
        mixer.q_proj.weight *= 0.1
        mixer.k_proj.weight *= 0.1
    config = modeling.Qwen3NextConfig(
        hidden_size=D, linear_num_key_heads=2, linear_num_value_heads=mixer.num_v_heads, linear_key_head_dim=8,
        linear_value_head_dim=mixer.head_v_dim, rms_norm_eps=1e-5, num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_conv_kernel_dim=settings.get("conv_size", 4) if mixer.use_short_conv else 1,
    )  # fmt: skip
    theirs = modeling.Qwen3NextGatedDeltaNet(config, 0).eval()
    copy_weights(theirs, qwen3_next_weights(mixer))
    x, weights = some_input().requires_grad_(), torch.linspace(-1, 1, B * T * D).view(B, T, D)
    got, want = mixer(x)[0], theirs(x)
    assert close(got, want, FOREIGN)
    assert close(*(torch.autograd.grad(y, x, weights)[0] for y in (got, want)), FOREIGN)
    with torch.no_grad():
        assert close(in_pieces(mixer, x)[0], want, FOREIGN)


def test_the_peers_are_plain_pytorch(monkeypatch):
    """With a kernel installed that cannot run here, as flash-linear-attention's where there is no GPU."""

    def chunk_gated_delta_rule(q, k, v, g, beta, **options):
        raise AssertionError("a kernel")

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule
    plain = plain_modeling.__wrapped__("qwen3_next")
    package, name = sys.modules["transformers.models.qwen3_next"], "modeling_qwen3_next"
    assert vars(package).get(name) is not plain and sys.modules.get(plain.__name__) is not plain
    monkeypatch.setitem(vars(package), name, None)
    monkeypatch.setitem(sys.modules, plain.__name__, None)
    del sys.modules[plain.__name__]
    theirs = importlib.import_module(plain.__name__)
    x = torch.ones(1, 3, 2, 8)
    inputs = (x, x, x, -torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    assert plain.torch_chunk_gated_delta_rule(*inputs)[0].isfinite().all()
    with pytest.raises(AssertionError, match="a kernel"):  # else theirs would not have to be plain
        theirs.torch_chunk_gated_delta_rule(*inputs)


def ifzo(ours: Tensor, dim: int) -> Tensor:
    """The gates z, o, i, f along `dim` in the order of the xlstm package."""
    return torch.cat((ours.narrow(dim, 2, 2), ours.narrow(dim, 0, 2)), dim)


def slstm_cell_weights(mixer) -> dict[str, Tensor]:
    recurrent = mixer.recurrent.detach().unflatten(2, (4, -1))  # [H,K,4,K]
    bias = mixer.bias.detach().unflatten(1, (4, -1))  # [H,4,K]
    return {
        "_recurrent_kernel_": ifzo(recurrent, 2).flatten(2).mT,
        "_bias_": ifzo(bias, 1).transpose(0, 1).flatten(),
    }


def same_slstm_state(got, want: Tensor) -> bool:
    """want [4,B,H·K] of the package: h, c, n, m."""
    ours = (got.hidden, got.cell, got.normaliser, got.stabiliser)
    return all(close(u.flatten(1), w, FOREIGN) for u, w in zip(ours, want, strict=True))


@pytest.mark.parametrize("use_short_conv", [False, True])
def test_slstm_is_that_of_its_authors(use_short_conv):
    package = pytest.importorskip("xlstm.blocks.slstm.layer")
    mixer = build("slstm", head_dim=D // 2, use_short_conv=use_short_conv)
    theirs = package.sLSTMLayer(
        package.sLSTMLayerConfig(
            embedding_dim=D, num_heads=2, conv1d_kernel_size=4 if use_short_conv else 0, backend="vanilla"
        )
    ).eval()
    with torch.no_grad():
        blocks = []
        for proj in (mixer.zo_proj, mixer.if_proj):
            weight = proj.weight.view(2, 2, D // 2, 2, D // 2)  # gate, head, cell; head and channel of x
            weight *= torch.eye(2)[:, None, :, None]  # theirs shows a head its own channels of x alone
            blocks.append(weight.sum(3))
        (z, o), (i, f) = blocks
        weights = {f"slstm_cell.{name}": p for name, p in slstm_cell_weights(mixer).items()}
        # Their layer hands the cell the output of `fgate` as its input gate and that of `igate` as its forget gate.
        weights |= {"zgate.weight": z, "ogate.weight": o, "fgate.weight": i, "igate.weight": f}
        weights["group_norm.weight"] = mixer.norm_weight.flatten() - 1  # theirs is added to 1
        if use_short_conv:
            weights |= {"conv1d.conv.weight": mixer.conv1d.weight, "conv1d.conv.bias": torch.zeros(D)}  # ours has none
        copy_weights(theirs, weights)
        x = some_input()
        want, end = theirs(x, return_last_state=True)
        want = mixer.o_proj(want)  # theirs leaves this to the block
        for got, state in (mixer(x), in_pieces(mixer, x)):
            assert close(got, want, FOREIGN) and same_slstm_state(state, end["slstm_state"])
            assert not use_short_conv or torch.equal(state.history, end["conv_state"])


@pytest.mark.parametrize("input_gate", [-100.0, 0.0, 100.0])
def test_slstm_cell_is_that_of_its_authors(input_gate):
    """Heads that see all of x and are fewer than its channels, which their layer lacks; gates beyond float32's exp."""
    package = pytest.importorskip("xlstm.blocks.slstm.cell")
    mixer, x = build("slstm", use_short_conv=False), some_input()
    theirs = package.sLSTMCell(package.sLSTMCellConfig(hidden_size=16, num_heads=2, backend="vanilla")).eval()
    with torch.no_grad():
        mixer.if_proj.weight *= 5
        mixer.bias[:, 16:24] += input_gate
        copy_weights(theirs, slstm_cell_weights(mixer))
        (z, o), (i, f) = (proj(x).chunk(2, -1) for proj in (mixer.zo_proj, mixer.if_proj))
        h, end = theirs(torch.cat((i, f, z, o), -1))  # [B,H,T,K]
        h = h - h.mean(-1, keepdim=True)
        h = rms(h, mixer.norm_weight[:, None])
        y, state = mixer(x)
        assert close(y, mixer.o_proj(h.transpose(1, 2).flatten(2)), FOREIGN) and same_slstm_state(state, end)


def test_mlstm_cell_is_that_of_its_authors():
    """Whole with the quadratic form, and with the carried state token by token."""
    package = pytest.importorskip("xlstm.blocks.mlstm.cell")
    mixer, x = build("mlstm", head_dim=D // 2), some_input()
    theirs = package.mLSTMCell(package.mLSTMCellConfig(context_length=T, embedding_dim=D, num_heads=2)).eval()
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    with torch.no_grad():
        mixer.v_proj.weight *= 0.03  # outputs so small that the norm's eps shows by what they were divided
        weights = {"outnorm.weight": mixer.o_norm.weight.repeat(2) - 1}  # theirs is added to 1
        for name, gate in (("igate", mixer.i_proj), ("fgate", mixer.f_proj)):
            theirs = torch.randn(2, 3 * D) / 5
            gate.weight.copy_(theirs @ torch.cat([p.weight for p in projections]))  # theirs sees x as q, k and v
            weights |= {f"{name}.weight": theirs, f"{name}.bias": gate.bias}
        copy_weights(theirs, weights)
        qkv = [p(x) for p in projections]
        gate = mixer.g_proj(x).sigmoid()  # not in their cell

        want = mixer.o_proj(theirs(*qkv) * gate)
        outputs, end = [], None
        for t in range(T):
            h, end = theirs.step(*(u[:, t : t + 1].clone() for u in qkv), end)
            outputs.append(h)
        assert close(mixer.o_proj(torch.cat(outputs, 1) * gate), want, FOREIGN)
        c, n, m = end
        for got, state in (mixer(x), in_pieces(mixer, x)):
            assert close(got, want, FOREIGN)
            assert close(state.recurrent, c, FOREIGN)
            assert close(state.normalizer, n[..., 0], FOREIGN) and close(state.stabilizer, m[..., 0, 0], FOREIGN)


# The papers' equations, a token at a time


def heads(x: Tensor, h: int) -> Tensor:
    """[B, H·K] → [B,H,K]."""
    return x.view(x.shape[0], h, -1)


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("feature_map", ["elu", "identity"])
def test_linear_attention_is_its_equations(feature_map):
    mixer, x = build("linear_attention", feature_map=feature_map, expand_v=2.0).double(), some_input(torch.float64)
    s = torch.zeros(B, 2, 8, 16, dtype=torch.float64)
    z = torch.zeros(B, 2, 8, dtype=torch.float64)
    want = []
    for x_t in x.unbind(1):
        q, k, v = (heads(x_t @ p.weight.T, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        if feature_map == "elu":
            q, k = (torch.where(u > 0, u + 1, u.exp()) for u in (q, k))
        s = s + torch.einsum("bhk,bhv->bhkv", k, v)
        z = z + k
        o = torch.einsum("bhk,bhkv->bhv", q, s)
        if feature_map == "elu":
            o = o / (torch.einsum("bhk,bhk->bh", q, z)[..., None] + 1e-6)
        else:
            o = rms(o * 8**-0.5, mixer.o_norm.weight)
        want.append(o.flatten(1) @ mixer.o_proj.weight.T)
    y, state = mixer(x)
    assert close(y, torch.stack(want, 1), EXACT) and close(state.recurrent, s, EXACT)
    assert (state.normalizer is None) == (feature_map == "identity")
    assert state.normalizer is None or close(state.normalizer, z, EXACT)


def test_gla_is_its_equations():
    mixer, x = build("gla", expand_v=2.0, gate_low_rank_dim=3).double(), some_input(torch.float64)
    s, want = torch.zeros(B, 2, 8, 16, dtype=torch.float64), []
    for x_t in x.unbind(1):
        q, k, v = (heads(x_t @ p.weight.T, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        down, up = mixer.gk_proj
        alpha = heads(torch.sigmoid(x_t @ down.weight.T @ up.weight.T + up.bias) ** (1 / 16), 2)
        s = alpha[..., None] * s + torch.einsum("bhk,bhv->bhkv", k, v)
        o = rms(torch.einsum("bhk,bhkv->bhv", q, s) * 8**-0.5, mixer.o_norm.weight)
        gate = x_t @ mixer.g_proj.weight.T
        want.append((o.flatten(1) * gate * torch.sigmoid(gate)) @ mixer.o_proj.weight.T)
    y, state = mixer(x)
    assert close(y, torch.stack(want, 1), EXACT) and close(state.recurrent, s, EXACT)


@pytest.mark.parametrize("input_gate", [-20.0, 0.0, 5.0])
def test_mlstm_is_its_equations_without_a_stabiliser(input_gate):
    """Gates that float64 can hold by themselves: the stabiliser must not change an output."""
    mixer, x = build("mlstm", expand_v=2.0).double(), some_input(torch.float64)
    with torch.no_grad():
        mixer.i_proj.bias += input_gate
        mixer.i_proj.weight *= 3
    c, n, want = torch.zeros(B, 2, 8, 16, dtype=torch.float64), torch.zeros(B, 2, 8, dtype=torch.float64), []
    for x_t in x.unbind(1):
        q, k, v = (heads(x_t @ p.weight.T, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        i, f = (x_t @ p.weight.T + p.bias for p in (mixer.i_proj, mixer.f_proj))
        i, f, k = i.exp()[..., None], torch.sigmoid(f)[..., None], k * 8**-0.5
        c = f[..., None] * c + i[..., None] * torch.einsum("bhk,bhv->bhkv", k, v)
        n = f * n + i * k
        h = torch.einsum("bhk,bhkv->bhv", q, c) / torch.einsum("bhk,bhk->bh", q, n).abs().clamp(min=1)[..., None]
        h = h - h.mean(-1, keepdim=True)
        h = rms(h, mixer.o_norm.weight)
        gate = torch.sigmoid(x_t @ mixer.g_proj.weight.T + mixer.g_proj.bias)
        want.append((h.flatten(1) * gate) @ mixer.o_proj.weight.T)
    y, state = mixer(x)
    assert (y - torch.stack(want, 1)).abs().max() <= EXACT * y.abs().max()
    scale = state.stabilizer.exp()[..., None]
    assert (state.normalizer * scale - n).abs().max() <= EXACT * n.abs().max()
    assert (state.recurrent * scale[..., None] - c).abs().max() <= EXACT * c.abs().max()


@pytest.mark.parametrize("input_gate", [-1000.0, 1000.0])
def test_mlstm_gates_do_not_overflow(input_gate):
    mixer, x = build("mlstm"), some_input().requires_grad_()
    with torch.no_grad():
        mixer.i_proj.bias += input_gate
        mixer.f_proj.bias -= 200  # so that m follows the input gate and does not stay where it started
    y, state = mixer(x)
    y.sum().backward()
    assert (state.stabilizer - input_gate).abs().max() < 10
    assert all(u.isfinite().all() for u in (y, *state, x.grad))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("allow_neg_eigval", [False, True], ids=["[0,1]", "[-1,1]"])
def test_mamba_is_its_equations(name, allow_neg_eigval):
    mixer = build(name, allow_neg_eigval=allow_neg_eigval, ssm_state_size=5).double()
    x = some_input(torch.float64)
    with torch.no_grad():
        mixer.in_proj.weight *= 3  # step sizes that vary, so that decays come near both ends
    a_rate, inner = mixer.A_log.exp(), 2 * D
    projected = x @ mixer.in_proj.weight.T
    if name == "mamba":
        u, z = projected.split((inner, inner), -1)
    else:
        z, u, dt = projected.split((inner, inner + 10, mixer.num_heads), -1)
    filters = mixer.conv1d.weight[:, 0]  # [channels, 4]
    decays, want, state = [], [], 0.0
    for t in range(T):
        seen = mixer.conv_bias + sum(filters[:, 3 - back] * u[:, t - back] for back in range(min(t + 1, 4)))
        seen = seen * torch.sigmoid(seen)
        if name == "mamba":
            low, b, c = (seen @ mixer.x_proj.weight.T).split((mixer.rank, 5, 5), -1)
            step = softplus(low @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
            a = torch.exp(-step[..., None] * a_rate)  # [B,I,N]
            write = (step * seen)[..., None] * b[:, None]
        else:
            seen, b, c = seen.split((inner, 5, 5), -1)
            step = softplus(dt[:, t] + mixer.dt_bias)
            a = torch.exp(-step * a_rate).repeat_interleave(8, -1)[..., None]  # [B,I,1]
            write = (step.repeat_interleave(8, -1) * seen)[..., None] * b[:, None]
        if allow_neg_eigval:
            a = 2 * a - 1
        decays.append(a)
        state = a * state + write
        y = (state * c[:, None]).sum(-1) + mixer.D.repeat_interleave(inner // len(mixer.D)) * seen
        y = y * z[:, t] * torch.sigmoid(z[:, t])
        want.append((rms(y, mixer.norm.weight) if name == "mamba2" else y) @ mixer.out_proj.weight.T)
    assert (torch.stack(decays).min() < -0.5) == allow_neg_eigval
    y, end = mixer(x)
    assert close(y, torch.stack(want, 1), EXACT)
    got = end.recurrent if name == "mamba" else end.recurrent.movedim(2, -1).flatten(1, 2)
    assert close(got, state, EXACT)
