"""The Triton kernels against the oracle: on a GPU where there is one, otherwise in Triton's interpreter, in NumPy.

The interpreter multiplies in float32 where tf32×3 is asked for. Operands of bfloat16 and tf32 are rounded as on a GPU,
so that what these cost in accuracy is seen here too, but for the order of sums.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from operator_cases import CU, Problem, assert_within, draw, errors, leaves, options, solve, solved
from oracle import Answer, l2_normalised, l2_normalised_gradient, oracle, relative_error

from deltaproduct.errors import UsageError
from deltaproduct.ops import BACKENDS, delta_product, delta_product_step, resolve_backend

pytest.importorskip("triton")

from deltaproduct.ops.triton import layout
from deltaproduct.ops.triton.layout import Layout

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FLOAT32 = 2e-5 if GPU else 1e-5  # tf32×3 has two bits fewer than float32
BFLOAT16 = 0.03  # operands of 8 bits: 4e-3 each, many of them
TF32 = 2e-3  # of 11 bits
PRECISE = 1e-3
LAST_BIT = 2**-8  # of a bfloat16 result
NAMES = ("triton", "triton_precise")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def float32_precision():
    """float32, whatever libraries that other tests import have asked PyTorch for (accelerate asks for tf32)."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    yield matmul
    matmul.allow_tf32 = before


@pytest.fixture(params=[False, True], ids=["one after the other", "side by side"])
def short_segments(request, monkeypatch):
    """Sequences are cut into segments of two chunks."""
    monkeypatch.setattr(layout, "_division", lambda *sizes: (2, request.param))


def on_device(x: dict) -> dict:
    return {n: a.to(DEVICE) for n, a in x.items()}


def outcome(p: Problem, x: dict, dtype=torch.float32, backend="triton", **more):
    """What `run` gives, on the device; gradients and results come back as NumPy arrays."""
    inputs = on_device(leaves(x, dtype))
    inputs = {n: a.detach().requires_grad_() for n, a in inputs.items()}
    choices = options(p) | more
    if choices.get("cu_seqlens") is not None:
        choices["cu_seqlens"] = choices["cu_seqlens"].to(DEVICE)
    return run_on(backend, on_device(x), inputs, **choices)


def run_on(backend, x, inputs, **choices):
    o, final = delta_product(**inputs, output_final_state=True, backend=backend, **choices)
    ((o * x["d_o"].to(o.dtype)).sum() + (final * x["d_final"]).sum()).backward()
    grads = {n: a.grad.double().cpu().numpy() for n, a in inputs.items()}
    return Answer(o.detach().double().cpu().numpy(), final.detach().double().cpu().numpy(), grads=grads)


PROBLEMS = [
    Problem(T=1, N=1, gate=False, initial=False),
    Problem(T=2, N=2, B=1, scale=0.7),
    Problem(T=32, N=2, B=1, H=1, HV=1),  # one chunk of 64 rows exactly
    Problem(T=33, N=2, B=1, H=1, HV=1, initial=False),  # and a token more
    Problem(T=20, N=4, B=1, gate=False, initial=False, V=13),
    Problem(T=29, N=5, B=1, K=1, V=1, H=1, HV=1),
    Problem(T=12, N=6, B=1, H=1, HV=1, gate=False),
    Problem(T=4, N=30, B=1, H=1, HV=1, K=4, V=5),
    Problem(T=40, N=1, B=1, H=1, HV=1, K=130, V=20),  # chunks of 32 rows
    Problem(T=75, N=1, B=1, cu=CU, gate=False, initial=False, H=1, HV=1),
    Problem(T=3, N=2, B=1, cu=(0, 3)),
    Problem(T=70, N=2, B=1, H=1, HV=1, beta="ends"),
    Problem(T=70, N=2, B=1, H=1, HV=1, resets="-inf"),
]
MORE = [  # that the interpreter takes a second or more for
    Problem(T=45, N=3, B=1, H=1, HV=3, initial=False, V=40, K=20),  # three blocks of values in the interpreter
    Problem(T=75, N=2, B=1, cu=CU, H=1, HV=2),
    Problem(T=75, N=2, B=1, cu=CU, resets="-inf", beta="ends", H=1, HV=1),
    Problem(T=75, N=3, B=1, cu=CU, initial=False, K=5, V=3, H=1, HV=1),
    Problem(T=20, N=2, B=1, H=1, HV=1, K=256, V=70, gate=False),
    Problem(T=20, N=7, B=1, H=2, HV=2, K=3, V=2),
    Problem(T=1, N=3, H=1, HV=2),
    Problem(T=70, N=3, B=1, H=1, HV=1, resets="-1e4"),
    Problem(T=70, N=1, B=1, H=1, HV=2, V=5, K=7),
    Problem(T=50, N=2, B=2, gate=False, H=1, HV=1, K=16, V=16),
    Problem(T=21, N=8, B=1, H=1, HV=1, K=3, V=1),
]


