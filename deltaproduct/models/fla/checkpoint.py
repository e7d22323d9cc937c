"""Foreign checkpoints: flash-linear-attention's DeltaNet, Gated DeltaNet and Gated DeltaProduct, to ours and back.

A recurrent layer has been published in three layouts. *Fused*: `k_proj`, `v_proj` and `b_proj` hold all Householder
steps, with rows ordered (n h d), the step outermost, and so do the channels of `k_conv1d` and `v_conv1d`: our own
order. *Per step*: step j has its own `k_projs.j`, `v_projs.j`, `b_projs.j`, `k_conv1ds.j`, `v_conv1ds.j`, which are
slices of those rows. *0.2.1*: per step, and there are `q_conv1ds.j` as well, of which that code uses only the first;
reading drops the others, and writing copies the first into them. Everything else differs in names alone.

| release                                   | delta_net | gated_deltanet | gated_deltaproduct |
|-------------------------------------------|-----------|----------------|--------------------|
| 0.1, 0.1.1, 0.1.2                         | fused     | fused          | (not there)        |
| 0.2.0, 0.2.1, automl/DeltaProduct's copy  | fused     | fused          | 0.2.1              |
| 0.2.2                                     | fused     | fused          | per-step           |
| 0.3.0 to 0.6.0                            | fused     | fused          | fused              |

All of these are read, and each is written under its name (`--to fla`, `fla-per-step`, `fla-0.2.1`). Models of every
release were run on checkpoints of each kind, and their logits agree with those of the model read here.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.files import MANIFEST, read_folder, read_json, replaced_folder, whole_folder, write_json
from deltaproduct.layers import DeltaProduct
from deltaproduct.models.config import ModelConfig
from deltaproduct.models.fla.config import ARCHITECTURES, Layout, from_fla_config, to_fla_config
from deltaproduct.models.sequence_model import CONFIG, MODEL_TYPE, SequenceModel
from deltaproduct.models.weights import COMPUTED, KINDS, WEIGHTS, read_weights, write_tensors

__all__ = ["checkpoint_kind", "from_fla_config", "from_fla_state", "read_fla", "to_fla_config", "to_fla_state",
           "write_fla"]  # fmt: skip

_OUTER = {"embedding": "model.embeddings", "norm": "model.norm", "head": "lm_head"}
_INNER = {"mixer_norm": "attn_norm", "mixer": "attn", "mlp_norm": "mlp_norm", "mlp": "mlp"}
# How state dicts name what torch.compile and DistributedDataParallel wrap.
_WRAPPERS = ("_orig_mod.", "module.")
_STEPWISE = {"k_proj": "k_projs", "v_proj": "v_projs", "b_proj": "b_projs",
             "k_conv1d": "k_conv1ds", "v_conv1d": "v_conv1ds"}  # fmt: skip


def checkpoint_kind(folder: Path) -> str:
    """Whose layout it has, "ours" or "fla", going by the model type in config.json; `UsageError` for any other."""
    values = read_json(folder / CONFIG)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind == MODEL_TYPE:
        return "ours"
    if kind in tuple(ARCHITECTURES):
        return "fla"
    known = ", ".join((MODEL_TYPE, *ARCHITECTURES))
    raise UsageError(f"{folder / CONFIG} is of model type {kind!r}; known are {known}.")


def read_fla(folder: str | Path) -> SequenceModel:
    """Load a checkpoint of flash-linear-attention, of any layout, in evaluation mode.

    The weights may be in model.safetensors or pytorch_model.bin, whole or in shards with an index; pickles are read
    without running what they contain. They become float32 (float64 stays), which holds bfloat16 and float16 exactly.

    Raises:
        UsageError: a file is missing or damaged, the configuration is not one that our layers can compute, or the
            weights do not fit it.
    """
    folder = Path(folder)
    if (whole_folder(folder) / MANIFEST).is_file():  # it was written here, and can be checked
        return read_folder(folder, "checkpoint", lambda whole, _: _read_fla(whole))
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder, so there is no checkpoint to load.")
    return _read_fla(folder)


def _read_fla(folder: Path) -> SequenceModel:
    config = from_fla_config(read_json(folder / CONFIG))
    tensors = {name: _widened(name, x) for name, x in _unwrapped(read_weights(folder)).items()}
    model = _outline(config)
    model.load_state_dict(from_fla_state(tensors, config), assign=True)
    if config.tie_word_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def write_fla(model: SequenceModel, folder: str | Path, layout: Layout = "fused") -> None:
    """Write config.json and model.safetensors as flash-linear-attention has them, and manifest.json, replacing the
    folder in one step.

    Raises:
        UsageError: flash-linear-attention cannot hold this model, the model is no longer the one that its configuration
            describes, or the folder cannot be written.
    """
    config, tensors = model.as_saved()
    values = to_fla_config(config, layout)
    with replaced_folder(Path(folder)) as fresh:
        write_json(fresh / CONFIG, values)
        foreign = to_fla_state(tensors, config, layout)
        write_tensors(fresh / WEIGHTS, {name: x.contiguous() for name, x in foreign.items()})


def from_fla_state(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of `SequenceModel(config)` from one of flash-linear-attention's model, in any layout.

    Raises:
        UsageError: a tensor is missing, left over or of another shape than the configuration makes it.
    """
    layout = _layout(tensors)
    model, left = _outline(config), dict(tensors)
    state = {}
    for name, sources in _sources(model, layout).items():
        rows, *rest = model.state_dict()[name].shape
        wanted = (rows // len(sources), *rest)
        if name == "head.weight" and config.tie_word_embeddings and sources[0] not in left:
            continue  # safetensors files hold a shared tensor once
        for source in sources:
            if source not in left:
                raise UsageError(f"The checkpoint lacks {source}, which its configuration needs.")
            if (found := tuple(left[source].shape)) != wanted:
                raise UsageError(f"The checkpoint's {source} has shape {found}; its configuration makes it {wanted}.")
        parts = [left.pop(source) for source in sources]
        state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    for name, unused in _unused(model, layout).items():
        for source in unused:
            found = left.pop(source, state[name]).shape
            if found != state[name].shape:
                raise UsageError(f"The checkpoint's {source} has shape {tuple(found)}; its configuration makes it "
                                 f"{tuple(state[name].shape)}.")  # fmt: skip
    if left:
        raise UsageError(f"The checkpoint has {min(left)}, which its configuration has no place for.")
    if config.tie_word_embeddings:
        head = state.setdefault("head.weight", state["embedding.weight"])
        if not torch.equal(head, state["embedding.weight"]):
            raise UsageError("The checkpoint's lm_head.weight differs from the embeddings to which it should be tied.")
    return state


def to_fla_state(tensors: Mapping[str, Tensor], config: ModelConfig, layout: Layout = "fused") -> dict[str, Tensor]:
    """The inverse of `from_fla_state`: views of `tensors`, a state dict of `SequenceModel(config)`; no tied head.

    What a layout has and does not use (0.2.1: `q_conv1ds.1` and on) are copies of what it uses in their place.
    """
    state: dict[str, Tensor] = {}
    model = _outline(config)
    for name, sources in _sources(model, layout).items():
        if not (name == "head.weight" and config.tie_word_embeddings):
            state |= dict(zip(sources, tensors[name].chunk(len(sources)), strict=True))
    return state | {x: tensors[name].clone() for name, unused in _unused(model, layout).items() for x in unused}


def _outline(config: ModelConfig) -> SequenceModel:
    """The model without memory behind its tensors."""
    with torch.device("meta"):
        return SequenceModel(config)


def _layout(names: Collection[str]) -> Layout:
    """The layout that tensors of these names have; where two have the same names, either."""
    if any(".q_conv1ds." in name for name in names):
        return "0.2.1"
    return "per-step" if any(f".{part}." in name for name in names for part in _STEPWISE.values()) else "fused"


def _sources(model: SequenceModel, layout: Layout) -> dict[str, list[str]]:
    """For each of our tensors, the names of those whose rows, one after the other, it consists of."""
    sources = {}
    for name in model.state_dict():
        outer, _, inner = name.partition(".")
        if outer in _OUTER:
            sources[name] = [f"{_OUTER[outer]}.{inner}"]
            continue
        layer, part, field = inner.split(".", 2)
        stem = f"model.layers.{layer}.{_INNER[part]}"
        mixer = model.get_submodule(f"blocks.{layer}.mixer")
        module, _, parameter = field.partition(".")
        if layout != "fused" and part == "mixer" and isinstance(mixer, DeltaProduct) and module in _STEPWISE:
            steps = range(mixer.num_householder)
            sources[name] = [f"{stem}.{_STEPWISE[module]}.{j}.{parameter}" for j in steps]
        elif layout == "0.2.1" and module == "q_conv1d":
            sources[name] = [f"{stem}.q_conv1ds.0.{parameter}"]
        else:
            sources[name] = [f"{stem}.{field}"]
    return sources


def _unused(model: SequenceModel, layout: Layout) -> dict[str, list[str]]:
    """For some of our tensors, the names of those of the same shape that the layout has besides and never uses."""
    if layout != "0.2.1":
        return {}
    unused = {}
    for name, (source, *_) in _sources(model, layout).items():
        stem, is_first, parameter = source.partition(".q_conv1ds.0.")
        if is_first:
            mixer = cast(DeltaProduct, model.get_submodule(name.removesuffix(f".q_conv1d.{parameter}")))
            unused[name] = [f"{stem}.q_conv1ds.{j}.{parameter}" for j in range(1, mixer.num_householder)]
    return unused


def _unwrapped(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the prefixes that a wrapper puts before every name, as in what the paper's own code saves."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): x for name, x in tensors.items()})
    return tensors


def _widened(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in COMPUTED:  # numbers of 8 bits mean nothing without their scales
        what = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"The checkpoint's {name} is {what}; only floating-point tensors can be read, {KINDS}.")
    return x if x.dtype == torch.float64 else x.float()
