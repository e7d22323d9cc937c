"""Compiled models beside their automata (theory/verification.py), and the commands `compile` and `verify`."""

import json

import numpy as np
import pytest
import torch
from commands import run

from deltaproduct.errors import UsageError
from deltaproduct.evaluation import evaluate_length
from deltaproduct.models import SequenceModel, sequence_model
from deltaproduct.tasks import get_task
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.automaton_task import run_automaton
from deltaproduct.tasks.dot import automaton_to_dot
from deltaproduct.theory import verification
from deltaproduct.theory.compiler import Compiled, compile_automaton, compile_group
from deltaproduct.theory.verification import draw_words, guaranteed_length, load, verify

pytestmark = pytest.mark.numerical

# (ab)*: after anything else, the third state for good
AB = Automaton(("a", "b"), ("even", "odd", "lost"), 0, (0,), ((1, 2), (2, 0), (2, 2)))


def test_every_second_word_stays_alive():
    words = draw_words(AB, 6, 50, seed=0)
    assert words.shape == (6, 50) and set(np.unique(words)) == {0, 1}
    states = run_automaton(AB, torch.from_numpy(words)).numpy()
    assert [list(row) for row in states] == [AB.trace(word) for word in words.tolist()]
    assert (states[1::2] != 2).all() and (states[0::2, -1] == 2).all()
    assert not np.array_equal(words, draw_words(AB, 6, 50, seed=1))


def test_a_right_model_is_found_right_in_pieces(monkeypatch):
    compiled = compile_automaton(AB)
    whole = verify(compiled, length=300, words=4)
    monkeypatch.setattr(sequence_model, "PIECE_TOKENS", 100)
    pieces = verify(compiled, length=300, words=4)
    assert whole.wrong == pieces.wrong == 0 and whole.first_wrong is None
    assert whole.margin == pytest.approx(pieces.margin, rel=1e-3) and whole.margin > 1


def test_a_wrong_model_is_found_wrong():
    """Labels 1 and 2 of the head are exchanged: every token whose state is one of them is wrong, and no other."""
    compiled = compile_group("Z3")
    with torch.no_grad():
        compiled.model.head.weight[:] = compiled.model.head.weight[[0, 2, 1]]
    found = verify(compiled, length=200, words=3, seed=5)
    states = run_automaton(compiled.automaton, torch.from_numpy(draw_words(compiled.automaton, 3, 200, 5))).numpy()
    assert found.wrong == (states != 0).sum() and found.margin < 0
    assert found.first_wrong == 1 + np.flatnonzero((states != 0).any(0))[0]


def test_the_first_wrong_symbol_is_counted_from_the_words_start(monkeypatch):
    def off_by_two(automaton, words):
        states = run_automaton(automaton, words)
        states[1, [76, 90]] = (states[1, [76, 90]] + 1) % 3
        return states

    monkeypatch.setattr(sequence_model, "PIECE_TOKENS", 40)  # 20 symbols of each of two words
    monkeypatch.setattr(verification, "run_automaton", off_by_two)
    found = verify(compile_group("Z3"), length=100, words=2)
    assert (found.wrong, found.first_wrong) == (2, 77)


def test_what_is_no_number_is_wrong():
    compiled = compile_group("Z2")
    with torch.no_grad():
        compiled.model.head.weight.fill_(torch.nan)
    assert verify(compiled, length=10, words=2).wrong == 20


