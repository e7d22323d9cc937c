"""Certificates as text, for tests that compare machines: `python published_certificates.py NAME ...`."""

import json
import sys
from dataclasses import asdict

from automaton_cases import from_maps

from deltaproduct.tasks.regular import modular_arithmetic
from deltaproduct.theory.certificate import certificates
from deltaproduct.theory.compiler import compile_automaton, compile_group

MODELS = {
    "Z60": lambda: compile_group("Z60"),
    "S4": lambda: compile_group("S4"),
    "a cascade": lambda: compile_automaton(from_maps((1, 2, 3, 0), (1, 0, 3, 3), (0, 2, 1, 1))),
    "D5 in two layers": lambda: compile_group("D5", "two-layer"),
    "Z60 in two layers": lambda: compile_group("Z60", "two-layer"),
    "A5": lambda: compile_group("A5"),
    "S5": lambda: compile_group("S5"),
    "arithmetic": lambda: compile_automaton(modular_arithmetic(5)),
}


def published(name: str) -> str:
    """What is published of a model, as text."""
    compiled = MODELS[name]()
    return json.dumps([asdict(found) for found in certificates(compiled.model, compiled.automaton)])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(published(name))
