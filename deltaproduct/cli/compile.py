"""`deltaproduct compile`: from a group, a regular expression or an automaton to a checkpoint with exact weights."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from deltaproduct.cli.outputs import check_new_folder, say
from deltaproduct.errors import UsageError
from deltaproduct.tasks.automata import Automaton
from deltaproduct.tasks.automaton_format import JSON_EXAMPLE
from deltaproduct.tasks.dot import DOT_EXAMPLE

if TYPE_CHECKING:
    from deltaproduct.theory.certificate import Certificate
    from deltaproduct.theory.compiler import Compiled
    from deltaproduct.theory.verification import Verification

CHECKED = {"words": 8, "length": 1000}
Strategy = Literal["auto", "permutation", "rotation", "two-layer", "cascade", "shallow"]


@dataclass(kw_only=True)
class Compile:
    """Write a checkpoint that follows a group or an automaton exactly, with automaton.json beside the weights.

    Its label at each position is the state after that symbol. Give one of --group, --regex, --automaton and --from-run.
    """

    out: Annotated[Path, tyro.conf.arg(help="the folder to write, which must not exist yet")]
    group: Annotated[str | None, tyro.conf.arg(help="such as S5, A5, Z60, D12, S3_x_Z2: one layer")] = None
    regex: Annotated[str | None, tyro.conf.arg(help="symbols are single characters: '(ab)*', '[ab]{2,4}c'")] = None
    alphabet: Annotated[str | None, tyro.conf.arg(help="all symbols, as in abc; None: the expression's own")] = None
    automaton: Annotated[Path | None, tyro.conf.arg(help=f"a file in JSON, such as {JSON_EXAMPLE}, or in "
                                                         f"Graphviz DOT, such as {DOT_EXAMPLE}")] = None  # fmt: skip
    from_run: Annotated[Path | None, tyro.conf.arg(help="a trained run: the automaton that `extract` finds")] = None
    strategy: Annotated[Strategy, tyro.conf.arg(help="the construction; auto: the fewest layers")] = "auto"
    monoid: Annotated[bool, tyro.conf.arg(help="follow what a word does to all states, not only to one")] = False
    num_householder: Annotated[int | None, tyro.conf.arg(help="at most, per token")] = None
    max_layers: Annotated[int | None, tyro.conf.arg(help="at most")] = None
    max_states: Annotated[int | None, tyro.conf.arg(help="at most")] = None
    max_width: Annotated[int | None, tyro.conf.arg(help="at most, of the residual stream")] = 16_384

    def run(self) -> None:
        given = [name for name in ("group", "regex", "automaton", "from_run") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"Give one of --group, --regex, --automaton and --from-run, not {' and '.join(given) or 'none'}."
            )
        if self.alphabet is not None and given != ["regex"]:
            raise UsageError("--alphabet goes with --regex.")
        check_new_folder(self.out)
        import torch

        from deltaproduct.theory.certificate import certificates
        from deltaproduct.theory.verification import verify

        compiled = self._compiled()
        model, automaton = compiled.model, compiled.automaton
        found = certificates(model, automaton)
        held = [
            verify(replace(compiled, model=copy.deepcopy(model).to(getattr(torch, certificate.dtype))), **CHECKED)
            for certificate in found
        ]
        if found[0].wrong or held[0].wrong:  # never seen; but a checkpoint that is called exact must be
            raise UsageError(
                f"The compiled model has {found[0].wrong + held[0].wrong} wrong labels; nothing was written."
            )
        check_new_folder(self.out)  # another process may have made it meanwhile
        compiled.save(
            self.out,
            {
                "strategy": compiled.strategy,
                "certificates": [asdict(certificate) for certificate in found],
                "held": [{"dtype": c.dtype} | asdict(v) for c, v in zip(found, held, strict=True)],
            },
        )
        config = model.config
        say(f"{_count(len(automaton.states), 'state')}, {_count(len(automaton.alphabet), 'symbol')} → {self.out}")
        print(f"strategy: {compiled.strategy}, layers: {config.num_hidden_layers}, Householder factors per token: "
              f"{max(options.num_householder for options in config.mixers)}, width: {config.hidden_size:,}, "
              f"parameters: {model.num_parameters:,}")  # fmt: skip
        shared = found[0].tried > found[0].situations * len(automaton.alphabet)
        print(f"tried: {_count(found[0].tried, 'symbol')} in {_count(found[0].situations, 'situation')}, which are "
              f"{'all' if found[0].complete else 'not all'} that there are"
              f"{', from every state that shares one' if shared else ''}; no label was wrong")  # fmt: skip
        for certificate, words in zip(found, held, strict=True):
            print(_format_certificate(certificate, words))

    def _compiled(self) -> Compiled:
        from deltaproduct.theory.compiler import compile_automaton, compile_group
        from deltaproduct.theory.limits import Limits

        limits = Limits(self.max_states, self.max_layers, self.num_householder, self.max_width)
        if self.group is not None and not self.monoid:
            return compile_group(self.group, self.strategy, limits)
        automaton = self._automaton()
        return compile_automaton(automaton.of_monoid() if self.monoid else automaton, self.strategy, limits)

    def _automaton(self) -> Automaton:
        if self.group is not None:
            raise UsageError("--monoid goes with --regex or --automaton: a word problem is one already.")
        if self.regex is not None:
            from deltaproduct.tasks.regex_automaton import from_regex

            return from_regex(self.regex, self.alphabet)
        if self.from_run is not None:
            from deltaproduct.analysis import extract
            from deltaproduct.cli.extract import trained

            found = extract(*trained(self.from_run))
            say(f"extracted from {self.from_run}: {len(found.automaton.states):,} states, agreement "
                  f"{found.agreement:.4f} on {found.words} words of length {found.length}")  # fmt: skip
            return found.automaton
        from deltaproduct.tasks.automaton_task import read_automaton

        assert self.automaton is not None
        given = read_automaton(self.automaton)
        # Without a difference to make between states, all of them are what is to be followed.
        meant = 0 < len(given.accepting) < len(given.states)
        return given.minimal() if meant else given.reachable()


def _format_certificate(certificate: Certificate, held: Verification) -> str:
    guaranteed = f"guaranteed to length {certificate.guaranteed:,}" if certificate.guaranteed else "nothing guaranteed"
    if certificate.guaranteed is None:
        guaranteed = "guaranteed to every length"
    margin = "one label only" if certificate.margin is None else f"margin {certificate.margin:.3g}"
    practice = "all right" if not held.wrong else f"the first wrong label after {held.first_wrong:,} symbols"
    return (
        f"{certificate.dtype}: {guaranteed} ({margin}, drift at most {certificate.drift:.2g} a token); in practice, "
        f"{held.words} words of length {held.length:,}: {practice}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
