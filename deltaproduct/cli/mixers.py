"""`deltaproduct mixers`: which sequence mixers there are, and what one is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from deltaproduct.cli.outputs import say

if TYPE_CHECKING:
    from deltaproduct.layers import Mixer

HIDDEN_SIZE = 64  # D, where a state's size is told


@dataclass(kw_only=True)
class MixersList:
    """List the sequence mixers."""

    def run(self) -> None:
        from rich.console import Console
        from rich.table import Table

        from deltaproduct.layers import MIXERS

        table = Table()
        for column in ("name", "what it is", "state", "negative eigenvalues"):
            table.add_column(column, overflow="fold")
        for name, kind in MIXERS.items():
            about = kind.about
            table.add_row(name, about.summary, "grows" if _grows(_built(name)) else "fixed", about.negative_eigenvalues)
        Console().print(table)


@dataclass(kw_only=True)
class MixersShow:
    """Describe one mixer: its recurrence and its options."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="such as deltaproduct")]

    def run(self) -> None:
        from deltaproduct.layers import get_mixer
        from deltaproduct.layers.options import declared

        about, mixer = get_mixer(self.name).about, _built(self.name)
        say(f"{self.name}: {about.summary} ({about.paper})")
        row = about.recurrence
        say(f"H_t = A(x_t) H_{{t−1}} + B(x_t): {row}")
        say(f"negative eigenvalues: {about.negative_eigenvalues}")
        size = f"{mixer.state_size:,} floats"
        if _grows(mixer):
            size = f"grows by {mixer.state_size_after(2) - mixer.state_size_after(1):,} floats a token"
        say(f"state of a sequence with D = {HIDDEN_SIZE} and the defaults: {size}")
        say("")
        for name, kind, default, help in declared(self.name):
            shown = kind.__name__ if isinstance(kind, type) else str(kind)
            say(f"{name}: {shown} = {default!r}  {help}")


def _built(name: str) -> "Mixer":
    """A mixer with its defaults, without memory behind its weights."""
    import torch

    from deltaproduct.layers import get_mixer

    with torch.device("meta"):
        return get_mixer(name).options().build(HIDDEN_SIZE)


def _grows(mixer: "Mixer") -> bool:
    return mixer.state_size_after(1) != mixer.state_size
