"""Pictures of automata (plots/automaton.py and layout.py): what is in them, and that nothing covers anything else."""

import itertools
import random
import sys

import numpy as np
import pytest

from deltaproduct.errors import UsageError
from deltaproduct.plots.automaton import _Picture, draw_automaton, generating_symbols
from deltaproduct.plots.layout import Labels, arc, bezier, circular_order, clear_arc, loop
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import build_group
from deltaproduct.theory.compiler import group_automaton

pytest.importorskip("matplotlib")


def random_automaton(seed, n, s):
    rng = random.Random(seed)
    rows = tuple(tuple(rng.randrange(n) for _ in range(s)) for _ in range(n))
    accepting = tuple(q for q in range(n) if rng.random() < 0.4)
    return Automaton(tuple("abcdef"[:s]), tuple(f"q{i}" for i in range(n)), 0, accepting, rows)


PARITY = Automaton(("0", "1"), ("even", "odd"), 0, (0,), ((0, 1), (1, 0)))
AB = Automaton(("a", "b"), ("even", "odd", "lost"), 0, (0,), ((1, 2), (2, 0), (2, 2)))
CASES = {
    "parity": PARITY,
    "(ab)*": AB,
    "one": Automaton(("a", "b"), ("x",), 0, (), ((0, 0),)),
    **{name: group_automaton(build_group(name)) for name in ("S3", "Z5", "Z3", "D4")},
    **{f"{n} {s}": random_automaton(n + s, n, s) for n, s in ((4, 2), (6, 3), (12, 2))},
}


@pytest.fixture
def picture():
    """Makes pictures that were drawn and not saved."""
    from matplotlib import pyplot

    def draw(automaton, symbols=None, title=None):
        symbols = range(len(automaton.alphabet)) if symbols is None else symbols
        drawn = _Picture(automaton, tuple(symbols), pyplot.figure())
        drawn.draw(title)
        return drawn

    yield draw
    pyplot.close("all")


def boxes(drawn):
    """Text, and left, low, right and high end in inches, of each that is not empty."""
    renderer = drawn.figure.canvas.get_renderer()
    found = []
    for text in drawn.axes.texts:
        patch = text.get_bbox_patch()
        text.set_bbox(None)  # of the letters alone
        box = text.get_window_extent(renderer)
        if patch is not None:
            text.set_bbox({"boxstyle": "square,pad=0.1"})
        data = drawn.axes.transData.inverted().transform([[box.x0, box.y0], [box.x1, box.y1]])
        found.append((text.get_text(), *data.ravel()))
    return found


