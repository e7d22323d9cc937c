"""Which states of an automaton are alike: the coarsest partition that its transitions respect."""

import numpy as np

ROUNDS = 32  # of Moore's refinement: most machines need fewer than ten, chains as many as they have states


def coarsest(table: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The coarsest partition that every symbol respects and that is finer than one which is given: in the states of a
    block, all words go on alike.

    Rounds of Moore's refinement, which are fast, and after a few of them Hopcroft's (1971), whose time is n·s·log n
    where rounds would take n²·s.

    Args:
        table: [n,s] the next state.
        block: [n] the block of each state.

    Returns:
        [n] the number of each state's block, from 0 on.
    """
    table = np.unique(table, axis=1) if table.shape[1] > 1 else table  # the partition does not depend on names
    count, rounds = len(np.unique(block)), 0
    while True:
        kinds: dict[bytes, int] = {}
        seen = np.column_stack([block, block[table]]).astype(np.int32)
        finer = np.array([kinds.setdefault(row.tobytes(), len(kinds)) for row in seen])
        if len(kinds) in (count, len(table)):
            return finer
        block, count, rounds = finer, len(kinds), rounds + 1
        if rounds == ROUNDS:
            return _hopcroft(table, block)


def _hopcroft(table: np.ndarray, block: np.ndarray) -> np.ndarray:
    """`coarsest`, by splitting blocks by what leads into a block, and of two halves going on with the smaller."""
    n, s = table.shape
    order = np.argsort(table.reshape(-1), kind="stable")
    begin = np.searchsorted(table.reshape(-1)[order], np.arange(n + 1)).tolist()
    sources, symbols = (order // s).tolist(), (order % s).tolist()
    block_of = block.tolist()
    members: list[set[int]] = [set() for _ in range(max(block_of) + 1)]
    for state, b in enumerate(block_of):
        members[b].add(state)
    largest = max(range(len(members)), key=lambda b: len(members[b]))
    waiting = set(range(len(members))) - {largest}
    while waiting:
        into: dict[int, list[int]] = {}
        for state in members[waiting.pop()]:
            for edge in range(begin[state], begin[state + 1]):
                into.setdefault(symbols[edge], []).append(sources[edge])
        for ones in into.values():
            touched: dict[int, list[int]] = {}
            for state in ones:
                touched.setdefault(block_of[state], []).append(state)
            for b, part in touched.items():
                if len(part) == len(members[b]):
                    continue
                new = len(members)
                members.append(set(part))
                members[b].difference_update(part)
                for state in part:
                    block_of[state] = new
                waiting.add(new if b in waiting or len(part) <= len(members[b]) else b)
    return np.array(block_of)
