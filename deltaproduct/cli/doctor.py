"""`deltaproduct doctor`: what this machine can run, and why not."""

import importlib.util
import os
from dataclasses import dataclass

EXTRAS = {
    "plot": ("matplotlib", "plotly"),
    "formal": ("automata", "chess"),
    "lm": ("transformers", "tokenizers"),
    "eval": ("lm_eval", "accelerate"),
    "dist": ("ray", "submitit"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "gpu": ("triton",),
}


@dataclass(kw_only=True)
class Doctor:
    """Say what this machine is, which backends of the operator it can run, and which optional packages are here."""

    def run(self) -> None:
        import torch
        from rich.console import Console

        from deltaproduct.machine import choose_device, describe_machine
        from deltaproduct.ops import BACKENDS, resolve_backend
        from deltaproduct.ops.native.library import ENGINE, KERNELS_VARIABLE

        console = Console(highlight=False, soft_wrap=True)
        for name, value in describe_machine().items():
            shown = ", ".join(value) or "none" if isinstance(value, list) else value
            console.print(f"{name:>20}  {shown}", markup=False)
        device = choose_device("auto")
        console.print(f"\nbackends of the operator on {device.type}")
        for name, backend in BACKENDS.items():
            reason = backend.unsupported_reason(device, torch.float32)
            state = "yes" if reason is None else f"no: {reason}"
            console.print(f"{name:>20}  {state} ({backend.summary})", markup=False)
            if name == "cpu" and ENGINE is not None:
                why = f"{KERNELS_VARIABLE} names them" if os.environ.get(KERNELS_VARIABLE) else "the fastest here"
                runs = ", ".join(ENGINE.kernels_here())
                console.print(f"{'its kernels':>20}  {ENGINE.kernels} ({why}; {runs} run here)", markup=False)
        name, reason = resolve_backend(device=device)
        console.print(f"{'auto':>20}  {name} ({reason})", markup=False)
        console.print("\noptional packages, by extra")
        for extra, packages in EXTRAS.items():
            missing = [p for p in packages if importlib.util.find_spec(p) is None]
            advice = f"no: {', '.join(missing)} not installed; pip install 'deltaproduct[{extra}]'"
            console.print(f"{extra:>20}  {advice if missing else 'yes'}", markup=False)
