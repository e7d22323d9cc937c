"""`deltaproduct lm export`: one step of a model as a program that runs without this library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deltaproduct.cli.outputs import check_new_folder, say
from deltaproduct.errors import UsageError


@dataclass(kw_only=True)
class LmExport:
    """Write the step (tokens, state) → (logits, state) for any number of sequences at a time, with a description.

    The program is run beside the model, and only put in place if it gives the same.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="a run's folder, or a checkpoint's")]
    to: Annotated[Literal["onnx", "aotinductor"], tyro.conf.arg(help="for ONNX Runtime, or compiled for PyTorch")]
    out: Annotated[Path, tyro.conf.arg(help="the folder to write, which must not exist yet")]
    device: Annotated[str, tyro.conf.arg(help="what aotinductor compiles for: auto, cpu or cuda")] = "cpu"

    def run(self) -> None:
        if self.to == "onnx" and self.device != "cpu":
            raise UsageError("--device goes with --to aotinductor: an ONNX graph is for all devices.")
        check_new_folder(self.out)
        from deltaproduct.machine import choose_device
        from deltaproduct.models import SequenceModel
        from deltaproduct.models.export import export_step
        from deltaproduct.training.run_folder import locate

        model = SequenceModel.from_pretrained(locate(self.source).checkpoint, device=choose_device(self.device))
        description = export_step(model, self.out, self.to)
        checked = description["checked"]
        state = ", ".join(f"{entry['name']} {entry['shape']}" for entry in description["inputs"][1:])
        say(f"{self.source} → {self.out / description['file']}")
        say(f"state: {state.replace(chr(39), '')}")
        print(f"beside the model over {checked['steps']} steps: within {checked['largest_difference']:.1e} of it")
