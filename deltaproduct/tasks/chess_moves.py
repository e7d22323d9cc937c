"""Chess whose moves are written as source and target: where the rook is while Black's pieces change places.

Source: Proposition 3.3 of "The Illusion of State in State-Space Models" (arXiv 2404.08819), which encodes S_5 so; that
the piece may be written with a move or left out is from "Chess as a Testbed for Language Model State Tracking" (arXiv
2102.13249).

Black has a rook and N−1 queens on the first N squares of the eighth rank, White a king behind its pawns. To swap those
on files i and j, as in the paper for a and c:

    a8-a7   c8-c6   a7-c7   c6-a6   c7-c8   a6-a8

A rook can make these moves as well as a queen, so they do not tell which is which, and no piece is in another's way.
After each of them White waits with g1-h1 or h1-g1; the pawns on f2, g2 and h2 are between its king and every queen, and
nothing is ever taken. So each move is legal in chess; draws by repetition are ignored, as in the paper.
"""

from functools import partial

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.tasks.swaps import draw_pairs, follow, unordered
from deltaproduct.tasks.task import Task
from deltaproduct.tasks.text import EventTask, Story, TextTask, WordTokenizer, check_count

FILES = "abcdefgh"
_RANKS = "876"  # Black's pieces never leave these
_MOVES = 6  # of Black, for a swap
_WAITING = (("g1", "h1"), ("h1", "g1"))  # White's answers in turn
_WHERE = ("rook", "?")
_REST = ("K", "a5", ".", "White", ":", "K", "g1", "f2", "g2", "h2", ".", "\n")  # of the opening


def starting_position(n: int, rook: int = 0) -> str:
    """The position with N = n pieces to swap and the rook on file number `rook`, Black to move, in FEN."""
    pieces = "".join("r" if file == rook else "q" for file in range(n))
    return f"{pieces}{8 - n or ''}/8/8/k7/8/8/5PPP/6K1 b - - 0 1"


def chess_task(name: str, pieces: str, parts: str, text: str | None) -> Task:
    """`chess_N`, `chess_N_PARTS` and both with `_text`: where the rook is among N pieces that change places.

    `chess_N`: a token for each whole swap, such as "a8<->c8", of which there are N(N−1)/2; the label is the rook's
    square, on the eighth rank. It stands on a8 at first. With N = 3:

        a8<->c8 a8<->b8 b8<->c8 → c8 c8 b8

    `chess_N_PARTS`: Black's moves one by one, a token for each part that is written, out of p (the piece), s (the
    source) and t (the target); `chess_5_st` is the paper's notation. The label after each move, scored at its last
    token, is the rook's square, one of 3N. The first swap above:

        a8 a7 c8 c6 a7 c7 c6 a6 c7 c8 a6 a8 → a7 a7 c7 c7 c8 c8

    With p, "R" or "Q" comes first and tells whether the rook moves, which makes tracking easy: see it with `_pst` and
    `_st`. Pieces alone do not tell where they go, so there is no `_p`. White's moves are left out: they carry nothing.

    `chess_N_text` and `chess_N_PARTS_text`: the game in plain text with White's moves, and after each of them the
    question where the rook is; the parts are s and t when not given. It begins on any of the N files, and the opening
    says which:

        Black: Qa8 Rb8 Qc8 Ka5. White: Kg1 f2 g2 h2.
        b8-b7 g1-h1 rook?
        a8-a6 h1-g1 rook? → b7, b7

    Files are drawn as two different ones, uniformly, in either order. `chance` is the mean, over the six moves of a
    swap, of the likeliest square's probability when the rook is on each file alike: 1/N² for a square of the
    sixth or the seventh rank (while a piece is there), and for each one of the eighth (N−1)/N², (N−2)/N² three times,
    (N−1)/N², 1/N.

    Raises UsageError when N is not 3 … 8, or when the parts are p alone.
    """
    n = int(pieces)
    check_count(name, n, 3, len(FILES), "fewer than 3 pieces can only change places with each other over and over",
                f"a rank has {len(FILES)} squares")  # fmt: skip
    if parts == "p":
        raise UsageError(f"{name} cannot be used because pieces alone do not tell where they go; add s or t")
    squares = tuple(file + rank for rank in _RANKS for file in FILES[:n])
    chance = (2 * (n - 1) + 3 * (n - 2) + n) / (6 * n * n)
    if text:
        return _text_task(name, n, parts or "st", squares, chance)
    if not parts:
        symbols = tuple(f"{a}<->{b}" for i, a in enumerate(squares[:n]) for b in squares[i + 1 : n])
        return EventTask(
            name=name, summary=f"the rook's square while {n} pieces change places, a token for each swap",
            symbols=symbols, answers=squares[:n], width=1, draw=partial(_swaps, n),
            vocab_size=len(symbols) + 2, num_labels=n, bos_id=len(symbols) + 1, chance=1 / n,
        )  # fmt: skip
    symbols = (*squares, *("QR" if "p" in parts else ""))
    return EventTask(
        name=name, summary=f"the rook's square while {n} pieces move, a token each for {_spelt(parts)}",
        symbols=symbols, answers=squares, width=len(parts), draw=partial(_moves, n, parts), min_length=len(parts),
        vocab_size=len(symbols) + 2, num_labels=len(squares), bos_id=len(symbols) + 1, chance=chance,
    )  # fmt: skip


