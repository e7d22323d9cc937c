"""How large a model is and what memory it takes, from its configuration alone: nothing as large as it is built.

All estimates are lower bounds in whole numbers. Sizes are of float32 unless something else is said.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from deltaproduct.errors import UsageError
from deltaproduct.memory import ENDLESS, check_memory
from deltaproduct.models.config import ModelConfig
from deltaproduct.models.weights import WEIGHTS, read_index

FLOAT = 4  # bytes
BLOCK = 8 << 10  # bytes of Python's objects for a block, whatever its size: the smallest has twice that
TRAINED = 4 * FLOAT  # of a parameter that is trained: itself, its gradient and AdamW's two moments
SIZES = "hidden_size, num_hidden_layers, intermediate_size, num_heads or head_dim"


def num_parameters(config: ModelConfig) -> int:
    """What `SequenceModel(config).num_parameters` is, without building more than one block of each kind, on "meta".

    2⁶⁰ where a tensor would have more numbers than PyTorch can count.

    Raises UsageError where the mixer cannot be built.
    """
    width, labels = config.hidden_size, config.num_labels
    total = config.vocab_size * width + width + (0 if config.tie_word_embeddings else labels * width)
    for layer, count in config.kinds_of_layers():
        total += count * _of_block(layer)
    return min(total, ENDLESS)


def _of_block(config: ModelConfig) -> int:
    from deltaproduct.models.sequence_model import Block  # which checks what it reads by this module

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return sum(p.numel() for p in Block(config).parameters())
    except UsageError:
        raise
    except (RuntimeError, OverflowError, TypeError, MemoryError):  # numbers that PyTorch cannot count
        return ENDLESS


def model_bytes(config: ModelConfig, *, per_parameter: int = FLOAT) -> int:
    """The memory of a model: its weights, or these with a gradient and moments, and Python's objects."""
    return num_parameters(config) * per_parameter + config.num_hidden_layers * BLOCK


def activation_bytes(config: ModelConfig, *, gradient_checkpointing: bool = False, per_float: int = FLOAT) -> int:
    """What a training step keeps of each token until its gradient is known: every block's input, what an MLP
    multiplies (gate, up and their product), and twice the logits in float32.

    Args:
        gradient_checkpointing: whether blocks keep nothing but their inputs.
        per_float: bytes of an activation; 2 under autocast to bfloat16.
    """
    of_mlps = 3 * sum(count * layer.mlp_size for layer, count in config.kinds_of_layers())
    inside = 0 if gradient_checkpointing else of_mlps
    return per_float * (config.num_hidden_layers * config.hidden_size + inside) + 2 * FLOAT * config.num_labels


def check_model(config: ModelConfig, device: Any = None) -> None:
    """`UsageError` if the weights alone cannot fit."""
    check_memory("The model", model_bytes(config), SIZES, device=device)


def check_training(
    config: ModelConfig,
    tokens: int,
    device: torch.device,
    *,
    advice: str,
    processes: int = 1,
    sharded: bool = False,
    gradient_checkpointing: bool = False,
    per_float: int = FLOAT,
) -> None:
    """`UsageError` if training cannot fit: the model with its optimiser, and what a step keeps of so many tokens.

    Args:
        advice: what to lower for fewer tokens.
        processes: that train the model; the tokens are those of one.
        sharded: whether the processes share the optimiser's numbers.
        gradient_checkpointing, per_float: as for `activation_bytes`.
    """
    if device.type != "cpu":
        check_model(config)  # it is built here first
    alone = model_bytes(config, per_parameter=max(FLOAT, TRAINED // processes) if sharded else TRAINED)
    check_memory("Training the model", alone, SIZES, device=device)
    step = tokens * activation_bytes(config, gradient_checkpointing=gradient_checkpointing, per_float=per_float)
    check_memory(f"A step of {tokens:,} tokens", alone + step, f"{advice}, or the model's sizes", device=device)


def check_stored(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: Any) -> None:
    """`UsageError` if a configuration describes more than the tensors of a checkpoint: before a module of it is built,
    since a module costs memory and time even where its weights take none.

    Args:
        shapes: of the tensors, by name.
        where: the checkpoint's place, for the message.
    """
    refused = f"The checkpoint {where} does not fit its configuration:"
    layers, wanted = config.num_hidden_layers, (config.vocab_size, config.hidden_size)
    if layers > len(shapes):
        raise UsageError(f"{refused} num_hidden_layers is {layers:,}, and there are only {len(shapes):,} tensors.")
    if (found := shapes.get("embedding.weight", wanted)) != wanted:
        raise UsageError(f"{refused} embedding.weight has shape {found} and should have {wanted}.")
    if num_parameters(config) >= ENDLESS:
        raise UsageError(f"{refused} it describes more than {ENDLESS:,} numbers.")


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the tensors in a folder's safetensors files, by name, from their headers alone; None where there
    are no such files, or they are damaged."""
    files = [folder / WEIGHTS]
    try:
        if not files[0].is_file():
            files = [folder / name for name in sorted(set(read_index(folder / f"{WEIGHTS}.index.json").values()))]
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safetensors.safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError):
        return None
    return shapes
