"""`deltaproduct explain`: what it prints, and that the commands it gives are understood and do what they say."""

import itertools
import json
import shlex

import pytest
from commands import run
from theorem_cases import COUNTING_PROOF, DIAGONAL, TASKS, classes

from deltaproduct.cli.main import main
from deltaproduct.errors import UsageError
from deltaproduct.theory.compiler import compile_group
from deltaproduct.theory.limits import Limits
from deltaproduct.theory.theorems.explanation import explain
from deltaproduct.theory.theorems.model_class import ModelClass
from deltaproduct.theory.verification import verify


def test_text(capsys):
    status, out, _ = run(capsys, "explain", "--group", "A5", "--num-householder", "2")
    assert status == 0 and out.startswith("Possible: ") and "forbidden by" not in out and "to see it fail" not in out
    assert "P1, Theorem 4: A5" in out and "arXiv 2502.10297" in out
    assert "\n  deltaproduct compile --group A5 --num-householder 2 --out exact/A5\n" in out
    assert "none: compile has no construction" in run(capsys, "explain", "--group", "S5", "--moves", "2")[1]
    status, out, _ = run(capsys, "explain", "--group", "S5", "--moves", "3", "--layers", "1")
    assert status == 0 and out.startswith("Impossible: ") and "at most 3 points" in out and "allowed by" not in out
    assert "to see it fail\n  deltaproduct train --task S5_limit_to_3 " in out
    assert "possible instead\n  DeltaProduct_2[-1,1] with 1 layer\n" in out
    status, out, _ = run(capsys, "explain", "--group", "S3", "--num-householder", "3", "--no-allow-neg-eigval")
    assert status == 0 and out.startswith("No theorem decides ") and "to try it\n" in out
    theorems, experiments = out.split("measured by training: experiments, not theorems")
    assert "Figure 12" in experiments and "Figure" not in theorems


def test_json(capsys):
    status, out, _ = run(capsys, "explain", "--group", "Z4", "--transition", "diagonal", "--gated", "--json")
    found = json.loads(out)
    assert status == 0 and found["verdict"] == "impossible" and found["weights"] is None
    assert found["experiment"].startswith("deltaproduct train --task Z4 --mixer mamba --allow-neg-eigval --steps")
    assert found["model"] == {"num_householder": 1, "layers": 1, "allow_neg_eigval": True, "gated": True} | DIAGONAL
    assert [s["source"] for s in found["statements"]] == [COUNTING_PROOF] and found["statements"][0]["reason"]
    assert found["nearest"][0]["layers"] == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--group", "Q8"], "Q8"),
        (["--group", "S1"], "S1"),
        (["--group", "S9"], "362,880"),
        (["--group", "S3", "--layers", "0"], "layers must be at least 1, not 0"),
        (["--group", "S3", "--num-householder", "-1"], "num_householder"),
        (["--group", "S3", "--transition", "dense"], "dense"),
        (["--group", "S3", "--transition", "diagonal", "--num-householder", "2"], "diagonal"),
        (["--group", "S5", "--moves", "5"], "less than the 5 points"),
        (["--group", "S5", "--moves", "1"], "at least 2"),
        (["--group", "A5", "--moves", "3"], "symmetric group"),
        (["--group", "S3_x_Z2", "--moves", "2"], "symmetric group"),
        (["--layers", "2"], "group"),
    ],
)
def test_mistakes_are_one_clear_line(capsys, arguments, word):
    status, out, err = run(capsys, "explain", *arguments)
    assert status == 2 and out == "" and word in err and err.count("\n") == 1


@pytest.mark.slow("exhaustive")
def test_the_commands_that_it_gives_are_understood(monkeypatch):
    """One of each form, for parsing takes a while."""
    started, forms = [], {}
    for command in ("train.Train", "compile.Compile"):
        monkeypatch.setattr(f"deltaproduct.cli.{command}.run", lambda self: started.append(self))
    for (name, moves), model in itertools.product(TASKS, classes(3, 2)):
        found = explain(name, model, moves=moves)
        assert (found.experiment is None) == (found.verdict == "possible")
        assert found.weights is None or found.verdict == "possible"
        for command in filter(None, (found.weights, found.experiment)):
            words = shlex.split(command)[1:]
            forms[(*(word for word in words if word.startswith("--")), moves)] = (words, name, model)
    assert len(forms) > 20
    for words, name, model in forms.values():
        main(words)
        made = started.pop()
        assert model.diagonal or made.num_householder == model.num_householder
        if words[0] == "train":
            assert made.mixer == ("mamba" if model.diagonal else "deltaproduct")
            assert made.allow_neg_eigval == model.allow_neg_eigval
            assert getattr(made, "use_forget_gate", False) == (model.gated and not model.diagonal)
            assert made.num_hidden_layers == model.layers and made.task.split("_")[0] == name.split("_")[0]
        else:
            assert made.group == name and (made.strategy == "two-layer") == ("two-layer" in words)


@pytest.mark.parametrize(
    ("name", "n", "layers", "strategy"),
    [("A5", 3, 1, "auto"), ("S3_x_Z2", 1, 2, "two-layer"), ("Z60", 1, 2, "two-layer"), ("S4", 1, 4, None),
     ("A4", 1, 4, "shallow"), ("S5", 1, 4, None), ("S5", 3, 3, None), ("S3_x_D4", 1, 2, "two-layer"),
     ("S7", 6, 1, None)],
)  # fmt: skip
def test_weights_are_offered_where_the_compiler_has_them(name, n, layers, strategy):
    found = explain(name, ModelClass(n, layers))
    assert found.verdict == "possible"
    try:
        compiled = compile_group(name, strategy or "auto", Limits(num_householder=n, layers=layers))
    except UsageError:
        assert strategy is found.weights is None
    else:
        words = shlex.split(found.weights)
        assert words[:6] == ["deltaproduct", "compile", "--group", name, "--num-householder", str(n)]
        assert words[6:] == (["--strategy", strategy] if layers > 1 else []) + ["--out", f"exact/{name}"]
        assert verify(compiled, length=64, words=2).wrong == 0


def test_no_weights_are_offered_for_what_the_compiler_does_not_know():
    assert explain("S5", ModelClass(1), moves=2).verdict == "possible"
    assert explain("S5", ModelClass(1), moves=2).weights is None
    assert explain("Z4", ModelClass(layers=2, transition="diagonal")).weights is None