def test_compile_and_verify(capsys, tmp_path):
    for name, arguments in {"s4": ["--group", "S4"], "ab": ["--regex", "(ab)*"]}.items():
        if name == "ab":
            pytest.importorskip("automata")
        status, out, _ = run(capsys, "compile", *arguments, "--out", tmp_path / name)
        assert status == 0 and "layers: " in out and "no label was wrong" in out
        assert "float32: guaranteed to " in out and "bfloat16: guaranteed to " in out and "all right" in out
        certificate = json.loads((tmp_path / name / "certificate.json").read_text())
        assert [entry["dtype"] for entry in certificate["certificates"]] == ["float32", "bfloat16"]
        assert certificate["held"][0]["wrong"] == 0
        assert SequenceModel.from_pretrained(tmp_path / name).config.num_labels == {"s4": 24, "ab": 3}[name]
        status, out, _ = run(capsys, "verify", tmp_path / name, "--length", "3000", "--json")
        assert status == 0 and json.loads(out)["wrong"] == 0 and json.loads(out)["length"] == 3000
    status, out, _ = run(capsys, "verify", tmp_path / "s4", "--length", "100", "--backend", "reference")
    assert status == 0 and "Right on every token of 4 words of length 100" in out
    assert "Guaranteed by the certificate in float32: every word, to length " in out
    status, out, _ = run(capsys, "verify", tmp_path / "s4", "--length", "20", "--dtype", "bfloat16", "--json")
    assert status == 0 and 0 < json.loads(out)["guaranteed"] < 1000


def test_an_automaton_is_minimised_unless_its_states_are_all_that_is_asked_for(capsys, tmp_path):
    twice = Automaton(("a",), ("0", "1", "2", "3"), 0, (0, 2), ((1,), (2,), (3,), (0,)))
    for accepting, states in (([0, 2], 2), ([], 4)):
        (tmp_path / "a.json").write_text(json.dumps(twice.to_dict() | {"accepting": accepting}))
        out = tmp_path / str(states)
        assert run(capsys, "compile", "--automaton", tmp_path / "a.json", "--out", out)[0] == 0
        assert len(load(out).automaton.states) == states


def test_the_syntactic_monoid_on_request(capsys, tmp_path):
    """Of (ab)*: the empty word, a, b, ab, ba and 0."""
    pytest.importorskip("automata")
    status, out, _ = run(capsys, "compile", "--regex", "(ab)*", "--monoid", "--out", tmp_path / "m")
    assert status == 0 and "6 states, 2 symbols" in out
    assert set(load(tmp_path / "m").automaton.states) == {"(empty word)", "a", "b", "ab", "ba", "aa"}


def test_dot_is_read_as_json_is(capsys, tmp_path):
    pytest.importorskip("pydot")
    (tmp_path / "ab.dot").write_text(automaton_to_dot(AB))
    (tmp_path / "ab.json").write_text(json.dumps(AB.to_dict()))
    for kind in ("dot", "json"):
        status, out, _ = run(capsys, "compile", "--automaton", tmp_path / f"ab.{kind}", "--out", tmp_path / kind)
        assert status == 0 and "3 states, 2 symbols" in out
    assert load(tmp_path / "dot").automaton.transitions == load(tmp_path / "json").automaton.transitions


