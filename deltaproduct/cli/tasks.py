"""`deltaproduct tasks`: which tasks there are, and what one looks like."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from deltaproduct.cli.outputs import say


@dataclass(kw_only=True)
class TasksList:
    """List the forms that a task's name can take."""

    def run(self) -> None:
        from rich.console import Console
        from rich.table import Table

        from deltaproduct.tasks import list_tasks

        table = Table()
        for column in ("name", "for example", "what it is"):
            table.add_column(column, overflow="fold")
        for pattern, description, example in list_tasks():
            table.add_row(pattern, "" if example == pattern else example, description)
        Console().print(table)


@dataclass(kw_only=True)
class TasksShow:
    """Describe one task, with a worked example."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="such as S3")]
    length: Annotated[int | None, tyro.conf.arg(help="tokens in the example, BOS not counted")] = None
    seed: Annotated[int, tyro.conf.arg(help="of the example")] = 0

    def run(self) -> None:
        from deltaproduct.tasks import get_task

        task = get_task(self.name)
        for line in task.worked_example(length=self.length, seed=self.seed).split("\n"):
            say(line)
        sizes = f"vocabulary {task.vocab_size} (BOS is {task.bos_id}), labels {task.num_labels}"
        print(f"\n{sizes}, chance {task.chance:.4f}")