@pytest.mark.parametrize(
    "p", [*PROBLEMS, *(pytest.param(p, marks=() if GPU else pytest.mark.slow("interpreter")) for p in MORE)], ids=str
)
def test_outputs_and_gradients(p):
    assert_within(errors(outcome(p, draw(p)), solved(p)), FLOAT32)


LONG = [  # in chunks of 64 rows
    Problem(T=300, N=1, B=2, H=1, HV=1, K=4, V=20),
    Problem(T=300, N=2, B=1, H=1, HV=1, K=4, V=3, cu=(0, 0, 1, 38, 38, 200, 201, 300, 300)),
    Problem(T=150, N=1, B=1, H=1, HV=1, K=130, V=3),  # in chunks of 32; a summary's product takes three parts of K
]


@pytest.mark.slow("interpreter")
@pytest.mark.ci("side by side-T300-N1-H1-HV1-K4-V20")
@pytest.mark.parametrize("p", LONG, ids=str)
def test_segments(p, short_segments):
    assert_within(errors(outcome(p, draw(p)), solved(p)), FLOAT32)


def test_time_is_divided_where_there_is_little_else_to_divide():
    def shape(batch: int, length: int, heads: int, cu: tuple[int, ...] | None = None) -> Layout:
        k = torch.empty(batch, length, 2, heads, 128, device="meta")
        return Layout.of(k, k, None if cu is None else torch.tensor(cu), processors=132)

    assert not shape(8, 4096, 8).segmented
    assert not shape(1, 512, 8).segmented  # too short to be worth it
    long = shape(1, 65536, 8)
    assert long.segmented and 132 <= long.segments * 8 * 2 <= 4 * 132
    assert shape(1, 65536, 8, (0, 100, 65536)).segmented
    assert not shape(1, 65536, 8, tuple(range(0, 65537, 256))).segmented


@pytest.mark.parametrize("backend", NAMES)
def test_bfloat16(backend):
    p = Problem(T=34, N=2, B=1, H=1, HV=2)
    x = draw(p)
    inputs = leaves(x, torch.bfloat16)
    rounded = x | {n: a.detach().double() for n, a in inputs.items()} | {"d_o": x["d_o"].bfloat16().double()}
    got, want = outcome(p, rounded, torch.bfloat16, backend), solve(p, rounded)
    arithmetic = BFLOAT16 if backend == "triton" else PRECISE
    assert_within(errors(got, want), LAST_BIT + arithmetic)
    assert relative_error(got.final, want.final) <= arithmetic
    if backend == "triton":  # which is what it saves
        assert relative_error(got.final, want.final) >= 1e-4


def test_float16_keeps_its_own_bits():
    p = Problem(T=34, N=2, B=1, H=1, HV=2)
    x = draw(p)
    inputs = leaves(x, torch.float16)
    rounded = x | {n: a.detach().double() for n, a in inputs.items()} | {"d_o": x["d_o"].half().double()}
    got, want = outcome(p, rounded, torch.float16), solve(p, rounded)
    assert_within(errors(got, want), 2**-11 + TF32)


@pytest.mark.slow("interpreter")
def test_float32_is_multiplied_in_tf32_where_pytorch_is_allowed_to(float32_precision):
    float32_precision.allow_tf32 = True
    p = Problem(T=45, N=3, B=1, H=1, HV=2)
    found = errors(outcome(p, draw(p)), solved(p))
    assert_within(found, TF32)
    assert all(error >= 1e-4 for error in found.values())
    assert_within(errors(outcome(p, draw(p), backend="triton_precise"), solved(p)), FLOAT32)


