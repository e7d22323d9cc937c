"""Multi-query associative recall, MQAR (Arora et al., "Zoology", arXiv 2312.04927): pairs of a key and its value, then
the keys again, at each of which the value is asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.tasks.task import Task

POWER = 0.01
MAX_VOCAB = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class RecallTask(Task):
    """D key-value pairs, then each key once more; at that token, and nowhere else, its value is the label.

    Of V tokens, 0 is the filler "_", those below V//2 are keys k1, k2, … and the others are values v0, v1, …; BOS is
    token V, and label i is the value vi. With D = 2:

        k3 v1 k1 v4 k3 _ _ _ k1 _ → at the second k3, v1, and at the second k1, v4

    Keys, and values, are drawn without replacement. The queries stand at even distances from the end of the pairs, the
    g-th such place (g = 1, 2, …) with probability ∝ g^(power − 1), without replacement: most soon, some late. Every
    length ≥ 4D is legal.

    Source: the published code (zoology/data/multiquery_ar.py), whose layout and distributions these are. It scores with
    all tokens as labels; here only values are.

    Attributes:
        pairs: D.
        random_fillers: whether a random token stands in place of each filler, as in the published configurations.
            Such a token may be a key, which does not change the key's value.
        power: of the places' distribution; 1 is uniform.
    """

    pairs: int
    random_fillers: bool = False
    power: float = POWER

    @property
    def first_value(self) -> int:
        """The token of value v0."""
        return self.bos_id // 2

    def token_name(self, i: int) -> str:
        if i == self.bos_id:
            return "[BOS]"
        return "_" if i == 0 else f"k{i}" if i < self.first_value else self.label_name(i - self.first_value)

    def label_name(self, i: int) -> str:
        return f"v{i}"

    def _sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        def choose(among: int) -> Tensor:
            """[batch,D] different numbers below `among`."""
            return torch.rand((batch, among), generator=generator, device=generator.device).topk(self.pairs).indices

        keys, values = 1 + choose(self.first_value - 1), choose(self.num_labels)
        context = 2 * self.pairs
        # The largest of log p + Gumbel noise, in falling order, are a draw without replacement (the Gumbel-top-k trick)
        places = torch.arange(1, (length - context) // 2 + 1, device=keys.device, dtype=torch.float64)
        noise = torch.empty((batch, len(places)), dtype=torch.float64, device=keys.device)
        gumbel = -noise.exponential_(generator=generator).log()
        chosen = ((self.power - 1) * places.log() + gumbel).topk(self.pairs).indices
        queries = context + 2 * chosen

        tokens = keys.new_zeros((batch, length))
        if self.random_fillers:
            tokens = torch.randint(self.bos_id, (batch, length), generator=generator, device=keys.device)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, self.first_value + values
        tokens.scatter_(1, queries, keys)
        labels = torch.zeros_like(tokens).scatter_(1, queries, values)
        mask = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, queries, True)
        return tokens, labels, mask


def recall_task(name: str, pairs: str, vocab: str, random_fillers: str | None) -> RecallTask:
    """`mqar_D_V` or `mqar_D_V_random`: D pairs, V tokens (the paper: 8,192), and random tokens as fillers.

    Raises UsageError when D is less than 1, when V is more than 2^20, or when there are fewer than D keys.
    """
    d, v = int(pairs), int(vocab)
    if d < 1:
        raise UsageError(f"{name} cannot be used because it has no pairs; use at least 1")
    if v > MAX_VOCAB:
        raise UsageError(f"{name} cannot be used because a vocabulary may have at most {MAX_VOCAB:,} tokens")
    if v // 2 - 1 < d:
        raise UsageError(f"{name} cannot be used because {d} pairs need as many keys; use a vocabulary of {2 * d + 2}")
    fillers = ", random tokens between the queries" if random_fillers else ""
    return RecallTask(
        name=name, summary=f"the value of each of {d} keys, asked once ({v:,} tokens{fillers})", pairs=d,
        random_fillers=bool(random_fillers), vocab_size=v + 1, num_labels=v - v // 2, bos_id=v,
        chance=1 / (v - v // 2), min_length=4 * d,
    )  # fmt: skip
