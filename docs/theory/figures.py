"""Draws the pictures of these pages: `python docs/theory/figures.py` (half a minute)."""

from pathlib import Path

import numpy as np
import torch

from deltaproduct.plots.automaton import draw_automaton
from deltaproduct.plots.style import COLORS, RC, pyplot, save
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.groups import build_group
from deltaproduct.theory.cascade import decompose
from deltaproduct.theory.certificate import certify
from deltaproduct.theory.compiler import compile_group, group_automaton
from deltaproduct.theory.constructions.circle import lines, points
from deltaproduct.theory.exploration import explore
from deltaproduct.theory.representations import representations, simplex
from deltaproduct.theory.verification import draw_words

HERE = Path(__file__).parent
PLAIN = RC | {"axes.grid": False, "figure.figsize": (6.4, 3.2)}


def permutations() -> None:
    """Three labels as corners of a triangle, the mirror of each swap, and what the heads read."""
    plt = pyplot()
    with plt.rc_context(PLAIN):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.4), width_ratios=(1, 1.1))
        corners = simplex(3).numpy()
        _plane(left)
        left.plot(*np.vstack([corners, corners[:1]]).T, color="grey", linewidth=0.8)
        for (a, b), color in zip(((0, 1), (0, 2), (1, 2)), COLORS[1:], strict=False):
            k = (corners[a] - corners[b]) / np.linalg.norm(corners[a] - corners[b])
            mirror = np.array([-k[1], k[0]])
            mirror *= np.sign(mirror @ (corners[a] + corners[b]))  # away from the corner that stays
            left.plot(*np.stack([-0.9 * mirror, 1.1 * mirror]).T, "--", color=color, linewidth=1.2)
            left.annotate(f"swap {a} {b}", 1.5 * mirror, color=color, ha="center", va="center", fontsize=9)
        for i, corner in enumerate(corners):
            left.plot(*corner, "o", color=COLORS[0], markersize=9)
            left.annotate(f"$u_{i}$", 1.22 * corner, ha="center", va="center")
        left.set_xlim(-1.9, 1.6)
        left.set_title("a label is a corner, a swap a mirror", loc="left", fontsize=10.5)
        read = simplex(3) @ simplex(3).T
        right.imshow(read, cmap="coolwarm", vmin=-2.5, vmax=2.5)
        for (i, j), value in np.ndenumerate(read.numpy()):
            right.annotate(
                f"{value:.2f} → {'+' if value > 0 else '−'}".replace("-", "−"), (j, i), ha="center", va="center"
            )
        right.set_xticks(range(3), [f"state $u_{i}$" for i in range(3)])
        right.set_yticks(range(3), [f"head {i}" for i in range(3)])
        right.spines[:].set_visible(False)
        right.tick_params(length=0)
        right.set_title("what heads read, and its sign", loc="left", fontsize=10.5)
        save(figure, HERE / "permutations.png")
        plt.close(figure)


def rotations() -> None:
    """Z60 as three circles, and where the rotations of the icosahedron take one point."""
    plt = pyplot()
    with plt.rc_context(PLAIN):
        figure = plt.figure(figsize=(8.4, 2.6))
        group, found = representations("Z60")
        for i, representation in enumerate(found):
            axes = figure.add_subplot(1, 4, i + 1)
            _plane(axes)
            axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="grey", linewidth=0.8))
            places = representation.matrices[:, :, 0].numpy()
            different = np.unique(places.round(6), axis=0)
            axes.plot(*different.T, "o", color=COLORS[i], markersize=8)
            number = group.elements.index(tuple((x + 17) % 60 for x in range(60)))
            axes.annotate("", places[number] * 0.9, (0, 0), arrowprops={"arrowstyle": "->", "color": "black"})
            axes.set_title(f"17 mod {len(different)} = {17 % len(different)}", fontsize=10.5)
        axes = figure.add_subplot(1, 4, 4, projection="3d")
        _, (icosahedron,) = representations("A5")
        start = torch.nn.functional.normalize(torch.tensor([1.0, 0.35, 0.6], dtype=torch.float64), dim=0)
        orbit = (icosahedron.matrices @ start).numpy()
        front = orbit @ np.array([0.8, 0.45, 0.4]) > 0
        for part, alpha in ((~front, 0.25), (front, 1.0)):
            axes.scatter(*orbit[part].T, color=COLORS[3], alpha=alpha, s=18, depthshade=False)
        axes.set_box_aspect((1, 1, 1), zoom=1.5)
        axes.view_init(elev=24, azim=29)
        axes.set_axis_off()
        axes.set_title("A5: 60 places", fontsize=10.5)
        save(figure, HERE / "rotations.png")
        plt.close(figure)


