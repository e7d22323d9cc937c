"""A picture of an automaton: states on a circle, as few crossing arrows as can be had, a label for each arrow.

Lengths are inches, which are the units of the axes too: so text, circles and arrows fit each other at every size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltaproduct.errors import UsageError, shortened
from deltaproduct.plots.layout import Labels, circular_order, clear_arc, loop, origin_is_left
from deltaproduct.plots.style import COLORS, RC, pyplot, save
from deltaproduct.tasks.automata import Automaton

MANY_SYMBOLS = 4  # beyond which only some that generate the others are drawn
MANY_STATES = 16  # beyond which names stand outside their circles, and a legend is in place of the arrows' labels
MOST_STATES = 150
MOST_WORK = 2_000_000  # numbers that may be looked at to find generating symbols
LONGEST_NAME, LONGEST_LABEL, LONGEST_CAPTION = 13, 20, 70  # characters, before an ellipsis
GAP = 0.025  # between an arrow's end and a circle
START = 0.42  # length of the arrow to the initial state
# How far arrows bend towards the picture's middle, as shares of their length, the first that keeps clear of all states:
STRAIGHT = (0.0, 0.06, 0.1, 0.15, 0.2, 0.25)
INNER, OUTER = (0.16, 0.2, 0.25), (-0.16, -0.1, -0.06, -0.03, 0.03)  # of two between the same states
MARGIN = 0.1  # around a picture
MIXED = "#404040"  # arrows of several symbols


@dataclass(frozen=True)
class _Arrow:
    begin: int
    end: int
    symbols: tuple[int, ...]
    both: bool  # it stands for its reverse as well


@dataclass(frozen=True)
class _Size:
    """What is drawn smaller where there are many states."""

    font: float  # points
    line: float  # points
    head: str
    ring: float  # between the circles of an accepting state
    loop: float  # how far a self-loop stands out
    room: float  # between neighbours, at least; more where arrows are many or their labels long


FEW_SIZE = _Size(font=10, line=1.1, head="head_length=4.5,head_width=2.2", ring=0.045, loop=0.42, room=0.6)
MANY_SIZE = _Size(font=7, line=0.7, head="head_length=3,head_width=1.5", ring=0.025, loop=0.25, room=0.24)


def draw_automaton(
    automaton: Automaton, path: Path, *, title: str | None = None, symbols: Sequence[int] | None = None
) -> None:
    """Write a PNG or SVG, as the suffix says.

    The arrow from nowhere marks the initial state, double circles the accepting ones. An arrow with several symbols
    stands for all of them, one with two heads for both directions.

    Args:
        symbols: numbers of those to draw; None means all, or, of more than four, some that generate what the others
            do, if these are fewer (`generating_symbols`). A line below the picture then says which.

    Raises UsageError when there are more than 150 states, it cannot be written or matplotlib is not installed.
    """
    if len(automaton.states) > MOST_STATES:
        raise UsageError(f"{len(automaton.states):,} states are too many to draw; at most {MOST_STATES}.")
    if symbols is None:
        everything = range(len(automaton.alphabet))
        symbols = generating_symbols(automaton) if len(everything) > MANY_SYMBOLS else everything
    plt = pyplot()
    with plt.rc_context(RC):
        figure = plt.figure()
        try:
            _Picture(automaton, tuple(symbols), figure).draw(title)
            save(figure, path)
        finally:
            plt.close(figure)


def generating_symbols(automaton: Automaton) -> list[int]:
    """Symbols whose words do to the states whatever any symbol does: each that no word of those before it does.

    All symbols, where finding them would take too long.
    """
    identity = tuple(range(len(automaton.states)))
    chosen: list[int] = []
    done = {identity}
    for symbol, images in enumerate(automaton.maps):
        if images in done:
            continue
        chosen.append(symbol)
        fresh, done = {identity}, {identity}
        while fresh:
            fresh = {tuple(automaton.maps[i][x] for x in f) for f in fresh for i in chosen} - done
            done |= fresh
            if len(done) * len(identity) * len(chosen) > MOST_WORK:
                return list(range(len(automaton.alphabet)))
    return chosen or [0]


class _Picture:
    """The parts of a picture, and where they are."""

    def __init__(self, automaton: Automaton, symbols: tuple[int, ...], figure: Any):
        self.automaton, self.symbols = automaton, symbols
        self.many = len(automaton.states) > MANY_STATES
        self.size = MANY_SIZE if self.many else FEW_SIZE
        self.colors = {symbol: COLORS[i % len(COLORS)] for i, symbol in enumerate(symbols)}
        self.arrows = self._arrows()
        self.names = [shortened(name, LONGEST_NAME) for name in automaton.states]
        self.texts = [
            shortened(", ".join(automaton.alphabet[i] for i in a.symbols), LONGEST_LABEL) for a in self.arrows
        ]
        self._place()
        self.figure = figure
        figure.set_size_inches(1, 1)  # an inch is a unit of the axes, here and when all is drawn
        self.axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, 1))
        self.axes.set_axis_off()

    def draw(self, title: str | None) -> None:
        self._draw_arrows()
        self._draw_states()
        if not self.many:
            self._draw_labels()
        self._draw_captions(title)
        left, low, right, high = self._extent()
        self.axes.set(xlim=(left - MARGIN, right + MARGIN), ylim=(low - MARGIN, high + MARGIN))
        self.figure.set_size_inches(right - left + 2 * MARGIN, high - low + 2 * MARGIN)

    def _arrows(self) -> list[_Arrow]:
        """One for each pair of states; where there are many, one for each symbol, told apart by color."""
        together: dict[tuple[int, int, int], list[int]] = {}
        for begin, row in enumerate(self.automaton.transitions):
            for symbol in self.symbols:
                together.setdefault((begin, row[symbol], symbol if self.many else -1), []).append(symbol)
        arrows = []
        for (begin, end, kind), symbols in together.items():
            both = begin != end and together.get((end, begin, kind)) == symbols
            if not both or begin < end:
                arrows.append(_Arrow(begin, end, tuple(symbols), both))
        return arrows

    def _place(self) -> None:
        """Where the states are, and the curves of the arrows."""
        n, initial = len(self.names), self.automaton.initial
        self.radius = 0.09 if self.many else max(0.22, max(map(_width, self.names)) / 2 + 0.1)
        self.longest = 0.0 if self.many else max(map(_width, self.texts))
        room = self.size.room
        if not self.many:
            room = max(room, self.longest + 0.4) + min(0.5, len(self.arrows) / 70)
        apart = 2 * self.radius + room
        order = circular_order(n, ((a.begin, a.end) for a in self.arrows), initial)
        self.angles = np.empty(n)
        self.angles[order] = np.pi - 2 * np.pi * np.arange(n) / n  # clockwise from the left
        around = apart / (2 * np.sin(np.pi / n)) if n > 1 else 0.0
        self.centers = around * np.column_stack([np.cos(self.angles), np.sin(self.angles)])
        pairs = {(a.begin, a.end) for a in self.arrows if not a.both}
        self.curves = []
        for a in self.arrows:
            here, there = self.centers[a.begin], self.centers[a.end]
            if a.begin == a.end:
                # Outside the circle of states, and out of the way of the arrow to the initial state.
                angle = self.angles[a.begin] - np.radians(55) * (a.begin == initial)
                self.curves.append(loop(here, self.radius + GAP, self.size.loop, angle if n > 2 else np.pi / 2))
            else:
                bends: Sequence[float] = STRAIGHT
                if (a.end, a.begin) in pairs and not a.both:
                    bends = INNER if origin_is_left(here, there) else OUTER
                self.curves.append(clear_arc(here, there, self.radius, GAP, bends, self.centers))

    def _draw_arrows(self) -> None:
        from matplotlib.path import Path as Line

        for arrow, curve in zip(self.arrows, self.curves, strict=True):
            kind = Line.CURVE3 if len(curve) == 3 else Line.CURVE4
            line = Line(curve, [Line.MOVETO] + [kind] * (len(curve) - 1))
            self._arrow(line, self._color(arrow), "<|-|>" if arrow.both else "-|>")
        end = self.centers[self.automaton.initial] - [self.radius + GAP, 0]
        self._arrow(Line([end - [START, 0], end]), "black", "-|>")

    def _arrow(self, line: Any, color: str, style: str) -> None:
        from matplotlib.patches import FancyArrowPatch

        self.axes.add_patch(
            FancyArrowPatch(
                path=line, arrowstyle=f"{style},{self.size.head}", mutation_scale=1, color=color,
                linewidth=self.size.line, joinstyle="miter", capstyle="butt", zorder=2,
            )
        )  # fmt: skip

    def _draw_states(self) -> None:
        from matplotlib.patches import Circle

        edge = {"facecolor": "white", "edgecolor": "black", "linewidth": self.size.line, "zorder": 3}
        for state, (center, angle, name) in enumerate(zip(self.centers, self.angles, self.names, strict=True)):
            self.axes.add_patch(Circle(center, self.radius, **edge))
            if state in self.automaton.accepting:
                self.axes.add_patch(Circle(center, self.radius - self.size.ring, **edge))
            if not self.many:
                self._text(center, name)
                continue
            away = self.radius + 0.07 + (START + 0.03) * (state == self.automaton.initial)
            turned = np.cos(angle) < -1e-9  # on the left, so that no name is upside down
            self._text(
                center + away * np.array([np.cos(angle), np.sin(angle)]), name, rotation_mode="anchor",
                rotation=np.degrees(angle) + 180 * turned, ha="right" if turned else "left",
            )  # fmt: skip

    def _draw_labels(self) -> None:
        labels = Labels(self.centers, self.radius, self.curves)
        for number, (arrow, text) in enumerate(zip(self.arrows, self.texts, strict=True)):
            place = labels.place(number, (_width(text) + 0.06, 0.2))
            box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
            self._text(place, text, color=self._color(arrow), bbox=box, zorder=5)

    def _draw_captions(self, title: str | None) -> None:
        """Above the picture its title, below it which symbols are drawn; and colors, where labels do not say them."""
        left, low, right, high = self._extent()
        middle = (left + right) / 2
        if title:
            self._text((middle, high + 0.15), title, fontsize=12, va="bottom")
        if self.many:
            for symbol in self.symbols:
                low -= 0.2
                name = shortened(self.automaton.alphabet[symbol], LONGEST_CAPTION)
                self._text((middle, low), f"→ {name}", fontsize=10, color=self.colors[symbol])
        if len(self.symbols) < len(self.automaton.alphabet):
            *names, last = (self.automaton.alphabet[i] for i in self.symbols)
            drawn = shortened(", ".join(names) + " and " * bool(names) + last, LONGEST_CAPTION)
            text = f"Drawn: {drawn}, of {len(self.automaton.alphabet)} symbols"
            self._text((middle, low - 0.12), text, fontsize=9, va="top")

    def _extent(self) -> tuple[float, float, float, float]:
        """Left, low, right and high end of all that is drawn so far."""
        renderer = self.figure.canvas.get_renderer()
        boxes = [artist.get_window_extent(renderer) for artist in (*self.axes.patches, *self.axes.texts)]
        corners = np.array([[box.x0, box.y0, box.x1, box.y1] for box in boxes]) / self.figure.dpi
        return (*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist())

    def _color(self, arrow: _Arrow) -> str:
        return self.colors[arrow.symbols[0]] if len(arrow.symbols) == 1 else MIXED

    def _text(self, at: Any, text: str, **style: Any) -> None:
        style = {"fontsize": self.size.font, "ha": "center", "va": "center", "zorder": 4, **style}
        self.axes.text(*at, text, parse_math=False, **style)


def _width(text: str) -> float:
    """Of text in the larger size."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text.replace("$", r"\$"), size=FEW_SIZE.font).get_extents().width / 72 if text else 0.0
