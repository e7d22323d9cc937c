"""Small language models, ours and transformers', for tests of what is saved."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from deltaproduct.models import ModelConfig, SequenceModel

V = 11

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8, "intermediate_size": 24}


def build(kind: str = "ours", **changes):
    torch.manual_seed(0)
    if kind == "ours":
        return SequenceModel(ModelConfig.build(V, V, defaults=SIZES, **changes)).eval()
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

    return DeltaProductForCausalLM(DeltaProductConfig(V, **(SIZES | changes))).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model(torch.tensor([[3, 1, 4, 1, 5]]))
    return found[0] if isinstance(found, tuple) else found.logits


def seal(folder: Path) -> None:
    """Write a manifest that agrees with the files, as someone would who edits a checkpoint on purpose."""
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.iterdir()
        if p.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