@pytest.mark.slow("processes")
def test_tf32_can_be_asked_for_in_either_way():
    program = """
import torch
from deltaproduct.ops.triton import operator
assert not operator._tf32_allowed()
torch.backends.cuda.matmul.{} = {}
assert operator._tf32_allowed()
"""
    ways = [("allow_tf32", True)]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        ways.append(("fp32_precision", "'tf32'"))
    for way in ways:  # PyTorch does not let one process use both
        subprocess.run([sys.executable, "-c", program.format(*way)], check=True, timeout=120)


def test_mixed_dtypes():
    p = Problem(T=40, N=2, B=1, H=1, HV=2)
    dtypes = {"q": torch.bfloat16, "k": torch.float32, "v": torch.float16, "beta": torch.float32, "g": torch.bfloat16,
              "initial_state": torch.bfloat16}  # fmt: skip
    x = draw(p)
    inputs = {n: x[n].to(DEVICE, dtype).requires_grad_() for n, dtype in dtypes.items()}
    rounded = x | {n: a.detach().double().cpu() for n, a in inputs.items()} | {"d_o": x["d_o"].half().double()}
    got, want = run_on("triton", on_device(rounded), inputs), solve(p, rounded)
    for name, error in errors(got, want).items():
        dtype = torch.float16 if name == "o" else dtypes.get(name.removeprefix("d_"), torch.float32)
        rounding = {torch.bfloat16: LAST_BIT, torch.float16: 2**-11}.get(dtype, 0)
        assert error <= rounding + FLOAT32, (name, error)
        assert name in ("o", "final") or inputs[name.removeprefix("d_")].grad.dtype == dtype


@pytest.mark.parametrize("p", [Problem(T=37, N=2, B=1, H=1, HV=2), Problem(T=37, N=2, B=1, gate=False)], ids=str)
def test_qk_l2norm(p):
    x = dict(draw(p))
    x["k"] = 0.01 * x["k"]  # so short that the 1e-6 under the root is seen
    normal = x | {n: torch.from_numpy(l2_normalised(x[n].numpy())) for n in "qk"}
    want = solve(p, normal)
    want.grads |= {n: l2_normalised_gradient(x[n].numpy(), want.grads[n]) for n in "qk"}
    assert_within(errors(outcome(p, x, qk_l2norm=True), want), FLOAT32)


def test_normalised_bfloat16_keys_are_not_rounded_again():
    # A key that is rounded after it was normalised has a norm of 1 ± .002: with β = 2, a thousand steps along it
    # multiply the state by up to (1 + .008)^1000.
    rng = np.random.default_rng(0)
    length = 1000
    x = {
        "q": rng.standard_normal((1, length, 1, 16)),
        "k": np.broadcast_to(rng.standard_normal((1, 1, 1, 1, 16)), (1, length, 1, 1, 16)),
        "v": np.zeros((1, length, 1, 1, 16)),
        "beta": np.full((1, length, 1, 1), 2.0),
        "initial_state": rng.standard_normal((1, 1, 16, 16)),
    }
    x = {n: torch.tensor(a, dtype=torch.bfloat16) for n, a in x.items()}
    exact = {n: a.double().numpy() for n, a in x.items()}
    want = oracle(**exact | {n: l2_normalised(exact[n]) for n in "qk"})
    inputs = on_device(x)
    _, final = delta_product(**inputs, qk_l2norm=True, output_final_state=True, backend="triton_precise")
    # 1e-6 under the root makes the norm 1 − 3e-8.
    assert relative_error(final.double().cpu().numpy(), want.final) <= PRECISE


def test_uninitialised_memory_is_never_read(poisoned):
    for p in (Problem(T=45, N=3, B=1, H=1, HV=1), Problem(T=75, N=2, B=1, cu=CU, H=1, HV=1)):
        assert_within(errors(outcome(p, draw(p)), solved(p)), FLOAT32)


@pytest.mark.slow("interpreter")
def test_uninitialised_memory_is_never_read_between_segments(poisoned, short_segments):
    p = LONG[1]
    assert_within(errors(outcome(p, draw(p)), solved(p)), FLOAT32)


