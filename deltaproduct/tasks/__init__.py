"""Synthetic tasks that ask a sequence model to track a state, each with labels that are exactly right.

`task.py` is the contract, `registry.py` turns a name such as "S5_only_swaps" into a task, and every other file holds
one kind of task. A first look:

    task = get_task("S3")
    print(task.worked_example())
    tokens, labels, mask = task.sample(batch=32, length=128, generator=torch.Generator().manual_seed(0))
"""

from typing import TYPE_CHECKING

from deltaproduct.late import late

if TYPE_CHECKING:
    from deltaproduct.tasks.registry import get_task, list_tasks
    from deltaproduct.tasks.task import Task

__all__ = ["Task", "get_task", "list_tasks"]

__getattr__, __dir__ = late(
    __name__,
    {
        "registry": ("get_task", "list_tasks"),
        "task": ("Task",),
    },
)
