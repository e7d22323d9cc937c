"""A mistake in the arguments is answered in one line, with the names of the command that was asked for."""

import pytest
from commands import run

from deltaproduct.errors import UsageError, did_you_mean, nearest


def refused(capsys, *arguments):
    """The line of a refusal, without the program's name."""
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1, (status, out, err)
    assert err.startswith("deltaproduct: ")
    return err.removeprefix("deltaproduct: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("trian", "there is no command trian; did you mean train?"),
        ("Train --out a", "there is no command Train; did you mean train?"),
        ("lm trian", "lm has no command trian; did you mean train?"),
        ("bench oops", "bench has no command oops; did you mean ops?"),
        ("tasks shwo S3", "tasks has no command shwo; did you mean show?"),
        ("train --stpes 5 --out a", "train has no flag --stpes; did you mean --steps?"),
        ("train --stpes=5 --out a", "train has no flag --stpes; did you mean --steps?"),
        ("train --out a --hiden_size 5", "train has no flag --hiden-size; did you mean --hidden-size?"),
        ("train --out a --no-resum", "train has no flag --no-resum; did you mean --no-resume?"),
        ("lm train --stpes 5", "lm train has no flag --stpes; did you mean --steps?"),
        ("lm generate r --promt hi", "lm generate has no flag --promt; did you mean --prompt?"),
        ("evaluate r --jsn", "evaluate has no flag --jsn; did you mean --json?"),
        ("evaluate r --zzz", "evaluate has no flag --zzz; for help: deltaproduct evaluate --help"),
        ("bench ops --sahpes B1", "bench ops has no flag --sahpes; did you mean --shapes?"),
        ("compile --out a --strategy rotatoin", "--strategy of compile cannot be rotatoin; did you mean rotation? It "
         "is one of auto, permutation, rotation, two-layer, cascade, shallow."),
        ("extract r --out a --method LSTAR", "--method of extract cannot be LSTAR; did you mean lstar? It is one of "
         "lstar, clustering."),
        ("lm evaluate r --what perplexiti", "--what of lm evaluate cannot be perplexiti; did you mean perplexity? It "
         "is one of perplexity, length-extrapolation, effective-rank, harness."),
        ("reproduce s3 --scale paper2", "--scale of reproduce cannot be paper2; did you mean paper? It is one of cpu, "
         "cpu-long, paper."),
        ("train --out", "--out needs a value: folder of the run; created."),
        ("train", "train needs --out (folder of the run; created); for help: deltaproduct train --help"),
        ("train --out a --steps 3.5", "--steps must be a whole number, not 3.5."),
        ("train --out a --steps None", "--steps must be a whole number, not None."),
        ("train --out a --lr fast", "--lr must be a number, not fast."),
        ("train --out a --resume=yes", "--resume takes no value; write --resume or --no-resume."),
        ("train --out a b", "train does not know what to do with b: --out takes one value, and has a."),
        ("doctor now", "doctor does not know what to do with now; for help: deltaproduct doctor --help"),
        ("lm", "lm needs a command: prepare, train, evaluate, generate, export, convert; for help: deltaproduct lm "
         "--help"),
        ("bench --quick ops", "--quick belongs behind a command: ops, scaling, generate, train; for help: "
         "deltaproduct bench --help"),
    ],
)  # fmt: skip
def test_one_line_names_what_was_meant(capsys, arguments, line):
    assert refused(capsys, *arguments.split()) == line


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("train --out @/a --task S5_only_swap", "S5_only_swaps"),
        ("train --out @/a --task s3", "Sn"),
        ("train --out @/a --mixer deltaprodct", "deltaproduct"),
        ("train --out @/a --backend chunkwize", "chunkwise"),
        ("train --out @/a --device gpu", "cpu"),
        ("reproduce table-chomski --list", "table-chomsky"),
        ("reproduce s3 --list --only n1-pos-sed0", "n1-pos-seed0"),
        ("lm train --out @/a --data @/b --preset tiney", "tiny"),
        ("compile --out @/a --group s5", "S5"),
        ("explain --group s3_X_z2", "S3_x_Z2"),
        ("bench ops --backends chunkwis --quick", "chunkwise"),
        ("bench ops --against textbook_lop --quick", "textbook_loop"),
        ("lm convert @ --to fla-perstep --out @/a", "fla-per-step"),
        ("reproduce s3 --out @/a --launcher slurm --launcher-options partitoin=gpu", "partition"),
    ],
)
def test_misspelt_values_are_answered_with_the_nearest(capsys, tmp_path, arguments, meant):
    line = refused(capsys, *arguments.replace("@", str(tmp_path)).split())
    assert f"did you mean '{meant}'" in line or f"nearest form is {meant}" in line
    assert not (tmp_path / "a").exists()


def test_values_that_begin_with_a_dash_are_still_values(capsys):
    assert "unknown task '-5'" in refused(capsys, "tasks", "show", "-5")
    status, _, _ = run(capsys, "tasks", "show", "S3", "--seed", "-5")
    assert status == 0


