"""`deltaproduct verify`: a compiled model beside its automaton, on words of any length."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deltaproduct.cli.flags import BackendName
from deltaproduct.cli.outputs import say
from deltaproduct.errors import UsageError
from deltaproduct.training.folder_kinds import why_not

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
WRONG = 1  # the exit status where a label was


@dataclass(kw_only=True)
class Verify:
    """Compare every label of a compiled model with its automaton's state; exit status 1 if one is wrong."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="a folder that `compile` wrote")]
    length: Annotated[int, tyro.conf.arg(help="symbols in a word")] = 1_000_000
    words: Annotated[int, tyro.conf.arg(help="words; every second one avoids states that nothing leaves")] = 4
    seed: Annotated[int, tyro.conf.arg(help="of the words")] = 0
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    backend: BackendName = "auto"
    dtype: Annotated[Dtype, tyro.conf.arg(help="of weights and activations")] = "float32"
    json: Annotated[bool, tyro.conf.arg(help="print one JSON object and nothing else")] = False

    def run(self) -> None:
        import torch

        from deltaproduct.machine import choose_device
        from deltaproduct.theory.verification import guaranteed_length, load, verify

        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, not {self.seed}.")
        if wrong := why_not(self.source, "compiled model"):
            raise UsageError(wrong)
        compiled = load(self.source, choose_device(self.device))
        compiled.model.use_backend(self.backend).to(getattr(torch, self.dtype))
        found = verify(compiled, length=self.length, words=self.words, seed=self.seed)
        guaranteed = guaranteed_length(self.source, self.dtype)
        if self.json:
            print(json.dumps(asdict(found) | {"guaranteed": guaranteed}))
        elif found.wrong:
            total = found.words * found.length
            print(f"Wrong: {found.wrong:,} of {total:,} tokens, the first after {found.first_wrong:,} symbols.")
        else:
            margin = "there is one label only" if found.margin is None else f"smallest margin {found.margin:.3g}"
            print(f"Right on every token of {found.words} words of length {found.length:,}; {margin}.")
        if not self.json and guaranteed is not None:
            length = guaranteed if isinstance(guaranteed, str) else f"length {guaranteed:,}"
            say(f"Guaranteed by the certificate in {self.dtype}: every word, to {length}.")
        if found.wrong:
            raise SystemExit(WRONG)
