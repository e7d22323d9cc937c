"""Every operator of the package under PyTorch's other transformations, against the same of plain operations in float64.

Right numbers, or one clear line: never the silent zero that PyTorch makes of a custom operator in forward mode.
Both sides are sums of at most a few hundred terms in float64, and second derivatives have products of two such sums:
1e-10 of the largest entry leaves a thousandfold margin. Where the engine takes float32 only, 5e-5 by the same count.
"""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from operator_cases import Problem, serving
from torch import Tensor
from transforms import ALL, BEYOND, OTHERS, REFUSAL, assert_equal, everything, leaves, like, numbers, operator, tangents

import deltaproduct
from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.ops import delta_product, delta_product_states, delta_product_step
from deltaproduct.training.loss import IGNORED, summed_cross_entropy

DOUBLE, SINGLE = 1e-10, 5e-5


EACH = pytest.mark.parametrize("name", ALL)


# --- The recurrence ---------------------------------------------------------------------------------------------------

CHUNK = 32  # Householder steps
PROBLEMS = [
    Problem(T=5, N=2, B=2, H=1, HV=2, K=3, V=2),
    Problem(T=3, N=2, B=1, H=1, HV=1, K=3, V=2, gate=False, initial=False),
    Problem(T=40, N=1, B=1, H=1, HV=1, K=2, V=2),  # more than a chunk, and N < K
    Problem(T=2, N=5, B=1, H=1, HV=1, K=2, V=2),  # N ≥ K
    Problem(T=7, N=2, B=1, H=1, HV=2, K=3, V=2, cu=(0, 0, 3, 4, 7)),
    Problem(T=5, N=2, B=1, H=1, HV=1, K=3, V=2, resets="-inf"),
]


# Of the other problems, those transformations that between them run every path of `ops/transforms.py`; all are slow.
FEW = ("jvp", "twice", "jvp of grad", "vmap, some shared", "gradients of samples", "batched cotangents")
RUNS = [
    pytest.param(
        p, name, id=f"{p}-{name}", marks=() if p is PROBLEMS[0] or name in FEW else pytest.mark.slow("exhaustive")
    )
    for p in PROBLEMS
    for name in ALL
]


@pytest.mark.parametrize(("p", "name"), RUNS)
def test_the_operator(p, name):
    for backend in ("auto", "chunkwise"):
        f, xs = operator(p, backend)
        slow, _ = operator(p, "reference")
        assert_equal(ALL[name](f, xs), ALL[name](slow, xs), DOUBLE)


@EACH
def test_backends_by_name(name):
    """They do what a backward of their own can do, and refuse the rest in one line that says what to use."""
    for backend in set(serving()) - {"chunkwise", "reference"}:
        f, xs = operator(PROBLEMS[0], backend)
        if name in BEYOND:
            with pytest.raises(UsageError, match=f"'{backend}' {REFUSAL}"):
                ALL[name](f, xs)
        else:
            assert_equal(ALL[name](f, xs), ALL[name](operator(PROBLEMS[0], "reference")[0], xs), DOUBLE)


# --- All the others: what is called, what it must be, and inputs ------------------------------------------------------


LABELS = torch.tensor([1, IGNORED, 4, 0])
FLOAT32_ONLY = {"rms_norm", "selective_scan"}  # on the engine
UNBATCHED = {"rms_norm", "diagonal_scan", "selective_scan"}
BATCHED = {"batched cotangents", "autograd.functional.jacobian"}


LONG = {"hessian", "autograd.functional.hessian", "jacfwd", "three times", "forward_ad of one input"}  # of a trace
CALLS = [
    pytest.param(
        what, name, marks=pytest.mark.slow("exhaustive") if what == "delta_product_states" and name in LONG else ()
    )
    for what in OTHERS
    for name in ALL
]


@pytest.mark.parametrize(("what", "name"), CALLS)
def test_the_others(what, name):
    f, slow, xs = OTHERS[what]
    if what in UNBATCHED and name in BATCHED:
        with pytest.raises(UsageError, match=r"use torch\.func\.jacrev or torch\.func\.vmap, or vectorize=False\.$"):
            ALL[name](f, xs)
        return
    assert_equal(ALL[name](f, xs), ALL[name](slow, xs), DOUBLE)
    if what in FLOAT32_ONLY:
        assert_equal(ALL[name](f, [x.float() for x in xs]), ALL[name](slow, xs), SINGLE)


