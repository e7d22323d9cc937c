"""What flash-linear-attention's releases take: `ops.fla_api` honours it, refuses it in one line, or says it is unused.

`RELEASES` was read out of the releases 0.1 to 0.6.0 (`ast` over the functions that `fla.ops` exports for the delta
rules and Gated DeltaProduct). A row is the first release with these arguments, and the arguments in order; `**` stands
for further ones, which the originals ignore.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.errors import UsageError
from deltaproduct.ops import fla_api

pytestmark = pytest.mark.neighbours

VERSIONS = ["0.1", "0.1.1", "0.1.2", "0.2.0", "0.2.1", "0.2.2", "0.3.0", "0.3.1", "0.3.2", "0.4.0", "0.4.1", "0.4.2",
            "0.5.0", "0.5.1", "0.5.2", "0.6.0"]  # fmt: skip
_S = "scale=None initial_state=None output_final_state=False"
_N = "use_qk_l2norm_in_kernel=False"
_FUSED_0_3 = f"q k v g=None gk=None gv=None beta=None {_S} {_N}"
_BETA = "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False state_v_first=False"
_GATE = "use_gate_in_kernel=False A_log=None dt_bias=None"
RELEASES = {
    "chunk_delta_rule": {
        "0.1": f"q k v beta {_S} cu_seqlens=None head_first=True {_N}",
        "0.1.1": f"q k v beta {_S} cu_seqlens=None head_first=False {_N}",
        "0.3.0": f"q k v beta {_S} {_N} cu_seqlens=None head_first=False",
        "0.4.2": f"q k v beta {_S} {_N} cu_seqlens=None cu_seqlens_cpu=None head_first=False",
        "0.5.0": f"q k v beta {_S} {_N} cu_seqlens=None cu_seqlens_cpu=None **",
    },
    "fused_recurrent_delta_rule": {
        "0.1": f"q k v beta=None {_S} cu_seqlens=None head_first=True {_N}",
        "0.2.0": f"q k v beta=None {_S} cu_seqlens=None head_first=False {_N}",
        "0.2.2": f"q k v beta=None {_S} cu_seqlens=None {_N}",
        "0.3.0": f"q k v beta=None {_S} {_N} cu_seqlens=None",
    },
    "fused_chunk_delta_rule": {"0.1": "**"},
    "chunk_gated_delta_rule": {
        "0.1": f"q k v g beta {_S} cu_seqlens=None head_first=True {_N}",
        "0.1.1": f"q k v g beta {_S} cu_seqlens=None head_first=False {_N}",
        "0.3.0": f"q k v g beta {_S} {_N} cu_seqlens=None head_first=False",
        "0.4.0": f"q k v g beta {_S} {_N} cu_seqlens=None **",
        "0.4.2": f"q k v g beta {_S} {_N} cu_seqlens=None cu_seqlens_cpu=None cp_context=None "
        "transpose_state_layout=False **",
        "0.5.1": f"q k v g beta {_S} {_N} {_BETA} cu_seqlens=None cu_seqlens_cpu=None cp_context=None **",
        "0.6.0": f"q k v g beta {_S} {_N} {_BETA} cu_seqlens=None cu_seqlens_cpu=None chunk_indices=None "
        "cp_context=None **",
    },
    "fused_recurrent_gated_delta_rule": {
        "0.1": f"q k v g beta=None {_S} cu_seqlens=None head_first=True {_N}",
        "0.2.0": f"q k v g beta=None {_S} cu_seqlens=None {_N} head_first=False",
        "0.2.2": f"q k v g beta=None {_S} cu_seqlens=None {_N}",
        "0.3.0": f"{_FUSED_0_3} cu_seqlens=None",
        "0.4.2": f"{_FUSED_0_3} cu_seqlens=None transpose_state_layout=False",
        "0.5.0": f"{_FUSED_0_3} {_GATE} cu_seqlens=None use_exp2=False transpose_state_layout=False",
        "0.5.1": f"{_FUSED_0_3} {_GATE} {_BETA} cu_seqlens=None **",
    },
    "chunk_gated_delta_product": {
        "0.3.0": f"q k v g beta num_householder {_S} {_N} cu_seqlens=None",
        "0.4.2": f"q k v g beta num_householder {_S} {_N} cu_seqlens=None cu_seqlens_cpu=None",
        "0.6.0": f"q k v g beta num_householder {_S} {_N} cu_seqlens=None cu_seqlens_cpu=None cp_context=None",
    },
    "naive_recurrent_gated_delta_rule": {"0.4.2": f"q k v beta g {_S}"},
    "naive_chunk_gated_delta_rule": {"0.4.2": f"q k v g beta chunk_size=64 {_S}"},
}
ALIASES = {"chunk_gdn": "chunk_gated_delta_rule", "fused_recurrent_gdn": "fused_recurrent_gated_delta_rule"}
ROWS = [(name, since) for name, rows in RELEASES.items() for since in rows if name != "fused_chunk_delta_rule"]
REQUIRED = inspect.Parameter.empty
Defaults = dict[str, Any]


def arguments(name: str, since: str) -> tuple[Defaults, bool]:
    """(default of each argument in order, whether there are further ones)."""
    parts = [part.partition("=") for part in RELEASES[name][since].split()]
    named = {part: ast.literal_eval(default) if eq else REQUIRED for part, eq, default in parts if part != "**"}
    return named, ("**", "", "") in parts


def newest(name: str) -> str:
    return list(RELEASES[name])[-1]


@pytest.mark.parametrize("name", RELEASES)
def test_the_signature_is_the_newest(name):
    parameters = inspect.signature(getattr(fla_api, name)).parameters.values()
    ours = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    want, further = arguments(name, newest(name))
    assert list(ours.items()) == list(want.items())
    assert any(p.kind is p.VAR_KEYWORD for p in parameters) == further


def test_every_function_is_here():
    assert set(fla_api.__all__) == {*RELEASES, *ALIASES}
    for alias, name in ALIASES.items():
        assert getattr(fla_api, alias) is getattr(fla_api, name)


def test_the_table_is_what_the_installed_release_has():
    package = importlib.util.find_spec("fla")
    folders = [Path(p, "ops") for p in (package and package.submodule_search_locations) or ()]
    if not any((folder / "delta_rule").is_dir() for folder in folders):
        pytest.skip("flash-linear-attention is not installed")
    version = importlib.metadata.version("flash-linear-attention")
    if version not in VERSIONS:
        pytest.skip(f"the table knows {VERSIONS[0]} to {VERSIONS[-1]}, not {version}")
    found = {}
    for kind in ("delta_rule", "gated_delta_rule", "gated_delta_product"):
        for file in (file for folder in folders for file in (folder / kind).glob("*.py")):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name in RELEASES:
                    args = node.args
                    first = len(args.args) - len(args.defaults)
                    defaults = map(ast.unparse, args.defaults)
                    parts = [a.arg for a in args.args[:first]]
                    parts += [f"{a.arg}={d}" for a, d in zip(args.args[first:], defaults, strict=True)]
                    found[node.name] = " ".join(parts + ["**"] * bool(args.kwarg))
    for name, rows in RELEASES.items():
        known = [since for since in rows if VERSIONS.index(since) <= VERSIONS.index(version)]
        if known:
            assert found[name] == rows[known[-1]], name


# What the arguments mean: the recurrence written out, in float64

B, T, H, K, V = 2, 6, 2, 4, 3
ENDS = [0, 2, 2, T]
LOG2 = 0.6931471805599453


def tensors(name: str, seed: int = 0, *, packed: bool = False) -> Defaults:
    """The tensors that the function needs, in float64."""
    rng = torch.Generator().manual_seed(seed)
    batch, n = 1 if packed else B, 2 if name == "chunk_gated_delta_product" else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    given: Defaults = {"q": normal(batch, T, H, K), "k": normal(batch, T * n, H, K) / 2}
    given["v"] = normal(batch, T * n, H, V)
    given["beta"] = 2 * torch.rand(batch, T * n, H, generator=rng, dtype=torch.float64)
    if "gated" in name:
        given["g"] = -torch.rand(batch, T, H, generator=rng, dtype=torch.float64)
    if name == "chunk_gated_delta_product":
        given["num_householder"] = n
    return given


def meaning(given: Defaults) -> tuple[Tensor, Tensor | None]:
    """(o, final state or None) of one of these calls, all arguments by name: the equations, token after token."""
    q, k, v, g, beta = (given.get(x) for x in ("q", "k", "v", "g", "beta"))
    n = given.get("num_householder", 1)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    if given.get("use_beta_sigmoid_in_kernel"):
        beta = (2 if given.get("allow_neg_eigval") else 1) / (1 + torch.exp(-beta))
    if given.get("use_gate_in_kernel"):
        rate = g if given.get("dt_bias") is None else g + given["dt_bias"]
        g = -torch.exp(given["A_log"]) * torch.log1p(torch.exp(rate))
    elif given.get("use_exp2") and g is not None:
        g = g * LOG2
    if given.get("use_qk_l2norm_in_kernel"):
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    scale = q.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    v_first = given.get("state_v_first") or given.get("transpose_state_layout")
    cu_seqlens, start = given.get("cu_seqlens"), given.get("initial_state")
    whole = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = whole if ends is None else [(0, a, b) for a, b in pairwise(ends)]
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    states = []
    for i, (b, first, end) in enumerate(spans):
        state = torch.zeros(q.shape[2], K, V, dtype=torch.float64)
        if start is not None:
            state = (start[i].mT if v_first else start[i]).clone()
        for t in range(first, end):
            for h in range(q.shape[2]):
                if g is not None:
                    state[h] *= torch.exp(g[b, t, h])
                for j in range(t * n, t * n + n):
                    old = state[h].T @ k[b, j, h]
                    state[h] += beta[b, j, h] * torch.outer(k[b, j, h], v[b, j, h] - old)
                o[b, t, h] = scale * state[h].T @ q[b, t, h]
        states.append(state.mT if v_first else state)
    return o, torch.stack(states) if given.get("output_final_state") else None


def assert_means(name: str, got: tuple[Tensor, Tensor | None], given: Defaults) -> None:
    want = meaning(given)
    assert (got[1] is None) == (want[1] is None)
    for x, y in zip(got, want, strict=True):
        if y is not None:
            # float64 (u = 1e-16), 12 steps whose norm is at most 1 + β‖k‖² ≈ 9 each: below 1e-16 · 9^4 in practice
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by", ["name", "place"])
@pytest.mark.parametrize(("name", "since"), ROWS)
def test_every_release_with_its_defaults(name, since, by):
    """Each argument given, with its default; a head-first layout, which 0.1 has by default, is refused."""
    named, further = arguments(name, since)
    given = {key: None if default is REQUIRED else default for key, default in named.items()} | tensors(name)
    if further:
        given |= {"chunk_size": 64, "use_gate_in_kernel": False} if by == "name" else {}
    function = getattr(fla_api, name)

    def call() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if by == "name":
                return function(**given)
            return function(*(given[key] for key in named))

    if given.get("head_first"):
        with pytest.raises(UsageError, match=r"head_first has been removed|fit the order of more than one release"):
            call()
    else:
        assert_means(name, call(), given)


# Values other than the defaults. A tuple: what else has to be given for the argument to mean anything.

HONOURED: dict[str, Any] = {
    "scale": (0.3, {}),
    "initial_state": (torch.linspace(-1, 1, B * H * K * V, dtype=torch.float64).view(B, H, K, V), {}),
    "output_final_state": (True, {}),
    "use_qk_l2norm_in_kernel": (True, {}),
    "cu_seqlens": (torch.tensor(ENDS), {}),
    "use_beta_sigmoid_in_kernel": (True, {}),
    "allow_neg_eigval": (True, {"use_beta_sigmoid_in_kernel": True}),
    "use_gate_in_kernel": (True, {"A_log": torch.tensor([-1.0, 0.5], dtype=torch.float64)}),
    "A_log": (torch.tensor([-1.0, 0.5], dtype=torch.float64), {"use_gate_in_kernel": True}),
    "dt_bias": (
        torch.tensor([0.5, -2.0], dtype=torch.float64),
        {"use_gate_in_kernel": True, "A_log": torch.tensor([-1.0, 0.5], dtype=torch.float64)},
    ),
    "use_exp2": (True, {}),
} | {
    layout: (
        True,
        {
            "initial_state": torch.linspace(-1, 1, B * H * K * V, dtype=torch.float64).view(B, H, V, K),
            "output_final_state": True,
        },
    )
    for layout in ("state_v_first", "transpose_state_layout")
}
UNUSED = {"cu_seqlens_cpu": torch.tensor(ENDS), "chunk_indices": torch.tensor([[0, 0]]), "chunk_size": 32}
FURTHER = {"use_cache": True, "chunk_size": 16, "training": False, "layer_idx": 0}
REFUSED = {
    "head_first": (True, "head_first has been removed; the layout is"),
    "cp_context": (object(), "cp_context is not supported"),
    "gk": (torch.zeros(B, T, H, K), "gk is not supported"),
    "gv": (torch.zeros(B, T, H, V), "gv is not supported"),
}
ALWAYS = {"q", "k", "v", "g", "beta", "num_householder"}
EVERY = [(name, key) for name, rows in RELEASES.items() for key in dict.fromkeys(
    key for since in rows for key in arguments(name, since)[0] if key not in ALWAYS)]  # fmt: skip


@pytest.fixture(autouse=True)
def warn_again():
    """Warnings come once in a process."""
    fla_api._warn_once.cache_clear()


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_every_argument(name, key):
    function, given = getattr(fla_api, name), tensors(name, packed=key == "cu_seqlens")
    if key in REFUSED:
        value, message = REFUSED[key]
        with pytest.raises(UsageError, match=message) as error:
            function(**given, **{key: value})
        assert "\n" not in str(error.value)
        return
    plain = meaning(given)[0]
    if key in UNUSED:
        with pytest.warns(UserWarning, match=f"{key} changes nothing"):
            got = function(**given, **{key: UNUSED[key]})
        assert_means(name, got, given)
        return
    value, besides = HONOURED[key]
    given |= besides | {key: value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        got = function(**given)
    assert_means(name, got, given)
    assert key == "output_final_state" or not torch.allclose(got[0], plain)


@pytest.mark.parametrize("name", [name for name in RELEASES if arguments(name, newest(name))[1]][:1] + list(ALIASES))
@pytest.mark.parametrize("key", FURTHER)
def test_what_the_originals_ignore_is_named_once(name, key):
    given = tensors(ALIASES.get(name, name))
    with pytest.warns(UserWarning, match=f"{key} changes nothing in this library's operators") as caught:
        got = getattr(fla_api, name)(**given, **{key: FURTHER[key]})
    assert len(caught) == 1
    assert_means(name, got, given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fla_api, name)(**given, **{key: FURTHER[key]})


def test_gates_without_their_switch_are_named():
    """The originals leave A_log aside where use_gate_in_kernel is not set."""
    given = tensors("chunk_gated_delta_rule")
    with pytest.warns(UserWarning, match="A_log changes nothing"):
        got = fla_api.chunk_gated_delta_rule(**given, A_log=torch.zeros(H))
    assert_means("chunk_gated_delta_rule", got, given)


def test_the_older_name_of_the_layout_warns_and_is_not_given_twice():
    given = tensors("chunk_gated_delta_rule")
    with pytest.warns(DeprecationWarning, match="has been renamed to state_v_first"):
        fla_api.chunk_gated_delta_rule(**given, transpose_state_layout=True)
    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        with pytest.raises(UsageError, match="give only one of them"):
            getattr(fla_api, name)(**given, state_v_first=True, transpose_state_layout=True)


# Positional arguments in every release's order. Two orders that the types cannot tell apart are refused.

FULL = {
    "scale": 0.3,
    "initial_state": torch.linspace(-1, 1, 3 * H * K * V, dtype=torch.float64).view(3, H, K, V),
    "output_final_state": True,
    "use_qk_l2norm_in_kernel": True,
    "cu_seqlens": torch.tensor(ENDS),
    "use_beta_sigmoid_in_kernel": True,
    "allow_neg_eigval": True,
    "state_v_first": True,
    "transpose_state_layout": True,
    "use_gate_in_kernel": True,
    "A_log": torch.tensor([-1.0, 0.5], dtype=torch.float64),
    "dt_bias": torch.tensor([0.5, -2.0], dtype=torch.float64),
    "cu_seqlens_cpu": torch.tensor(ENDS),
    "chunk_indices": torch.tensor([[0, 0]]),
}
# 0.1.x ended in (…, head_first, use_qk_l2norm_in_kernel), 0.2.0 in the reverse: one flag and another.
ALIKE = {("fused_recurrent_delta_rule", "0.2.2"), ("fused_recurrent_gated_delta_rule", "0.1"),
         ("fused_recurrent_gated_delta_rule", "0.2.0"), ("fused_recurrent_gated_delta_rule", "0.2.2")}  # fmt: skip


@pytest.mark.parametrize(("name", "since"), ROWS)
def test_positional_arguments_in_the_order_of_every_release(name, since):
    named, _ = arguments(name, since)
    packed = "cu_seqlens" in named
    rest = FULL if packed else FULL | {"initial_state": FULL["initial_state"][:B]}
    given = tensors(name, packed=packed)
    given = {key: given.get(key, rest.get(key, default)) for key, default in named.items()}
    given |= {"head_first": False} if "head_first" in named else {}
    if given.get("state_v_first") or given.get("transpose_state_layout"):
        given["initial_state"] = given["initial_state"].mT
    function = getattr(fla_api, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (name, since) in ALIKE:
            with pytest.raises(UsageError, match="fit the order of more than one release") as error:
                function(*given.values())
            assert "pass them by name" in str(error.value) and "\n" not in str(error.value)
            del given["use_qk_l2norm_in_kernel"]
            got = function(**{key: x for key, x in given.items() if key != "head_first"})
        else:
            got = function(*given.values())
            by_name = function(**given)
            assert torch.equal(got[0], by_name[0]) and torch.equal(got[1], by_name[1])
    assert_means(name, got, given)


def test_a_call_cut_off_anywhere():
    """Whatever number of positional arguments is given, in every order, the rest being named."""
    warnings.simplefilter("ignore", DeprecationWarning)  # pytest restores the filters
    for name, since in ROWS:
        named, _ = arguments(name, since)
        function = getattr(fla_api, name)
        given = tensors(name)
        given |= {"initial_state": FULL["initial_state"][:B], "output_final_state": True, "scale": 0.3}
        given = {key: given.get(key, default) for key, default in named.items()}
        given |= {"head_first": False} if "head_first" in named else {}
        want = function(**{key: x for key, x in given.items() if key != "head_first"})
        for count in range(3, len(named) + 1):
            keys = list(named)
            got = function(*(given[key] for key in keys[:count]), **{key: given[key] for key in keys[count:]})
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), (name, since, count)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: fla_api.chunk_delta_rule(*x, None, None, False, 1), "fit the order of no release"),
        (lambda x: fla_api.chunk_delta_rule(*x, None, None, False, True, ENDS), "fit the order of no release"),
        (lambda x: fla_api.chunk_delta_rule(*x, None, None, False, None, True), "head_first has been removed"),
        (lambda x: fla_api.chunk_delta_rule(*x, offsets=torch.tensor(ENDS)), "offsets is not supported"),
        (lambda x: fla_api.chunk_delta_rule(*x, use_gate_in_kernel=True), "use_gate_in_kernel is not supported"),
        (lambda x: fla_api.chunk_delta_rule(*x, g=x[3]), "g is not supported"),
        (lambda x: fla_api.chunk_delta_rule(*x, chunk_size=48), "chunk_size must be one of 16, 32, 64, not 48"),
        (lambda x: fla_api.chunk_gdn(*x, x[3], chunk_size=48), "chunk_size must be one of 16, 32, 64, not 48"),
        (lambda x: fla_api.chunk_gdn(*x, x[3], use_exp2=True), "use_exp2 is not supported"),
        (lambda x: fla_api.chunk_gdn(*x, x[3], gk=x[0]), "gk is not supported"),
        (lambda x: fla_api.chunk_gdn(*x, x[3], ssm_state_indices=x[0]), "ssm_state_indices is not supported"),
        (lambda x: fla_api.chunk_gdn(*x, x[3], output_h=True), "output_h is not supported"),
        (lambda x: fla_api.chunk_gdn(*x, x[3], lower_bound=-5), "lower_bound is not supported"),
        (lambda x: fla_api.fused_recurrent_gdn(*x[:3], x[3], x[2]), "fit the order of more than one release"),
        (
            lambda x: fla_api.fused_recurrent_gdn(*x, use_exp2=True, use_gate_in_kernel=True, A_log=torch.zeros(H)),
            "use_exp2=True says how to read a given g",
        ),
        (
            lambda x: fla_api.fused_recurrent_gdn(*x, use_gate_in_kernel=True, A_log=torch.zeros(1)),
            r"A_log is \[1\] and should be \[HV\] = \[2\]",
        ),
        (lambda x: fla_api.fused_chunk_delta_rule(*x), "has been removed; use chunk_delta_rule"),
        (lambda x: fla_api.fused_chunk_delta_rule(), "has been removed; use chunk_delta_rule"),
    ],
)
def test_refusals_in_one_line(call, match):
    x = tensors("chunk_delta_rule")
    with pytest.raises(UsageError, match=match) as error:
        call([x["q"], x["k"], x["v"], x["beta"]])
    assert "\n" not in str(error.value)


def test_naive_functions_answer_in_float32():
    """As the originals do, whatever they are given."""
    given = {name: x.bfloat16() for name, x in tensors("chunk_gated_delta_rule").items()}
    for name in ("naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"):
        o, state = getattr(fla_api, name)(**given, output_final_state=True)
        assert o.dtype == state.dtype == torch.float32
        want = meaning({key: x.double() for key, x in given.items()})[0]
        # 6 steps in float32 (u = 6e-8) of norm at most 9, relative to the largest entry
        assert float((o.double() - want).abs().max() / want.abs().max()) < 1e-5


def test_gradients_pass_through_the_older_order():
    given = tensors("chunk_delta_rule")
    leaves = [given[x].requires_grad_() for x in ("q", "k", "v", "beta")]
    older = torch.autograd.grad(
        fla_api.chunk_delta_rule(*leaves, None, None, False, None, False, True)[0].sum(), leaves
    )
    newer = torch.autograd.grad(fla_api.chunk_delta_rule(*leaves, use_qk_l2norm_in_kernel=True)[0].sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(older, newer, strict=True))
    assert not torch.equal(F.normalize(leaves[1], dim=-1), leaves[1])  # so that normalising shows


@pytest.mark.slow("graphs")
def test_one_graph_with_what_is_unused_and_an_older_order():
    given = tensors("chunk_delta_rule")
    leaves = [given[x] for x in ("q", "k", "v", "beta")]

    def older(*x: Tensor) -> Tensor:
        return fla_api.chunk_delta_rule(*x, None, None, False, None, False, True, use_cache=True)[0]

    compiled = torch.compile(older, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), fla_api.chunk_delta_rule(*leaves, use_qk_l2norm_in_kernel=True)[0])
