"""What theorems about linear RNNs ask of a group: orders, points moved, isometries. Computed from the group itself.

The letters: m is a cyclic group's order and a polygon's number of corners, d the dimension of a representation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.tasks.groups import Group, build_group
from deltaproduct.theory.representations import representations
from deltaproduct.theory.rotations import prime_powers

SOLIDS = {12: "tetrahedron", 24: "cube", 60: "icosahedron"}  # whose rotations are so many, and neither Z_m nor D_m


@dataclass(frozen=True)
class Space:
    """An orthogonal representation: its dimension d, whether all are rotations, the most reflections one takes."""

    size: int
    rotations: bool
    reflections: int

    @property
    def inside(self) -> str:
        """O(d), or SO(d) where the matrices are rotations and d is odd, which is where it saves a reflection."""
        return f"SO({self.size})" if self.rotations and self.size % 2 else f"O({self.size})"

    @property
    def num_householder(self) -> int:
        """The n_h that P1's Theorem 4 asks for: d for O(d), d − 1 for SO(d) with odd d."""
        return self.size - (self.inside[0] == "S")


@dataclass(frozen=True, eq=False)
class GroupFacts:
    """A group's word problem, its inputs being all elements or those moving few points.

    Attributes:
        name: as `tasks.groups.build_group` takes it.
        names: of the elements; an element's number is its place in here, and 0 is the identity.
        inputs: numbers of the elements that are symbols, the identity among them.
        orders: of every element.
        abelian: whether all elements commute.
        points: how many it permutes faithfully here, for Z_m not m but the sum of m's prime powers.
        moved: the most of those points that one input moves.
        cyclic: m if the group is isomorphic to Z_m.
        dihedral: m if it is isomorphic to D_m, m ≥ 3.
        spaces: representations that tell its elements apart, of few reflections.
        parity_layers: how many groups the series G, its squares' group, that one's squares' group … takes to become
            trivial, which it does for groups of 2^p elements; None for all others.
        factors: of a direct product; none for any other name.
    """

    name: str
    names: tuple[str, ...]
    inputs: tuple[int, ...]
    orders: tuple[int, ...]
    abelian: bool
    points: int
    moved: int
    cyclic: int | None
    dihedral: int | None
    spaces: tuple[Space, ...]
    parity_layers: int | None
    factors: tuple["GroupFacts", ...]

    @property
    def size(self) -> int:
        """How many elements there are."""
        return len(self.names)

    @property
    def one_layer_householder(self) -> int:
        """The least n_h with which `compile_group` makes it one layer."""
        return max(1, *(space.reflections for space in self.spaces))

    @property
    def shape(self) -> str:
        """What the group is as a group of isometries, as a clause."""
        space = max(self.spaces, key=lambda s: s.size)
        if self.factors:
            return "; ".join(part.shape for part in self.factors) + "; each has heads of its own"
        if self.cyclic == 2:
            what = "the sign group O(1)"
        elif self.cyclic:
            what = f"the group of the plane's rotations by multiples of 1/{self.cyclic} of a turn, a subgroup of O(2)"
        elif self.dihedral:
            what = f"the symmetry group of a regular {self.dihedral}-gon, a subgroup of O(2)"
        elif space.rotations and space.size == 3:
            what = f"the rotation group of the {SOLIDS[self.size]}, a subgroup of SO(3)"
        else:
            kind = "rotations" if space.rotations else "symmetries"
            what = f"a group of {kind} of a regular simplex in {space.size} dimensions, a subgroup of {space.inside}"
        return f"{self.name} is {what}"

    def find(self, condition: Callable[[int], bool], *, among_inputs: bool) -> int | None:
        """The number of an element whose order meets a condition, of the least such order; None if there is none."""
        candidates = self.inputs if among_inputs else range(self.size)
        return min((i for i in candidates if condition(self.orders[i])), key=lambda i: self.orders[i], default=None)


@lru_cache(maxsize=256)
def group_facts(name: str, moves: int | None = None) -> GroupFacts:
    """The facts about a group of `tasks/groups.py`; with `moves`, about S_n with inputs moving at most so many points.

    Raises UsageError as `build_group`, and where `moves` is given and the group is not S_n or not 1 < moves < n.
    """
    group, found = representations(name)
    moved = [sum(x != y for x, y in enumerate(p)) for p in group.elements]
    inputs = range(len(moved)) if moves is None else _moving_at_most(name, moves, moved)
    parts = name.split("_x_")
    orders = _orders(group.table)
    cyclic = len(orders) if max(orders) == len(orders) else None
    points = sum(prime_powers(cyclic)) if cyclic else len(group.elements[0])
    return GroupFacts(
        name=name,
        names=group.names,
        inputs=tuple(inputs),
        orders=orders,
        abelian=bool(torch.equal(group.table, group.table.T)),
        points=points,
        moved=min(points, max(moved[i] for i in inputs)),
        cyclic=cyclic,
        dihedral=_dihedral(group, orders),
        spaces=tuple(_space(representation.matrices) for representation in found),
        parity_layers=_squares_series(group.table),
        factors=tuple(group_facts(part) for part in parts) if len(parts) > 1 else (),
    )


def is_power_of_two(m: int) -> bool:
    """Whether m is 1, 2, 4, 8, …"""
    return m & (m - 1) == 0


def _moving_at_most(name: str, moves: int, moved: list[int]) -> list[int]:
    n = len(build_group(name).elements[0])
    if not (name[0] == "S" and name[1:].isdigit()):
        raise UsageError(f"--moves needs one symmetric group, such as S5, not {name}.")
    if not 1 < moves < n:
        raise UsageError(f"--moves must be at least 2 and less than the {n} points of {name}, not {moves}.")
    return [i for i, count in enumerate(moved) if count <= moves]


def _orders(table: Tensor) -> tuple[int, ...]:
    n = table.shape[0]
    element = torch.arange(n)
    power, order = element.clone(), torch.ones_like(element)
    while (going := power != 0).any():
        power = torch.where(going, table[power, element], power)
        order += going
    return tuple(order.tolist())


def _dihedral(group: Group, orders: tuple[int, ...]) -> int | None:
    """m if some element of order m = half the group's size leaves out only elements of order 2."""
    m, odd = divmod(len(orders), 2)
    if odd or m < 3 or m not in orders:
        return None
    rotation, power, inside = orders.index(m), 0, set()
    for _ in range(m):
        inside.add(power)
        power = int(group.table[power, rotation])
    return m if all(order == 2 for i, order in enumerate(orders) if i not in inside) else None


def _space(matrices: Tensor) -> Space:
    """Of a representation [n,d,d]."""
    size = matrices.shape[1]
    moved = torch.linalg.matrix_rank(matrices - torch.eye(size, dtype=matrices.dtype), atol=1e-6)
    return Space(size, bool((torch.linalg.det(matrices) > 0).all()), int(moved.max()))


def _squares_series(table: Tensor) -> int | None:
    """How many steps G ⊃ ⟨squares of G⟩ ⊃ … takes to the trivial group: each quotient is a product of copies of Z2."""
    if not is_power_of_two(table.shape[0]):
        return None
    members, length = torch.arange(table.shape[0]), 0
    while len(members) > 1:
        members, length = generated(table, table[members, members]), length + 1
    return length


def generated(table: Tensor, elements: Tensor) -> Tensor:
    """The numbers, increasing, of the subgroup that some elements of a group with this Cayley table generate."""
    members = torch.unique(torch.cat([torch.zeros(1, dtype=torch.int64), elements]))
    while True:
        larger = torch.unique(table[members[:, None], members[None]])
        if len(larger) == len(members):
            return members
        members = larger
