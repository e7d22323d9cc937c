"""Which room may import which (the README's tour), read from the source; and what importing the package may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deltaproduct

ROOT = Path(deltaproduct.__file__).parent
RANKS = (
    ("ops",),
    ("tasks", "corpus"),
    ("layers", "plots"),
    ("models",),
    ("evaluation",),
    ("theory",),
    ("training", "analysis"),
    ("launchers",),
    ("experiments", "benchmarks"),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
# Modules at the top, which every room may import.
LEAVES = {"errors", "files", "late", "machine", "memory", "progress", "renamed", "seeds"}


def targets(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """The modules of the package that a source imports, at its top or inside a function, as dotted names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            # `from deltaproduct import ops` names a room, `from deltaproduct.ops import delta_product` a thing in one.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "deltaproduct" else {base}
    return {name for name in found if name.split(".")[0] == "deltaproduct"}


def offence(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`, both dotted names below the package; None if it may."""
    room, other = (name.split(".")[1] if "." in name else "" for name in (importer, imported))
    if other in ("", "__version__") or other == room or other in LEAVES - {room}:
        return None
    if room == "":
        return None  # the package itself, which offers names of its rooms, late (tests/test_renamed.py)
    if room in LEAVES:
        return "a leaf imports leaves alone"
    if other not in RANK:
        return f"{other} is no room of the layout"
    if RANK[other] < RANK[room]:
        return None
    return f"{room} is not above {other}"


def offences(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        for name in sorted(targets(ast.parse(path.read_text(encoding="utf-8")), module, is_package)):
            if why := offence(module, name):
                found.append(f"{module} imports {name}: {why}")
    return found


def test_imports_run_one_way():
    assert offences(ROOT) == []


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders <= set(RANK), "a new room needs a rank here"
    assert {path.stem for path in ROOT.glob("*.py")} <= LEAVES | {"__init__", "__main__"}


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("deltaproduct.ops.x", "from deltaproduct.layers import MIXERS", False),
        ("deltaproduct.ops.x", "def f():\n    import deltaproduct.layers.parts", False),
        ("deltaproduct.ops.x", "from ..layers import parts", False),
        ("deltaproduct.ops.x", "from . import inputs\nfrom .inputs import pad_time", True),
        ("deltaproduct.ops.x", "from deltaproduct import tasks", False),
        ("deltaproduct.layers.x", "from deltaproduct.plots import figures", False),
        ("deltaproduct.models.x", "from deltaproduct.evaluation import scores", False),
        ("deltaproduct.evaluation.x", "from deltaproduct.models import SequenceModel", True),
        ("deltaproduct.cli.x", "from deltaproduct import delta_product", False),
        ("deltaproduct.files", "from deltaproduct.ops import delta_product", False),
        ("deltaproduct.machine", "import deltaproduct\nfrom deltaproduct.errors import UsageError", True),
        ("deltaproduct.training.x", "from deltaproduct.experiments import runner", False),
        ("deltaproduct.cli.x", "from deltaproduct.experiments import runner\nimport torch", True),
    ],
)
def test_the_rule_itself(module, source, allowed):
    found = [offence(module, name) for name in targets(ast.parse(source), module, False)]
    assert (not any(found)) == allowed, found


@pytest.mark.slow("processes")
def test_importing_is_light():
    # rich and tyro belong to the command line and to training, the others to what few people install.
    heavy = {"matplotlib", "plotly", "rich", "tyro", "transformers", "triton", "automata", "chess", "pandas"}
    # torch itself may import some of these (triton, where it is installed): only what the package adds counts.
    code = """
import sys, torch, cattrs
before = set(sys.modules)
import deltaproduct
top = set(sys.modules) - before
from deltaproduct.models import SequenceModel
from deltaproduct.ops import delta_product
print(*top, ",", *set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    top, rooms = ({name.split(".")[0] for name in names.split()} for names in done.stdout.split(","))
    assert top <= {"deltaproduct"}  # its version is read by tools that need nothing else
    assert "deltaproduct" in rooms and not rooms & heavy
