"""Old names of what has moved, and the names that `import deltaproduct` offers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import deltaproduct
from deltaproduct.renamed import MOVED, RenamedModules, new_name, renamed_names


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_is_the_same_under_its_old_name(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {MOVED[old]}; the old name goes with the next release"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(MOVED[old]) and found.__name__ == MOVED[old]


def test_what_lies_below_a_moved_package_is_not_imported_twice():
    for name in ("deltaproduct.tasks.corpus", "deltaproduct.tasks.corpus.reader"):
        sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=r"tasks.corpus is now deltaproduct.corpus;"):
        importlib.import_module("deltaproduct.tasks.corpus")
    with pytest.warns(DeprecationWarning, match=r"tasks.corpus.reader is now deltaproduct.corpus.reader;"):
        old = importlib.import_module("deltaproduct.tasks.corpus.reader")
    assert old is importlib.import_module("deltaproduct.corpus.reader")


def test_nothing_else_is_looked_for():
    assert new_name("deltaproduct.tasks.corpuses") is None and new_name("numpy") is None
    assert sum(isinstance(finder, RenamedModules) for finder in sys.meta_path) == 1
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("deltaproduct.tasks.nonsense")


def test_an_old_name_in_a_module_warns():
    here = ModuleType("here")
    here.New, here.__getattr__ = (
        5,
        renamed_names("here", {"Old": "New", "Elsewhere": "deltaproduct.seeds.weights_seed"}),
    )
    sys.modules["here"] = here
    try:
        with pytest.warns(DeprecationWarning, match=r"here.Old is now here.New; the old name goes with"):
            assert here.Old == 5
        with pytest.warns(DeprecationWarning, match=r"here.Elsewhere is now deltaproduct.seeds.weights_seed"):
            assert here.Elsewhere is importlib.import_module("deltaproduct.seeds").weights_seed
        with pytest.raises(AttributeError, match="module 'here' has no attribute 'other'"):
            _ = here.other
    finally:
        del sys.modules["here"]


def old_names():
    """(module, old name, new name) of every `renamed_names(__name__, {…})` and `late(…, renamed={…})` in the source."""
    root = Path(deltaproduct.__file__).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        if "renamed_names(" not in text and "renamed=" not in text:
            continue  # parsing all files takes seconds, in every process that collects the tests
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            tables = [k.value for k in node.keywords if k.arg == "renamed" and node.func.id == "late"]
            if node.func.id == "renamed_names":
                tables += node.args[1:2]
            for table in tables:
                if isinstance(table, ast.Dict):
                    yield from ((module, *pair) for pair in ast.literal_eval(table).items())


@pytest.mark.parametrize(("module", "old", "new"), list(old_names()))
def test_every_old_name_leads_to_something(module, old, new):
    where, _, name = new.rpartition(".")
    try:
        wanted = getattr(importlib.import_module(where or module), name)
    except ImportError as e:
        pytest.skip(f"needs {e.name}")
    with pytest.warns(DeprecationWarning, match=f"^{module}.{old} is now {where or module}.{name};") as caught:
        assert getattr(importlib.import_module(module), old) is wanted
    assert caught[0].filename == __file__


def test_the_packages_own_names_are_those_of_its_rooms():
    from deltaproduct import layers, models, ops, tasks, theory, training

    rooms = (layers, models, ops, tasks, theory, training)
    for name in deltaproduct.__all__:
        assert any(getattr(room, name, None) is getattr(deltaproduct, name) for room in rooms), name
    assert set(deltaproduct.__all__) <= set(dir(deltaproduct))


@pytest.mark.slow("processes")
def test_importing_the_package_imports_no_pytorch():
    seen = "print('torch' in sys.modules)"
    code = f"import sys, deltaproduct; {seen}; deltaproduct.delta_product; {seen}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