@pytest.mark.parametrize("name", ["d_o", "d_final"])
def test_gradient_of_either_result_alone(name):
    p = Problem(T=40, N=2, B=1, H=1, HV=1)
    x = draw(p)
    only = x | {name: torch.zeros_like(x[name])}
    inputs = {n: a.detach().requires_grad_() for n, a in on_device(leaves(x, torch.float32)).items()}
    o, final = delta_product(**inputs, output_final_state=True, backend="triton")
    kept = "d_final" if name == "d_o" else "d_o"
    ((final if name == "d_o" else o) * x[kept].to(DEVICE)).sum().backward()
    want = solve(p, only)
    for n, a in inputs.items():
        grad = np.zeros(a.shape) if a.grad is None else a.grad.double().cpu().numpy()
        assert relative_error(grad, want.grads[n], floor=1.0) <= FLOAT32, n


def test_tensors_of_any_strides():
    p = Problem(T=20, N=2, B=2, H=2, HV=2)
    x = on_device({n: a.float() for n, a in draw(p).items() if not n.startswith("d_")})
    want, _ = delta_product(**x, backend="triton")
    strided = {n: a.transpose(0, 1).contiguous().transpose(0, 1) for n, a in x.items()}
    assert not strided["k"].is_contiguous()
    got, _ = delta_product(**strided, backend="triton")
    assert torch.equal(got, want)


# Few or almost parallel keys, β → 2, no decay: where chunked algorithms break.
HARD = (1, 3000, 2, 4, 64) if GPU else (1, 256, 2, 1, 16)  # B, T, N, H, K


