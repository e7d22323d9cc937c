"""Every place of the package that could make code of data is one that SECURITY.md speaks of."""

import ast
from pathlib import Path

import deltaproduct

ROOT = Path(deltaproduct.__file__).parent
# Calls that run, import or unpickle what their arguments say: functions of Python's own, and others as `module.name` or
# by a name alone.
BUILT_IN = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "import_module", "CDLL", "load_library", "aoti_load_package", "Unpickler",
    "pickle_load", "pickle.load", "pickle.loads", "dcp.load", "torch.load", "np.load", "yaml.load", "yaml.unsafe_load",
    "os.system", "os.popen", "sympify", "parse_expr", "run_path", "run_module", "load_inline", "cpp_extension.load",
}  # fmt: skip
ALLOWED = {
    "training/pickled_checkpoint.py": {"dcp.load", "torch.load"},  # with a flag that says so
    "launchers/launcher.py": {"pickle.loads"},  # of this program's own processes, or a cluster's
    "launchers/ray_tune.py": {"pickle.loads"},
    "launchers/slurm_ranks.py": {"pickle_load"},
    "launchers/__init__.py": {"import_module"},  # of names in the code, here and in the next three
    "cli/main.py": {"import_module"},
    "late.py": {"import_module"},
    "renamed.py": {"import_module"},  # of names in its table
    "models/weights.py": {"torch.load"},  # weights_only
    "models/export.py": {"aoti_load_package"},  # of what was written a moment before
    "ops/native/library.py": {"CDLL"},  # DELTAPRODUCT_ENGINE
    "machine.py": {"CDLL"},  # of the C library, which Python has loaded already
    "files.py": {"CDLL"},
}


def called(node: ast.Call) -> set[str]:
    """The names under which what is called may be in CALLS."""
    if isinstance(node.func, ast.Attribute):
        name, place = node.func.attr, ast.unparse(node.func.value)
        owner = place if place.startswith("safetensors.") else place.split(".")[-1]  # safetensors.torch is not torch
        return {name, f"{owner}.{name}"} - BUILT_IN
    return {node.func.id} if isinstance(node.func, ast.Name) else set()


def found(source: str) -> tuple[set[str], list[str]]:
    """Of a module: the calls of CALLS in it, and keywords that make a call run code or unpickle."""
    calls, keywords = set(), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        names = called(node)
        calls |= names & (CALLS | BUILT_IN)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if "torch.load" in names and given.get("weights_only") != "True":
            keywords.append(ast.unparse(node))
        if {"allow_pickle", "trust_remote_code", "shell"} & {name for name, value in given.items() if value != "False"}:
            keywords.append(ast.unparse(node))
    return calls, keywords


def test_nothing_else_makes_code_of_data():
    there = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    calls = {name: found(text) for name, text in there.items()}
    assert {name: its for name, (its, _) in calls.items() if its} == ALLOWED
    assert [keyword for _, keywords in calls.values() for keyword in keywords] == []


def test_what_is_looked_for_is_found():
    for text in ("torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
                 "AutoTokenizer.from_pretrained(n, trust_remote_code=x)", "subprocess.run(c, shell=True)"):  # fmt: skip
        assert found(text)[1], text
    assert found("pickle.loads(x); eval(x); torch._inductor.aoti_load_package(x)")[0] == {
        "pickle.loads", "eval", "aoti_load_package"
    }  # fmt: skip
    assert found("re.compile(x); model.eval(); block.compile(); safetensors.torch.load(x)") == (set(), [])
