"""Our own tasks for lm-eval, which need no network: YAML for lm-eval, and documents as JSON lines beside it.

    deltaproduct_code_swaps   multiple choice: what a program prints after a few swaps of five variables
    deltaproduct_entities     multiple choice: who of five people has the penny after a few trades
    deltaproduct_recall       generated: a number that was told a few sentences ago
    deltaproduct_prose        rolling perplexity: short essays

The first three are made by `generate.py`, from streams that no training run can draw from; the essays were written for
this library and are in no corpus of the web. lm-eval's own command line finds all four with `--include_path` and this
folder.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
OFFLINE_TASKS = ("deltaproduct_code_swaps", "deltaproduct_entities", "deltaproduct_recall", "deltaproduct_prose")


def documents(name: str, **metadata: Any) -> dict[str, Any]:
    """The documents of `name`.jsonl as the split "test": what the YAML files name as their `custom_dataset`.

    lm-eval hands over a task's `metadata` besides.
    """
    from datasets import Dataset

    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
