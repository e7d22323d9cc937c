"""The experiments by name. A new one takes a function that returns its jobs, and one line here."""

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.experiments.experiment import Experiment
from deltaproduct.experiments.extrapolation import EXTRAPOLATION
from deltaproduct.experiments.formal_languages import PARITY, TABLE_CHOMSKY
from deltaproduct.experiments.recall_vs_tracking import RECALL_VS_TRACKING
from deltaproduct.experiments.text import TEXT
from deltaproduct.experiments.word_problems import CYCLIC, DIHEDRAL, FIG1, FIG5, S3, SWAPS

_ALL = (S3, FIG1, FIG5, PARITY, TABLE_CHOMSKY, CYCLIC, DIHEDRAL, SWAPS, TEXT, RECALL_VS_TRACKING,
        EXTRAPOLATION)  # fmt: skip
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name; `UsageError` if there is none."""
    if name not in EXPERIMENTS:
        near = did_you_mean(name, EXPERIMENTS)
        raise UsageError(f"There is no experiment {name!r}{near}; choose from {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]