def two_layers() -> None:
    """The corners that the second layer follows, and the lines that tell them apart."""
    plt = pyplot()
    with plt.rc_context(PLAIN):
        figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.3))
        for axes, q in zip(panels, (4, 5), strict=True):
            _plane(axes)
            axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="grey", linewidth=0.8))
            for normal, color in zip(lines(q).numpy(), COLORS[1:], strict=False):
                along = np.array([normal[1], -normal[0]])
                axes.plot(*np.stack([-1.3 * along, 1.3 * along]).T, color=color, linewidth=1.2)
                axes.annotate("+", 1.3 * along + 0.12 * normal, color=color, ha="center", va="center")
                axes.annotate("−", 1.3 * along - 0.12 * normal, color=color, ha="center", va="center")
            corners = points(q)
            sides = (corners @ lines(q).T).sign().tolist()
            for corner, row in zip(corners.numpy(), sides, strict=True):
                axes.plot(*corner, "o", color=COLORS[0], markersize=9)
                text = "".join("+" if side > 0 else "−" for side in row)
                axes.annotate(text, 0.72 * corner, ha="center", va="center", fontsize=9.5)
            axes.set_title(f"{q} corners, {len(lines(q))} lines", loc="left", fontsize=10.5)
        save(figure, HERE / "two-layers.png")
        plt.close(figure)


EXAMPLE = Automaton(("a", "b", "c"), ("0", "1", "2", "3"), 0, (0,), ((1, 0, 2), (2, 0, 1), (3, 1, 1), (0, 2, 3)))
WORD = "aabacbaca"


def cascade() -> None:
    """A word on its way through the levels of an automaton: contexts, and the labels that are crossed out."""
    plt = pyplot()
    levels = decompose(EXAMPLE).levels
    contexts, labels = [level.initial_context for level in levels], [level.initial_label for level in levels]
    columns = [(contexts[:], labels[:], [None] * len(levels))]
    for symbol in ("abc".index(x) for x in WORD):
        after, done = levels[0].initial_context, []
        for i, level in enumerate(levels):
            action = level.actions[symbol, contexts[i], after]
            labels[i], contexts[i] = action(labels[i]), after
            after = level.following[after, labels[i]]
            done.append(action)
        columns.append((contexts[:], labels[:], done))
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(figsize=(8.6, 3.0))
        for t, (context, label, done) in enumerate(columns):
            axes.annotate("BOS" if t == 0 else WORD[t - 1], (t, 0.75), ha="center", fontsize=11, weight="bold")
            for i, level in enumerate(levels):
                row, action = -i, done[i]
                if action is not None:
                    reset = action.permutation is None
                    color = COLORS[1] if reset else "#eeeeee" if action.is_identity else COLORS[5]
                    axes.add_patch(
                        plt.Rectangle((t - 0.42, row - 0.38), 0.84, 0.76, color=color, alpha=0.45, linewidth=0)
                    )
                for j, part in enumerate(context[i]):
                    x = t + 0.2 * (j - (level.size - 1) / 2)
                    out = j == label[i]
                    axes.annotate(str(part[0]), (x, row), ha="center", va="center", color="grey" if out else "black")
                    if out:
                        axes.plot([x - 0.08, x + 0.08], [row - 0.16, row + 0.16], color=COLORS[1], linewidth=1.4)
            (state,) = levels[-1].following[context[-1], label[-1]][0]
            axes.annotate(str(state), (t, -len(levels)), ha="center", va="center", weight="bold", color=COLORS[0])
        for i in range(len(levels)):
            axes.annotate(f"level {i + 1}", (-1.6, -i), va="center")
        axes.annotate("state", (-1.6, -len(levels)), va="center")
        axes.set_xlim(-1.7, len(WORD) + 0.6)
        axes.set_ylim(-len(levels) - 0.5, 1.1)
        axes.set_axis_off()
        for x, color, text in (
            (0.0, COLORS[5], "permutes"),
            (1.7, COLORS[1], "resets"),
            (3.1, "#dddddd", "leaves as it is"),
        ):
            y = -len(levels) - 0.95
            axes.add_patch(plt.Rectangle((x, y), 0.3, 0.3, color=color, alpha=0.6, clip_on=False, linewidth=0))
            axes.annotate(text, (x + 0.4, y + 0.15), va="center", fontsize=9, annotation_clip=False)
        save(figure, HERE / "cascade.png")
        plt.close(figure)


