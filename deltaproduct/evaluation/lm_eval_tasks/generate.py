"""The documents of the offline tasks: `python -m deltaproduct.evaluation.lm_eval_tasks.generate` writes their files.

Everything is drawn from evaluation streams: no training run, on the same tasks as plain text, has seen a document.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deltaproduct.evaluation.lm_eval_tasks import FOLDER
from deltaproduct.files import write_text
from deltaproduct.seeds import evaluation_generator
from deltaproduct.tasks import get_task
from deltaproduct.tasks.entities import PEOPLE
from deltaproduct.tasks.text import TextTask, spelt

DOCUMENTS = 96
MOST_EVENTS = 8  # documents have 1 … 8 swaps, trades or sentences, as many of each
SEED = 20_260  # of no experiment


def tracking(task: TextTask) -> Iterator[dict[str, Any]]:
    """Stories of the task's with a single question, at the end: {text, choices, answer (its place), events}."""
    story = task.draw(DOCUMENTS, MOST_EVENTS, evaluation_generator(SEED, MOST_EVENTS))
    for i in range(DOCUMENTS):
        events = i % MOST_EVENTS + 1
        words = [task.tokenizer.words[word] for word in story.opening[i].tolist()]
        for event in story.events[i, :events].tolist():
            words += task.phrases[event]
        words += task.questions[int(story.questions[i, events - 1])]
        yield {
            "text": spelt(words, task.tokenizer.prefixes),
            "choices": list(task.answers),
            "answer": int(story.answers[i, events - 1]),
            "events": events,
        }


def recall() -> Iterator[dict[str, Any]]:
    """Numbers of several people, and then one of them is asked for: {text, answer, events}."""
    generator = evaluation_generator(SEED, MOST_EVENTS + 1)
    for i in range(DOCUMENTS):
        events = i % MOST_EVENTS + 1
        people = [PEOPLE[j] for j in torch.randperm(len(PEOPLE), generator=generator)[:events].tolist()]
        numbers = torch.randint(1000, 10_000, (events,), generator=generator).tolist()
        asked = int(torch.randint(events, (), generator=generator))
        told = [f"{person}'s number is {number}." for person, number in zip(people, numbers)]
        question = f"{people[asked]}'s number is"
        yield {"text": " ".join([*told, question]), "answer": str(numbers[asked]), "events": events}


def _text_task(name: str) -> TextTask:
    task = get_task(name)
    assert isinstance(task, TextTask)
    return task


GENERATED: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "code_swaps": lambda: tracking(_text_task("code_swaps_5_text")),
    "entities": lambda: tracking(_text_task("entities_5_text")),
    "recall": recall,
}


def as_lines(name: str) -> str:
    """What `name`.jsonl holds."""
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in GENERATED[name]())


if __name__ == "__main__":
    for name in GENERATED:
        write_text(FOLDER / f"{name}.jsonl", as_lines(name))
