"""Every situation that a compiled model can be in: the states that its layers hold, found by trying every symbol.

A compiled model holds codes, so that up to rounding its recurrent states are finitely many. Beginning after BOS, every
symbol is tried from every situation until nothing new turns up: then the model is right on every word as long as
rounding does not add up to more than its margins (certificate.py).

States of the automaton whose futures agree may share a situation: where the same symbols lead from two of them to the
same states, nothing has to be held that tells the two apart. So what is tried is every case, a situation with a state
of the automaton in which words lead to it, and the label after every symbol is checked in every case. A model that
holds too little is found wrong by its labels, and by nothing else.

What no symbol lets survive makes no difference, and situations that differ only in it are one: a layer that keeps
something for one token, say, also holds what it had kept before. It is known by the heads' transition matrices A: they
have no part in which it is.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.layers import DeltaProduct
from deltaproduct.models import SequenceModel
from deltaproduct.models.sequence_model import Block
from deltaproduct.ops.inputs import l2_normalise
from deltaproduct.tasks.automata import Automaton

MAX_TRIED = 600_000  # symbols tried in all
BATCH = 8_192  # tried at once
SAMPLED = 16, 64  # words and symbols in each, by which transition matrices are known
GRID = 50.0  # cells per unit of a state's largest entry: entries that differ less are the same code
OFFSET = 0.1234  # of the grid, so that codes such as 0 and 1/2 are not on its lines


@dataclass(frozen=True, eq=False)
class Exploration:
    """What was found.

    Attributes:
        before, symbols, after: [P] numbers of cases and symbols: each try.
        state_of: [cases] the automaton's state.
        held: for every layer [H,U,K,V] float64 the different states of each head, padded with zeros; the first of them
            after BOS.
        kept: for every layer and head [r,K] float64, orthonormal: the directions of the state in which something
            survives.
        holds: for every layer [cases,H], which of these.
        wrong: tries whose label was not the automaton's state.
        complete: whether nothing new was left to try.
    """

    before: Tensor
    symbols: Tensor
    after: Tensor
    state_of: Tensor
    held: list[Tensor]
    kept: list[list[Tensor]]
    holds: list[Tensor]
    wrong: int
    complete: bool

    @property
    def situations(self) -> int:
        """Different situations, whatever states of the automaton they go with."""
        return len(torch.cat(self.holds, dim=1).unique(dim=0))

    @property
    def pairs(self) -> int:
        """Different pairs of an automaton's state and a symbol that were tried."""
        width = int(self.symbols.max()) + 1 if len(self.symbols) else 1
        return len((self.state_of[self.before] * width + self.symbols).unique())


@dataclass(eq=False)
class _Codes:
    """The different states of one head that were met."""

    scale: float
    kept: Tensor
    number: dict[bytes, int] = field(default_factory=dict)
    first: list[Tensor] = field(default_factory=list)

    def numbers(self, states: Tensor) -> np.ndarray:
        """Of states [B,K,V]; new ones are kept."""
        cells = ((self.kept @ states).flatten(1) * (GRID / self.scale) + OFFSET).round().to(torch.int32)
        wide = torch.nn.functional.pad(cells, (1, 0)).numpy()  # at least one column, even where nothing survives
        rows = np.ascontiguousarray(wide).view(np.dtype((np.void, wide.itemsize * wide.shape[1])))[:, 0]
        different, first, which = np.unique(rows, return_index=True, return_inverse=True)
        known = np.empty(len(different), dtype=np.int64)
        for i in np.argsort(first):  # in the order in which they were met
            key = different[i].tobytes()
            if key not in self.number:
                self.number[key] = len(self.first)
                self.first.append(states[first[i]].clone())
            known[i] = self.number[key]
        return known[which.ravel()]


