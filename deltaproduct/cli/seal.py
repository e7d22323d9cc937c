"""`deltaproduct seal`: accept the files of a folder as they are now."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from deltaproduct.cli.outputs import say
from deltaproduct.files import reseal_folder


@dataclass(kw_only=True)
class Seal:
    """Accept what was changed in a checkpoint's folder on purpose: its files are checked by what they are now."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="a folder with a manifest.json")]

    def run(self) -> None:
        changed = reseal_folder(self.folder)
        say(f"{self.folder}: " + (f"sealed; new or changed: {', '.join(changed)}" if changed else "nothing changed"))