def test_from_a_run(capsys, tmp_path):
    """Of a model that is good for some hundred symbols, with keys that are off, an exact one."""
    pytest.importorskip("aalpy")
    compiled = compile_group("S3")
    weight = compiled.model.blocks[0].mixer.k_proj.weight
    with torch.no_grad():
        weight.mul_(1 + 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert 64 < verify(compiled, length=5000, words=4).first_wrong < 5000
    compiled.save(tmp_path / "worn")
    status, out, _ = run(capsys, "compile", "--from-run", tmp_path / "worn", "--out", tmp_path / "new")
    assert status == 0 and "6 states, agreement 0.99" in out and "strategy: rotation" in out
    mended = load(tmp_path / "new")
    assert mended.automaton == compiled.automaton and verify(mended, length=5000, words=4).wrong == 0
    assert run(capsys, "compile", "--from-run", tmp_path / "nowhere", "--out", tmp_path / "no")[0] == 2


@pytest.mark.slow("exhaustive")
@pytest.mark.timeout(600)
def test_a_trained_model_becomes_exact(capsys, tmp_path):
    """What `reproduce s3` trains loses the state beyond its training length; extracted and compiled it does not."""
    pytest.importorskip("aalpy")
    arguments = ["reproduce", "s3", "--seeds", "1", "--lengths", "128,8192", "--out", tmp_path / "s3"]
    assert run(capsys, *arguments)[0] == 0
    runs = json.loads((tmp_path / "s3" / "summary.json").read_text())["runs"]
    best = max(runs, key=lambda one: one["accuracy"]["128"])
    assert best["label"] == "DeltaProduct_2[-1,1]" and best["accuracy"]["128"] > 0.99 > 0.9 > best["accuracy"]["8192"]
    folder = tmp_path / "s3" / "runs" / best["name"]
    status, out, _ = run(capsys, "extract", folder, "--out", tmp_path / "learned")
    assert status == 0 and "transition monoid: S3; the automaton is its word problem" in out
    learned = tmp_path / "learned" / "automaton.json"
    assert run(capsys, "compile", "--automaton", learned, "--out", tmp_path / "mended")[0] == 0
    status, out, _ = run(capsys, "verify", tmp_path / "mended", "--length", "1000000", "--json")
    assert status == 0 and json.loads(out)["wrong"] == 0
    # The labels are the task's: the model takes the place of the trained one.
    mended = load(tmp_path / "mended").model
    assert evaluate_length(mended, get_task("S3"), 100_000, sequences=8).accuracy == 1


def test_what_a_certificate_says_of_a_dtype(tmp_path):
    certificate = {"certificates": [{"dtype": "float32", "guaranteed": None}, {"dtype": "bfloat16", "guaranteed": 7}]}
    compile_group("Z2").save(tmp_path / "z2", certificate)
    said = [guaranteed_length(tmp_path / "z2", dtype) for dtype in ("float32", "bfloat16", "float16")]
    assert said == ["every length", 7, None]
    compile_group("Z2").save(tmp_path / "none")
    assert guaranteed_length(tmp_path / "none", "float32") is None
    (tmp_path / "none" / "certificate.json").write_text("[]")
    with pytest.raises(UsageError, match="has no certificates"):
        guaranteed_length(tmp_path / "none", "float32")


def test_verify_says_what_is_wrong_and_where(capsys, tmp_path):
    compiled = compile_group("Z3")
    Compiled(compiled.model, compile_group("D3").automaton).save(tmp_path / "misfit")
    status, _, err = run(capsys, "verify", tmp_path / "misfit", "--length", "10")
    assert status == 2 and "a model of 7 tokens and 6 labels" in err
    with torch.no_grad():
        compiled.model.head.weight.neg_()
    compiled.save(tmp_path / "wrong")
    status, out, _ = run(capsys, "verify", tmp_path / "wrong", "--length", "10", "--words", "2")
    assert status == 1 and out.startswith("Wrong: 20 of 20 tokens, the first after 1 symbols.")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "not none"),
        (["--group", "S3", "--regex", "a*"], "not group and regex"),
        (["--group", "S3", "--alphabet", "ab"], "--alphabet goes with --regex"),
        (["--group", "S3", "--monoid"], "a word problem is one already"),
        (["--group", "S3", "--max-layers", "0"], "leave nothing"),
        (["--group", "S5", "--num-householder", "2"], "permutation: needs 4 Householder factors per token, at most 2"),
        (["--group", "Q8"], "Q8"),
        (["--automaton", "nowhere.json"], "nowhere.json"),
        (["--automaton", "nowhere.dot"], "nowhere.dot"),
        (["--from-run", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_clear_line(capsys, tmp_path, arguments, word):
    status, _, err = run(capsys, "compile", *arguments, "--out", tmp_path / "new")
    assert status == 2 and word in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    status, _, err = run(capsys, "compile", "--group", "S3", "--out", tmp_path / "mine")
    assert status == 2 and "already exists" in err
    with pytest.raises(UsageError, match="At least one word"):
        verify(compile_group("Z2"), length=0)
