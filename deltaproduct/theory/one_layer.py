"""What one layer can do exactly: a group's word problem, and any automaton whose symbols permute its states.

A group, by its product g as an orthogonal matrix. The layer's state holds R_gᵀ, in one or more representations
(representations.py), and a head for each of its rows that is looked at. A token x multiplies by R_xᵀ, as a product of
reflections; BOS writes the start. What the heads read, normalised to a constant length, is the code of g. All codes
have one length, so that the logit of each element, its code times what was read, is largest for g alone.

An automaton of n states whose symbols are permutations, by a corner of a regular simplex that reflections move (P2,
Theorem 3). A head for each state reads the sign of its own corner's product with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.models import SequenceModel
from deltaproduct.theory.circuit import Circuit, Write, plain_config
from deltaproduct.theory.householder import Factors
from deltaproduct.theory.representations import Representation

DIRECTIONS_TRIED = 64


@dataclass(frozen=True, eq=False)
class _Head:
    """What one head does: [n] factors for the n elements, and the row of the state that it reads."""

    factors: list[Factors]
    columns: int  # of the identity that BOS writes
    query: Tensor  # [d]
    code: Tensor  # [n,columns] of length 1


def one_layer(name: str, found: Sequence[Representation], num_householder: int | None) -> SequenceModel:
    """The model; `name` is for messages. Raises UsageError when num_householder is too few."""
    all_factors = [representation.factors() for representation in found]
    least = max(1, *(len(f.betas) for factors in all_factors for f in factors))
    steps = least if num_householder is None else num_householder
    if steps < least:
        raise UsageError(f"{name} in one layer needs num_householder of at least {least} here, not {steps}.")
    heads: list[_Head] = []
    for representation, factors in zip(found, all_factors, strict=True):
        heads += _heads(representation, factors, steps)
    return _model(heads, steps)


def _heads(representation: Representation, factors: list[Factors], steps: int) -> list[_Head]:
    """A head for every row, if the whole matrix can be written at once; else as many in directions found by trying."""
    d = representation.size
    columns = min(d, steps)
    states = representation.matrices.mT[:, :, :columns]  # R_gᵀ, what BOS wrote moved on
    queries = torch.eye(d, dtype=torch.float64)
    if columns < d:  # rows of fewer columns have no constant length, and none may be near zero
        rng = torch.Generator().manual_seed(0)
        normals = torch.randn(DIRECTIONS_TRIED, d, d, generator=rng, dtype=torch.float64)
        tried = torch.linalg.qr(normals).Q
        queries = max(tried, key=lambda directions: _margin(_codes(states, directions)))
    codes = _codes(states, queries)
    return [_Head(factors, columns, query, code) for query, code in zip(queries, codes, strict=True)]


def _codes(states: Tensor, queries: Tensor) -> Tensor:
    """What heads with these queries [h,d] read from states [n,d,columns], normalised: [h,n,columns]."""
    return torch.nn.functional.normalize(torch.einsum("hd,ndc->hnc", queries, states), dim=-1)


def _margin(codes: Tensor) -> float:
    """By how much each element's own score is above any other's, at least."""
    flat = codes.movedim(1, 0).flatten(1)
    scores = flat @ flat.T
    own = scores.diagonal().clone()
    return float((own - scores.fill_diagonal_(-math.inf).max(1).values).min())


def _model(heads: Sequence[_Head], steps: int) -> SequenceModel:
    n = len(heads[0].factors)
    key_dim = max(len(head.query) for head in heads)
    value_dim = max(head.columns for head in heads)
    bos, out = n, n + 1
    config = plain_config(
        vocab_size=n + 1,
        num_labels=n,
        hidden_size=n + 1 + len(heads) * value_dim,
        intermediate_size=0,
        num_heads=len(heads),
        head_dim=key_dim,
        num_householder=steps,
        expand_v=value_dim / key_dim,
    )
    circuit = Circuit(config)
    queries = torch.zeros(len(heads), key_dim, dtype=torch.float64)
    codes = torch.zeros(n, len(heads), value_dim, dtype=torch.float64)
    writes: list[dict[int, Write]] = []
    for h, head in enumerate(heads):
        queries[h, : len(head.query)] = head.query
        codes[:, h, : head.columns] = head.code
        identity = torch.eye(key_dim, dtype=torch.float64)[: head.columns]
        start = Write(Factors(identity, torch.ones(head.columns, dtype=torch.float64)), identity[:, : head.columns])
        by_token = {token: Write(factors.widened(key_dim)) for token, factors in enumerate(head.factors)}
        writes.append(by_token | {bos: start})
    circuit.mixer(0, queries, writes, out, power=len(heads))
    return circuit.read(out, codes.flatten(1))
