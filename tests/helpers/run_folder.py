"""What a training run has written to its folder."""

import json
from pathlib import Path


def metrics(out: Path) -> list[dict]:
    """What it has logged, line by line."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_done(out: Path) -> int:
    """Of a run that may be writing now, or not have begun."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
