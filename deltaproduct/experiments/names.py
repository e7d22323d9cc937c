"""What the command line's help says of the experiments, for which it need not wait for PyTorch."""

from typing import Literal

Scale = Literal["cpu", "cpu-long", "paper"]
# Those of `registry.EXPERIMENTS`, in its order.
EXPERIMENT_NAMES = ("s3", "fig1", "fig5", "parity", "table-chomsky", "cyclic", "dihedral", "swaps", "text",
                    "recall-vs-tracking", "extrapolation")  # fmt: skip
