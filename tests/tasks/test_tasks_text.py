"""Chess, code and trades against oracles that read what is written: python-chess, Python itself, and a reader of
English; the words, the format, the guesses' accuracy, the time, and that a small model learns."""

import contextlib
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from speed import best_of

from deltaproduct.errors import UsageError
from deltaproduct.experiments.recipes import state_tracking_model
from deltaproduct.models import SequenceModel
from deltaproduct.tasks import chess_moves, code_swaps, entities, get_task, list_tasks
from deltaproduct.tasks.text import TextTask, WordTokenizer

CODE = [f"code_{form}_{n}" for form in ("swaps", "temp", "if") for n in (3, 5, 8)] + ["code_if_2"]
PARTS = ["s", "t", "st", "ps", "pt", "pst"]
TOKENS = [*CODE, "entities_3", "entities_5", "entities_8", "chess_3", "chess_5", "chess_8",
          *(f"chess_5_{parts}" for parts in PARTS), "chess_3_st", "chess_8_pst"]  # fmt: skip
TEXTS = [f"{name}_text" for name in TOKENS]
ALL = TOKENS + TEXTS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(name: str, length: int, batch: int = 60, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """(names of the tokens after BOS without padding, names of the scored labels) of each sequence, from tokens; or,
    from text, ([the text], …)."""
    task = get_task(name)
    tokens, labels, mask = task.sample(batch, length, generator=seeded(seed))
    rows = tokens[:, 1:].tolist()
    if isinstance(task, TextTask):
        written = [[task.tokenizer.decode(row)] for row in rows]
    else:
        written = [[task.token_name(i) for i in row if i < task.pad_id] for row in rows]  # type: ignore[attr-defined]
    scored = [[task.label_name(i) for i in row[keep].tolist()] for row, keep in zip(labels, mask, strict=True)]
    return list(zip(written, scored, strict=True))


# -------------------------------------------------------------------------------------------------------------- oracles


def python(program: str) -> list[str]:
    """What a program prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    return out.getvalue().split()


def first_lines(name: str) -> str:
    """What the tokens of code leave out: the variables at first."""
    n = int(name.split("_")[2])
    return f"p, q = True, False\n{', '.join('abcdefgh'[:n])} = {', '.join(str(i + 1) for i in range(n))}\n"


def reader(story: str) -> list[str]:
    """Who has the penny whenever it is asked, by reading sentences."""
    sentences = re.findall(r"[^.?]+[.?]", story)
    everybody = re.fullmatch(r"(.+) and (\w+) each have a coin\.", sentences[0])
    coins = dict.fromkeys([*everybody[1].split(", "), everybody[2]], "dime")
    coins[re.fullmatch(r" (\w+) is the only one having a penny\.", sentences[1])[1]] = "penny"
    answers = []
    for sentence in sentences[2:]:
        if trade := re.fullmatch(r" (\w+) and (\w+) trade coins\.", sentence):
            a, b = trade.groups()
            coins[a], coins[b] = coins[b], coins[a]
            assert a != b
        else:
            assert sentence == " Who has the penny?"
            answers.append({coin: owner for owner, coin in coins.items()}["penny"])
    return answers


def board_of(opening: str):
    """A board from "Black: Ra8 … White: Kg1 f2 …", Black to move."""
    chess = pytest.importorskip("chess")
    board = chess.Board.empty()
    for colour, pieces in re.findall(r"(Black|White): ([^.]+)\.", opening):
        for piece, square in re.findall(r"([KQR]?)([a-h][1-8])", pieces):
            kind = chess.Piece.from_symbol((piece or "P").lower()).piece_type
            board.set_piece_at(chess.parse_square(square), chess.Piece(kind, colour == "White"))
    board.turn = chess.BLACK
    assert board.is_valid()
    return board


def play(board, source: str, target: str, piece: str | None = None) -> None:
    """A move, which has to be legal, takes nothing, and is of the piece that it says."""
    chess = pytest.importorskip("chess")
    move = chess.Move.from_uci(source + target)
    assert board.is_legal(move) and not board.is_capture(move), (board.fen(), move)
    assert piece is None or board.piece_at(move.from_square).symbol().upper() == piece
    board.push(move)


def rook(board) -> str:
    chess = pytest.importorskip("chess")
    (square,) = board.pieces(chess.ROOK, chess.BLACK)
    return chess.square_name(square)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("code")])
def test_code_is_what_python_makes_of_it(name):
    for written, scored in samples(name, 150, batch=50):
        program = "".join(f"{x}\nprint(a)\n" for x in written)
        program = written[0] if name.endswith("_text") else first_lines(name) + program
        assert python(program) == scored, program


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("entities")])
def test_stories_are_what_a_reader_makes_of_them(name):
    people = entities.PEOPLE[: int(name.split("_")[1])]
    first = f"{', '.join(people[:-1])} and {people[-1]} each have a coin. {people[-1]} is the only one having a penny."
    for written, scored in samples(name, 150, batch=200):
        story = written[0] if name.endswith("_text") else first + "".join(f" {x} Who has the penny?" for x in written)
        assert reader(story) == scored, story


MOVE = re.compile(r"([KQR]?)([a-h][1-8])-([a-h][1-8]) ([KQR]?)([a-h][1-8])-([a-h][1-8]) rook\?")


@pytest.mark.parametrize("name", ["chess_3_text", "chess_4_st_text", "chess_5_pst_text", "chess_8_text"])
def test_games_are_legal_and_the_rook_is_where_python_chess_has_it(name):
    task = get_task(name)
    starts = set()
    for (game,), scored in samples(name, 220, batch=30):
        opening, *moves = game.splitlines()
        board = board_of(opening)
        before = board.piece_map()
        starts.add(rook(board))
        assert board.fen() == chess_moves.starting_position(len(task.answers) // 3, "abcdefgh".index(rook(board)[0]))
        for number, (move, answer) in enumerate(zip(moves, scored, strict=True), start=1):
            *black, white, source, target = MOVE.fullmatch(move).groups()
            assert bool(black[0]) == bool(white) == ("pst" in name)
            play(board, black[1], black[2], black[0] or None)
            play(board, source, target, "K")
            assert rook(board) == answer
            if number % 6 == 0:  # a swap is complete: the same squares, other pieces
                assert set(board.piece_map()) == set(before)
    assert len(starts) == len(task.answers) // 3


@pytest.mark.parametrize("name", ["chess_3_st", "chess_5_st", "chess_5_pst", "chess_8_pst"])
def test_moves_as_tokens_are_legal(name):
    chess = pytest.importorskip("chess")
    k, n = len(name.split("_")[2]), int(name.split("_")[1])
    for written, scored in samples(name, 100, batch=20):
        board = chess.Board(chess_moves.starting_position(n))
        for number in range(len(written) // k):
            *piece, source, target = written[number * k : number * k + k]
            play(board, source, target, *piece)
            assert rook(board) == scored[number]
            play(board, *(("g1", "h1"), ("h1", "g1"))[number % 2])


@pytest.mark.parametrize("n", [3, 5, 8])
def test_a_swap_of_two_files_is_a_swap_of_two_pieces(n):
    """Every pair, in either order, with the rook as the first, the second and neither, by the moves' closed form."""
    chess = pytest.importorskip("chess")
    squares = [file + rank for rank in "876" for file in "abcdefgh"[:n]]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    for i, j, at in [(*pair, at) for pair in pairs for at in (*pair, min({0, 1, 2} - {*pair}))]:
        board = chess.Board(chess_moves.starting_position(n, at))
        sources, targets = chess_moves._routes(n, torch.tensor(i), torch.tensor(j))
        for turn, (source, target) in enumerate(zip(sources.tolist(), targets.tolist(), strict=True)):
            play(board, squares[source], squares[target])
            play(board, *(("g1", "h1"), ("h1", "g1"))[turn % 2])
        where = {i: j, j: i}.get(at, at)
        assert board.board_fen() == chess.Board(chess_moves.starting_position(n, where)).board_fen()


def test_the_papers_sequence():
    """Items 1 and 3 of five, as in the proof of Proposition 3.3."""
    squares = [file + rank for rank in "876" for file in "abcde"]
    sources, targets = chess_moves._routes(5, torch.tensor(0), torch.tensor(2))
    moves = [f"{squares[s]}{squares[t]}" for s, t in zip(sources.tolist(), targets.tolist(), strict=True)]
    assert moves == ["a8a7", "c8c6", "a7c7", "c6a6", "c7c8", "a6a8"]


@pytest.mark.parametrize("name", ["chess_3", "chess_5", "chess_8"])
def test_whole_swaps_of_pieces(name):
    for written, scored in samples(name, 100, batch=100):
        row = ["R" if i == 0 else "Q" for i in range(8)]
        for swap, answer in zip(written, scored, strict=True):
            a, b = (ord(square[0]) - ord("a") for square in re.fullmatch(r"([a-h]8)<->([a-h]8)", swap).groups())
            row[a], row[b] = row[b], row[a]
            assert f"{'abcdefgh'[row.index('R')]}8" == answer


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("n", [3, 8])
def test_parts_are_parts_of_the_whole_move(n, parts):
    k, moves = len(parts), 20
    whole = samples(f"chess_{n}_pst", 3 * moves)
    for (full, answers), (some, same) in zip(whole, samples(f"chess_{n}_{parts}", k * moves), strict=True):
        assert same == answers and len(answers) == moves
        assert some == [full[3 * i + "pst".index(part)] for i in range(moves) for part in parts]
    move = "".join({"p": "[KQR]", "s": "[a-h][1-8]", "t": "[a-h][1-8]"}[part] for part in parts)
    move = move.replace("8][a-h", "8]-[a-h")
    game = get_task(f"chess_{n}_{parts}_text").text(seeded(), 120)
    assert all(re.fullmatch(f"{move} {move} rook\\?", line) for line in game.splitlines()[1:])


# ---------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("answers", [False, True])
def test_text_to_words_and_back(name, answers):
    task = get_task(name)
    for seed in range(20):
        text = task.text(seeded(seed), 130, answers=answers)
        ids = task.tokenizer.encode(text)
        assert task.tokenizer.decode(ids) == text and max(ids) < task.pad_id and len(ids) <= 130
        if not answers:
            tokens, _, _ = task.sample(1, 130, generator=seeded(seed))
            assert tokens[0, 1 : 1 + len(ids)].tolist() == ids and (tokens[0, 1 + len(ids) :] == task.pad_id).all()


ANSWER = {"code": r"print\(\w\) # (\d)\n", "entities": r"Who has the penny\? (\w+)\.", "chess": r"rook\? (\w\d)\n"}


@pytest.mark.parametrize("name", TEXTS)
def test_written_answers_are_right(name):
    task, kind = get_task(name), name.split("_")[0]
    for seed in range(5):
        text = task.text(seeded(seed), 200, answers=True)
        answers = re.findall(ANSWER[kind], text)
        assert len(answers) > 1
        if kind == "code":
            assert answers == python(text)
        elif kind == "entities":
            assert answers == reader(re.sub(r"\? \w+\.", "?", text))
        elif MOVE.search(text):
            board = board_of(text)
            for move, answer in zip(MOVE.finditer(text), answers, strict=True):
                play(board, move[2], move[3])
                play(board, move[5], move[6])
                assert rook(board) == answer


def test_the_tokenizer_says_what_it_cannot_read():
    task = get_task("code_swaps_3_text")
    with pytest.raises(UsageError, match="no word for 'z'"):
        task.tokenizer.encode("a, z = z, a")
    for odd in ("a , b = b, a", "a,b = b, a", "a  , b", " a"):
        with pytest.raises(UsageError, match="not spaced"):
            task.tokenizer.encode(odd)
    tight = WordTokenizer(("R", "a8", "-", "a7"), frozenset("R"))
    assert tight.encode("Ra8-a7") == [0, 1, 2, 3] and tight.decode([0, 1, 9]) == "Ra8"
    with pytest.raises(UsageError):
        tight.encode("R a8")


# --------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("more", [0, 1, 2, 7, 64])
def test_format(name, more):
    task = get_task(name)
    length = task.min_length + more
    tokens, labels, mask = task.sample(40, length, generator=seeded(more))
    assert tokens.shape == labels.shape == mask.shape == (40, 1 + length)
    assert tokens.dtype == labels.dtype == torch.int64 and mask.dtype == torch.bool
    assert (tokens[:, 0] == task.bos_id).all() and (tokens[:, 1:] < task.bos_id).all() and tokens.min() >= 0
    assert labels.min() >= 0 and labels.max() < task.num_labels == len(task.answers)
    assert (labels[~mask] == 0).all() and mask.any(dim=1).all()
    padding = tokens == task.pad_id
    assert (padding[:, 1:].int().diff(dim=1) >= 0).all() and not mask[padding].any()  # only at the end
    names = [task.token_name(i) for i in range(task.vocab_size)]
    assert len(set(names)) == len(names) and names[-2:] == ["[PAD]", "[BOS]"] and not any("\n" in x for x in names)
    assert task.bos_id == task.vocab_size - 1
    if isinstance(task, TextTask):  # the longest event and its question did not fit
        assert padding.sum(dim=1).max() < task.min_length - task.opening
    else:
        assert (padding.sum(dim=1) == length % task.width).all()
    with pytest.raises(UsageError, match=f"length must be at least {task.min_length}, not {task.min_length - 1}"):
        task.sample(1, task.min_length - 1, generator=seeded())


@pytest.mark.parametrize("name", ALL)
def test_every_word_is_used(name):
    task = get_task(name)
    seen = set(task.sample(600, 200, generator=seeded())[0].unique().tolist()) | {task.pad_id}
    unused = [task.token_name(i) for i in range(task.vocab_size) if i not in seen]
    assert unused in ([], ["#"]), unused  # the mark before a written answer


@pytest.mark.parametrize("name", ["chess_5_st", "chess_5_text", "code_if_5", "code_temp_5_text", "entities_5_text"])
def test_the_generator_is_the_only_source_of_randomness(name):
    task, copy = get_task(name), pickle.loads(pickle.dumps(get_task(name)))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = task.sample(6, 90, generator=seeded(7))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, copy.sample(6, 90, generator=seeded(7)), strict=True))
    assert not torch.equal(first[0], task.sample(6, 90, generator=seeded(8))[0])


