"""Word problems of groups: which models track them past the training length?

* s3: the papers' central claim at its smallest (arXiv 2502.10297, Fig. 5).
* fig1: which permutation groups one layer learns, S5 with n_h = 1 … 4 (arXiv 2502.10297, Fig. 1, left).
* fig5: S3, S4, A5 and S5, n_h = 1 … 4 in one layer, 1 … 10 layers with n_h = 1, and the range [0,1] (arXiv 2502.10297,
  Fig. 5 and 12).
* cyclic: counting modulo 5 and 60 (arXiv 2411.12537, section 5.2, has Z60).
* dihedral: symmetries of a regular polygon, by two reflections per token in one layer or one in two layers (arXiv
  2502.10297, Theorem 7).
* swaps: how much each token may move, and S5 with single reflections (arXiv 2411.12537, section 5.2 and Theorem 3).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from deltaproduct.experiments.experiment import ALL_SCALES, Experiment, Scale
from deltaproduct.experiments.recipes import (
    LARGER_GROUPS,
    PAPER_MODEL,
    curriculum,
    label,
    paper_training,
    sized,
    small_curriculum,
    state_tracking_model,
)
from deltaproduct.experiments.state_tracking import STATE_TRACKING
from deltaproduct.experiments.tables import accuracy_table
from deltaproduct.experiments.task_job import EvaluationSpec, TaskJob
from deltaproduct.models import ModelConfig
from deltaproduct.plots.figures import accuracy_by_length
from deltaproduct.tasks import get_task
from deltaproduct.training import Run, TrainConfig

BOTH = ("sequence_accuracy", "accuracy")  # the papers' figure of merit, and the tokens'
PAPER_EVALUATION = EvaluationSpec((128, 512), sequences=500_000)

# -------------------------------------------------------------------------------------------------------------- one run


def group_job(
    name: str, seed: int, *, scale: str, longest: int = 128, prefix: str | None = None, **changes: Any
) -> TaskJob:
    """A run on task `name`; `changes` are what `ModelConfig.build` takes.

    Args:
        longest: length that is trained at, and tested up to sixteen times of.
        prefix: of the run's name, before its layers, n_h, range and seed; None: the task's name.
    """
    task = get_task(name)
    if scale == "paper":
        model, training, evaluation = sized(task, PAPER_MODEL, **changes), paper_training(task, seed), PAPER_EVALUATION
    else:
        model = sized(task, STATE_TRACKING | LARGER_GROUPS | blocks(changes), **changes)
        training = curriculum(task, seed, longest=longest)
        evaluation = EvaluationSpec(tuple(longest << i for i in range(5)), sequences=256)
    return named(name if prefix is None else prefix, model, training, evaluation)


def small_group_job(name: str, seed: int, *, prefix: str | None = None, **changes: Any) -> TaskJob:
    """A run of a minute: groups of up to two dozen elements fit hidden 64. Arguments as for `group_job`."""
    task = get_task(name)
    model = state_tracking_model(task, **blocks(changes), **changes)
    evaluation = EvaluationSpec((128, 512), sequences=256)
    return named(name if prefix is None else prefix, model, small_curriculum(task, seed), evaluation)


def job_at(scale: Scale) -> Callable[..., TaskJob]:
    """`small_group_job` on a laptop in half an hour, else `group_job` at that scale."""
    return small_group_job if scale == "cpu" else partial(group_job, scale=scale)


def blocks(changes: dict[str, Any]) -> dict[str, Any]:
    """Several layers have MLPs between them, as in the papers; one layer has none (`recipes.STATE_TRACKING`)."""
    return {"intermediate_size": None} if changes.get("num_hidden_layers", 1) > 1 else {}


def named(prefix: str, model: ModelConfig, training: TrainConfig, evaluation: EvaluationSpec) -> TaskJob:
    """A job whose name and label say what sets it apart: layers, n_h, range and seed."""
    layers = model.num_hidden_layers
    parts = [
        prefix,
        f"l{layers}" if layers > 1 else "",
        f"n{getattr(model.mixer, 'num_householder', 1)}",
        "neg" if model.mixer.allow_neg_eigval else "pos",
        f"seed{training.seed}",
    ]
    shown = label(model) + (f", {layers} layers" if layers > 1 else "")
    return TaskJob("-".join(filter(None, parts)), shown, Run(training, model), evaluation)


# ------------------------------------------------------------------------------------------------------------------- S3

S3_LENGTHS = (128, 512, 2048, 8192)
CONFIGURATIONS = ((2, True), (2, False), (1, True), (1, False))  # (num_householder, allow_neg_eigval)
S3_FIRST_STAGE = 45  # steps at length 8


def s3(scale: Scale, seeds: Sequence[int]) -> list[TaskJob]:
    """The runs of `deltaproduct reproduce s3`.

    One layer, trained at length 128, in four configurations: n_h ∈ {1, 2} × eigenvalue range {[0,1], [−1,1]}. All four
    have the same budget and schedule, the curriculum's first stage included: it ends after a fixed number of steps.
    """
    jobs = []
    for seed in seeds:
        for num_householder, allow_neg_eigval in CONFIGURATIONS:
            changes = {"num_householder": num_householder, "allow_neg_eigval": allow_neg_eigval}
            if scale == "paper":
                jobs.append(group_job("S3", seed, scale=scale, prefix="", **changes))
                continue
            training = TrainConfig(
                task="S3",
                steps=350,
                seed=seed,
                lengths=(8, 128),
                batch_sizes=(256, 64),
                stage_steps=(S3_FIRST_STAGE,),
                stage_loss=None,
            )
            model = state_tracking_model(get_task("S3"), **changes)
            jobs.append(named("", model, training, EvaluationSpec(S3_LENGTHS)))
    return jobs


S3 = Experiment(
    name="s3",
    summary="S3 in one layer, n_h 1 and 2, both ranges: the claim at its smallest",
    jobs=s3,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who tracks S3 beyond the training length? One layer"),
)

# --------------------------------------------------------------------------------------------------------- Fig. 1 and 5


def fig1(scale: Scale, seeds: Sequence[int]) -> list[TaskJob]:
    """The runs of `deltaproduct reproduce fig1`.

    On a laptop the training length is 32, with the first two seeds, and 128 at the longer scale, with one curriculum
    for all four.
    """
    quick = scale == "cpu"
    longest = 32 if quick else 128
    return [
        group_job("S5", seed, scale=scale, longest=longest, num_householder=num_householder)
        for seed in (seeds[:2] if quick else seeds)
        for num_householder in (1, 2, 3, 4)
    ]


FIG1 = Experiment(
    name="fig1",
    summary="S5 in one layer with n_h 1 to 4 (arXiv 2502.10297, Fig. 1)",
    jobs=fig1,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who tracks it in one layer?", metrics=BOTH),
    scales=ALL_SCALES,
)

FIG5_GROUPS = ("S3", "S4", "A5", "S5")
FIG5_HOUSEHOLDERS = (1, 2, 3, 4)
FIG5_LAYERS = (2, 3, 4, 6, 8, 10)  # with n_h = 1, besides one layer


def fig5(scale: Scale, seeds: Sequence[int]) -> list[TaskJob]:
    """The runs of `deltaproduct reproduce fig5`, those of one seed together.

    In under half an hour on two cores: S3 and S4, one layer, n_h 1 and 2, both ranges, trained at 128.
    """
    jobs = []
    for seed in seeds:
        if scale == "cpu":
            for group in ("S3", "S4"):
                for n, neg in CONFIGURATIONS:
                    jobs.append(small_group_job(group, seed, num_householder=n, allow_neg_eigval=neg))
            continue
        for group in FIG5_GROUPS:
            for neg in (True, False):
                for n in FIG5_HOUSEHOLDERS:
                    jobs.append(group_job(group, seed, scale=scale, num_householder=n, allow_neg_eigval=neg))
            for layers in FIG5_LAYERS if scale == "cpu-long" else range(2, 11):
                jobs.append(group_job(group, seed, scale=scale, num_householder=1, num_hidden_layers=layers))
    return jobs


FIG5 = Experiment(
    name="fig5",
    summary="S3, S4, A5, S5: n_h 1 to 4, 1 to 10 layers, both ranges (arXiv 2502.10297, Fig. 5)",
    jobs=fig5,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who tracks state beyond the training length?", metrics=BOTH),
    scales=ALL_SCALES,
)

# ------------------------------------------------------------------------------------------- cyclic and dihedral groups

CYCLIC_TASKS = ("Z5", "Z60")
CYCLIC_MODELS: dict[str, dict[str, Any]] = {
    "": {"num_householder": 2},
    "range": {"num_householder": 2, "allow_neg_eigval": False},
    "one": {"num_householder": 1},
    "layers": {"num_householder": 1, "num_hidden_layers": 2},
    "mamba": {"mixer": "mamba", "num_hidden_layers": 2},
}


def cyclic(scale: Scale, seeds: Sequence[int]) -> list[TaskJob]:
    """The runs of `deltaproduct reproduce cyclic`.

    Theorem 2 of arXiv 2411.12537: modulo m, not a power of two, needs a transition with an eigenvalue that is not real.
    A product of two reflections has one; one reflection per token needs a second layer (Theorem 6), and a diagonal
    transition never has.
    """
    job = job_at(scale)
    return [
        job(task, seed, prefix=f"{task}-{name}".rstrip("-"), **changes)
        for seed in seeds
        for task in (CYCLIC_TASKS[:1] if scale == "cpu" else CYCLIC_TASKS)
        for name, changes in CYCLIC_MODELS.items()
    ]


CYCLIC = Experiment(
    name="cyclic",
    summary="Z5 and Z60: complex eigenvalues or a second layer (arXiv 2411.12537, 5.2)",
    jobs=cyclic,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who counts modulo m?", metrics=BOTH),
    scales=ALL_SCALES,
)

DIHEDRAL_TASKS = ("D5", "D12")
DIHEDRAL_MODELS: tuple[dict[str, Any], ...] = (
    {"num_householder": 2},
    {"num_householder": 2, "allow_neg_eigval": False},
    {"num_householder": 1},
    {"num_householder": 1, "num_hidden_layers": 2},
)


def dihedral(scale: Scale, seeds: Sequence[int]) -> list[TaskJob]:
    """The runs of `deltaproduct reproduce dihedral`: on a laptop D5, and D12 at the longer scale."""
    job = job_at(scale)
    return [
        job(task, seed, **changes)
        for seed in seeds
        for task in (DIHEDRAL_TASKS[:1] if scale == "cpu" else DIHEDRAL_TASKS)
        for changes in DIHEDRAL_MODELS
    ]


DIHEDRAL = Experiment(
    name="dihedral",
    summary="D5 and D12: one layer of two reflections, or two of one (arXiv 2502.10297, Theorem 7)",
    jobs=dihedral,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="Who follows a polygon's symmetries?", metrics=BOTH),
    scales=ALL_SCALES,
)

# ---------------------------------------------------------------------------------------------------------------- swaps

SWAP_TASKS = ("S5_only_swaps", "S5_limit_to_3", "S5")
SWAP_MODELS = ((1, True), (1, False), (2, True))  # (num_householder, allow_neg_eigval)
FILLERS, FILLERS_LAYERS = "S5_4_s_tokens", 5


def swaps(scale: Scale, seeds: Sequence[int]) -> list[TaskJob]:
    """The runs of `deltaproduct reproduce swaps`; half an hour on a laptop does not suffice for five layers.

    A swap is one reflection, so DeltaNet[-1,1] follows S5 where the inputs are swaps alone; elements that move up to
    three points need n_h = 2, and all of S5 needs 4. With three fillers after each symbol single reflections have time
    for all of it, but they have to know how far the symbol lies back, which takes more layers: the paper has 5.
    """
    job = partial(group_job, scale=scale, longest=16 if scale == "cpu" else 128)
    jobs = []
    for seed in seeds:
        for task in SWAP_TASKS:
            jobs += [job(task, seed, num_householder=n, allow_neg_eigval=neg) for n, neg in SWAP_MODELS]
        if scale != "cpu":
            for neg in (True, False):
                jobs.append(
                    job(FILLERS, seed, num_householder=1, num_hidden_layers=FILLERS_LAYERS, allow_neg_eigval=neg)
                )
    return jobs


SWAPS = Experiment(
    name="swaps",
    summary="S5 by swaps alone, up to three points, symbols with fillers (arXiv 2411.12537, 5.2)",
    jobs=swaps,
    table=accuracy_table,
    draw=partial(accuracy_by_length, title="How much may each token move?", metrics=BOTH),
    scales=ALL_SCALES,
)