def hard(kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(3)
    batch, length, steps, heads, size = HARD

    def unit(*shape):
        a = rng.standard_normal(shape)
        return a / np.linalg.norm(a, axis=-1, keepdims=True)

    if kind == "cosine .99":
        k = np.sqrt(0.99) * unit(size) + np.sqrt(0.01) * unit(batch, length, steps, heads, size)
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    else:
        directions = unit(int(kind.split()[0]), size)
        k = directions[rng.integers(len(directions), size=(batch, length, steps, heads))]
    x = {
        "q": unit(batch, length, heads, size),
        "k": k,
        "v": rng.standard_normal((batch, length, steps, heads, size)),
        "beta": rng.uniform(1.9, 2, (batch, length, steps, heads)),
        "initial_state": rng.standard_normal((batch, heads, size, size)),
        "d_o": rng.standard_normal((batch, length, heads, size)),
        "d_final": rng.standard_normal((batch, heads, size, size)),
    }
    floats = {"beta", "initial_state", "d_final"}
    return {n: torch.tensor(a, dtype=torch.float32 if n in floats else dtype) for n, a in x.items()}


@pytest.mark.slow("interpreter")
@pytest.mark.parametrize("kind", ["2 directions", "12 directions", "cosine .99"])
def test_hard_regime_in_float32(kind):
    x = hard(kind, torch.float32)
    inputs = {n: a.to(DEVICE, copy=True).requires_grad_() for n, a in x.items() if not n.startswith("d_")}
    want = oracle(**{n: a.double().numpy() for n, a in x.items()})
    assert_within(errors(run_on("triton", on_device(x), inputs), want), 1e-4)


@pytest.mark.parametrize("kind", ["2 directions", "12 directions", "cosine .99"])
def test_hard_regime_in_precise_bfloat16(kind):
    x = hard(kind, torch.bfloat16)
    inputs = {n: a.to(DEVICE) for n, a in x.items() if not n.startswith("d_")}
    _, final = delta_product(**inputs, output_final_state=True, backend="triton_precise")
    want = oracle(**{n: a.double().numpy() for n, a in x.items() if not n.startswith("d_")})
    assert relative_error(final.double().cpu().numpy(), want.final) <= PRECISE


# Sizes of language models: B, T, H, K, V, whether packed. Only a GPU computes them in reasonable time.
REAL = [(2, 4096, 4, 128, 128, False), (4, 512, 8, 64, 64, False), (1, 65536, 2, 128, 128, False),
        (1, 3000, 2, 256, 256, False), (1, 8192, 2, 128, 256, True)]  # fmt: skip


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", REAL, ids=str)
def test_real_sizes(size, steps, gate):
    batch, length, heads, keys, values, packed = size
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng).to(DEVICE)

    cu = torch.tensor([0, 1, length // 3, length // 3, length], device=DEVICE) if packed else None
    sequences = 4 if packed else batch
    x = {
        "q": torch.nn.functional.normalize(normal(batch, length, heads, keys), dim=-1),
        "k": torch.nn.functional.normalize(normal(batch, length, steps, heads, keys), dim=-1),
        "v": normal(batch, length, steps, heads, values),
        "beta": 2 * normal(batch, length, steps, heads).sigmoid(),
        "initial_state": normal(sequences, heads, keys, values),
    }
    if gate:
        x["g"] = torch.nn.functional.logsigmoid(normal(batch, length, heads) + 3)
    d_o, d_final = normal(batch, length, heads, values).bfloat16(), normal(sequences, heads, keys, values)
    x = {n: a.bfloat16() if n in "qkv" else a for n, a in x.items()}

    def run(backend, dtype):
        inputs = {n: a.to(dtype or a.dtype, copy=True).requires_grad_() for n, a in x.items()}
        o, final = delta_product(**inputs, output_final_state=True, cu_seqlens=cu, backend=backend)
        grads = torch.autograd.grad([o, final], list(inputs.values()), [d_o.to(o.dtype), d_final.to(final.dtype)])
        found = {"o": o, "final": final} | {f"d_{n}": a for n, a in zip(inputs, grads, strict=True)}
        return {n: a.detach().double() for n, a in found.items()}

    want = run("chunkwise", torch.float64)
    for backend, dtype, limit in (
        ("triton", None, BFLOAT16),
        ("triton_precise", None, LAST_BIT),
        ("triton", torch.float32, 1e-4),
    ):
        for name, got in run(backend, dtype).items():
            error = ((got - want[name]).norm() / want[name].norm()).item()
            assert error <= limit, (backend, dtype, name, error)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_one_token(steps, gate, inplace):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    x = {
        "q": normal(2, 2, 20),
        "k": normal(2, steps, 2, 20),
        "v": normal(2, steps, 4, 24),
        "beta": 2 * normal(2, steps, 4).sigmoid(),
        "g": -normal(2, 4).exp() if gate else None,
    }
    state = normal(2, 4, 20, 24)
    wide = {n: None if a is None else a.double() for n, a in x.items()}
    want = delta_product_step(**wide, state=state.double(), scale=0.3, qk_l2norm=True)
    x = {n: None if a is None else a.to(DEVICE) for n, a in x.items()}
    given = state.to(DEVICE, copy=True)
    step = BACKENDS["triton"].step_inplace if inplace else BACKENDS["triton"].step
    found = step(*x.values(), given, 0.3, True)
    o, after = (found, given) if inplace else found
    assert inplace or torch.equal(given.cpu(), state)
    assert relative_error(o.double().cpu().numpy(), want[0].numpy()) <= FLOAT32
    assert relative_error(after.double().cpu().numpy(), want[1].numpy()) <= FLOAT32


def test_one_token_can_be_differentiated():
    x = {n: a[:, 0].float().to(DEVICE) for n, a in draw(Problem(T=1, N=2, B=1, H=1, HV=1)).items() if n in "qkv"}
    x = {n: a.requires_grad_() for n, a in x.items()}
    beta, state = torch.full((1, 2, 1), 1.5, device=DEVICE), torch.ones(1, 1, 8, 6, device=DEVICE)
    o, after = BACKENDS["triton"].step(*x.values(), beta, None, state, 1.0, False)
    (o.sum() + after.sum()).backward()
    wide = {n: a.detach().double().cpu().requires_grad_() for n, a in x.items()}
    o, after = delta_product_step(**wide, beta=beta.double().cpu(), state=state.double().cpu(), scale=1.0)
    (o.sum() + after.sum()).backward()
    for n in "qkv":
        assert relative_error(x[n].grad.double().cpu().numpy(), wide[n].grad.numpy()) <= FLOAT32


@pytest.mark.parametrize("name", NAMES)
def test_a_token_is_differentiated_by_the_backend_that_was_named(name):
    """Of bfloat16 inputs, on which the two differ: to the bit what a sequence of length 1 gives."""
    p = Problem(T=1, N=4, B=1, H=1, HV=1, gate=False)
    found = []
    for as_step in (True, False):
        x = {n: a.bfloat16().to(DEVICE).requires_grad_() for n, a in draw(p).items() if n in ("q", "k", "v", "beta")}
        state = draw(p)["initial_state"].float().to(DEVICE).requires_grad_()
        if as_step:
            o, after = delta_product_step(**{n: a[:, 0] for n, a in x.items()}, state=state, backend=name)
        else:
            o, after = delta_product(**x, initial_state=state, output_final_state=True, backend=name)
        (o.sum() + after.sum()).backward()
        found.append([o.flatten(), after, *(a.grad for a in x.values()), state.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_more_sequences_than_an_axis_of_the_grid_is_long(packed, monkeypatch):
    from deltaproduct.ops.triton import operator  # whether kernels are interpreted is decided here

    launched = {}

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            launched[self.name] = grid({"BV": 16}) if callable(grid) else grid
            return lambda *args, **constants: None

    for name in (name for name in vars(operator) if name.endswith("_kernel")):
        monkeypatch.setattr(operator, name, Kernel(name))
    count = 66000
    k = torch.empty(1, count, 1, 1, 4) if packed else torch.empty(count, 1, 1, 1, 4)
    cu = torch.arange(count + 1) if packed else None
    x = (k[:, :, 0], k, k.clone(), torch.empty(*k.shape[:3], 1), torch.empty(*k.shape[:2], 1))
    o, _, kept, summary = operator.triton_forward(*x, None, cu, 1.0, True)
    operator.triton_backward(o, None, *x, kept, summary, cu, 1.0, False, False)
    operator.triton_step(*(a.flatten(0, 1) for a in x), torch.empty(count, 1, 4, 4), 1.0, False)
    assert launched.keys() == {f"{n}_kernel" for n in ("gates", "prepare", "scan", "reverse", "gradients", "decode")}
    for name, grid in launched.items():
        assert grid[0] >= count and all(side < 1 << 16 for side in grid[1:]), name


@pytest.mark.slow("graphs")
@pytest.mark.parametrize("packed", [False, True])
def test_as_registered_operators(packed):
    p = Problem(T=40, N=2, B=1, H=1, HV=2, cu=(0, 7, 40) if packed else None)
    x = {n: a.float().to(DEVICE).requires_grad_() for n, a in draw(p).items() if not n.startswith("d_")}
    cu = None if p.cu is None else torch.tensor(p.cu, device=DEVICE)
    args = (x["q"], x["k"], x["v"], x["beta"], x["g"], x["initial_state"], cu, 0.5, True, True, False)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.deltaproduct.triton_forward.default, args, test_utils=checks)


@pytest.mark.slow("graphs")
def test_compiled():
    p = Problem(T=40, N=2, B=1, H=1, HV=2)
    x = {n: a.float().to(DEVICE).requires_grad_() for n, a in draw(p).items() if not n.startswith("d_")}

    def f(**x):
        o, final = delta_product(**x, output_final_state=True, backend="triton")
        return o.sum() + final.sum()

    compiled = torch.compile(f, backend="inductor" if GPU else "aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(**x), list(x.values()))
    want = torch.autograd.grad(f(**x), list(x.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_what_it_cannot_serve(monkeypatch):
    with pytest.raises(UsageError, match="float64"):
        resolve_backend("triton", device=DEVICE, dtype=torch.float64)
    with pytest.raises(UsageError, match="keys of at most 256, not 257"):
        resolve_backend("triton", device=DEVICE, size=(1, 257))
    with pytest.raises(UsageError, match="at most 32 Householder steps per token, not 33"):
        resolve_backend("triton", device=DEVICE, size=(33, 8))
    name, reason = resolve_backend(device=DEVICE, size=(33, 8))
    assert name == ("chunkwise" if GPU else resolve_backend(device="cpu")[0])
    assert not GPU or "at most 32" in reason
    if not GPU:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(UsageError, match="it needs a GPU and PyTorch sees none"):
            resolve_backend("triton", device="cpu")