def _spelt(parts: str) -> str:
    *others, last = ({"p": "piece", "s": "source", "t": "target"}[part] for part in parts)
    return " and ".join(filter(None, (", ".join(others), last)))


def _text_task(name: str, n: int, parts: str, squares: tuple[str, ...], chance: float) -> TextTask:
    def written(piece: str, source: str, target: str) -> tuple[str, ...]:
        between = ("-",) if "s" in parts and "t" in parts else ()
        return (
            *((piece,) if "p" in parts else ()), *((source,) if "s" in parts else ()), *between,
            *((target,) if "t" in parts else ()),
        )  # fmt: skip

    phrases = []
    file = torch.arange(n)
    first, second = torch.cartesian_prod(file, file).T
    sources, targets = (numbers.tolist() for numbers in _routes(n, first, second))
    for source_row, target_row in zip(sources, targets, strict=True):
        for move, (source, target) in enumerate(zip(source_row, target_row, strict=True)):
            white = written("K", *_WAITING[move % 2])
            phrases += [(*written(piece, squares[source], squares[target]), *white) for piece in "QR"]
    opening = ("Black", ":", *(word for square in squares[:n] for word in ("Q", square)), *_REST)
    used = (word for phrase in (opening, *phrases, _WHERE) for word in phrase)
    words = tuple(dict.fromkeys((*squares, "Q", "R", *used)))
    tokenizer = WordTokenizer(words, prefixes=frozenset("QRK"))
    constant = tokenizer.table([opening])[0]
    return TextTask(
        name=name, summary=f"the rook's square while {n} pieces move, in plain text with {_spelt(parts)}",
        tokenizer=tokenizer, phrases=tuple(phrases), questions=(_WHERE,), answers=squares, around=((), ()),
        end=("\n",), opening=len(opening), draw=partial(_game, n, constant, tokenizer.ids["R"]),
        min_length=len(opening) + len(phrases[0]) + len(_WHERE) + 1, vocab_size=len(words) + 2, num_labels=len(squares),
        bos_id=len(words) + 1, chance=chance,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- drawing


def _routes(n: int, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """The sources and the targets, each [..., 6], of Black's moves that swap files i and j; a square is a number in
    8a 8b … 7a 7b … 6a 6b …"""
    seventh, sixth = n, 2 * n
    sources = torch.stack((i, j, seventh + i, sixth + j, seventh + j, sixth + i), dim=-1)
    targets = torch.stack((seventh + i, sixth + j, seventh + j, sixth + i, j, i), dim=-1)
    return sources, targets


def _swaps(n: int, batch: int, events: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first, second = draw_pairs(n, batch, events, generator)
    return unordered(n, first, second), follow(first.new_zeros(batch), first, second)


def _play(n: int, rook: Tensor, events: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The first `events` moves of Black from the rook on file `rook` [B]; five tensors [B,events]: the number of the
    move among those of all swaps, the source, the target, whether the rook moves, and the rook's square after it."""
    batch, swaps = len(rook), -(-events // _MOVES)
    first, second = draw_pairs(n, batch, swaps, generator)
    before = torch.cat([rook[:, None], follow(rook, first, second)[:, :-1]], dim=1)[..., None]
    sources, targets = _routes(n, first, second)
    turn = torch.arange(_MOVES, device=rook.device)
    moves = torch.where(turn % 2 == 0, before == first[..., None], before == second[..., None])
    # The two take turns, so whichever does not move now is where it went before, or, at first, where it began.
    stays = torch.cat([before, targets[..., :-1]], dim=-1)
    swapped = (before == first[..., None]) | (before == second[..., None])
    square = torch.where(moves, targets, torch.where(swapped, stays, before))
    number = (first * n + second)[..., None] * _MOVES + turn
    return tuple(x.flatten(1)[:, :events] for x in (number, sources, targets, moves, square))


def _moves(n: int, parts: str, batch: int, events: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rook = torch.zeros(batch, dtype=torch.int64, device=generator.device)
    _, source, target, is_rook, square = _play(n, rook, events, generator)
    written = {"p": 3 * n + is_rook.long(), "s": source, "t": target}
    return torch.stack([written[part] for part in parts], dim=2).flatten(1), square


def _game(n: int, constant: Tensor, rook_word: int, batch: int, events: int, generator: torch.Generator) -> Story:
    rook = torch.randint(n, (batch,), generator=generator, device=generator.device)
    number, _, _, is_rook, square = _play(n, rook, events, generator)
    opening = constant.to(rook.device).repeat(batch, 1)
    opening.scatter_(1, 2 + 2 * rook[:, None], rook_word)  # "Black : Q a8 Q b8 …"
    return Story(opening, 2 * number + is_rook.long(), torch.zeros_like(number), square)