def test_the_nearest_name_does_not_mind_case_or_length():
    assert nearest("S4", ["s4", "s5"]) == ["s4"] and nearest("zzz", ["a"]) == []
    assert did_you_mean("stpes", ["steps", "seeds"]) == " (did you mean 'steps'?)"
    assert did_you_mean("ab", ["abc", "abd"], most=2) == " (did you mean 'abd' or 'abc'?)"
    assert nearest("x" * 10**6, ["x" * 150]) == ["x" * 150]  # at once, and not after minutes


# --- Lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["--lengths", "8,,16"], "8,16 may be meant"),
        (["--lengths", "8,"], "8 may be meant"),
        (["--lengths", ","], "has nothing beside it"),
        (["--lengths", "8 16"], "such as 8,16"),
        (["--lengths", "8", "16"], "such as --lengths 8,16"),
        (["--lengths", "8,", "16"], "8 may be meant"),
        (["--lengths", "8;16"], "such as 128,512"),
        (["--batch-sizes", "4,,"], "4 may be meant"),
        (["--stage-steps", ",5"], "5 may be meant"),
    ],
)
def test_lists_with_empty_parts_or_spaces_are_refused(capsys, tmp_path, arguments, right):
    line = refused(capsys, "train", "--out", tmp_path / "a", *arguments)
    assert right in line and not (tmp_path / "a").exists()


def test_every_list_flag_refuses_them(capsys):
    for arguments in (["evaluate", "r", "--lengths"], ["evaluate", "r", "--length-range"],
                      ["bench", "scaling", "--lengths"], ["bench", "ops", "--step", "--batches"],
                      ["reproduce", "s3", "--list", "--lengths"], ["reproduce", "s3", "--list", "--only"]):  # fmt: skip
        assert "a comma of '4,,8' has nothing beside it; 4,8 may be meant" in refused(capsys, *arguments, "4,,8")


@pytest.mark.parametrize("options", ["cluster=local,,cpus_per_task=2", "cluster=local,", ",cluster=local", "", " "])
def test_launcher_options_with_empty_parts_are_refused(capsys, options):
    line = refused(capsys, "reproduce", "s3", "--list", "--launcher-options", options)
    assert "NAME=VALUE,NAME=VALUE" in line


def test_one_batch_size_for_all_stages_is_what_help_says(capsys):
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0 and "a single number: the same in all" in " ".join(out.replace("│", " ").split())


# --- Values that mean nothing -----------------------------------------------------------------------------------------


ODD = ["10" * 20, "-" + "10" * 20, "nan", "inf", "-inf", "1e300", "1" * 5000, "", "\udcff", "\x1b[31m", "[/b]", "☃"]


def every_flag():
    from importlib import import_module

    from deltaproduct.cli.main import COMMANDS, Command
    from deltaproduct.cli.mistakes import flags_of

    for first, found in COMMANDS.items():
        commands = {first: found} if isinstance(found, Command) else found.commands
        for name, command in commands.items():
            full = name if name == first and commands.get(first) is found else f"{first} {name}"
            for flag in flags_of(getattr(import_module(f"deltaproduct.cli.{command.module}"), command.name)):
                yield full, flag


def test_numbers_that_nothing_can_hold_are_refused_by_every_flag(capsys):
    """Whatever else is missing: the first mistake is that value, so that nothing runs."""
    tried = 0
    for name, flag in every_flag():
        for odd in ODD:
            whole = odd.lstrip("-").isdecimal()
            wrong = {
                int: not whole or abs(int(odd[:40])) >= 2**63,
                float: not whole,
            }.get(flag.kind, False)
            strict = flag.choices or flag.parser is not None
            if odd if strict else wrong:
                tried += 1
                words = [odd] if flag.positional else [f"{flag.spelt}={odd}"]
                assert flag.spelt in refused(capsys, *name.split(), *words), (name, flag.spelt, odd)
    assert tried > 800


def test_a_name_of_a_file_or_folder_is_not_empty(capsys):
    """An empty one would be the current folder: a variable of the shell that was never set."""
    paths = 0
    for name, flag in every_flag():
        if flag.kind.__name__ == "Path":
            paths += 1
            line = refused(capsys, *name.split(), *([""] if flag.positional else [f"{flag.spelt}="]))
            assert line == f"{flag.spelt} must name a file or a folder, and is empty."
    assert paths > 20


def test_training_takes_finite_numbers_only():
    from deltaproduct.training import TrainConfig
    from deltaproduct.training.config import LanguageConfig

    for values in ({"clip": float("inf")}, {"weight_decay": float("inf")}, {"stage_loss": float("nan")},
                   {"clip": float("nan")}, {"stage_loss": float("inf")}):  # fmt: skip
        with pytest.raises(UsageError, match=next(iter(values))):
            TrainConfig(**values)
    with pytest.raises(UsageError, match="max_rise"):
        LanguageConfig(max_rise=float("inf"))
