"""Where the parts of a drawn graph go: its nodes around a circle, lines between them, labels on the lines.

Plain geometry: points are [2], in inches.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

MOST_COUNTED = 16  # nodes up to which crossings are counted; beyond, only the length of the lines
MOST_TRIED = 30_000  # orders


def circular_order(n: int, edges: Iterable[tuple[int, int]], first: int = 0) -> list[int]:
    """The nodes 0 … n−1 in an order around a circle that starts at `first` and makes few lines cross, and them short.

    From the order of a breadth-first search on, two nodes change places or a part is turned round, as long as that
    helps: a local optimum, always the same one.
    """
    lines = sorted({(min(a, b), max(a, b)) for a, b in edges if a != b})
    order = _breadth_first(n, lines, first)
    if n < 4 or not lines:
        return order
    ends, place = np.array(lines), np.empty(n, dtype=np.int64)

    def cost(order: list[int]) -> float:
        place[order] = np.arange(n)
        return _cost(place[ends], n)

    best, tried, pairs = cost(order), 0, list(itertools.combinations(range(1, n), 2))  # the first stays in its place
    while tried < MOST_TRIED:
        before = best
        for i, j in pairs:
            swapped = [*order[:i], order[j], *order[i + 1 : j], order[i], *order[j + 1 :]]
            turned = [*order[:i], *order[i : j + 1][::-1], *order[j + 1 :]]
            for other in (swapped, turned):
                if (its_cost := cost(other)) < best - 1e-9:
                    best, order = its_cost, other
        tried += 2 * len(pairs)
        if best == before:
            break
    return order


def _cost(places: np.ndarray, n: int) -> float:
    """Of lines [E,2] between places on a circle: crossings, each worth more than any line's length, and lengths."""
    lines = np.sort(places, axis=1)
    length = float(np.sin(np.pi * (lines[:, 1] - lines[:, 0]) / n).sum())
    if n > MOST_COUNTED:
        return length
    start, end = lines[:, 0], lines[:, 1]
    crossing = (start[:, None] < start) & (start < end[:, None]) & (end[:, None] < end)
    return 2.0 * int(crossing.sum()) + length


def _breadth_first(n: int, lines: list[tuple[int, int]], first: int) -> list[int]:
    near: list[list[int]] = [[] for _ in range(n)]
    for a, b in lines:
        near[a].append(b)
        near[b].append(a)
    order: list[int] = []
    for start in (first, *range(n)):
        if start in order:
            continue
        order.append(start)
        for node in order:  # grows while it is gone through
            order += [other for other in near[node] if other not in order]
    return order


def arc(a: np.ndarray, b: np.ndarray, radius: float, bow: float) -> np.ndarray:
    """A quadratic Bézier curve [3,2] between circles around a and b [2], which do not touch.

    Its middle lies to the left of the straight line by `bow` of that line's length.
    """
    across = np.array([a[1] - b[1], b[0] - a[0]])
    whole = np.array([a, (a + b) / 2 + 2 * bow * across, b])
    t = np.linspace(0, 1, 401)
    points = bezier(whole, t)
    t0 = t[np.linalg.norm(points - a, axis=1) <= radius][-1]
    t1 = t[np.linalg.norm(points - b, axis=1) <= radius][0]
    # Of the part from t0 to t1 the middle control point is the curve's polar form at both.
    weights = np.array([(1 - t0) * (1 - t1), (1 - t0) * t1 + t0 * (1 - t1), t0 * t1])
    begin, end = bezier(whole, np.array([t0, t1]))
    return np.array([begin, weights @ whole, end])


def origin_is_left(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the origin lies to the left of the way from a to b, and not on it."""
    return bool(a[0] * b[1] - a[1] * b[0] > 1e-9)


def clear_arc(
    a: np.ndarray, b: np.ndarray, radius: float, gap: float, bends: Sequence[float], centers: np.ndarray
) -> np.ndarray:
    """The first `arc` between two of the circles at centers [n,2] that keeps clear of the others, else the clearest.

    Clear is four times the gap that an arc leaves at its ends. It bends by one of `bends`, towards the origin if that
    is positive; where the origin lies on the straight line, to the left.
    """
    side = -1.0 if origin_is_left(b, a) else 1.0
    others = centers[(centers != a).any(1) & (centers != b).any(1)]
    curves = [arc(a, b, radius + gap, side * bend) for bend in bends]
    if not len(others):
        return curves[0]
    room = []
    for curve in curves:
        points = bezier(curve, np.linspace(0, 1, 61))
        room.append(np.linalg.norm(points[:, None] - others, axis=2).min() - radius)
        if room[-1] > 4 * gap:
            return curve
    return curves[int(np.argmax(room))]


def loop(center: np.ndarray, radius: float, height: float, angle: float) -> np.ndarray:
    """A cubic Bézier curve [4,2] from a circle back to it, which stands out at an angle by `height`."""
    foot, wide = np.radians(32), np.radians(26)
    # Its middle is an eighth of both ends and three eighths of both other control points.
    far = (radius + height - radius * np.cos(foot) / 4) / (0.75 * np.cos(wide))
    turns = angle + np.array([foot, wide, -wide, -foot])
    reach = np.array([radius, far, far, radius])
    return center + reach[:, None] * np.column_stack([np.cos(turns), np.sin(turns)])


def bezier(controls: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The points [P,2] at parameters t [P] of the Bézier curve with these control points [m,2]."""
    degree = len(controls) - 1
    basis = [math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)]
    return np.stack(basis, axis=1) @ controls


END, HEAD = 50, 0.1  # what hiding the end of a line counts, in points of lines; the room that it needs


class Labels:
    """Finds a place for the label of each curve, so that it hides as little as can be of other labels and lines."""

    ALONG = np.array([0.5, 0.43, 0.57, 0.36, 0.64, 0.29, 0.71])  # a curve, the best first

    def __init__(self, centers: np.ndarray, radius: float, curves: Sequence[np.ndarray]):
        self.centers, self.radius, self.curves = centers, radius, curves
        self.lines = [bezier(curve, np.linspace(0, 1, 61)) for curve in curves]
        self.taken: list[tuple[np.ndarray, np.ndarray]] = []  # center and half the size of each label so far

    def place(self, number: int, size: tuple[float, float]) -> np.ndarray:
        """The center [2] of the label, of this width and height, of curve `number`: on an arc, or behind a loop."""
        half, curve = np.array(size) / 2, self.curves[number]
        places = bezier(curve, self.ALONG)
        if len(curve) == 4:
            foot = (curve[0] + curve[3]) / 2
            out = (places[0] - foot) / np.linalg.norm(places[0] - foot)
            places = places[:1] + out * (np.abs(out) @ half + 0.02)
        cost = [self._hidden(number, place, half) for place in places]
        best = places[int(np.argmin(cost))]  # the first of the best
        self.taken.append((best, half))
        return best

    def _hidden(self, number: int, place: np.ndarray, half: np.ndarray) -> float:
        """What a label would hide: other labels and states most of all, then the ends, then points of other lines."""
        overlaps = sum(bool((np.abs(place - other) < half + size).all()) for other, size in self.taken)
        outside = np.maximum(np.abs(self.centers - place) - half, 0)
        overlaps += int((np.linalg.norm(outside, axis=1) < self.radius).sum())
        hidden = 0
        for i, line in enumerate(self.lines):
            if i != number:
                hidden += int((np.abs(line - place) < half).all(axis=1).sum())
                hidden += END * int((np.abs(line[[0, -1]] - place) < half + HEAD).all(axis=1).sum())
        return 1000.0 * overlaps + hidden
