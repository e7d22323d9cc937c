"""What is certain of a compiled model: every situation tried, its margins, and how much rounding can add up to.

The exploration (exploration.py) shows that the model is right from every situation as long as its recurrent states are
what they were there. From token to token a head's state S goes to A S + W, and what it then holds differs from its code
by at most

    D′ ≤ ‖A‖ D + ρ + r

where ρ is how far the weights' own transition, carried out in float64, misses the next code, and r bounds the rounding
of keys, values and the recurrence in float32 (by the standard model, |fl(x∘y) − x∘y| ≤ u |x∘y|; the recurrence in the
order of ops/reference.py, sums in any order). Where every cycle of situations clears the state, D stays below a bound;
else it grows with every token.

No number depends on how this machine rounds: what is measured is measured in float64 and published to six digits,
rounded to the safe side. A float32 model is looked at as if it computed exactly, and r allows for what it does not. Of
a bfloat16 model the numbers that it rounds itself are taken, 2⁻⁹ being far coarser than the order of a sum.

Where a token either writes nothing or leaves nothing of what was there, a state's length makes no difference to
anything that is read, and what it holds is compared with its code up to a factor.

What a head reads is off by at most D. A head of value dimension 1 gives only its sign, which is right while D is below
half of what is read. Other heads give a direction, off by about D over its length; how far that can move two labels'
scores, or an AND's input, is known from the weights. So there is a length up to which every word is right.

It bounds the `reference` order of operations; other backends round in another order, and are measured instead.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deltaproduct.errors import UsageError
from deltaproduct.layers.plain import first_unusual
from deltaproduct.models import SequenceModel
from deltaproduct.ops.inputs import compute_dtype, l2_normalise
from deltaproduct.ops.reference import householder_step
from deltaproduct.tasks.automata import Automaton
from deltaproduct.theory.exploration import Exploration, batches, explore, layers_of, operator_inputs, transition

DIGITS = 6  # of published numbers
NOISE = 1e-9  # of a key's largest entry: what float64 leaves of zeros
VALUES = 8  # roundings of a value that is written, and of the norms before it, in units of float32's
ROUNDS = 200  # after which a drift that still grows is taken to grow for ever
CLEARED = 1e-3  # norm of a transition that leaves nothing
LARGEST_GUARANTEE = 10**15  # tokens, beyond which nobody asks
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
_Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v and β of a layer
SLACK = 8  # roundings of the whole read-out, in units of a dtype's


class Head(NamedTuple):
    """How one head's state can drift.

    Attributes:
        layer, head: which.
        code: the smallest norm that it reads, in units of its largest state.
        drift: by how much a token can add to the state's distance from its code, at most, in the same units.
        growth: by how much a token multiplies that distance, at most.
        bound: what the distance never exceeds; None where it may grow for ever.
        tolerated: the distance up to which all labels are certain to be right.
    """

    layer: int
    head: int
    code: float
    drift: float
    growth: float
    bound: float | None
    tolerated: float

    def distance(self, tokens: int) -> float:
        """How far the state can be from its code after so many tokens, at most."""
        if self.bound is not None:
            return self.bound
        rate = self.growth - 1
        if rate * tokens < 1e-9:
            return self.drift * tokens
        return self.drift * math.expm1(min(700.0, tokens * math.log1p(rate))) / rate


@dataclass(frozen=True)
class Certificate:
    """What is certain of a model in one dtype.

    Attributes:
        dtype: of weights and activations; states are float32 at least.
        situations: how many there are, whatever states of the automaton they go with.
        tried: symbols that were tried: every one in every situation, for every state that it goes with.
        pairs: different pairs of a state and a symbol among these.
        complete: whether that were all situations; otherwise nothing is guaranteed.
        wrong: labels that were wrong.
        margin: the right label's logit above the next, at least; None where there is but one label.
        drift: what a token can add to a state's distance from its code, at most, in units of the largest state.
        guaranteed: the length up to which every word is right; None means every length.
        heads: what bounds it, head by head.
    """

    dtype: str
    situations: int
    tried: int
    pairs: int
    complete: bool
    wrong: int
    margin: float | None
    drift: float
    guaranteed: int | None
    heads: tuple[Head, ...]


def certificates(model: SequenceModel, automaton: Automaton) -> list[Certificate]:
    """A compiled model's, in float32 and bfloat16, by one exploration; the model is float32, on a CPU.

    They are the same on every machine.
    """
    exploration = explore(model, automaton)
    dtypes = (torch.float32, torch.bfloat16)
    return [certify(copy.deepcopy(model).to(dtype), automaton, exploration) for dtype in dtypes]


@torch.no_grad()
def certify(model: SequenceModel, automaton: Automaton, exploration: Exploration) -> Certificate:
    """The certificate of a model in its own dtype, by the exploration of the same model in float32.

    Raises:
        UsageError: a module computes something else than its weights say (an adapter, a hook), and only weights can be
            bounded.
    """
    if reason := first_unusual(model, owner=SequenceModel):
        raise UsageError(f"A certificate bounds what weights do, and this model's say too little: {reason}.")
    evidence = _Evidence(model, automaton, exploration)
    for tries in batches(exploration):
        evidence.add(*tries)
    heads = [_published(head) for head in evidence.heads()]
    complete = exploration.complete and evidence.survives <= CLEARED
    wrong = exploration.wrong + evidence.wrong
    one_label = model.config.num_labels == 1  # which is right whatever the state has come to
    return Certificate(
        dtype=str(evidence.dtype).removeprefix("torch."),
        situations=exploration.situations,
        tried=len(exploration.before),
        pairs=exploration.pairs,
        complete=complete,
        wrong=wrong,
        margin=None if one_label else _rounded(evidence.margin, ROUND_FLOOR),
        drift=max((head.drift for head in heads), default=0.0),
        guaranteed=_guaranteed([] if one_label else heads) if complete and not wrong else 0,
        heads=tuple(heads),
    )


def _rounded(x: float, direction: str) -> float:
    """To six digits, so that differences in float64's last bits do not show.

    Twelve digits come first: a number of six digits, but for such a difference, stays that number.
    """
    return float(Context(prec=DIGITS, rounding=direction).create_decimal(f"{x:.11e}"))


def _published(head: Head) -> Head:
    up = partial(_rounded, direction=ROUND_CEILING)
    down = partial(_rounded, direction=ROUND_FLOOR)
    return head._replace(
        code=down(head.code), drift=up(head.drift), growth=1 + up(head.growth - 1),
        bound=None if head.bound is None else up(head.bound), tolerated=down(head.tolerated),
    )  # fmt: skip


def _normalised(x: Tensor) -> Tensor:
    """Keys x / √(Σx² + 1e-6) in float64. A key along an axis is as float32 has it: without a sum that is the same
    everywhere, and where it is exactly 1 nothing is ever rounded."""
    single = ((x != 0).sum(-1, keepdim=True) == 1) & (x.dtype != torch.float64)
    return torch.where(single, l2_normalise(x).double(), l2_normalise(x.double()))


def _guaranteed(heads: list[Head]) -> int | None:
    """The largest number of tokens after which every head is as close to its code as it must be; BOS is one."""

    def fine(tokens: int) -> bool:
        # On its code a head is as it was when all labels were tried, even where nothing else is tolerated: one that
        # holds nothing reads nothing, and half of that.
        return all((off := head.distance(tokens)) == 0 or off < head.tolerated for head in heads)

    if fine(LARGEST_GUARANTEE) and all(head.bound is not None or head.drift == 0 for head in heads):
        return None
    low, high = 0, 1
    while high < LARGEST_GUARANTEE and fine(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fine(middle) else (low, middle)
    return max(0, low - 1)


def _scores(logits: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [P,labels] those of the right labels [P], and the largest of the others."""
    right = logits.double().gather(1, want[:, None])[:, 0]
    return right, logits.double().scatter(1, want[:, None], -math.inf).amax(1)


