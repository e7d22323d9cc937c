"""`deltaproduct lm convert`: a checkpoint of this library as one of flash-linear-attention, or the other way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from deltaproduct.cli.outputs import check_folder, say
from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.files import MANIFEST, read_whole, verified_folder

if TYPE_CHECKING:
    from deltaproduct.models.fla.config import Layout

NAMES = {"ours": "this library's", "fla": "flash-linear-attention's"}
LAYOUTS: dict[str, Layout] = {"fla": "fused", "fla-per-step": "per-step", "fla-0.2.1": "0.2.1"}
TARGETS = {
    "ours": "this library's layout",
    "fla": "flash-linear-attention 0.3.0 to 0.6.0 (its delta_net and gated_deltanet: 0.1 to 0.6.0)",
    "fla-per-step": "flash-linear-attention 0.2.2, with k_projs.0, k_projs.1, …",
    "fla-0.2.1": "flash-linear-attention 0.2.0 and 0.2.1 and the DeltaProduct paper's code, with q_conv1ds.0, … too",
}


@dataclass(kw_only=True)
class LmConvert:
    """Write a checkpoint of this library (or a run's) in flash-linear-attention's layout, or one of its own in ours.

    fla is the layout of its versions 0.3.0 to 0.6.0 (for delta_net and gated_deltanet: 0.1 to 0.6.0); fla-per-step that
    of 0.2.2, with `k_projs.0`, `k_projs.1`, …; fla-0.2.1 that of 0.2.0, 0.2.1 and the DeltaProduct paper's code, which
    also have `q_conv1ds.0`, `q_conv1ds.1`, … and use the first, so all are written alike. All are read.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="a checkpoint's folder, or a run's")]
    to: Annotated[str, tyro.conf.arg(help="what to write", metavar="{" + ",".join(TARGETS) + "}")]
    out: Annotated[Path, tyro.conf.arg(help="the folder to write: new, empty, or of an earlier conversion to the same")]

    def run(self) -> None:
        if self.to not in TARGETS:
            choices = ";\n".join(f"{name} ({what})" for name, what in TARGETS.items())
            raise UsageError(
                f"There is no layout {self.to!r}{did_you_mean(self.to, TARGETS)}; choose one for --to:\n{choices}."
            )
        from deltaproduct.models import SequenceModel
        from deltaproduct.models.fla.checkpoint import checkpoint_kind, read_fla, to_fla_config, write_fla
        from deltaproduct.models.fla.config import USES_NEG_EIGVAL
        from deltaproduct.training.run_folder import locate

        folder = locate(self.source, "any layout").checkpoint
        kind, wanted = read_whole(folder, checkpoint_kind), "ours" if self.to == "ours" else "fla"
        if kind == wanted == "ours":
            raise UsageError(f"{folder} is in this library's layout already.")
        check_replaceable(self.out, wanted)
        model = SequenceModel.from_pretrained(folder) if kind == "ours" else read_fla(folder)
        if wanted == "ours":
            model.save_pretrained(self.out)
        else:
            write_fla(model, self.out, LAYOUTS[self.to])
        config = model.config
        say(f"{folder} ({NAMES[kind]}) → {self.out} ({NAMES[wanted]})")
        print(f"layers: {config.num_hidden_layers}, width: {config.hidden_size:,}, vocabulary: {config.vocab_size:,}, "
              f"parameters: {model.num_parameters:,}")  # fmt: skip
        if wanted == "fla":
            written = to_fla_config(config, LAYOUTS[self.to])
            since = USES_NEG_EIGVAL.get(written["model_type"])
            if since and written["allow_neg_eigval"]:
                print(f"It has allow_neg_eigval. flash-linear-attention uses that in {written['model_type']} since "
                      f"version {since}; an older one will load this and compute something else.")  # fmt: skip
            if written["model_type"] == "gated_deltaproduct" and "num_v_heads" in written:
                print("Its value heads are grouped. flash-linear-attention 0.6.0 has that in its layer of this kind, "
                      "but its model does not hand num_v_heads on and will not load this.")  # fmt: skip


def check_replaceable(out: Path, kind: str) -> None:
    """`UsageError` unless `out` is missing, empty, or holds a checkpoint of this kind that was written here and nothing
    besides, so that replacing it loses nothing of the user's."""
    from deltaproduct.models.fla.checkpoint import checkpoint_kind

    check_folder(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; choose another folder.")
    found = {path.name for path in out.iterdir()}
    if not found:
        return
    if MANIFEST not in found or checkpoint_kind(out) != kind:
        raise UsageError(f"{out} is not empty, nor a checkpoint in {NAMES[kind]} layout that was written here; choose "
                         "another folder.")  # fmt: skip
    if others := found - {MANIFEST, *verified_folder(out, "checkpoint")}:
        raise UsageError(f"{out} also holds {min(others)}, which would be lost; choose another folder.")
