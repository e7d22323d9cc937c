"""Learning a Moore machine by watching: the model's recurrent states on random words, sorted into clusters.

A cluster is a set of positions that are taken for one state. At first these are the positions of one label; where some
of them then go on differently after the same symbol, the cluster is cut in two by a linear discriminant (Fisher's) of
the recurrent state, and so on until all go on alike. What a symbol does to a cluster is what it does to most of it.
That a model makes mistakes now and then does little harm; states that few of the words reach may be missed.

Quantising the recurrent state to find an automaton in it: Omlin and Giles (1996), on a grid in place of cuts. Cutting
only where the future demands it: Weiss, Goldberg and Yahav, arXiv 1711.09576.

P positions · F numbers in a sketch of the state · s symbols. Cluster 0 is BOS; 1 + i is label i at first.
"""

from typing import NamedTuple

import numpy as np

from deltaproduct.analysis.moore import UNKNOWN, Moore
from deltaproduct.analysis.teacher import Teacher
from deltaproduct.errors import UsageError

VISITS = 20  # of each label with each symbol, about, if all are as likely;
POSITIONS = 1 << 14  # in all at least
SHORT = 8  # symbols: half of all positions are in words so short, where states lie that are soon left for good
FEWEST = 5  # positions that must disagree with the most for a cut,
SHARE, SURE = 0.01, 3.0  # and more, by so many standard deviations, than that share of all: these may be mistakes
RIDGE = 1e-3  # of the mean variance, added to every direction's


class _Cut(NamedTuple):
    """Positions of a cluster whose sketch times `direction` is above `threshold` go into another one."""

    cluster: int
    into: int
    direction: np.ndarray  # [F]
    threshold: float


def learn_clustering(
    teacher: Teacher, *, max_length: int, max_states: int, rng: np.random.Generator
) -> tuple[Moore, int]:
    """The machine of the clusters on random words of up to `max_length` symbols, and that length.

    Its start has the output `UNKNOWN`.

    Raises UsageError when there would be more than `max_states` clusters, or the model's state grows with the tokens.
    """
    if teacher.model.state_size_after(1) != teacher.model.state_size:
        raise UsageError("Clustering watches a state of fixed size, and this model keeps a cache; use lstar.")
    watched = _Watched(teacher, max_length, rng)
    hopeless: set[tuple[int, int]] = set()
    while (worst := watched.most_divided(hopeless)) is not None:
        if watched.cut(*worst):
            hopeless = {pair for pair in hopeless if pair[0] != worst[0]}
        else:
            hopeless.add(worst)
        if len(watched.cuts) + len(np.unique(watched.cluster)) - 1 > max_states:
            raise UsageError(f"The model has more than {max_states:,} clusters: it has not learned a small automaton.")
    return watched.machine(), max_length