@pytest.mark.parametrize("name", CASES)
def test_nothing_covers_a_label(name, picture):
    automaton = CASES[name]
    symbols = generating_symbols(automaton) if len(automaton.alphabet) > 4 else None
    drawn = picture(automaton, symbols, title="a title")
    found = boxes(drawn)
    assert len(found) == len(automaton.states) + len(drawn.arrows) + 1 + (symbols is not None)
    for (_, *a), (_, *b) in itertools.combinations(found, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (name, a, b)
    (left_end, right_end), (low_end, high_end) = drawn.axes.get_xlim(), drawn.axes.get_ylim()
    for number, (text, left, low, right, high) in enumerate(found):
        nearest = np.clip(drawn.centers, [left, low], [right, high])
        inside = np.linalg.norm(drawn.centers - nearest, axis=1) < drawn.radius
        own = number < len(automaton.states)  # the names come first, each in its circle; all else is in none
        assert np.flatnonzero(inside).tolist() == [number] * own, (name, text)
        if own:
            assert max(drawn.centers[number] - [left, low]) < drawn.radius, (name, text)
        assert left_end < left and right < right_end and low_end < low and high < high_end, (name, text)


@pytest.mark.parametrize("name", CASES)
def test_arrows_end_at_the_circles_and_keep_clear_of_the_others(name, picture):
    drawn = picture(CASES[name], generating_symbols(CASES[name]))
    seen = set()
    for arrow, curve in zip(drawn.arrows, drawn.curves, strict=True):
        points = bezier(curve, np.linspace(0, 1, 200))
        distance = np.linalg.norm(points[:, None] - drawn.centers, axis=2)
        assert distance[0, arrow.begin] == pytest.approx(drawn.radius + 0.025, abs=0.02)
        assert distance[-1, arrow.end] == pytest.approx(drawn.radius + 0.025, abs=0.02)
        assert distance.min() > drawn.radius
        pairs = {(arrow.begin, arrow.end)} | ({(arrow.end, arrow.begin)} if arrow.both else set())
        for begin, end in pairs:
            for symbol in arrow.symbols:
                assert CASES[name].transitions[begin][symbol] == end and (begin, symbol) not in seen
                seen.add((begin, symbol))
    assert len(seen) == len(CASES[name].states) * len(drawn.symbols)


def test_pictures_say_what_is_in_them(picture):
    texts = [text for text, *_ in boxes(picture(PARITY, title="parity"))]
    assert sorted(texts) == ["0", "0", "1", "even", "odd", "parity"]  # one arrow with two heads for 1
    texts = [text for text, *_ in boxes(picture(AB))]
    assert sorted(texts) == ["a", "a", "a, b", "b", "b", "even", "lost", "odd"]
    s3 = CASES["S3"]
    texts = [text for text, *_ in boxes(picture(s3, generating_symbols(s3)))]
    assert "Drawn: (1 2) and (0 1), of 6 symbols" in texts and texts.count("(1 2)") == 4  # a state and three arrows
    long = Automaton(("x" * 30, "$a$"), ("state " * 5, r"$\frac$"), 0, (), ((1, 0), (0, 1)))
    texts = [text for text, *_ in boxes(picture(long))]
    assert "x" * 19 + "…" in texts and "state state …" in texts and r"$\frac$" in texts


def test_accepting_states_have_two_circles(picture):
    from matplotlib.patches import Circle

    for automaton in (PARITY, CASES["12 2"]):
        circles = [patch for patch in picture(automaton).axes.patches if isinstance(patch, Circle)]
        assert len(circles) == len(automaton.states) + len(automaton.accepting)


def test_of_many_states_the_names_stand_outside_and_colors_have_a_legend(picture):
    automaton = group_automaton(build_group("S4"))
    drawn = picture(automaton, generating_symbols(automaton))
    texts = [text for text, *_ in boxes(drawn)]
    assert {"→ (2 3)", "→ (1 2)", "→ (0 1)", "(0 1)(2 3)"} < set(texts) and len(texts) == 24 + 3 + 1


def test_generating_symbols():
    assert generating_symbols(CASES["Z5"]) == [1] and generating_symbols(CASES["S3"]) == [1, 2]
    assert generating_symbols(group_automaton(build_group("S4"))) == [1, 2, 6]
    assert generating_symbols(AB) == [0, 1]
    assert generating_symbols(CASES["one"]) == [0]  # nothing to generate, and something to draw
    for name in ("A4", "D4", "S3_x_Z2"):
        automaton = group_automaton(build_group(name))
        chosen = generating_symbols(automaton)
        rows = tuple(tuple(row[i] for i in chosen) for row in automaton.transitions)
        part = Automaton(tuple(automaton.alphabet[i] for i in chosen), automaton.states, 0, (0,), rows)
        assert set(part.monoid()) == set(automaton.monoid()) and len(chosen) < len(automaton.alphabet) / 2


def test_orders_around_a_circle():
    ring = [(i, (i + 5) % 12) for i in range(12)]  # a ring in another order: no line need cross another
    order = circular_order(12, ring, first=3)
    place = {node: i for i, node in enumerate(order)}
    assert order[0] == 3 and sorted(order) == list(range(12))
    assert all((place[a] - place[b]) % 12 in (1, 11) for a, b in ring)
    assert circular_order(40, [(i, (i + 7) % 40) for i in range(40)]) != list(range(40))
    assert circular_order(3, []) == [0, 1, 2] and circular_order(1, [(0, 0)]) == [0]
    assert sorted(circular_order(5, [(3, 4)], first=2)) == [0, 1, 2, 3, 4]  # in parts


def test_curves():
    a, b = np.array([-1.0, 1.0]), np.array([2.0, 0.0])
    curve = arc(a, b, 0.3, 0.2)
    points = bezier(curve, np.linspace(0, 1, 101))
    assert np.linalg.norm(points[[0, -1]] - [a, b], axis=1) == pytest.approx(0.3, abs=0.01)
    middle = points[np.abs(np.linalg.norm(points - a, axis=1) - np.linalg.norm(points - b, axis=1)).argmin()]
    left = np.array([1.0, 3.0]) / 10**0.5
    assert (middle - (a + b) / 2) @ left == pytest.approx(0.2 * 10**0.5, rel=0.02)
    around = bezier(loop(a, 0.3, 0.5, np.pi / 2), np.linspace(0, 1, 101)) - a
    assert around[:, 1].max() == pytest.approx(0.8, abs=1e-3) and around[50, 0] == pytest.approx(0)
    assert np.linalg.norm(around[[0, -1]], axis=1) == pytest.approx(0.3)
    blocked = np.array([[-2.0, -0.2], [2.0, -0.2], [0.0, -0.2]])  # the third is in the way, and the origin above it
    points = bezier(clear_arc(blocked[0], blocked[1], 0.2, 0.02, (0.0, 0.1, 0.2), blocked), np.linspace(0, 1, 50))
    assert points[:, 1].max() == pytest.approx(0.2, abs=0.02)


def test_labels_make_way_for_each_other():
    curves = [arc(np.array(a), np.array(b), 0.1, 0) for a, b in (((-2.0, 0.0), (2.0, 0.0)), ((0.0, -2.0), (0.0, 2.0)))]
    labels = Labels(np.array([[-2.0, 0], [2, 0], [0, -2], [0, 2]]), 0.1, curves)
    first, second = labels.place(0, (0.4, 0.2)), labels.place(1, (0.4, 0.2))
    assert first[1] == pytest.approx(0) and abs(first[0]) > 0.2  # off the crossing
    assert second[0] == pytest.approx(0) and abs(second[1]) > 0.1
    pointing = np.array([[0.0, 2.0], [0.0, 1.0], [0.0, 0.15]])  # ends just above the first line's middle
    assert abs(Labels(np.array([[9.0, 9.0]]), 0.1, [curves[0], pointing]).place(0, (0.4, 0.2))[0]) > 0.3


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_files_are_written_whole_and_the_same_each_time(tmp_path, suffix):
    draw_automaton(CASES["S3"], tmp_path / f"a.{suffix}", title="S3")
    data = (tmp_path / f"a.{suffix}").read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == "png" else b"</svg>" in data[-10:]
    assert suffix == "png" or b"<!-- Drawn: (1 2) and (0 1), of 6 symbols -->" in data
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]
    if suffix == "png":
        draw_automaton(CASES["S3"], tmp_path / "b.png", title="S3")
        assert (tmp_path / "b.png").read_bytes() == data


def test_mistakes_are_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="200 states are too many"):
        draw_automaton(group_automaton(build_group("Z200")), tmp_path / "a.png")
    with pytest.raises(UsageError, match="cannot be written"):
        draw_automaton(PARITY, tmp_path / "nowhere" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="matplotlib"):
        draw_automaton(PARITY, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
