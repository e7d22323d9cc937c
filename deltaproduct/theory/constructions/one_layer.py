"""A group's word problem in one layer: the product g of all symbols, as an orthogonal matrix.

The layer's state holds R_gᵀ, in one or more representations (representations.py), and a head for each of its rows that
is looked at. A token x multiplies by R_xᵀ, as a product of reflections; BOS writes the start. What the heads read,
normalised to a constant length, is the code of g. All codes have one length, so that the score of each element, its
code times what was read, is largest for g alone. Where several elements have one label, an MLP looks it up.
"""

import math

import torch
from torch import Tensor

from deltaproduct.theory.constructions.circuit import Circuit, Unit, Write
from deltaproduct.theory.householder import Factors
from deltaproduct.theory.limits import Plan
from deltaproduct.theory.representations import WordProblem

DIRECTIONS_TRIED = 64


def one_layer(problem: WordProblem, strategy: str) -> Plan:
    """The plan, with as many Householder factors per token as its symbols need."""
    representations = problem.representations
    factors = [r.factors(problem.tokens) for r in representations]
    steps = max(1, *(len(f.betas) for own in factors for f in own))
    key_dim = max(r.size for r in representations)
    value_dim = min(key_dim, steps)
    bos, n = len(problem.tokens), len(problem.labels)
    queries: list[Tensor] = []
    writes: list[dict[int, Write]] = []
    codes = torch.zeros(n, sum(r.size for r in representations), value_dim, dtype=torch.float64)
    for representation, own in zip(representations, factors, strict=True):
        d = representation.size
        columns = min(d, steps)
        states = representation.matrices.mT[:, :, :columns]  # R_gᵀ, as far as BOS can write it
        directions = _directions(states)
        identity = torch.eye(key_dim, value_dim, dtype=torch.float64)[:columns]
        rows = torch.eye(key_dim, dtype=torch.float64)[:columns]
        start = Write(Factors(rows, torch.ones(columns, dtype=torch.float64)), identity)
        moves = {token: Write(f.widened(key_dim)) for token, f in enumerate(own)} | {bos: start}
        codes[:, len(queries) : len(queries) + d, :columns] = _codes(states, directions).movedim(0, 1)
        writes += [moves] * d
        queries += torch.nn.functional.pad(directions, (0, key_dim - d))
    circuit, heads = Circuit(bos + 1), len(queries)
    out = circuit.mixer(torch.stack(queries), writes, power=heads)
    flat = codes.flatten(1)
    if problem.regular:
        by_label = torch.zeros(problem.num_labels, flat.shape[1], dtype=torch.float64)
        by_label[problem.labels] = flat
        return circuit.plan(strategy, out, by_label)
    # A product's own score is the number of heads, and all others are below it by the margin: halfway is the threshold.
    margin, answer = _margin(flat), circuit.take(problem.num_labels)
    units = []
    for label, code in zip(problem.labels, flat.tolist(), strict=True):
        weights = {out + i: x / margin for i, x in enumerate(code) if x}
        units.append(Unit(weights, heads / margin - 0.5, (answer + label,)))
    circuit.look_up(units)
    return circuit.plan(strategy, answer, torch.eye(problem.num_labels, dtype=torch.float64))


def _directions(states: Tensor) -> Tensor:
    """What heads read from states [n,d,columns]: every row [d,d], if the whole matrix is there.

    Else as many directions, found by trying: rows of fewer columns have no constant length, and none may be near zero.
    """
    d, columns = states.shape[1:]
    if columns == d:
        return torch.eye(d, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    tried = torch.linalg.qr(torch.randn(DIRECTIONS_TRIED, d, d, generator=rng, dtype=torch.float64)).Q
    return max(tried, key=lambda directions: _margin(_codes(states, directions).movedim(0, 1).flatten(1)))


def _codes(states: Tensor, queries: Tensor) -> Tensor:
    """What heads with these queries [h,d] read from states [n,d,columns], normalised: [h,n,columns]."""
    return torch.nn.functional.normalize(torch.einsum("hd,ndc->hnc", queries, states), dim=-1)


def _margin(codes: Tensor) -> float:
    """By how much each element's own score is above any other's, at least, from codes [n,c].

    Elements that are not told apart have one code, and are no others.
    """
    different = codes.round(decimals=9).unique(dim=0)
    scores = different @ different.T
    own = scores.diagonal().clone()
    return float((own - scores.fill_diagonal_(-math.inf).max(1).values).min())
