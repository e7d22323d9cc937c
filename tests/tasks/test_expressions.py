"""Regular expressions (tasks/expressions.py): languages and alphabets beside Python's `re`, by the definition, and
beside automata-lib where it is right; what it misreads is found."""

import itertools
import json
import random
import re
import warnings

import pytest
from commands import run

from deltaproduct.errors import UsageError
from deltaproduct.tasks import derivatives, get_task, regex_automaton
from deltaproduct.tasks.derivatives import Derivatives, first_difference
from deltaproduct.tasks.expressions import NoExpression, language_of, symbols_of, tokens_of
from deltaproduct.tasks.regex_automaton import from_regex
from deltaproduct.theory.verification import load

pytest.importorskip("automata")


def words(alphabet, length):
    """All of at most this length."""
    for n in range(length + 1):
        yield from map("".join, itertools.product(alphabet, repeat=n))


def accepted(automaton, length):
    number = {a: i for i, a in enumerate(automaton.alphabet)}
    return {word for word in words(automaton.alphabet, length) if automaton.accepts([number[a] for a in word])}


def pythons(regex, alphabet, length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # [[ may come to mean something else
        compiled = re.compile(regex, re.ASCII | re.DOTALL)
    return {word for word in words(alphabet, length) if compiled.fullmatch(word)}


# Expressions and their symbols; Python's `re` knows all of them.
LANGUAGES = {
    "a{0}": "a", "ba{0}b": "ab", "(ab){0}a*": "ab", "a{0,0}": "a", "a{,0}": "a", "(a{0}b){2}": "ab", "(a|b){0}": "ab",
    "(ab){2}": "ab", "a{2,3}": "a", "a{2}.": "a", "(a{2}|b){1,2}": "ab", "((a|b){2}){3}": "ab", "a{,2}": "a",
    "a{1,}b{0,}": "ab", "a{0,3}b{3}": "ab", "(a{1,2}){2}": "a", "(a?){3}": "a", "(a*b?){2,3}": "ab", "a{1}": "a",
    "[a-c]": "abc", "[a-cx]*": "abcx", "[^a]b": "ab", "[^ab]": "ab", "[ab^]": "^ab", "[a-]": "-a", "[-a]": "-a",
    "[a\\-c]": "-ac", "[\\]a]": "]a", "[.*]": "*.", "[a-c-e]": "-abce", "[\\\\]": "\\", "[^a-c]*d": "abcd",
    ".": None, "a.": "a", ".*b": "b", "\\.": ".", "a\\*": "*a", "\\(\\)": "()", "\\{2\\}": "2{}", "\\[a": "[a",
    "\\|\\&\\^\\?\\+": "&+?^|", "\\$": "$", "\\\\": "\\", "\\n": "\n", "\\ta": "\ta", "2{2}": "2", "a,b": ",ab",
    "a-b": "-ab", "a b": " ab", "a\tb": "\tab", "é|ß*": "ßé", "日本?": "日本", "😀{2}": "😀", "a#'\"": "\"#'a",
    "\\d": "0123456789", "\\d{2}|a": "0123456789a", "[\\d]a?": "0123456789a", "()": None, "a()b": "ab", "(a())*": "a",
    "(((a)))": "a", "(a|b|)": None,
}  # fmt: skip


@pytest.mark.parametrize("regex", [regex for regex, symbols in LANGUAGES.items() if symbols])
def test_language_and_alphabet(regex):
    automaton = from_regex(regex)
    assert "".join(automaton.alphabet) == LANGUAGES[regex]
    length = 7 if len(automaton.alphabet) < 4 else 3
    assert accepted(automaton, length) == pythons(regex, automaton.alphabet, length)


def test_where_python_differs():
    """A repetition of a repetition, and what is left out of the alphabet."""
    assert accepted(from_regex("a{2}{3}"), 12) == {"a" * 6}
    assert accepted(from_regex("a**"), 3) == {"", "a", "aa", "aaa"}
    assert accepted(from_regex("(a+)?"), 2) == {"", "a", "aa"} == accepted(from_regex("(a?)+"), 2)
    assert accepted(from_regex("[^a]", "abc"), 2) == {"b", "c"} and accepted(from_regex("[^ab]"), 2) == set()
    assert accepted(from_regex("\\D", "a1"), 2) == {"a"} and accepted(from_regex("\\w+", "a-"), 2) == {"a", "aa"}
    assert accepted(from_regex(".{2}", "ab"), 3) == {"aa", "ab", "ba", "bb"}
    assert accepted(from_regex("", "ab"), 3) == {""} == accepted(from_regex("()", "ab"), 3)
    assert accepted(from_regex("[^a]*", "a"), 3) == {""}


def some_expression(rng, depth=3):
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["a", "b", "c", ".", "[ab]", "[^a]", "()"])
    kind = rng.randrange(4)
    inner = [some_expression(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    if kind == 0:
        return "(" + "|".join(inner) + ")"
    if kind == 1:
        return "".join(inner)
    least = rng.randint(0, 3)
    count = rng.choice(["*", "+", "?", f"{{{least}}}", f"{{{least},}}", f"{{{least},{least + rng.randint(0, 2)}}}",
                        f"{{,{least}}}", "{0}"])  # fmt: skip
    return f"({inner[0]}){count}"


@pytest.mark.parametrize("seed", range(4))
def test_expressions_at_random_are_pythons(seed):
    rng = random.Random(seed)
    for _ in range(40):
        regex = some_expression(rng)
        automaton = from_regex(regex, "abc")
        assert accepted(automaton, 5) == pythons(regex, "abc", 5), regex


def test_signs_at_random_are_pythons_or_refused():
    """Where both take a text for an expression they mean one language by it."""
    rng, both = random.Random(0), 0
    for _ in range(3000):
        regex = "".join(rng.choice("aab()|*+?{}01,[]-.\\") for _ in range(rng.randint(1, 9)))
        try:
            automaton = from_regex(regex)
        except UsageError as e:
            assert "\n" not in str(e)
            continue
        try:
            want = pythons(regex, automaton.alphabet, 3)
        except re.error as e:
            assert "multiple repeat" in str(e), regex  # which the library has always taken, and means one thing
            continue
        assert accepted(automaton, 3) == want, regex
        both += 1
    assert both > 300


def shuffles(first, second):
    for places in itertools.combinations(range(len(first) + len(second)), len(first)):
        word = list(second)
        for place, symbol in zip(places, first, strict=True):
            word.insert(place, symbol)
        yield "".join(word)


PAIRS = [("(a|b)*a", "a(a|b)*"), ("(ab)*", "(a|b){2,4}"), ("a{0}", "a*"), ("ab?", "b*a?"), ("(a|b)(a|b)", "a*")]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_intersections_and_shuffles_by_the_definition(first, second):
    one, two = (pythons(regex, "ab", 5) for regex in (first, second))
    assert accepted(from_regex(f"({first})&({second})", "ab"), 5) == one & two
    mixed = {word for x in one for y in two if len(x + y) <= 5 for word in shuffles(x, y)}
    assert accepted(from_regex(f"({first})^({second})", "ab"), 5) == mixed
    # From left to right, whatever the sign.
    assert accepted(from_regex(f"a|({first})&({second})", "ab"), 5) == ({"a"} | one) & two


@pytest.mark.parametrize("seed", range(3))
def test_derivatives_are_the_language(seed):
    """Without the library: a word is in it if what is left by its symbols holds the empty word."""
    rng, by = random.Random(100 + seed), Derivatives()
    for _ in range(30):
        regex = some_expression(rng)
        language, found = language_of(tokens_of(regex), "abc"), set()
        for word in words("abc", 4):
            rest = language
            for symbol in word:
                rest = by(rest, symbol)
            if rest.empty_word:
                found.add(word)
        assert found == pythons(regex, "abc", 4), regex


def test_a_wrong_answer_of_the_library_is_not_taken(monkeypatch):
    """If it is asked for a{0} or a quantifier as it stands, or answers with anything else."""
    monkeypatch.setattr(regex_automaton, "for_library", lambda language, names: "({}){{0}}".format(names["a"]))
    with pytest.raises(UsageError, match=r"automata-lib reads 'a\{0\}' wrongly, for instance for the word 'a'"):
        from_regex("a{0}")
    monkeypatch.setattr(regex_automaton, "for_library", lambda language, names: "{0}{0}{1}*".format(*names.values()))
    with pytest.raises(UsageError, match="for the word 'aabbb'"):
        from_regex("aab{0,2}")


def test_every_word_is_compared_and_no_more_than_is_needed():
    """A difference in words of 300 symbols only is found; an expression with many derivatives is given up in time."""
    language = language_of(tokens_of("a{300}"), "a")
    ends = {"right": 300, "wrong": 301}
    for name, at in ends.items():
        word = first_difference(language, "a", 0, lambda q, _: min(q + 1, 302), lambda q, at=at: q == at)
        assert word == (None if name == "right" else "a" * 300)


def test_the_comparison_ends(monkeypatch):
    seen = []

    class Counted(Derivatives):
        def __init__(self):
            super().__init__()
            seen.append(self)

    monkeypatch.setattr(derivatives, "Derivatives", Counted)
    monkeypatch.setattr(derivatives, "MAX_COMPARED", 500)
    automaton = from_regex("(a|b)*a(a|b){7}")
    assert len(automaton.states) == 256 and 500 < seen[0].work < 1500  # the last step may go past it, by one state


BAD = {
    "(a{1,999}){1,999}": "written out it has 998,001 parts, and at most 10,000",
    "(a{500})^(b{500})": "written out it has 251,001 parts",
    "a{1000}": "more than 999 times", "a{2,1}": "from 2 down to 1", "a{": "how often", "a{}": "how often",
    "a{x}": "how often", "a{-1}": "how often", "{2}": "missing before {2}", "*": "missing before *", "a|": "its end",
    "(|a)": "missing before |", "a||b": "missing before |", "^a": "missing before ^", "a&": "its end", ")": "missing",
    "a)": "closes nothing", "(a": "never closed", "a$": "the symbol is \\$", "a}": "the symbol is \\}",
    "a]": "the symbol is \\]", "[": "never closed", "[a": "never closed", "[a\\": "never closed", "[]": "no symbols",
    "[^]": "no symbols", "[c-a]": "range", "[\\d-z]": "range", "[a-\\d]": "range", "\\": "the symbol is \\\\",
    "\\b": "\\b means nothing", "\\1": "\\1 means nothing", "[\\D]": "\\D means nothing", "a*?": "two meanings",
    "a??": "two meanings", "a{2}+": "two meanings", "a+?": "two meanings", "(?:a)": "missing before ?",
    "(" * 60 + "a" + ")" * 60: "more than 50 brackets", "a\ud800": "UTF-8", "[\x00-\U0010ffff]": "range of more than",
}  # fmt: skip


@pytest.mark.parametrize("regex", BAD)
def test_mistakes_in_expressions(regex):
    with pytest.raises(UsageError) as e:
        from_regex(regex)
    assert BAD[regex] in str(e.value) and "\n" not in str(e.value) and str(e.value).endswith(".")


def test_symbols_outside_of_the_alphabet():
    for regex in ("abc", "[a-c]", "ab|c*"):
        with pytest.raises(UsageError, match="'c' is not in the alphabet"):
            from_regex(regex, "ab")
    with pytest.raises(UsageError, match="has no symbols"):
        from_regex(".")
    with pytest.raises(NoExpression):
        language_of(tokens_of("a"), "b")
    assert symbols_of(tokens_of("[^x]a\\d?")) == {"x", "a", *"0123456789"}


def test_deep_and_long_expressions_need_no_deep_stack():
    assert accepted(from_regex("(" * 50 + "ab" + ")?" * 50), 4) == {"", "ab"}
    assert accepted(from_regex("((((a*b)*c)*d)*)&" * 10 + "(.*)", "abcd"), 2)
    assert len(from_regex("ab" * 100).states) == 202
    assert len(from_regex("|".join("abcdefghijklmnop") + "|aa").states) == 4


@pytest.mark.parametrize("regex", ["a{0}b", "ba{0}b", "(ab){2}", "a{2,3}", "[a-c]", "a{2}.", "(ab){0}a+"])
def test_tasks_read_them_too(regex):
    task = get_task(f"regex_accept:{regex}")
    assert task.automaton == from_regex(regex) == get_task(f"regex:{regex}").automaton
    assert accepted(task.automaton, 4) == pythons(regex, task.automaton.alphabet, 4)


def test_a_task_without_words_says_so():
    with pytest.raises(UsageError, match="no word would be accepted"):
        get_task("regex_accept:[^ab]")
    with pytest.raises(UsageError, match="two meanings"):
        get_task("regex:(ab)*?")


def test_weights_are_of_the_language(capsys, tmp_path):
    for i, (regex, states) in enumerate({"ba{0}b": 4, "(ab){2}": 6, "a{0}": 2}.items()):
        status, out, err = run(capsys, "compile", "--regex", regex, "--out", tmp_path / str(i))
        assert status == 0, err
        automaton = load(tmp_path / str(i)).automaton
        assert len(automaton.states) == states
        assert accepted(automaton, 5) == pythons(regex, automaton.alphabet, 5)
    status, out, _ = run(capsys, "tasks", "show", "regex:ba{0}b")
    assert status == 0 and "vocabulary 3 (BOS is 2), labels 4" in out
    for command in (["compile", "--out", tmp_path / "no", "--regex", "a*?"], ["tasks", "show", "regex:a*?"]):
        status, _, err = run(capsys, *command)
        assert status == 2 and "two meanings" in err and err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_what_is_learned_of_one_is_the_language(capsys, tmp_path):
    pytest.importorskip("aalpy")
    assert run(capsys, "compile", "--regex", "(ba{0}b)*", "--out", tmp_path / "x")[0] == 0
    status, _, err = run(capsys, "compile", "--from-run", tmp_path / "x", "--out", tmp_path / "y")
    assert status == 0, err
    states = json.loads((tmp_path / "y" / "automaton.json").read_text())["states"]
    assert len(states) == len(from_regex("(bb)*", "ab").states)
