"""The experiments by name. A new one takes its own file and one line here."""

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.experiments.cyclic import CYCLIC
from deltaproduct.experiments.dihedral import DIHEDRAL
from deltaproduct.experiments.experiment import Experiment
from deltaproduct.experiments.extrapolation import EXTRAPOLATION
from deltaproduct.experiments.fig1 import FIG1
from deltaproduct.experiments.fig5 import FIG5
from deltaproduct.experiments.parity import PARITY
from deltaproduct.experiments.recall_vs_tracking import RECALL_VS_TRACKING
from deltaproduct.experiments.s3 import S3
from deltaproduct.experiments.swaps import SWAPS
from deltaproduct.experiments.table_chomsky import TABLE_CHOMSKY
from deltaproduct.experiments.text import TEXT

_ALL = (S3, FIG1, FIG5, PARITY, TABLE_CHOMSKY, CYCLIC, DIHEDRAL, SWAPS, TEXT, RECALL_VS_TRACKING,
        EXTRAPOLATION)  # fmt: skip
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name; `UsageError` if there is none."""
    if name not in EXPERIMENTS:
        near = did_you_mean(name, EXPERIMENTS)
        raise UsageError(f"There is no experiment {name!r}{near}; choose from {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]
