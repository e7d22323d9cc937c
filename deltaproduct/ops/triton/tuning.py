"""Which block sizes and how many warps a kernel is compiled with: measured once per shape, and remembered on disk.

The candidates are those that keep most in registers on compute capability 9.0, the best of them first; what they were
compiled to is in `docs/LOG.md`. None has been timed on a GPU yet.
"""

from collections.abc import Callable, Sequence
from typing import Any

import triton

from deltaproduct.ops.triton.layout import tile
from deltaproduct.ops.triton.parts import INTERPRETED

# What decides which candidate is the best, or comes close: not how many steps or heads there are.
SHAPE = ["K", "V", "C", "MODE"]

# Arguments that change from batch to batch: a kernel is the same for all of their values.
LENGTHS = ["T", "chunks", "segments"]

Candidates = Sequence[tuple[int | None, int, int]]


def tuned(
    candidates: Candidates, wide: Candidates = (), *, key: Sequence[str] = (), restore: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """A kernel that is tried with each candidate (columns of V in a block or None, warps, stages), once per shape.

    Args:
        wide: the candidates where operands are wider than bfloat16, if those are others.
        key: constants of the kernel, beside those of SHAPE, that decide what it does.
        restore: tensors that it may read and write, and that are put back while it is tried.
    """

    def config(columns: int | None, warps: int, stages: int) -> triton.Config:
        return triton.Config({} if columns is None else {"BV": columns}, num_warps=warps, num_stages=stages)

    def that_fit(configs: list[triton.Config], args: dict[str, Any], **meta: Any) -> list[triton.Config]:
        """Those of the mode, and none with more columns than there are."""
        chosen = wide if wide and meta["MODE"] != "fast" else candidates
        found: dict[str, triton.Config] = {}
        for columns, warps, stages in chosen:
            fitting = config(None if columns is None else min(columns, tile(meta["V"])), warps, stages)
            found.setdefault(str(fitting), fitting)
        return list(found.values())

    configs = [config(*candidate) for candidate in dict.fromkeys((*candidates, *wide))]
    prune = {"early_config_prune": that_fit}
    if INTERPRETED:  # nothing to measure; narrow blocks, so that small problems have several
        configs, prune = [config(None if candidates[0][0] is None else 16, 4, 1)], {}

    def decorate(kernel: Any) -> Any:
        names = [name for name in (*SHAPE, *key) if name in kernel.arg_names]
        return triton.autotune(
            configs, key=names, prune_configs_by=prune, restore_value=list(restore), cache_results=True
        )(kernel)

    return decorate