class _Watched:
    """Positions of random words, and the clusters that they are in."""

    def __init__(self, teacher: Teacher, max_length: int, rng: np.random.Generator):
        self.teacher, self.cuts = teacher, list[_Cut]()
        s, short = teacher.symbols, min(SHORT, max_length)
        positions = max(POSITIONS, VISITS * s * teacher.num_labels)
        self.words = [rng.integers(s, size=(-(-positions // (2 * n)), n)) for n in (short, max_length)]
        labels = [teacher.labels(words) for words in self.words]
        self.label = np.concatenate([x.ravel() for x in labels])  # [P]
        self.cluster = 1 + self.label  # [P]
        self._sketch: np.ndarray | None = None  # [P,F], made when it is first needed
        # Every step from one position of a word to the next, by number; BOS is −1.
        number = np.arange(len(self.label))
        first = np.concatenate([np.arange(x.size) % x.shape[1] == 0 for x in labels])
        self.begin, self.end = np.where(first, -1, number - 1), number
        self.symbol = np.concatenate([words.ravel() for words in self.words])

    @property
    def sketch(self) -> np.ndarray:
        if self._sketch is None:
            found = [self.teacher.sketches(words) for words in self.words]
            self._sketch = np.concatenate([x.reshape(-1, x.shape[-1]) for x in found])
        return self._sketch

    def votes(self) -> tuple[np.ndarray, np.ndarray]:
        """Every (cluster, symbol, next cluster) that was seen, in order, [M,3], and how often, [M]."""
        begins = np.where(self.begin < 0, 0, self.cluster[self.begin])
        return np.unique(np.column_stack([begins, self.symbol, self.cluster[self.end]]), axis=0, return_counts=True)

    def most_divided(self, hopeless: set[tuple[int, int]]) -> tuple[int, int] | None:
        """The cluster and symbol after which the largest share of positions goes elsewhere than most do."""
        steps, count = self.votes()
        pairs, which = np.unique(steps[:, :2], axis=0, return_inverse=True)
        total, most = np.zeros(len(pairs), dtype=int), np.zeros(len(pairs), dtype=int)
        np.add.at(total, which.reshape(-1), count)
        np.maximum.at(most, which.reshape(-1), count)
        others, mistakes = total - most, SHARE * total
        divided = (others >= FEWEST) & (others > mistakes + SURE * np.sqrt(mistakes)) & (pairs[:, 0] > 0)
        candidates = np.flatnonzero(divided)
        for i in candidates[np.argsort(-(others / total)[candidates], kind="stable")]:
            if (pair := (int(pairs[i, 0]), int(pairs[i, 1]))) not in hopeless:
                return pair
        return None

    def cut(self, cluster: int, symbol: int) -> bool:
        """Part the positions that go where most do from the others, and all of their cluster alike; False if that
        leaves one side empty."""
        here = np.flatnonzero((self.begin >= 0) & (self.symbol == symbol))
        here = here[self.cluster[self.begin[here]] == cluster]
        going, count = np.unique(self.cluster[self.end[here]], return_counts=True)
        elsewhere = self.cluster[self.end[here]] != going[count.argmax()]
        direction, threshold = _discriminant(self.sketch[self.begin[here]], elsewhere)
        inside = np.flatnonzero(self.cluster == cluster)
        moved = inside[self.sketch[inside] @ direction > threshold]
        if len(moved) in (0, len(inside)):
            return False
        into = 1 + self.teacher.num_labels + len(self.cuts)
        self.cuts.append(_Cut(cluster, into, direction, threshold))
        self.cluster[moved] = into
        return True

    def machine(self) -> Moore:
        """The clusters as states; a step that was never seen is looked up from one position of its cluster."""
        n, s = 1 + self.teacher.num_labels + len(self.cuts), self.teacher.symbols
        outputs = np.concatenate([[UNKNOWN], np.arange(self.teacher.num_labels), np.zeros(len(self.cuts), dtype=int)])
        for cut in self.cuts:
            outputs[cut.into] = outputs[cut.cluster]
        table = np.full((n, s), UNKNOWN)
        steps, count = self.votes()
        order = np.argsort(count, kind="stable")  # of several next clusters the one seen most is written last
        table[steps[order, 0], steps[order, 1]] = steps[order, 2]
        examples: dict[int, list[int]] = {0: []}
        for position in range(len(self.label)):
            cluster = int(self.cluster[position])
            if cluster not in examples:
                examples[cluster] = self._word(position)
        while True:
            missing = [(c, a) for c in sorted(examples) for a in np.flatnonzero(table[c] == UNKNOWN).tolist()]
            if not missing:
                break
            words = [[*examples[c], a] for c, a in missing]
            for pair, word, to in zip(missing, words, self._look_up(words), strict=True):
                table[pair] = to
                examples.setdefault(to, word)
        return Moore(np.maximum(table, 0), outputs)  # what is still unknown is never reached

    def _word(self, position: int) -> list[int]:
        """The word up to and with a position."""
        for words in self.words:
            if position < words.size:
                row, column = divmod(position, words.shape[1])
                return words[row, : column + 1].tolist()
            position -= words.size
        raise IndexError(position)

    def _look_up(self, words: list[list[int]]) -> list[int]:
        """The clusters at the ends of words."""
        last = np.array([len(word) for word in words]) - 1
        padded = np.zeros((len(words), last.max() + 1), dtype=np.int64)  # what comes after a word's end is not read
        for row, word in zip(padded, words, strict=True):
            row[: len(word)] = word
        rows = np.arange(len(words))
        found = 1 + self.teacher.labels(padded)[rows, last]
        if self.cuts:
            sketch = self.teacher.sketches(padded)[rows, last]
            for cut in self.cuts:
                found[(found == cut.cluster) & (sketch @ cut.direction > cut.threshold)] = cut.into
        return found.tolist()


def _discriminant(points: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, float]:
    """Fisher's direction [F] for points [P,F], and the threshold on it that tells the positive [P] best."""
    points = points.astype(np.float64)
    means = [points[positive == side].mean(0) for side in (False, True)]
    centred = points - np.where(positive[:, None], means[1], means[0])
    within = centred.T @ centred / len(points)
    within += (RIDGE * np.trace(within) / len(within) + 1e-12) * np.eye(len(within))
    direction = np.linalg.solve(within, means[1] - means[0])
    direction /= np.linalg.norm(direction) or 1.0
    along = points @ direction
    order = np.argsort(along, kind="stable")
    right, along = positive[order], along[order]
    # After every place in that order: what share of the positive is above it, less what share of the negative is.
    score = np.cumsum(~right) / (~right).sum() - np.cumsum(right) / right.sum()
    score[:-1][np.diff(along) == 0] = -np.inf
    best = int(score[:-1].argmax())
    return direction.astype(np.float32), float((along[best] + along[best + 1]) / 2)