class _Edges:
    """Of one head: from what it holds to what it holds next, the worst of all tries."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, before: Tensor, after: Tensor, values: Tensor) -> None:
        """values [P,6]: the norm of A; the local error, and that up to a factor; minus the length of what is read, and
        minus that factor; whether something is written beside what remains."""
        # What clears the state is kept apart from what does not: the worst of both would be neither.
        kinds = torch.stack((before, after, (values[:, 0] <= CLEARED).long()), 1)
        pairs, which = kinds.unique(dim=0, return_inverse=True)
        worst = torch.full((len(pairs), values.shape[1]), -math.inf, dtype=torch.float64)
        worst.scatter_reduce_(0, which[:, None].expand_as(values), values, "amax")
        self.parts.append((pairs, worst))

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Pairs of numbers of states (and their kind) [E,3], and values [E,6] as given."""
        pairs, values = (torch.cat(part) for part in zip(*self.parts, strict=True))
        whole = _Edges()
        whole.add(pairs[:, 0], pairs[:, 1], values)
        return whole.parts[0]


class _Evidence:
    def __init__(self, model: SequenceModel, automaton: Automaton, exploration: Exploration):
        self.model, self.exploration = model, exploration
        self.dtype = model.embedding.weight.dtype
        # A float32 model's sums come out differently by the machine: what is measured of it is measured of this one.
        self.measured = copy.deepcopy(model).double() if self.dtype == torch.float32 else model
        self.layers = layers_of(self.measured)
        self.table = torch.tensor(automaton.transitions)
        _, self.start = self.measured(torch.tensor([[len(automaton.alphabet)]]))
        # In another dtype BOS writes another length: codes are taken to be longer or shorter as much.
        self.held = []
        for layer, held in zip(self.start, exploration.held, strict=True):
            first = held[:, 0].double()
            ratio = layer.recurrent[0].double().flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1).clamp(min=1e-30)
            self.held.append(held.double() * ratio[:, None, None, None])
        self.scale = [held.flatten(2).norm(dim=2).amax(1).clamp(min=1e-30) for held in self.held]  # [H] each
        self.edges = [[_Edges() for _ in held] for held in self.held]
        self.wrong, self.margin, self.largest = 0, math.inf, 0.0
        self.survives = 0.0  # of what the exploration took not to: situations would be more than it knows
        self.gains, self.clear = [0.0] * len(self.held), [math.inf] * len(self.held)

    def add(self, before: Tensor, symbols: Tensor, after: Tensor) -> None:
        holds = self.exploration.holds
        states = [
            torch.stack([held[h, own[before, h]] for h in range(len(held))], 1)
            for held, own in zip(self.held, holds, strict=True)
        ]

        want = self.table[self.exploration.state_of[before], symbols]
        with self._watched():
            inputs, logits = self._run(self.measured, symbols, states, compute_dtype(self.measured.embedding.weight))
        right, others = _scores(logits, want)
        self.margin = min(self.margin, float((right - others).min()))
        self.largest = max(self.largest, float(logits.abs().max()))
        if self.measured is not self.model:  # labels are its own, and so are keys along axes
            own_inputs, logits = self._run(self.model, symbols, states, torch.float32)
            right, others = _scores(logits, want)
            inputs[0] = self._as_in_float32(inputs[0], own_inputs[0])
            inputs[1:] = [self._as_in_float32(x, x) for x in inputs[1:]]
        self.wrong += int((~(right > others)).sum())
        for layer, ((q, k, v, beta), s) in enumerate(zip(inputs, states, strict=True)):
            self._layer(layer, s, q[:, 0], k[:, 0], v[:, 0], beta[:, 0], before, after)

    def _run(
        self, model: SequenceModel, symbols: Tensor, states: list[Tensor], dtype: torch.dtype
    ) -> tuple[list[_Inputs], Tensor]:
        """What the layers' recurrences are given, and the logits [P,labels], for symbols [P] read in these states."""
        given = [layer._replace(recurrent=s.to(dtype)) for layer, s in zip(self.start, states, strict=True)]
        with operator_inputs(model, _normalised) as inputs:
            logits, _ = model(symbols[:, None], given)
        return inputs, logits[:, 0]

    @staticmethod
    def _as_in_float32(exact: _Inputs, own: _Inputs) -> _Inputs:
        """What float32 makes of a layer's exact inputs, as far as that is certain: β, and keys along axes."""
        q, k, v, beta = exact
        single = (k != 0).sum(-1, keepdim=True) == 1
        return q, torch.where(single, own[1].float().double(), k), v, beta.float().double()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note, while the model runs, what the norms in front of look-ups and head multiply by, and how far from 0 the
        look-ups' ANDs are."""

        def look(layer: int, gate: Tensor | None, norm: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            gain = out.double().norm(dim=-1) / given[0].double().norm(dim=-1)
            self.gains[layer] = max(self.gains[layer], float(gain.max()))
            if gate is not None:
                self.clear[layer] = min(self.clear[layer], float((out @ gate.T).abs().min()))

        last = self.layers[-1][0]
        hooks = [self.measured.norm.register_forward_hook(partial(look, -1, None))] if last.mlp is None else []
        for i, (block, _) in enumerate(self.layers):
            if block.mlp is not None:
                hooks.append(block.mlp_norm.register_forward_hook(partial(look, i, block.mlp.gate_proj.weight)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _layer(
        self, layer: int, state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, before: Tensor, after: Tensor
    ) -> None:
        """state [P,H,K,V], q [P,H,K], k [P,N,H,K], v [P,N,H,V], beta [P,N,H]."""
        matrix = transition(k, beta)
        limit = torch.ones_like(beta[:, 0], dtype=torch.float64)
        rounding, growth = torch.zeros_like(limit), torch.zeros_like(limit)
        writes = torch.zeros_like(limit, dtype=torch.bool)
        unit = ROUNDING[torch.float64 if self.dtype == torch.float64 else torch.float32]
        coarse = self.dtype not in (torch.float64, torch.float32)  # what enters is as measured, to the last bit
        for k_j, v_j, beta_j in zip(k.double().unbind(1), v.double().unbind(1), beta.double().unbind(1), strict=True):
            recalled = (k_j.unsqueeze(-2) @ state).squeeze(-2).norm(dim=-1)
            summed = (k_j.abs().unsqueeze(-2) @ state.abs()).squeeze(-2).norm(dim=-1)
            error = (v_j - (k_j.unsqueeze(-2) @ state).squeeze(-2)).norm(dim=-1)
            length, new = k_j.norm(dim=-1), householder_step(state, k_j, v_j, beta_j)
            terms = (k_j.abs() > NOISE * k_j.abs().amax(-1, keepdim=True)).sum(-1)
            after_it = new.flatten(2).norm(dim=2)
            # A key's length is off by half of what its sum of squares is, and by a root and a quotient; each entry by
            # its own product in the projection, and by that with the length. One along an axis is rounded once.
            whole = torch.where(terms == 1, 1.0, (terms + 1) / 2 + 2)
            entry = torch.where(terms == 1, 0.0, 1.0 if coarse else 2.0)
            keys = whole * (error + recalled) + entry * (error + summed)
            values = (0 if coarse else VALUES) * v_j.norm(dim=-1)
            bound = beta_j * length * (terms * summed + 3 * error + keys + values) + after_it
            # The same of a state that is off its code, per unit of how far.
            more = beta_j * length**2 * (terms + 3 + 2 * whole + 2 * entry) + 1
            # A key along an axis, a β that is a whole number and nothing to write: every product and sum is exact.
            exact = ((k_j != 0).sum(-1) == 1) & (length == 1) & (beta_j == beta_j.round()) & (v_j == 0).all(-1)
            exact |= beta_j == 0
            rounding += torch.where(exact, 0.0, unit * bound)
            growth += torch.where(exact, 0.0, unit * more)
            writes |= (beta_j > 0) & (v_j != 0).any(-1)
            limit *= (1 - beta_j * length**2).abs().clamp(min=1)
            state = new
        read = (q.double().unsqueeze(-2) @ state).squeeze(-2).norm(dim=-1)
        for h, edges in enumerate(self.edges[layer]):
            basis, own = self.exploration.kept[layer][h].double(), self.exploration.holds[layer]
            projected = basis @ matrix[:, h] @ basis.T
            outside = (matrix[:, h] - matrix[:, h] @ basis.T @ basis).flatten(1).norm(dim=1)
            norm = torch.minimum(limit[:, h], projected.flatten(1).norm(dim=1)) + outside + growth[:, h]
            self.survives = max(self.survives, float(outside.max()))
            found, code = ((basis @ s).flatten(1) for s in (state[:, h], self.held[layer][h, own[after, h]]))
            factor = ((found * code).sum(1) / code.square().sum(1)).nan_to_num(1.0)  # nothing survives: nothing to miss
            noise = 1e-13 * found.norm(dim=1)  # of float64, here
            missed, apart = (found - code).norm(dim=1), (found - factor[:, None] * code).norm(dim=1)
            missed, apart = (torch.where(off < noise, 0.0, off) for off in (missed, apart))
            missed = missed + rounding[:, h]
            turned = (apart + rounding[:, h]) / factor
            beside = (writes[:, h] & (norm > CLEARED)).double()
            values = torch.stack((norm, missed, turned, -read[:, h], -factor, beside), 1)
            edges.add(own[before, h], own[after, h], values)

    def heads(self) -> list[Head]:
        tolerated = self._tolerated()
        result = []
        for layer, all_edges in enumerate(self.edges):
            for h, edges in enumerate(all_edges):
                scale = float(self.scale[layer][h])
                pairs, values = edges.gathered()
                free = not values[:, 5].any()
                error = values[:, 2 if free else 1]
                bound = _settled(pairs, values[:, 0], error, self.held[layer].shape[1])
                read = -float(values[:, 3].max()) * (min(1.0, -float(values[:, 4].max())) if free else 1)
                result.append(
                    Head(
                        layer, h, read / scale, float(error.max()) / scale, max(1.0, float(values[:, 0].max())),
                        None if bound is None else bound / scale, tolerated[layer] * read / scale,
                    )
                )  # fmt: skip
        return result

    def _tolerated(self) -> list[float]:
        """For each layer: how far off a state may be, as a share of what its heads read.

        A head of value dimension 1 gives a sign, for which half is enough. A direction that is off by a share x moves
        what depends on it by x times the weights' norm: the look-up's ANDs, which may lose half of what keeps them
        apart in the last layer and a hundredth elsewhere, or the scores of two labels.
        """
        model, slack = self.measured, SLACK * ROUNDING[self.dtype]
        result = []
        for (block, mixer), gain, clear in zip(self.layers, self.gains, self.clear, strict=True):
            if mixer.head_v_dim == 1:
                result.append(0.5)
                continue
            last = block is model.blocks[-1]
            if block.mlp is not None:
                weights, allowed = block.mlp.gate_proj.weight, (0.5 if last else 0.01) * clear * (1 - slack)
            else:  # and then it is the only layer
                weights, allowed = 2 * model.head.weight, self.margin - slack * self.largest
            reached = gain * (weights.double() @ mixer.o_proj.weight.double())
            by_head = reached.unflatten(1, (-1, mixer.head_v_dim)).norm(dim=2).sum(1) * math.sqrt(mixer.head_v_dim)
            share = allowed / max(1e-30, float(by_head.max()))
            result.append(max(0.0, min(0.5, share / 1.1)))  # 1.1: up to a half, an arc is not longer than that
        return result


def _settled(pairs: Tensor, norm: Tensor, error: Tensor, states: int) -> float | None:
    """What D′ ≤ norm·D + error never exceeds along these pairs of states; None when it goes on growing."""
    if not error.any():
        return 0.0
    if (norm > CLEARED).all():  # every state is left again and again, and never cleared
        return None
    order = pairs[:, 1].argsort()
    source, target, norms, errors = (x.numpy() for x in (pairs[order, 0], pairs[order, 1], norm[order], error[order]))
    first = np.flatnonzero(np.diff(target, prepend=-1))  # of every target's pairs
    distance = np.zeros(states)
    for _ in range(ROUNDS):
        grown = distance.copy()
        grown[target[first]] = np.maximum.reduceat(norms * distance[source] + errors, first)
        if np.allclose(grown, distance, rtol=1e-9, atol=0):
            return float(grown.max())
        distance = grown
    return None