@EACH
def test_the_loss_without_logits(name):
    """Everywhere but under `create_graph`, where it says what to use."""

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return summed_cross_entropy(x, weight, LABELS, block=8)

    def slow(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x @ weight.mT, LABELS, ignore_index=IGNORED, reduction="sum")

    xs = [numbers(4, 3), numbers(5, 3, seed=1)]
    try:
        got = ALL[name](f, xs)
    except UsageError as e:
        assert name in REFUSED_BY_THE_LOSS and "torch.nn.functional.cross_entropy" in str(e) and "\n" not in str(e)
    else:
        assert name not in REFUSED_BY_THE_LOSS
        assert_equal(got, ALL[name](slow, xs), DOUBLE)


REFUSED_BY_THE_LOSS = {
    "twice", "three times", "autograd.functional.hessian", "a tangent of a cotangent",
}  # fmt: skip


# --- Whole models, what is refused, and that nothing is forgotten ---------------------------------------------------


MIXERS = ("deltaproduct", "gated_deltanet", "mamba", "mamba2", "gla", "rwkv7", "mlstm")
LAYER_NORM = {"rwkv7", "mlstm"}  # PyTorch 2.13's layer_norm is wrong in reverse over forward, and there alone


def model_loss(mixer: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]:
    """The loss of a small float64 model as a function of its parameters and tokens [B,T]; the parameters; tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_heads": 2, "head_dim": 4, "intermediate_size": 8, "num_hidden_layers": 2}
    gated = {"use_forget_gate": True, "use_output_gate": True} if mixer == "deltaproduct" else {}
    config = ModelConfig.build(
        5, 5, mixer=mixer, defaults=sizes, initializer_range=0.3, embedding_init_std=1.0, **gated
    )
    model = SequenceModel(config).double()
    parameters = dict(model.named_parameters())

    def f(tokens: Tensor, *values: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (tokens,))[0]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten())

    tokens = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(1))
    return f, tuple(p.detach() for p in parameters.values()), tokens


@pytest.mark.parametrize("mixer", MIXERS)
def test_whole_models(mixer):
    """Norms, projections, convolutions and the recurrence together, by finite differences and sample by sample."""
    f, values, tokens = model_loss(mixer)
    way = tuple(like(x, i) for i, x in enumerate(values))

    def moved(h: float) -> tuple[Tensor, ...]:
        return tuple(x + h * d for x, d in zip(values, way, strict=True))

    def slope(*xs: Tensor) -> Tensor:
        return torch.func.jvp(lambda *ys: f(tokens, *ys), xs, way)[1]

    # Central differences of a loss of size 1: h² = 1e-10 times its third derivative, which is some thousands along a
    # direction of all parameters at once, and 1e-16 / h of rounding.
    h = 1e-5
    first = slope(*values)
    assert first == pytest.approx(((f(tokens, *moved(h)) - f(tokens, *moved(-h))) / (2 * h)).item(), rel=1e-4, abs=1e-6)
    # Hessian times vector: forward over reverse, reverse over forward and reverse twice; the same to rounding.
    everywhere = everything(values)
    of_f = torch.func.grad(lambda *ys: f(tokens, *ys), everywhere)
    products = torch.func.jvp(of_f, values, way)[1]
    if mixer not in LAYER_NORM:
        assert_equal(torch.func.grad(slope, everywhere)(*values), products, DOUBLE)
    given = leaves(values)
    grads = torch.autograd.grad(f(tokens, *given), given, create_graph=True)
    along = sum((d * t).sum() for d, t in zip(grads, way, strict=True))
    assert_equal(torch.autograd.grad(along, given), products, DOUBLE)
    # The gradients of samples, each by itself
    samples = torch.func.vmap(
        lambda row: torch.func.grad(lambda *ys: f(row[None], *ys), everywhere)(*values), randomness="error"
    )(tokens)
    for b, row in enumerate(tokens):
        given = leaves(values)
        assert_equal([d[b] for d in samples], torch.autograd.grad(f(row[None], *given), given), DOUBLE)


@pytest.mark.parametrize("backend", serving())
def test_second_derivatives_by_finite_differences(backend):
    f, xs = operator(Problem(T=2, N=2, B=1, H=1, HV=1, K=2, V=1), backend)
    assert torch.autograd.gradgradcheck(f, leaves(xs))


def test_linearize():
    f, xs = operator(Problem(T=2, N=1, B=1, H=1, HV=1, K=2, V=1), "auto")
    _, push = torch.func.linearize(f, *xs)
    assert_equal(push(*tangents(xs)), torch.func.jvp(f, tuple(xs), tangents(xs))[1], DOUBLE)


@pytest.mark.slow("graphs")
def test_compiled():
    f, xs = operator(PROBLEMS[0], "auto")
    for name in ("jvp", "grad"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *ys, name=name: ALL[name](f, ys), backend="aot_eager")
        assert_equal(compiled(*xs), ALL[name](f, xs), DOUBLE)
        torch._dynamo.reset()
        assert_equal(ALL[name](torch.compile(f, backend="aot_eager"), xs), ALL[name](f, xs), DOUBLE)


def test_half_precision_and_autocast():
    f, xs = operator(PROBLEMS[0], "auto")
    wide = torch.func.jvp(
        f, tuple(x.bfloat16().double() for x in xs), tuple(t.bfloat16().double() for t in tangents(xs))
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.func.jvp(f, tuple(x.bfloat16() for x in xs), tuple(t.bfloat16() for t in tangents(xs)))
    for got, want in zip([*half[0], *half[1]], [*wide[0], *wide[1]], strict=True):
        # o and its tangent are rounded to 8 bits; the state is float32, here from bfloat16 gates that are exact.
        assert (got.double() - want).abs().max() <= (2**-8 if got.dtype == torch.bfloat16 else 1e-5) * want.abs().max()


def test_what_cannot_be_is_refused_in_one_line():
    _, xs = operator(PROBLEMS[4], "auto")
    packings = torch.tensor([[0, 3, 7], [0, 4, 7]])
    x = dict(zip(("q", "k", "v", "beta", "g"), xs, strict=False))
    with pytest.raises(UsageError, match=r"^vmap cannot map over cu_seqlens; .*\.$"):
        torch.func.vmap(lambda cu: delta_product(**x, cu_seqlens=cu)[0])(packings)
    with pytest.raises(UsageError, match=r"^vmap cannot map over positions; .*\.$"):
        torch.func.vmap(lambda p: delta_product_states(x["k"], x["v"], x["beta"], positions=p))(
            torch.tensor([[1], [2]])
        )
    token = OTHERS["delta_product_step"][2]

    def inplace(*ys: Tensor) -> Tensor:
        return delta_product_step(*ys[:-1], state=ys[-1].clone(), inplace=True)[0]

    for name in ("jvp", "forward_ad", "vmap", "grad"):
        with pytest.raises(UsageError, match=r"^A state is overwritten without derivatives or maps: .*\.$"):
            ALL[name](inplace, token)


ROOT = Path(deltaproduct.__file__).parent


def operators_and_functions() -> set[str]:
    """The names of all custom operators and all subclasses of autograd.Function in the package's source."""
    found = set()
    for path in ROOT.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("Function") for b in node.bases):
                found.add(f"{path.relative_to(ROOT)}: {node.name}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("custom_op", "triton_op", ".define")):
                found.add(f"{path.relative_to(ROOT)}: {ast.unparse(node.args[0])}")
    return found


# Which test here holds it to its word. Who adds an operator adds its formula, or a refusal, and a line.
HELD = {
    "ops/cpu.py: 'deltaproduct::cpu_forward'": test_backends_by_name,
    "ops/cpu.py: 'deltaproduct::cpu_backward'": test_backends_by_name,
    "ops/chunkwise.py: 'deltaproduct::chunkwise_forward'": test_the_operator,
    "ops/chunkwise.py: 'deltaproduct::chunkwise_backward'": test_the_operator,
    "ops/transforms.py: FirstDerivative": test_the_operator,
    "ops/transforms.py: _Gradient": test_the_operator,
    "ops/triton/operator.py: 'deltaproduct::triton_forward'": "test_transforms_triton.py",
    "ops/triton/operator.py: 'deltaproduct::triton_backward'": "test_transforms_triton.py",
    "ops/triton/operator.py: 'deltaproduct::triton_step'": "test_transforms_triton.py",
    "ops/triton/operator.py: 'deltaproduct::triton_step_inplace'": "test_transforms_triton.py",
    "ops/norm.py: _NativeRMSNorm": test_the_others,
    "ops/norm.py: _RMSNorm": test_the_others,
    "ops/scan.py: _DiagonalScan": test_the_others,
    "ops/inverse.py: _Inverse": test_the_others,
    "ops/selective_scan.py: 'deltaproduct::selective_scan_forward'": test_the_others,
    "ops/selective_scan.py: 'deltaproduct::selective_scan_backward'": test_the_others,
    "ops/context_parallel.py: _Gather": "test_context_parallel.py",
    "ops/context_parallel.py: _Scatter": "test_context_parallel.py",
    "training/loss.py: _SummedCrossEntropy": test_the_loss_without_logits,
}


def test_no_operator_is_forgotten():
    assert operators_and_functions() == set(HELD)
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("deltaproduct::")
    }
    assert registered <= {name.split("::")[1].rstrip("'") for name in HELD if "::" in name}
