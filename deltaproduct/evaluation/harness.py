"""Standard benchmarks through lm-eval: the papers' tasks where their data can be had, and our own offline.

`evaluate_harness` is what most need; those who call `lm_eval.simple_evaluate` themselves hand it a `HarnessModel`
(harness_model.py). lm-eval's wrapper of transformers' models gives the same figures where its tokenizer writes the
document token before a text, which for rolling log-likelihoods it must not do (tests/evaluation/test_harness.py).
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

from deltaproduct.corpus import Tokenizer
from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.evaluation.lm_eval_tasks import FOLDER, OFFLINE_TASKS
from deltaproduct.models import SequenceModel, evaluating

# What arXiv 2411.12537 and 2502.10297 report, all without examples in the prompt, under lm-eval's names for it.
PAPERS_TASKS = {
    "wikitext": ("word_perplexity",),
    "lambada_openai": ("perplexity", "acc"),
    "piqa": ("acc",),
    "hellaswag": ("acc_norm",),
    "winogrande": ("acc",),
    "arc_easy": ("acc",),
    "arc_challenge": ("acc_norm",),
    "swde": ("contains",),
    "squad_completion": ("contains",),
    "fda": ("contains",),
}
AVERAGED = ("lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")  # the last metric of each
GROUPS = {"papers": tuple(PAPERS_TASKS), "offline": OFFLINE_TASKS}

# Where lm-eval keeps the papers' tasks: reading all of its 15,000 files to find ten takes half a minute.
PAPERS_FOLDERS = ("wikitext", "lambada", "piqa", "hellaswag", "winogrande", "arc", "swde", "squad_completion", "fda")
BOOTSTRAPS = 1000  # for the standard errors that have no formula


def evaluate_harness(
    model: SequenceModel, tokenizer: Tokenizer, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Evaluate a language model on tasks of lm-eval's.

    Args:
        model: one that predicts the next token.
        tokenizer: the one that it was trained with.
        tasks: names of lm-eval's tasks, groups and tags, of `OFFLINE_TASKS`, or "papers" or "offline" for all of those.
        limit: documents of each task, the first ones; None means all. Figures of a part are no benchmark's.
        batch_size: sequences that are read side by side.

    Returns:
        Plain values: {"tasks": {task: {metric: value, metric_stderr: value}}, "papers": the metrics of `PAPERS_TASKS`
        and, where all of `AVERAGED` were evaluated, the mean accuracy of those, "samples": {task: documents},
        "versions": {"lm_eval": …, task: …}, "limit": limit}.

    Raises:
        UsageError: there is no such task, its data cannot be had, lm-eval is not installed, the tokenizer is not the
            model's, or limit or batch_size is below 1.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
    sizes = {model.config.vocab_size, model.config.num_labels, tokenizer.vocab_size}
    if len(sizes) > 1:
        raise UsageError(
            f"The model reads {model.config.vocab_size} tokens and predicts {model.config.num_labels}, but the "
            f"tokenizer has {tokenizer.vocab_size}: they do not belong together."
        )
    lm_eval = _lm_eval()
    from lm_eval.tasks import TaskManager

    from deltaproduct.evaluation.harness_model import HarnessModel

    # lm-eval prints while it works, and standard output may be somebody's JSON.
    with evaluating(model), redirect_stdout(sys.stderr):
        results = lm_eval.simple_evaluate(
            model=HarnessModel(model, tokenizer, batch_size),
            tasks=load_tasks(tasks),
            task_manager=TaskManager(include_defaults=False),  # they are loaded: it has nothing to find
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            # Greedy answers need no seeds, and nobody else's random state is to be moved.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    return _report(results, lm_eval.__version__, limit)


def load_tasks(names: Sequence[str]) -> list[Any]:
    """lm-eval's task objects of these names, "papers" and "offline" included, with their data.

    Raises:
        UsageError: there is no such task, its data are neither on this machine nor to be had, or it runs programs that
            the model writes.
    """
    _lm_eval()
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    if not names:
        raise UsageError(f"Name at least one task, or {' or '.join(GROUPS)} for all of those.")
    wanted = list(dict.fromkeys(single for name in names for single in GROUPS.get(name, (name,))))
    with _quiet():
        manager = TaskManager(include_defaults=False, include_path=task_folders())
        if not set(wanted) <= set(manager.all_tasks):
            manager = TaskManager(include_path=str(FOLDER))
        _check_names(wanted, manager.all_tasks)
        loaded: dict[str, Any] = {}
        for name in wanted:
            try:
                found = manager.load([name])
            except (OSError, ValueError, DatasetsError) as e:
                reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
                raise UsageError(
                    f"The data of the task {name} are neither in this machine's cache nor to be had from the hub "
                    f"({reason}): evaluate once where there is a network, copy that cache here, name its folder in "
                    f"HF_HOME and set HF_DATASETS_OFFLINE=1; or leave the task out (offline needs no data)."
                ) from e
            if unsafe := [task for task, its in found["tasks"].items() if getattr(its, "UNSAFE_CODE", False)]:
                raise UsageError(
                    f"The task {unsafe[0]} runs programs that the model writes, which is never done here; leave it out."
                )
            loaded |= {name: found["groups"][name]} if name in found["groups"] else found["tasks"]
    return list(loaded.values())


def task_folders() -> list[Path]:
    """Where the offline tasks' and the papers' YAML files are."""
    import lm_eval.tasks

    return [Path(lm_eval.tasks.__file__).parent / folder for folder in PAPERS_FOLDERS] + [FOLDER]


def _check_names(wanted: Sequence[str], known: Sequence[str]) -> None:
    for name in wanted:
        if name not in known:
            near = did_you_mean(name, [*GROUPS, *known], most=3)
            raise UsageError(f"lm-eval has no task {name!r}{near}; {' and '.join(GROUPS)} name whole lists.")


def _report(results: Mapping[str, Any], version: str, limit: int | None) -> dict[str, Any]:
    tasks = {name: _metrics(values) for name, values in results["results"].items()}
    papers = {
        name: {metric: tasks[name][metric] for metric in metrics}
        for name, metrics in PAPERS_TASKS.items()
        if name in tasks
    }
    if papers.keys() >= set(AVERAGED):
        papers["average"] = {"acc": mean(papers[name][PAPERS_TASKS[name][-1]] for name in AVERAGED)}
    return {
        "tasks": tasks,
        "papers": papers,
        "samples": {name: counts["effective"] for name, counts in results["n-samples"].items()},
        "versions": {"lm_eval": version} | results["versions"],
        "limit": limit,
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's "metric,filter" → metric, or as it is where there is a filter; what is no number is left out."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and not isinstance(value, str)
    }


def _lm_eval() -> ModuleType:
    try:
        import lm_eval
        import lm_eval.evaluator  # what the package itself imports only when it is used
    except ImportError as e:
        raise UsageError(f"Benchmarks need lm-eval ({e}); install deltaproduct with its [eval] extra.") from e
    return lm_eval


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks about what the YAML files leave open, of which there are some in its own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
