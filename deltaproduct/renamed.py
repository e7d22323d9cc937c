"""Old names of what has moved: they go on being importable for one release, with a warning."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old name → new name; what lies below the old one lies below the new one.
MOVED = {
    "deltaproduct.models.decoder": "deltaproduct.models.decoding",
    "deltaproduct.models.hf.listed": "deltaproduct.models.hf.manifest",
    "deltaproduct.benchmarks.decode": "deltaproduct.benchmarks.op_step",
    "deltaproduct.benchmarks.peers": "deltaproduct.benchmarks.implementations",
    "deltaproduct.benchmarks.problem": "deltaproduct.benchmarks.workload",
    "deltaproduct.benchmarks.step": "deltaproduct.benchmarks.generate",
    "deltaproduct.evaluation.ranges": "deltaproduct.evaluation.lengths",
    "deltaproduct.evaluation.tasks": "deltaproduct.evaluation.lm_eval_tasks",
    "deltaproduct.experiments.cyclic": "deltaproduct.experiments.word_problems",
    "deltaproduct.experiments.dihedral": "deltaproduct.experiments.word_problems",
    "deltaproduct.experiments.fig1": "deltaproduct.experiments.word_problems",
    "deltaproduct.experiments.fig5": "deltaproduct.experiments.word_problems",
    "deltaproduct.experiments.formal": "deltaproduct.experiments.formal_languages",
    "deltaproduct.experiments.groups": "deltaproduct.experiments.word_problems",
    "deltaproduct.experiments.launchers": "deltaproduct.launchers",
    "deltaproduct.models.checkpoints": "deltaproduct.models.fla.checkpoint",
    "deltaproduct.models.fla_config": "deltaproduct.models.fla.config",
    "deltaproduct.ops.compat": "deltaproduct.ops.fla_api",
    "deltaproduct.ops.spans": "deltaproduct.ops.context_parallel",
    "deltaproduct.ops.tape": "deltaproduct.ops.engine_program",
    "deltaproduct.experiments.parity": "deltaproduct.experiments.formal_languages",
    "deltaproduct.experiments.s3": "deltaproduct.experiments.word_problems",
    "deltaproduct.experiments.swaps": "deltaproduct.experiments.word_problems",
    "deltaproduct.experiments.table_chomsky": "deltaproduct.experiments.formal_languages",
    "deltaproduct.tasks.corpus": "deltaproduct.corpus",
    "deltaproduct.tasks.formal": "deltaproduct.tasks.regular",
    "deltaproduct.theory.constructions.plan": "deltaproduct.theory.limits",
    "deltaproduct.theory.validate": "deltaproduct.theory.limits",
    "deltaproduct.training.distributed_checkpoint": "deltaproduct.training.checkpoint",
    "deltaproduct.training.language": "deltaproduct.training.objectives.language",
    "deltaproduct.training.log": "deltaproduct.training.metrics",
    "deltaproduct.training.memory": "deltaproduct.training.loop",
    "deltaproduct.training.shards": "deltaproduct.training.checkpoint",
}


class RenamedModules(MetaPathFinder, Loader):
    """Finds a module under its old name: it is the very module of the new name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if new_name(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = new_name(old)
        assert new is not None  # or it would not have been found
        warnings.warn(f"{old} is now {new}; the old name goes with the next release.", DeprecationWarning, stacklevel=2)
        # The import system takes what lies here once this returns.
        sys.modules[old] = import_module(new)


def new_name(old: str) -> str | None:
    """What a module is called now; None if it has not moved."""
    for before, after in MOVED.items():
        if old == before or old.startswith(before + "."):
            return after + old.removeprefix(before)
    return None


def install() -> None:
    """Have old names be found: first, as otherwise a folder that moved would be searched for second copies."""
    if not any(isinstance(finder, RenamedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, RenamedModules())


def renamed_names(module: str, names: Mapping[str, str], stacklevel: int = 2) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562) that gives what it exports under old names as well, with a warning.

    Args:
        module: its `__name__`.
        names: old name → new name, of this module, or with dots where another module has it.
        stacklevel: 2, or more where another `__getattr__` calls this one.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, _, new = names[name].rpartition(".")
        where = where or module
        warnings.warn(
            f"{module}.{name} is now {where}.{new}; the old name goes with the next release.",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
        return getattr(import_module(where), new)

    return __getattr__
