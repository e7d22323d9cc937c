"""Exact weights: a group's word problem in one layer of an unmodified `SequenceModel`.

The layer's state holds R_gᵀ for the product g of the tokens so far, in one or more representations
(representations.py), and a head for each of its rows that is looked at. A token x multiplies by R_xᵀ, as a product of
reflections; BOS writes the start. What the heads read, normalised to a constant length, is the code of g. All codes
have one length, so that the logit of each element, its code times what was read, is largest for g alone.

What makes the weights exact in float32: 2·sigmoid saturates to exactly 2 and 0, and is exactly 1 at 0; keys are scaled
up so that the 1e-6 in their normalisation is invisible, and written values so that the norm's eps is. The residual
stream has one length for all tokens, so that norms are constant factors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.files import replaced_folder, write_json
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import Group
from deltaproduct.theory.householder import Factors
from deltaproduct.theory.representations import Representation, representations

AUTOMATON = "automaton.json"
LARGE = 1e3  # of keys and values before their normalisation: its eps is then below float32's rounding
ON, OFF = 40.0, -200.0  # logits of β = 2 and 0; sigmoid is 1 and below 1e-86 there, float64 included
SHARPNESS = 10.0  # of the logits
DIRECTIONS_TRIED = 64


@dataclass(frozen=True)
class Compiled:
    """A model, and the automaton that it carries out: its label at each position is the state after that symbol."""

    model: SequenceModel
    automaton: Automaton

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint like any other, with automaton.json beside it; the folder is replaced in one step.

        Raises UsageError when it cannot be written.
        """
        with replaced_folder(Path(folder)) as fresh:
            self.model.write_files(fresh)
            write_json(fresh / AUTOMATON, self.automaton.to_dict())


@dataclass(frozen=True, eq=False)
class _Head:
    """What one head does: [n] factors for the n elements, and the row of the state that it reads."""

    factors: list[Factors]
    columns: int  # of the identity that BOS writes
    query: Tensor  # [d]
    code: Tensor  # [n,columns] of length 1


def group_automaton(group: Group) -> Automaton:
    """The group's word problem: symbols and states are its elements, and g goes by x to g ∘ x."""
    return Automaton(
        alphabet=group.names,
        states=group.names,
        initial=0,
        accepting=(0,),
        transitions=tuple(tuple(row) for row in group.table.tolist()),
    )


def compile_group(name: str, num_householder: int | None = None) -> Compiled:
    """The word problem of a group of `tasks/groups.py` in one layer, right at every length up to rounding.

    Args:
        name: such as "S5", "A5", "Z60", "D12", "S3_x_Z2".
        num_householder: N; None means the fewest that its representations need: 4 for S5, 2 for A5, S4, Z_m and D_m.

    Raises UsageError when there is no such group, or N is too few.
    """
    group, found = representations(name)
    all_factors = [representation.factors() for representation in found]
    least = max(1, *(len(f.betas) for factors in all_factors for f in factors))
    steps = least if num_householder is None else num_householder
    if steps < least:
        raise UsageError(f"{name} in one layer needs num_householder of at least {least} here, not {steps}.")
    heads: list[_Head] = []
    for representation, factors in zip(found, all_factors, strict=True):
        heads += _heads(representation, factors, steps)
    return Compiled(_model(heads, steps), group_automaton(group))


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
    bos, width = n, n + 1 + len(heads) * value_dim  # a slot for each token, then the codes
    config = ModelConfig(
        vocab_size=n + 1,
        num_labels=n,
        hidden_size=width,
        num_hidden_layers=1,
        intermediate_size=0,
        num_heads=len(heads),
        head_dim=key_dim,
        num_householder=steps,
        expand_v=value_dim / key_dim,
        allow_neg_eigval=True,
        use_short_conv=False,
        qkv_activation="identity",
    )
    q = torch.zeros(len(heads), key_dim, n + 1, dtype=torch.float64)
    k = torch.zeros(steps, len(heads), key_dim, n + 1, dtype=torch.float64)
    v = torch.zeros(steps, len(heads), value_dim, n + 1, dtype=torch.float64)
    beta = torch.zeros(steps, len(heads), n + 1, dtype=torch.float64)
    codes = torch.zeros(n, len(heads), value_dim, dtype=torch.float64)
    for h, head in enumerate(heads):
        d = len(head.query)
        q[h, :d] = head.query[:, None]
        codes[:, h, : head.columns] = head.code
        for token, factors in enumerate(head.factors):
            padded = factors.padded(steps)
            k[:, h, :d, token] = padded.keys
            beta[:, h, token] = torch.where(padded.betas == 2, ON, OFF)
        # BOS writes the identity's columns, one a step: β is exactly 1 where the logit is 0.
        k[:, h, 0, bos] = 1
        beta[:, h, bos] = OFF
        for column in range(head.columns):
            k[column, h, :, bos] = torch.eye(key_dim, dtype=torch.float64)[column]
            v[column, h, column, bos] = 1
            beta[column, h, bos] = 0
    model = SequenceModel(config).double()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if "norm" not in name:
                weight.zero_()
        slots = torch.eye(width, dtype=torch.float64)
        weights["embedding.weight"][:] = slots[: n + 1]
        # The norm multiplies the one-hot code of a token by this.
        gain = 1 / math.sqrt(1 / width + config.norm_eps)
        mixer = "blocks.0.mixer."
        weights[mixer + "q_proj.weight"][:, : n + 1] = LARGE * q.flatten(0, 1)
        weights[mixer + "k_proj.weight"][:, : n + 1] = LARGE * k.flatten(0, 2)
        weights[mixer + "v_proj.weight"][:, : n + 1] = LARGE * v.flatten(0, 2)
        weights[mixer + "b_proj.weight"][:, : n + 1] = beta.flatten(0, 1) / gain
        weights[mixer + "o_proj.weight"][n + 1 :] = torch.eye(len(heads) * value_dim, dtype=torch.float64)
        weights["head.weight"][:, n + 1 :] = SHARPNESS * codes.flatten(1)
    return model.float().eval()
