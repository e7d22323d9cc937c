"""Compiled automata against automata-lib, which had nothing to do with compiling them."""

import torch
from automaton_cases import library
from compiled_sizes import most_steps

from deltaproduct.tasks.automata import Automaton
from deltaproduct.theory.compiler import compile_automaton
from deltaproduct.theory.verification import draw_words


def assert_agrees_with_library(automaton: Automaton, words: int, length: int, seed: int) -> None:
    theirs, compiled, n = library(automaton), compile_automaton(automaton), len(automaton.states)
    config = compiled.model.config
    assert config.num_hidden_layers <= max(1, 2 * n - 3) and most_steps(config) <= max(n - 1, 2)
    drawn = draw_words(automaton, words, length, seed)
    want = [
        list(theirs.read_input_stepwise([automaton.alphabet[i] for i in word], ignore_rejection=True))[1:]
        for word in drawn
    ]
    bos = torch.full((words, 1), len(automaton.alphabet))
    with torch.no_grad():
        logits, _ = compiled.model(torch.cat((bos, torch.from_numpy(drawn)), 1))
    assert logits.argmax(-1)[:, 1:].tolist() == want
