"""Automata for tests: small ones, random ones, the same in automata-lib, and how often a compiled one errs."""

import random

import pytest
import torch

from deltaproduct.models import SequenceModel
from deltaproduct.tasks.automata import Automaton

PARITY = Automaton(("0", "1"), ("even", "odd"), 0, (0,), ((0, 1), (1, 0)))


def random_automaton(rng: random.Random, n: int, s: int) -> Automaton:
    rows = tuple(tuple(rng.randrange(n) for _ in range(s)) for _ in range(n))
    accepting = tuple(q for q in range(n) if rng.random() < 0.4)
    return Automaton(tuple("abcdefgh"[:s]), tuple(f"q{i}" for i in range(n)), rng.randrange(n), accepting, rows)


def library(automaton: Automaton):
    dfa = pytest.importorskip("automata.fa.dfa")
    return dfa.DFA(
        states=set(range(len(automaton.states))),
        input_symbols=set(automaton.alphabet),
        transitions={q: dict(zip(automaton.alphabet, row)) for q, row in enumerate(automaton.transitions)},
        initial_state=automaton.initial,
        final_states=set(automaton.accepting),
    )


def from_maps(*maps, initial=0):
    names = tuple(map(str, range(len(maps[0]))))
    return Automaton(tuple("abcdefgh"[: len(maps)]), names, initial, (0,), tuple(zip(*maps, strict=True)))


def wrong_labels(model: SequenceModel, automaton: Automaton, words: list[list[int]]) -> int:
    """How many labels of these words are not the automaton's states."""
    bos = len(automaton.alphabet)
    with torch.no_grad():
        logits, _ = model(torch.tensor([[bos, *word] for word in words]))
    return int((logits.argmax(-1)[:, 1:] != torch.tensor([automaton.trace(word) for word in words])).sum())
