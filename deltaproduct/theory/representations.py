"""What is multiplied: a group as orthogonal matrices of a size and kind that few Householder factors make.

A word problem here is a group with an element for every symbol, and a label for every product. A layer follows it
exactly if the representations tell all elements apart (P1, Theorems 1 and 4; P2, Theorem 3).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import Group, Permutation, build_group
from deltaproduct.theory.householder import Factors, no_factors, transpositions
from deltaproduct.theory.rotations import Representation, rotations

MAX_ENTRIES = 50_000_000  # of a group's matrices, 400 MB of them


@dataclass(frozen=True, eq=False)
class WordProblem:
    """Products g = g_1 ∘ g_2 ∘ … of a group's elements, each further symbol on the right.

    Attributes:
        name: what messages call it.
        representations: together they tell the n elements apart.
        tokens: [s] the element of each symbol.
        labels: [n] what is to be said of each product.
        num_labels: how many labels there are, with those that no product has.
    """

    name: str
    representations: list[Representation]
    tokens: list[int]
    labels: list[int]
    num_labels: int

    @property
    def regular(self) -> bool:
        """Whether different products have different labels."""
        return len(set(self.labels)) == len(self.labels)


def of_group(name: str, *, as_rotations: bool = True) -> WordProblem:
    """The word problem of a group of `tasks/groups.py`: symbols, elements and labels are the same.

    Raises UsageError as `representations`.
    """
    group, found = representations(name, as_rotations=as_rotations)
    n = len(group.elements)
    return WordProblem(name, found, list(range(n)), list(range(n)), n)


def representations(name: str, *, as_rotations: bool = True) -> tuple[Group, list[Representation]]:
    """A group of `tasks/groups.py`, and representations that together tell its elements apart.

    Factors of a direct product are represented one by one: as rotations where they are such (rotations.py) and that
    is asked for, else S_m and A_m as permutations of the m corners of a regular simplex in m − 1 dimensions.

    Raises UsageError as `build_group`, or when matrices would have more than 50,000,000 entries.
    """
    group = build_group(name)
    found: list[Representation] = []
    offset = 0
    points = sum((int(part[1:]) - 1) ** 2 for part in name.split("_x_"))
    if not as_rotations and len(group.elements) * points > MAX_ENTRIES:
        raise UsageError(f"its matrices have {len(group.elements) * points:,} entries, at most {MAX_ENTRIES:,}")
    for part in name.split("_x_"):
        m = int(part[1:])
        every = [tuple(x - offset for x in p[offset : offset + m]) for p in group.elements]
        own = sorted(set(every))
        known = rotations(own) if as_rotations else None
        if not known and len(own) * (m - 1) ** 2 > MAX_ENTRIES:
            raise UsageError(f"its matrices have {len(own) * (m - 1) ** 2:,} entries, at most {MAX_ENTRIES:,}")
        known = known or [Representation(part, _of_points(simplex(m), own))]
        number = {p: i for i, p in enumerate(own)}
        index = torch.tensor([number[p] for p in every])
        found += [Representation(r.name, r.matrices[index]) for r in known]
        offset += m
    return group, found


def of_automaton(automaton: Automaton) -> WordProblem:
    """An automaton whose symbols permute its states, as a group of rotations.

    A state is where the product of permutations takes the initial one, and different products may so have one label.

    Raises UsageError when some symbol is no permutation, or the group that they make is none of rotations or trivial.
    """
    require_permutations(automaton)
    elements = automaton.monoid()
    if len(elements) == 1:
        raise UsageError("its symbols leave every state as it is, and there is nothing to follow")
    found = rotations(elements)
    if not found:
        raise UsageError(f"its symbols make a group of order {len(elements):,}, which is none of rotations")
    # Symbols act on the left, f_t ∘ … ∘ f_1, and products here grow on the right: so they are those of inverses.
    number = {p: i for i, p in enumerate(elements)}
    tokens = [number[inverse(p)] for p in automaton.maps]
    labels = [inverse(p)[automaton.initial] for p in elements]
    return WordProblem("The automaton", found, tokens, labels, len(automaton.states))


def require_permutations(automaton: Automaton) -> None:
    """Raises UsageError when some symbol is no permutation of the states."""
    for symbol, images in zip(automaton.alphabet, automaton.maps, strict=True):
        if len(set(images)) < len(images):
            first: dict[int, int] = {}
            q = next(q for q, to in enumerate(images) if first.setdefault(to, q) != q)
            p = first[images[q]]
            raise UsageError(
                f"symbol {symbol!r} takes both {automaton.states[p]!r} and {automaton.states[q]!r} to "
                f"{automaton.states[images[p]]!r}, so that it is no permutation"
            )


def inverse(p: Permutation) -> Permutation:
    """What takes p[x] back to x."""
    return tuple(sorted(range(len(p)), key=p.__getitem__))


def simplex(m: int) -> Tensor:
    """The corners [m,m−1] of a regular simplex, unit vectors with the products −1/(m−1)."""
    # Each corner is on the next axis as far as it is not settled by the axes before.
    corners = torch.zeros(m, m - 1, dtype=torch.float64)
    for axis in range(m - 1):
        height = math.sqrt(1 - float(corners[axis, :axis].square().sum()))
        corners[axis, axis] = height
        corners[axis + 1 :, axis] = (-1 / (m - 1) - corners[axis + 1 :, :axis] @ corners[axis, :axis]) / height
    return corners


def swaps(permutation: Permutation, corners: Tensor) -> Factors:
    """Reflections that take every corner x of a simplex to corner permutation[x], two of them at a time."""
    return swap_factors(transpositions(permutation), corners)


def swap_factors(pairs: Iterable[tuple[int, int]], corners: Tensor) -> Factors:
    """Reflections that swap corners of a simplex, one pair after the other."""
    keys = [corners[a] - corners[b] for a, b in pairs]
    if not keys:
        return no_factors(corners.shape[1])
    directions = torch.nn.functional.normalize(torch.stack(keys), dim=-1)
    return Factors(directions, torch.full((len(keys),), 2.0, dtype=torch.float64))


def _of_points(points: Tensor, elements: Sequence[Permutation]) -> Tensor:
    """The isometries that permute `points` [m,d], whose outer products add up to m/d times the identity, so."""
    m, d = points.shape
    images = points[torch.tensor(elements)]  # [n,m,d]
    return torch.einsum("nmi,mj->nij", images, points) * (d / m)
