"""Whether an automaton accepts a language, by derivatives (Brzozowski, Derivatives of Regular Expressions, 1964).

The derivative of R by a holds what follows a first a in the words of R, and a word is in R if and only if the
derivative by all of its symbols holds the empty word. A language has finitely many derivatives, so that comparing a
state with each of them compares all words.
"""

from collections.abc import Callable, Sequence
from typing import Any

from deltaproduct.tasks.languages import EMPTY, NOTHING, Language, all_of, any_of, chain, repeat, shuffle

MAX_COMPARED = 300_000  # parts of derivatives that are gone through, which takes a second or two


class Derivatives:
    """The derivative of a language by a symbol: what follows the symbol in the words that begin with it.

    Attributes:
        work: how many parts of languages have been gone through.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Language, str], Language] = {}
        self.work = 0

    def __call__(self, language: Language, symbol: str) -> Language:
        found = self.known.get((language, symbol))
        if found is None:
            self.work += 1 + len(language.parts)
            found = self.known[language, symbol] = self._of(language, symbol)
        return found

    def _of(self, language: Language, symbol: str) -> Language:
        if language.kind == "one":
            return EMPTY if symbol in language.symbols else NOTHING
        parts = language.parts
        if language.kind == "repeat":
            most = None if language.most is None else language.most - 1
            return chain((self(parts[0], symbol), repeat(parts[0], max(0, language.least - 1), most)))
        options: list[Language] = []
        for i, part in enumerate(parts):
            after = self(part, symbol)
            if language.kind == "chain":
                options.append(chain((after, *parts[i + 1 :])))
                if not part.empty_word:
                    break
            elif language.kind == "shuffle":
                options.append(shuffle((*parts[:i], after, *parts[i + 1 :])))
            else:
                options.append(after)
        return all_of(options) if language.kind == "all" else any_of(options)


def first_difference(
    language: Language,
    alphabet: Sequence[str],
    start: Any,
    step: Callable[[Any, str], Any],
    accepts: Callable[[Any], bool],
) -> str | None:
    """A shortest word that is in the language or accepted, and not both; None if none is found.

    States and derivatives are compared in pairs, as words lead to them. That is every word, unless there is so much of
    derivatives that it stops at `MAX_COMPARED` of their parts; then it is every word up to some length.
    """
    by_symbol = Derivatives()
    words: dict[tuple[Any, Language], str] = {(start, language): ""}
    queue = list(words)
    for state, rest in queue:  # grows while it is gone through
        word = words[state, rest]
        if rest.empty_word != accepts(state):
            return word
        if by_symbol.work > MAX_COMPARED:
            continue  # what has been found is still compared
        for symbol in alphabet:
            pair = (step(state, symbol), by_symbol(rest, symbol))
            if pair not in words:
                words[pair] = word + symbol
                queue.append(pair)
    return None