def shallow() -> None:
    """Blocks of m = 2 tokens: which products are carried out when."""
    plt = pyplot()
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(figsize=(8.6, 2.7))
        for t in range(8):
            block, i = divmod(t, 2)
            color = COLORS[block]
            axes.add_patch(plt.Rectangle((t - 0.46, 1.6), 0.92, 0.7, color=color, alpha=0.35, linewidth=0))
            axes.annotate(f"$x_{t + 1}$", (t, 1.95), ha="center", va="center")
            axes.annotate(f"{t % 4}", (t, 1.2), ha="center", va="center", color="grey")
            if block:
                axes.add_patch(
                    plt.Rectangle((t - 0.46, 0.1), 0.92, 0.7, color=COLORS[block - 1], alpha=0.35, linewidth=0)
                )
                first = 2 * block - 1
                axes.annotate(
                    f"part {i + 1}\nof $x_{first}x_{first + 1}$", (t, 0.45), ha="center", va="center", fontsize=9
                )
            else:
                axes.annotate("–", (t, 0.45), ha="center", va="center")
            missing = [] if i else ([f"part 2 of $x_{2 * block - 1}x_{2 * block}$"] if block else [])
            so_far = f"$x_{t + 1}$" if i == 0 else f"$x_{t}x_{t + 1}$"
            axes.annotate("\n".join([*missing, so_far]), (t, -0.55), ha="center", va="center", fontsize=8)
        for y, text in ((1.95, "symbol"), (1.2, "clock"), (0.45, "carried out"), (-0.55, "added by\nlook-up")):
            axes.annotate(text, (-1.75, y), va="center")
        axes.set_xlim(-1.8, 7.6)
        axes.set_ylim(-1.0, 2.4)
        axes.set_axis_off()
        save(figure, HERE / "shallow.png")
        plt.close(figure)


def extraction() -> None:
    """S3's word problem, as `extract` draws it."""
    draw_automaton(group_automaton(build_group("S3")), HERE / "extraction.png")


@torch.no_grad()
def certificate() -> None:
    """How far states really are from their codes, beside the bound, and what is tolerated."""
    plt = pyplot()
    lengths = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000]
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(6.4, 3.8))
        for dtype, color in ((torch.bfloat16, COLORS[1]), (torch.float32, COLORS[0])):
            compiled = compile_group("A5")
            found = explore(compiled.model, compiled.automaton)
            model = compiled.model.to(dtype)
            head = certify(model, compiled.automaton, found).heads[0]
            words = torch.from_numpy(draw_words(compiled.automaton, 8, lengths[-1], seed=0))
            codes = torch.nn.functional.normalize(found.held[0][0].flatten(1), dim=1)
            _, state = model(torch.full((8, 1), 60))
            done, distances = 0, []
            for until in lengths:
                _, state = model(words[:, done:until], state)
                done = until
                held = torch.nn.functional.normalize(state[0].recurrent[:, 0].flatten(1).double(), dim=1)
                distances.append(float((held[:, None] - codes.double()).norm(dim=2).amin(1).max()))
            name = str(dtype).removeprefix("torch.")
            axes.plot(lengths, distances, "o-", color=color, markersize=4, label=f"{name}, measured (worst of 8 words)")
            bound = np.array([head.distance(n + 1) for n in lengths])
            axes.plot(lengths, np.where(bound < 3, bound, np.nan), "--", color=color, label=f"{name}, at most")
        axes.axhline(head.tolerated, color="black", linewidth=1, linestyle=":")
        axes.annotate("tolerated", (1, head.tolerated), xytext=(0, 4), textcoords="offset points", fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("symbols")
        axes.set_ylabel("distance of the state from its code")
        axes.set_title("A5 in one layer: how rounding adds up", loc="left", pad=12)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        save(figure, HERE / "certificate.png")
        plt.close(figure)


def _plane(axes) -> None:
    axes.set_aspect("equal")
    axes.set_xlim(-1.6, 1.6)
    axes.set_ylim(-1.6, 1.6)
    axes.set_axis_off()


if __name__ == "__main__":
    for draw in (permutations, rotations, two_layers, cascade, shallow, extraction, certificate):
        draw()