BAD = {
    "chess_9": "a rank has 8 squares",
    "chess_2_st_text": "fewer than 3 pieces",
    "chess_5_p": "add s or t",
    "chess_5_p_text": "add s or t",
    "chess_5_ts": "unknown task",
    "chess_5_": "unknown task",
    "code_swaps_1": "fewer than 3 variables",
    "code_temp_2_text": "fewer than 3 variables",
    "code_if_1": "nothing to be swapped with",
    "code_swaps_9": "only 8 variables have names",
    "code_while_5": "unknown task",
    "entities_9": "only 8 people",
    "entities_0_text": "fewer than 3 people",
    "Entities_5": "upper and lower case matter",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name):
    with pytest.raises(UsageError) as error:
        get_task(name)
    assert BAD[name] in str(error.value) and "\n" not in str(error.value)


def test_texts_too_short():
    task = get_task("code_swaps_3_text")
    for answers, least in ((False, task.min_length), (True, task.min_length + 2)):
        assert task.text(seeded(), least, answers=answers).count("print") == 1
        with pytest.raises(UsageError, match=f"length must be at least {least}"):
            task.text(seeded(), least - 1, answers=answers)


EXAMPLES = [example for _, _, example in list_tasks() if re.match("code|chess|entities", example)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_can_be_read(name):
    assert name in get_task(name).worked_example()
    task = get_task(f"{name}_text")
    shown = task.worked_example(seed=3)
    length = int(re.search(r"of length (\d+)", shown)[1])
    assert shown.endswith(task.text(seeded(3), length).rstrip())
    assert sum(line.endswith("yes") for line in shown.splitlines()) >= 3


def test_the_docstrings_examples():
    doc = code_swaps.code_task.__doc__
    lines = re.findall(r"^ {8}((?:t|if|a, b = b).*) → (.+)$", doc, re.MULTILINE)
    assert len(lines) == 3
    for tokens, answers in lines:
        program = "".join(f"{line}\nprint(a)\n" for line in tokens.split(" | "))
        assert python(first_lines("code_if_3") + program) == answers.split()
    text, answers = re.search(r"^ {8}(a, b, c = [^→]+) → (.+)$", doc, re.MULTILINE).groups()
    program = re.sub(r"^ +", "", text, flags=re.MULTILINE)
    assert python(program) == answers.split(", ") and get_task("code_swaps_3_text").tokenizer.encode(program)
    doc = entities.entities_task.__doc__
    story, answers = re.search(r"^ {8}(Alice, Bob and Carl each [^→]+) → (.+)$", doc, re.MULTILINE).groups()
    story = re.sub(r"\s+", " ", story)
    assert reader(story) == answers.split(", ") and get_task("entities_3_text").tokenizer.encode(story)
    trades, answers = re.search(r"^ {8}(Alice and Carl trade .*) → (.+)$", doc, re.MULTILINE).groups()
    told = story.split(" Alice and Carl")[0] + "".join(f" {x} Who has the penny?" for x in trades.split(" | "))
    assert reader(told) == answers.split(", ")
    doc = chess_moves.chess_task.__doc__
    game, answers = re.search(r"^ {8}(Black: [^→]+) → (.+)$", doc, re.MULTILINE).groups()
    game = re.sub(r"^ +", "", game, flags=re.MULTILINE)
    board = board_of(game)
    for move, answer in zip(MOVE.finditer(game), answers.split(", "), strict=True):
        play(board, move[2], move[3])
        play(board, move[5], move[6])
        assert rook(board) == answer
    assert get_task("chess_3_text").tokenizer.encode(game)
    board = board_of("Black: Ra8 Qb8 Qc8 Ka5. White: Kg1 f2 g2 h2.")
    moves, answers = (s.split() for s in re.search(r"^ {8}(a8 a7 c8 [^→]+) → (.+)$", doc, re.MULTILINE).groups())
    for i, answer in enumerate(answers):
        play(board, *moves[2 * i : 2 * i + 2])
        assert rook(board) == answer
        play(board, *(("g1", "h1"), ("h1", "g1"))[i % 2])


# --------------------------------------------------------------------------------------------------- guesses, and speed


GUESSED = ["code_swaps_3", "code_temp_5", "code_if_2", "code_if_8", "entities_5", "chess_3", "chess_8", "chess_3_st",
           "chess_8_pst", "code_swaps_5_text", "code_if_3_text", "entities_3_text", "chess_3_text",
           "chess_5_pst_text"]  # fmt: skip


@pytest.mark.parametrize("name", GUESSED)
def test_chance(name):
    """The best guess for each scored place, counted on one half of the sequences and scored on the other."""
    task = get_task(name)
    length = 150 * task.width if name in TOKENS else task.opening + 24 * (task.min_length - task.opening)
    _, labels, mask = task.sample(6000, length, generator=seeded(3))
    order = mask.cumsum(1)[mask] - 1
    many = int(mask.sum(1).min())
    answers = torch.zeros((6000, int(order.max()) + 1), dtype=torch.int64)
    answers[mask.nonzero()[:, 0], order] = labels[mask]
    whole = many // 18 * 18  # of whole swaps of six moves the last third: by then the beginning is forgotten
    assert whole >= 18
    settled = answers[:, whole // 3 * 2 : whole]
    counts = F.one_hot(settled[:3000], task.num_labels).sum(0)
    best = counts.argmax(1)
    score = (settled[3000:] == best).double().mean().item()
    # Chosen on one half, the guess of a place is near the best, by less than the noise of a share of 3,000: that is
    # .5/55 = .009 at one place, and less over the 6 and more places that are averaged.
    assert abs(score - task.chance) < 0.012


@pytest.mark.parametrize("name", ["chess_8", "chess_8_pst", "code_if_8", "code_temp_5", "code_swaps_5", "entities_8",
                                  "chess_8_t_text", "code_if_8_text", "code_swaps_5_text",
                                  "entities_5_text"])  # fmt: skip
def test_a_training_batch_takes_milliseconds(name, one_thread):
    task, generator = get_task(name), seeded()
    limit = 0.06 if name.endswith("_text") else 0.03
    assert best_of(5, lambda: task.sample(64, 256, generator=generator)) < limit


# ------------------------------------------------------------------------------------------------------------- learning


def losses(name: str, steps: int, length: int) -> list[float]:
    """Of the state-tracking recipe's model (hidden 64, one layer) trained on fresh batches of 32."""
    task = get_task(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SequenceModel(state_tracking_model(task))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    generator, found = seeded(1), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 20)
        tokens, labels, mask = task.sample(32, max(length, task.min_length), generator=generator)
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits[mask], labels[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_model_begins_to_learn(one_thread):
    found = losses("entities_3", 25, 8)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


@pytest.mark.slow("exhaustive")
@pytest.mark.parametrize("name", ["chess_5", "chess_5_st", "code_swaps_5", "code_temp_5", "code_if_5", "entities_5",
                                  "chess_5_text", "code_swaps_5_text", "code_temp_5_text", "code_if_5_text",
                                  "entities_5_text"])  # fmt: skip
def test_a_model_learns(name, one_thread):
    found = losses(name, 100, 96 if name.endswith("_text") else 16)
    assert sum(found[-10:]) < 0.8 * sum(found[:10])
