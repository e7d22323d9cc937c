"""Certificates at the edge: one state, one label, one symbol, states that nothing changes, and heads that hold
nothing."""

import itertools
import json

import pytest
import torch
from commands import run

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.theory.certificate import certificates
from deltaproduct.theory.compiler import compile_automaton
from deltaproduct.theory.verification import verify


def automaton(*rows: tuple[int, ...], initial: int = 0) -> Automaton:
    return Automaton(tuple("abc"[: len(rows[0])]), tuple(map(str, range(len(rows)))), initial, (0,), rows)


@pytest.mark.parametrize("symbols", [1, 3])
def test_one_state_is_certain_at_every_length(symbols):
    compiled = compile_automaton(automaton((0,) * symbols))
    for certificate in certificates(compiled.model, compiled.automaton):
        assert certificate.complete and certificate.wrong == 0 and certificate.guaranteed is None
        assert certificate.margin is None  # there is no other label
    assert verify(compiled, length=100).margin is None


def test_one_state_on_the_command_line(capsys, tmp_path):
    """JSON knows no infinite margin; and one is one state and one symbol."""
    pytest.importorskip("automata")
    status, out, _ = run(capsys, "compile", "--regex", "a*", "--out", tmp_path / "x")
    assert status == 0 and out.startswith("1 state, 1 symbol →") and "tried: 1 symbol in 1 situation, which" in out
    assert out.count("guaranteed to every length (one label only, drift at most 0 a token)") == 2
    read = json.loads((tmp_path / "x" / "certificate.json").read_text(), parse_constant=pytest.fail)
    assert [entry["guaranteed"] for entry in read["certificates"]] == [None, None]
    status, out, _ = run(capsys, "verify", tmp_path / "x", "--length", "20")
    assert status == 0 and "there is one label only" in out and "every word, to every length" in out
    status, out, _ = run(capsys, "verify", tmp_path / "x", "--length", "20", "--json")
    assert status == 0 and json.loads(out, parse_constant=pytest.fail)["margin"] is None


@pytest.mark.parametrize(("states", "symbols"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_every_small_automaton_is_certain(states, symbols):
    """All tables, from both states: at every length in both dtypes, or to some thousand symbols in float32."""
    for flat in itertools.product(range(states), repeat=states * symbols):
        rows = tuple(flat[i : i + symbols] for i in range(0, len(flat), symbols))
        for initial in range(min(states, 2)):
            compiled = compile_automaton(automaton(*rows, initial=initial))
            first, second = certificates(compiled.model, compiled.automaton)
            assert first.complete and first.wrong == second.wrong == 0, (rows, initial)
            assert first.guaranteed is None or first.guaranteed > 10_000, (rows, initial)
            assert second.guaranteed is None or second.guaranteed > 10, (rows, initial)


def test_a_head_that_cannot_be_read_is_not_certain():
    """Without queries there are no signs, and only what is exact stays as it was tried: the parity, here."""
    compiled = compile_automaton(automaton((1, 2, 0), (2, 0, 1), (0, 1, 2)))
    with torch.no_grad():
        compiled.model.blocks[0].mixer.q_proj.weight.zero_()
    certificate = certificates(compiled.model, compiled.automaton)[0]
    assert certificate.wrong > 0 and certificate.guaranteed == 0


@pytest.mark.parametrize("strategy", ["rotation", "two-layer", "shallow"])
@pytest.mark.parametrize("rows", [((0,),), ((0, 0),), ((0,), (1,), (2,))])
def test_nothing_to_follow_is_one_clear_line(strategy, rows):
    try:
        compiled = compile_automaton(automaton(*rows), strategy)
    except UsageError as e:
        assert "nothing to follow" in str(e) and "\n" not in str(e)
    else:
        assert strategy == "shallow" and len(rows) > 1
        assert verify(compiled, length=100).wrong == 0
