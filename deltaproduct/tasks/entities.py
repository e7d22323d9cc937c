"""Entity tracking: people who trade coins, one of which is a penny, and who has it now."""

from functools import partial

import torch
from torch import Tensor

from deltaproduct.tasks.swaps import draw_pairs, follow, unordered
from deltaproduct.tasks.task import Task
from deltaproduct.tasks.text import EventTask, Story, TextTask, WordTokenizer, check_count

PEOPLE = ("Alice", "Bob", "Carl", "Dan", "Emma", "Frank", "Grace", "Henry")
_COIN = ("each", "have", "a", "coin", ".")
_PENNY = ("is", "the", "only", "one", "having", "a", "penny", ".")
_TRADE = ("trade", "coins", ".")
_WHO = ("Who", "has", "the", "penny", "?")


def entities_task(name: str, people: str, text: str | None) -> Task:
    """`entities_N`, a token for each trade, or `entities_N_text`, plain English: N people, of whom one has the penny.

    As tokens, "Alice and Carl trade coins." is one of N(N−1)/2 tokens, and the label after each is who has the penny;
    the last of the N people has it at first. With Alice, Bob and Carl:

        Alice and Carl trade coins. | Alice and Bob trade coins. | Bob and Carl trade coins. → Alice, Bob, Carl

    As text, the penny is anybody's at first, and who it is is written:

        Alice, Bob and Carl each have a coin. Carl is the only one having a penny. Alice and Carl trade coins. Who has
        the penny? Carl and Bob trade coins. Who has the penny? → Alice, Alice

    Two different people are drawn uniformly for each trade. That the traders are named, and never the penny ("Carl
    trades his penny"), is what makes it state tracking: the source is the figure of arXiv 2404.08819.

    `chance` is 1/N: with text the penny is anybody's alike all along; with tokens it soon is.

    Raises UsageError when N is not 3 … 8.
    """
    n = int(people)
    check_count(name, n, 3, len(PEOPLE), "fewer than 3 people can only trade with each other over and over",
                f"only {len(PEOPLE)} people are known by name")  # fmt: skip
    names = PEOPLE[:n]
    if text is None:
        symbols = tuple(f"{a} and {b} trade coins." for i, a in enumerate(names) for b in names[i + 1 :])
        return EventTask(
            name=name, summary=f"who has the penny while {n} people trade coins, a token for each trade",
            symbols=symbols, answers=names, width=1, draw=partial(_trades, n),
            vocab_size=len(symbols) + 2, num_labels=n, bos_id=len(symbols) + 1, chance=1 / n,
        )  # fmt: skip
    opening = [word for person in names[:-2] for word in (person, ",")] + [names[-2], "and", names[-1], *_COIN]
    words = tuple(dict.fromkeys((*PEOPLE[:n], *opening, *_PENNY, *_TRADE, *_WHO)))
    tokenizer = WordTokenizer(words)
    constant = tokenizer.table([(*opening, names[0], *_PENNY)])[0]
    phrases = tuple((a, "and", b, *_TRADE) for a in names for b in names)
    return TextTask(
        name=name, summary=f"who has the penny while {n} people trade coins, in plain English", tokenizer=tokenizer,
        phrases=phrases, questions=(_WHO,), answers=names, around=((), (".",)), end=(), opening=len(constant),
        draw=partial(_story, n, constant, len(opening)), min_length=len(constant) + len(phrases[0]) + len(_WHO),
        vocab_size=len(words) + 2, num_labels=n, bos_id=len(words) + 1, chance=1 / n,
    )  # fmt: skip


def _trades(n: int, batch: int, events: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first, second = draw_pairs(n, batch, events, generator)
    return unordered(n, first, second), follow(first.new_full((batch,), n - 1), first, second)


def _story(n: int, constant: Tensor, owner_at: int, batch: int, events: int, generator: torch.Generator) -> Story:
    owner = torch.randint(n, (batch,), generator=generator, device=generator.device)
    first, second = draw_pairs(n, batch, events, generator)
    opening = constant.to(owner.device).repeat(batch, 1)
    opening[:, owner_at] = owner  # people are the first words of the vocabulary
    return Story(opening, first * n + second, torch.zeros_like(first), follow(owner, first, second))
