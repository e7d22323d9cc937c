"""Every backend offers what `ops/backend.py` says, by the very same parameters."""

import inspect
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from operator_cases import BACKEND, Problem, draw
from oracle import relative_error

import deltaproduct
from deltaproduct.ops import BACKENDS, delta_product
from deltaproduct.ops.backend import Forward, States, Step, StepInplace
from deltaproduct.ops.inputs import l2_normalise, num_sequences

CONTRACT = {"run": Forward, "states": States, "step": Step, "step_inplace": StepInplace}


def parameters(function) -> dict[str, object]:
    """Names, types and whether there is a default, of what the operator hands over by position."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in found if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize(("name", "part"), list(product(BACKENDS, CONTRACT)))
def test_the_parameters_are_those_of_the_contract(name, part):
    function = getattr(BACKENDS[name], part)
    if function is None:
        assert part in ("step", "step_inplace")  # what a backend may leave to the others
        return
    assert parameters(function) == parameters(CONTRACT[part].__call__)
    assert inspect.signature(function).return_annotation == inspect.signature(CONTRACT[part].__call__).return_annotation


@BACKEND
@pytest.mark.parametrize("packed", [False, True])
def test_a_backend_normalises_by_itself(backend, packed):
    """`run` with qk_l2norm is `run` on normalised q and k, here of lengths from 1/8 to 8."""
    p = Problem(T=24, N=2, B=1, cu=(0, 5, 5, 24) if packed else None)
    x = {n: a for n, a in draw(p).items() if not n.startswith("d_")}
    lengths = 2 ** torch.linspace(-3, 3, p.T, dtype=torch.float64)
    x["q"], x["k"] = x["q"] * lengths[:, None, None], x["k"] * lengths.flip(0)[:, None, None, None]
    cu = torch.tensor(p.cu) if packed else None
    run = BACKENDS[backend].run
    o, final = run(*x.values(), cu, 0.5, True)
    unit = x | {n: l2_normalise(x[n]) for n in ("q", "k")}
    want, last = run(*unit.values(), cu, 0.5, False)
    # float64 throughout: a rounding of each factor, over 48 steps
    assert relative_error(o.numpy(), want.numpy()) <= 1e-13 and relative_error(final.numpy(), last.numpy()) <= 1e-13
    raw, _ = run(*x.values(), cu, 0.5, False)
    assert relative_error(raw.numpy(), want.numpy()) > 1  # else this would show nothing


def test_draw_is_in_the_order_of_the_contract():
    names = [n for n in draw(Problem(T=2)) if not n.startswith("d_")]
    assert names == list(parameters(Forward.__call__))[: len(names)]


def test_num_sequences():
    assert num_sequences(3, None) == 3 and num_sequences(0, None) == 0
    assert num_sequences(1, torch.tensor([0, 4])) == 1 and num_sequences(1, torch.tensor([0, 0, 4, 4])) == 3


def test_how_many_sequences_there_are_is_asked_in_one_place():
    root = Path(deltaproduct.__file__).parent
    counted = re.compile(r"seqlens\.(shape\[0\]|numel\(\)|size\(0\)) - 1|len\((self\.)?cu_seqlens\) - 1")
    found = [p.relative_to(root).as_posix() for p in root.rglob("*.py") if counted.search(p.read_text("utf-8"))]
    assert found == ["ops/inputs.py"]


@BACKEND
def test_gradients_are_none_or_zero_where_nothing_is_asked(backend):
    """Of the final state alone, with no gate and no state given: a gradient for each tensor that was given."""
    x = {n: a for n, a in draw(Problem(T=5, gate=False, initial=False)).items() if not n.startswith("d_")}
    x = {n: a.requires_grad_() for n, a in x.items()}
    _, final = delta_product(**x, output_final_state=True, backend=backend)
    grads = torch.autograd.grad(final.sum(), [x["k"], x["v"], x["beta"]])
    assert all(bool(d.abs().sum() > 0) for d in grads)
    (d_q,) = torch.autograd.grad(
        delta_product(**x, output_final_state=True, backend=backend)[1].sum(), [x["q"]], allow_unused=True
    )
    assert d_q is None or not d_q.any()
