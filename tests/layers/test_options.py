"""A mixer's options have one home, the record in its file: what is read without importing it is what is imported, the
constructor takes the same names and defaults, and what a mixer has not is refused."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, get_type_hints

import pytest
import torch

from deltaproduct.errors import UsageError
from deltaproduct.layers import MIXERS, DeltaNetOptions, LinearAttention, LinearAttentionOptions, MixerOptions, options
from deltaproduct.layers.options import declared, option, option_names
from deltaproduct.layers.parts import ACTIVATIONS
from deltaproduct.layers.registry import PLACES, get_mixer

EACH = pytest.mark.parametrize("name", MIXERS)


@EACH
def test_what_the_source_declares_is_what_is_imported(name):
    record = MIXERS[name].options
    hints = get_type_hints(record)
    assert [tuple(x) for x in declared(name)] == [
        (f.name, hints[f.name], f.default, f.metadata["help"]) for f in dataclasses.fields(record)
    ]
    assert record.name == name and record.__name__ == PLACES[name].options and declared(name)
    assert all(x.help and "\n" not in x.help for x in declared(name))


@EACH
def test_the_constructor_takes_what_the_record_has(name):
    """With the same defaults where it has any: a layer built by hand is the one that a configuration describes."""
    mixer, parameters = MIXERS[name], {}
    for base in mixer.__mro__[::-1]:
        if "__init__" in vars(base) and issubclass(base, MIXERS[name].__mro__[-4]):
            parameters |= inspect.signature(base.__init__).parameters
    for unlisted in ("self", "hidden_size", "options"):
        parameters.pop(unlisted, None)
    assert ("norm_eps" in parameters) == mixer.takes_norm_eps
    own = {x.name: x.default for x in declared(name)}
    fixed = set(mixer.fixed)
    assert set(parameters) - {"norm_eps"} - fixed == set(own) and not fixed & set(own)
    for key, default in own.items():
        if parameters[key].default is not inspect.Parameter.empty:
            assert parameters[key].default == default, key


@pytest.mark.slow("processes")
def test_options_are_read_without_pytorch():
    code = """
import sys
from deltaproduct.layers.options import declared
from deltaproduct.layers.registry import MIXERS
print(sum(len(declared(name)) for name in MIXERS), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(options.__file__).parents[2])  # fmt: skip
    count, imported = done.stdout.split()
    assert int(count) == sum(len(option_names(mixer.options)) for mixer in MIXERS.values()) and imported == "False"


def test_a_declaration_that_is_no_literal_is_a_mistake_of_ours(tmp_path):
    def read(line):
        source = tmp_path / f"{abs(hash(line))}.py"
        source.write_text(f"class A(MixerOptions):\n    name: ClassVar[str] = 'a'\n    {line}\nclass B(A):\n    pass\n")
        return options._declared_in(source)["B"]

    assert read("size: int | None = option(None, 'a size', at_least=1)")["size"][1:] == (int | None, None, "a size")
    for line in ("size: int = 4", "size: int = option(4)", "size: list = option([], 'sizes')"):
        with pytest.raises(TypeError, match="is not `name: kind = option"):
            read(line)
    with pytest.raises(ValueError, match="malformed"):
        read("size: int = option(print(), 'a size')")
    assert ast.parse(Path(options.__file__).read_text())  # and that file has no other reader


def test_names_of_choices_are_those_that_there_are():
    for record, name, known in (
        (DeltaNetOptions, "qkv_activation", ACTIVATIONS),
        (LinearAttentionOptions, "feature_map", inspect.getmodule(LinearAttention).FEATURE_MAPS),
    ):
        field = next(f for f in dataclasses.fields(record) if f.name == name)
        assert field.metadata["one_of"] == tuple(known)


@EACH
def test_impossible_values_are_refused_by_the_record(name):
    record = MIXERS[name].options
    for x in declared(name):
        wrong = "seven" if x.kind in (int, float, int | None, float | None) else 7
        with pytest.raises(UsageError, match=rf"^{x.name} must be"):
            record(**{x.name: wrong})
        if x.kind in (int, int | None):
            for value in (0, 2**28):
                with pytest.raises(UsageError, match=rf"^{x.name} must be (at least 1|below)"):
                    record(**{x.name: value})
    with pytest.raises(UsageError, match=rf"^The mixer {name} has no option 'nonsense'; there are"):
        record().changed(nonsense=1)


def test_a_record_builds_its_own_mixer_alone():
    with pytest.raises(UsageError, match="LinearAttention is built from LinearAttentionOptions, not DeltaNetOptions"):
        LinearAttention.from_options(12, DeltaNetOptions())
    torch.manual_seed(0)
    one = LinearAttentionOptions(num_heads=2, head_dim=4).build(12, 1e-3)
    torch.manual_seed(0)
    other = LinearAttention(12, 2, 4, norm_eps=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_somebody_elses_mixer_is_registered_under_its_own_name(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(LinearAttentionOptions):
        name: ClassVar[str] = "theirs"

        slope: float = option(1.5, "of nothing")

    class Theirs(LinearAttention):
        options: ClassVar[type[MixerOptions]] = Options

        def __init__(self, hidden_size: int, num_heads: int, head_dim: int, slope: float = 1.5, **others):
            super().__init__(hidden_size, num_heads, head_dim, **others)
            self.slope = slope

    monkeypatch.setitem(MIXERS, "theirs", Theirs)
    assert get_mixer("theirs") is Theirs and declared("theirs")[-1] == ("slope", float, 1.5, "of nothing")
    assert Options(slope=2.0).build(12).slope == 2.0
    with pytest.raises(UsageError, match="has the options of theirs; they have to be of lstm"):
        MIXERS["lstm"] = Theirs


@EACH
def test_what_is_said_of_a_mixer_goes_with_its_options(name):
    about, names = MIXERS[name].about, option_names(MIXERS[name].options)
    assert all(about) and not any("\n" in text for text in about)
    assert (about.negative_eigenvalues == "allow_neg_eigval") == ("allow_neg_eigval" in names)
    assert (about.negative_eigenvalues == "-") == about.recurrence.startswith("none: ")
    assert about.recurrence.startswith(("A = ", "none: "))