@torch.no_grad()
def explore(model: SequenceModel, automaton: Automaton) -> Exploration:
    """Try every symbol in every case, at most 600,000 times in all. The model is on a CPU.

    All is computed in float64, with the model's own weights: what is found is then the same on every machine.
    """
    model = copy.deepcopy(model).double()
    symbols, bos = len(automaton.alphabet), len(automaton.alphabet)
    table = torch.tensor(automaton.transitions)
    _, start = model(torch.tensor([[bos]]))
    layers = [layer.recurrent for layer in start]
    kept = _kept(model, symbols)
    codes = [
        [_Codes(float(s[0, h].abs().max()) or 1.0, basis) for h, basis in enumerate(own)]
        for s, own in zip(layers, kept, strict=True)
    ]

    def numbers(states: list[Tensor]) -> list[tuple[int, ...]]:
        """What every head holds, of B situations."""
        columns = [c.numbers(s[:, h]) for s, heads in zip(states, codes, strict=True) for h, c in enumerate(heads)]
        return list(map(tuple, np.stack(columns, 1).tolist()))

    cases = {(numbers(layers)[0], automaton.initial): 0}  # what every head holds, and the automaton's state
    tries: list[tuple[Tensor, Tensor, Tensor]] = []
    wrong = tried = done = 0
    while done < len(cases) and tried < MAX_TRIED:
        fresh = list(itertools.islice(cases, done, done + max(1, BATCH // symbols)))
        who = torch.arange(done, done + len(fresh)).repeat_interleave(symbols)
        what = torch.arange(symbols).repeat(len(fresh))
        held = _states_of([key for key, _ in fresh], codes)
        logits, new = model(what[:, None], [
            layer._replace(recurrent=s.repeat_interleave(symbols, 0)) for layer, s in zip(start, held, strict=True)
        ])  # fmt: skip
        want = table[torch.tensor([state for _, state in fresh]).repeat_interleave(symbols), what]
        wrong += int((logits[:, 0].argmax(-1) != want).sum())
        reached = zip(numbers([layer.recurrent for layer in new]), want.tolist(), strict=True)
        after_it = torch.tensor([cases.setdefault(case, len(cases)) for case in reached])
        tries.append((who, what, after_it))
        tried += len(who)
        done += len(fresh)
    before, tried_symbols, after = (torch.cat(part) for part in zip(*tries, strict=True))
    keys = torch.tensor([key for key, _ in cases])
    state_of = torch.tensor([state for _, state in cases])
    counts = [len(heads) for heads in codes]
    return Exploration(
        before, tried_symbols, after, state_of, [_padded(heads) for heads in codes],
        kept, list(keys.split(counts, dim=1)), wrong, done == len(cases),
    )  # fmt: skip


@torch.no_grad()
def _kept(model: SequenceModel, symbols: int) -> list[list[Tensor]]:
    """For every layer and head, the directions [r,K] in which some transition matrix has anything."""
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(symbols, SAMPLED, generator=rng)
    _, start = model(torch.full((len(words), 1), symbols))
    with operator_inputs(model) as inputs:
        model(words, start)
    result = []
    for _, k, _, beta in inputs:
        matrices = transition(k, beta)  # [B,T,H,K,K]
        gram = (matrices.mT @ matrices).sum((0, 1))
        values, vectors = torch.linalg.eigh(gram)
        own = []
        for value, vector in zip(values, vectors.mT, strict=True):
            there = value > 1e-6 * max(1.0, float(values.max()))
            own.append(torch.eye(len(value), dtype=torch.float64) if there.all() else vector[there])
        result.append(own)
    return result


def transition(k: Tensor, beta: Tensor) -> Tensor:
    """The products [...,H,K,K] float64 of a token's factors, of keys [...,N,H,K] and β [...,N,H]."""
    eye = torch.eye(k.shape[-1], dtype=torch.float64)
    product = eye.expand(*k.shape[:-3], *k.shape[-2:], k.shape[-1])
    for k_j, beta_j in zip(k.double().unbind(-3), beta.double().unbind(-2), strict=True):
        product = product - beta_j[..., None, None] * k_j[..., None] * (k_j[..., None, :] @ product)
    return product


def layers_of(model: SequenceModel) -> list[tuple[Block, DeltaProduct]]:
    """Every layer's block and mixer. Raises UsageError where a mixer is none of DeltaProduct's."""
    result = []
    for block in model.blocks:
        assert isinstance(block, Block)
        if not isinstance(block.mixer, DeltaProduct):
            raise UsageError(f"Situations can be tried of DeltaProduct layers, not of {type(block.mixer).__name__}.")
        result.append((block, block.mixer))
    return result


@contextmanager
def operator_inputs(
    model: SequenceModel, normalise: Callable[[Tensor], Tensor] = l2_normalise
) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """What the recurrence of every layer is given while the model runs in this context: q and k after `normalise`, v,
    and β; shaped as in `delta_product`."""
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def look(mixer: DeltaProduct, given: tuple[Any, ...]) -> None:
        x = given[0]
        q, k, v, beta, *_ = mixer.project(x, mixer.init_state(len(x), x.dtype, x.device))
        found.append((normalise(q), normalise(k), v, beta))

    hooks = [mixer.register_forward_pre_hook(look) for _, mixer in layers_of(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _states_of(keys: list[tuple[int, ...]], codes: list[list[_Codes]]) -> list[Tensor]:
    """The layers' states [B,H,K,V] in these situations."""
    columns = iter(zip(*keys, strict=True))
    return [torch.stack([torch.stack([c.first[i] for i in next(columns)]) for c in heads], 1) for heads in codes]


def _padded(heads: list[_Codes]) -> Tensor:
    most = max(len(c.first) for c in heads)
    zero = torch.zeros_like(heads[0].first[0])
    return torch.stack([torch.stack(c.first + [zero] * (most - len(c.first))) for c in heads])


def batches(exploration: Exploration) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The tries (before, symbols, after), some at a time."""
    tries = (exploration.before, exploration.symbols, exploration.after)
    yield from zip(*(part.split(BATCH) for part in tries), strict=True)
