"""What `ops` called its parts before goes on being importable for one release, with a warning."""

import importlib
import sys

import pytest

OLD = {
    "deltaproduct.ops.context_parallel": {
        "Spans": "ContextParallel",
        "delta_product_span": "delta_product_context_parallel",
    },
    "deltaproduct.ops.engine_program": {"Tape": "EngineProgram"},
    "deltaproduct.ops.inputs": {"check_step_inputs": "check_inputs"},
}


@pytest.mark.parametrize("module", OLD)
def test_old_names_are_the_new_things(module):
    found = importlib.import_module(module)
    for old, new in OLD[module].items():
        with pytest.warns(DeprecationWarning, match=f"{old} is now {module}.{new}"):
            assert getattr(found, old) is getattr(found, new)
        assert old not in vars(found)


def test_an_old_import_works_as_it_stood():
    for name in ("spans", "tape", "compat"):
        sys.modules.pop(f"deltaproduct.ops.{name}", None)  # which an earlier test may have left there
    with pytest.warns(DeprecationWarning):
        from deltaproduct.ops.spans import Spans  # type: ignore[import-not-found]
    with pytest.warns(DeprecationWarning):
        from deltaproduct.ops.tape import Tape  # type: ignore[import-not-found]
    with pytest.warns(DeprecationWarning):
        from deltaproduct.ops.compat import chunk_delta_rule  # type: ignore[import-not-found]
    names = [x.__module__ + "." + x.__name__ for x in (Spans, Tape, chunk_delta_rule)]
    assert names == [
        "deltaproduct.ops.context_parallel.ContextParallel",
        "deltaproduct.ops.engine_program.EngineProgram",
        "deltaproduct.ops.fla_api.chunk_delta_rule",
    ]
