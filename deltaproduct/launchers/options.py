"""What a user may ask of a cluster: names, what their values are, and the reading of them."""

from collections.abc import Mapping
from typing import Any

from deltaproduct.errors import UsageError, did_you_mean

# Named as submitit names them. What is not here can be set by sbatch's own variables, such as SBATCH_RESERVATION.
SLURM_OPTIONS: Mapping[str, type] = {
    "cluster": str,  # slurm, or local: processes of this machine, to try what a job would do
    "timeout_min": int,  # of one job; when it is over, the job goes back into the queue and then continues
    "cpus_per_task": int,  # also the run's threads
    "gpus_per_node": int,
    "mem_gb": float,
    "partition": str,
    "account": str,
    "qos": str,
    "constraint": str,
    "gres": str,
    "nodelist": str,
    "exclude": str,
    "dependency": str,
    "comment": str,
    "mail_type": str,
    "mail_user": str,
}
RAY_OPTIONS: Mapping[str, type] = {
    "address": str,  # of a running cluster, "auto" for the one that this machine belongs to; none: start Ray here
    "cpu": int,  # cores of a run, also its threads; 1 if not given
    "gpu": float,  # a share of one if below 1; 1 if not given and there are any
}
# The same for one run on many ranks.
SLURM_RANK_OPTIONS: Mapping[str, type] = {
    **SLURM_OPTIONS,
    "nodes": int,  # 1 if not given
    "tasks_per_node": int,  # ranks of each node; one for each of its GPUs if not given
}
RAY_RANK_OPTIONS: Mapping[str, type] = {
    "address": str,
    "num_workers": int,  # ranks; one for each of the cluster's GPUs if not given
    "cpu": int,  # of each rank
    "gpu": int,  # of each rank: ranks cannot share one
    "max_failures": int,  # how often lost ranks are started again, from the last checkpoint; 0 if not given
}


def parse_options(text: str | None) -> dict[str, str]:
    """ "partition=gpu,exclude=n1,n2" → {"partition": "gpu", "exclude": "n1,n2"}: what has no name belongs to the value
    before it."""
    options: dict[str, str] = {}
    name = None
    if text is not None and not text.strip():
        raise UsageError("Options are written NAME=VALUE,NAME=VALUE, and none is given.")
    for part in (text or "").split(",") if text else ():
        if not part.strip():
            raise UsageError(
                f"Options are written NAME=VALUE,NAME=VALUE, and a comma of {text!r} has nothing beside it."
            )
        before, sign, after = part.partition("=")
        if sign and before.strip():
            name = before.strip()
            if name in options:
                raise UsageError(f"The option {name} is given twice.")
            options[name] = after.strip()
        elif name is not None:
            options[name] += f",{part}"
        else:
            raise UsageError(f"Options are written NAME=VALUE,NAME=VALUE, not {text!r}.")
    return options


def typed(options: Mapping[str, Any], kinds: Mapping[str, type], launcher: str) -> dict[str, Any]:
    """The options as values of their kinds; `UsageError` for one that the launcher does not have or cannot be read."""
    if options and not kinds:
        raise UsageError(f"The launcher {launcher} has no options, so {', '.join(options)} cannot be set.")
    values = {}
    for name, value in options.items():
        if name not in kinds:
            near = did_you_mean(name, kinds)
            raise UsageError(f"The launcher {launcher} has no option {name!r}{near}; it has {', '.join(kinds)}.")
        try:
            values[name] = kinds[name](value)
        except (TypeError, ValueError):
            raise UsageError(f"The option {name} must be {WORDS[kinds[name]]}, not {value!r}.") from None
        if kinds[name] is str and not values[name]:
            raise UsageError(f"The option {name} has no value.")
        if kinds[name] is not str and not 0 <= values[name] < float("inf"):
            raise UsageError(f"The option {name} must be {WORDS[kinds[name]]} of at least 0, not {value}.")
    return values


WORDS = {int: "a whole number", float: "a number"}
