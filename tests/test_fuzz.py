"""Damaged and hostile inputs of every kind that the library reads (fuzz.py): the right answer, or one clear line."""

import sys

import fuzz
import pytest

NAMES = [kind.name for kind in fuzz.KINDS]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    pytest.importorskip("transformers")
    before = sys.getrecursionlimit()
    yield fuzz.Bench(tmp_path_factory.mktemp("fuzz"))
    assert sys.getrecursionlimit() == before


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def check(cases):
    problems = [str(case) for case in cases if case.problem]
    assert not problems, "\n\n".join(problems)
    statuses = {case.outcome.status for case in cases}
    assert 2 in statuses, "nothing was refused: this fuzz tests nothing"


@pytest.mark.slow("fuzz")
@pytest.mark.ci("conversation")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", fuzz.KINDS, ids=NAMES)
def test_damaged_files_give_the_right_answer_or_one_line(bench, kind):
    check([fuzz.damaged(bench, kind, number) for number in range(29)])


@pytest.mark.slow("fuzz")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", fuzz.KINDS, ids=NAMES)
def test_hostile_files_run_nothing_write_nothing_and_are_refused_in_one_line(bench, kind):
    check([fuzz.hostile(bench, kind, number) for number in range(15)])


@pytest.mark.parametrize("damage", sorted({damage.__name__ for damage in fuzz.DAMAGES}))
def test_each_damage_is_noticed_in_a_conversation(bench, damage, monkeypatch):
    """Every file of a conversation is checked, so that whatever changes one has to be refused."""
    kind = next(kind for kind in fuzz.KINDS if kind.name == "conversation")
    monkeypatch.setattr(fuzz, "DAMAGES", [getattr(fuzz, damage)])
    case = fuzz.damaged(bench, kind, 0)
    assert case.problem is None and case.outcome.status == 2, case


def test_the_fuzz_notices_what_it_looks_for(bench):
    """Another answer, a traceback, several lines and code that runs are each called a problem."""
    right = fuzz.Outcome(0, "right")
    assert right.problem("right") is None and "another answer" in right.problem("wrong")
    assert fuzz.Outcome(2, said="deltaproduct: no.\n").problem("right") is None
    for bad in (fuzz.Outcome(2, said="a\nb\n"), fuzz.Outcome(2), fuzz.Outcome(1, said="Traceback"), fuzz.Outcome(1)):
        assert bad.problem("right")
    kind = next(kind for kind in fuzz.KINDS if kind.name == "conversation")

    def careless(root):
        (root.parent / fuzz.MARKER).touch()
        return right

    careless = fuzz.Kind(kind.name, kind.build, careless, kind.target)
    assert fuzz.hostile(bench, careless, 0).problem == "code was executed"
    outside = fuzz.Kind(kind.name, kind.build, lambda root: (root.parent / "new").touch() or right, kind.target)
    assert "written outside" in fuzz.hostile(bench, outside, 0).problem
    crash = fuzz.call(lambda: 1 // 0)
    assert crash.status == 1 and "ZeroDivisionError" in crash.problem(None)
