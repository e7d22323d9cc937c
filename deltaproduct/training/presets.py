"""Language models by name: the papers' (arXiv 2502.10297, section 5) and one that a laptop trains in minutes.

A preset says how large a model is and how it is trained. What it is trained on, and for how long, is the user's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.models import ModelConfig

PAPERS_VOCABULARY = 32_000  # of Mistral-7B's tokenizer


@dataclass(frozen=True)
class Preset:
    """Fields of `ModelConfig` and of `LanguageConfig`; those in `sizes` depend on the number of Householder steps."""

    summary: str
    sizes: Mapping[int, Mapping[str, Any]]
    model: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)


_PAPERS_MODEL = {
    "num_hidden_layers": 24,
    "head_dim": 128,
    "use_short_conv": True,
    "conv_size": 4,
    "allow_neg_eigval": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.006,
    "norm_eps": 1e-6,
}
# 128 windows of 4,096 tokens are the papers' 524,288 tokens a step; 36,240 such steps are 19 B tokens.
_PAPERS_TRAINING = {
    "context": 4096,
    "batch_size": 128,
    "lr": 3e-4,
    "min_lr_ratio": 0.1,
    "warmup_steps": 512,
    "beta2": 0.95,
    "weight_decay": 0.01,
    "clip": 1.0,
    "precision": "bfloat16",
}


def _widths(**by_steps: tuple[int, int]) -> dict[int, dict[str, int]]:
    """n1=(hidden_size, num_heads), …"""
    return {int(name[1:]): {"hidden_size": d, "num_heads": h} for name, (d, h) in by_steps.items()}


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "0.7 to 0.8 M parameters beside the embedding; falls below 2 nats a byte on a laptop within two minutes",
        _widths(n1=(128, 6), n2=(128, 4), n3=(128, 3)),
        {"num_hidden_layers": 4, "head_dim": 32, "tie_word_embeddings": True, "intermediate_size": 256},
        {"context": 256, "batch_size": 16, "steps": 300, "lr": 4e-3, "min_lr_ratio": 0.1, "warmup_steps": 30,
         "beta2": 0.95, "weight_decay": 0.01},
    ),
    "213m": Preset(
        "the papers' smallest, matched by the number of heads",
        _widths(n1=(768, 8), n2=(736, 6), n3=(768, 4)),
        _PAPERS_MODEL,
        _PAPERS_TRAINING | {"steps": 36_240},
    ),
    "340m": Preset(
        "the papers' earlier size: eight heads for every number of Householder steps, so that parameters grow with it",
        _widths(n1=(1024, 8), n2=(1024, 8), n3=(1024, 8), n4=(1024, 8)),
        _PAPERS_MODEL,
        _PAPERS_TRAINING | {"context": 2048, "batch_size": 256, "steps": 66_757},
    ),
    "392m": Preset(
        "the papers' middle size, matched by the number of heads",
        _widths(n1=(1024, 12), n2=(1024, 8), n3=(1024, 6)),
        _PAPERS_MODEL,
        _PAPERS_TRAINING | {"steps": 66_757},
    ),
    "805m": Preset(
        "the papers' largest, matched by the number of heads",
        _widths(n1=(1536, 16), n2=(1468, 12), n3=(1536, 8)),
        _PAPERS_MODEL,
        _PAPERS_TRAINING | {"steps": 104_904},
    ),
}  # fmt: skip


def get_preset(name: str) -> Preset:
    """`UsageError` if there is none of that name."""
    if name not in PRESETS:
        raise UsageError(f"There is no preset {name!r}{did_you_mean(name, PRESETS)}; choose from {', '.join(PRESETS)}.")
    return PRESETS[name]


def preset_model(name: str, num_householder: int = 2) -> dict[str, Any]:
    """The preset's fields of `ModelConfig` but the vocabulary; `UsageError` if it has no such num_householder."""
    preset = get_preset(name)
    if num_householder not in preset.sizes:
        known = ", ".join(map(str, preset.sizes))
        raise UsageError(f"The preset {name} is made for num_householder {known}, not {num_householder}.")
    return dict(preset.model) | {"num_householder": num_householder} | dict(preset.sizes[num_householder])


def preset_config(name: str, num_householder: int = 2, *, vocab_size: int = PAPERS_VOCABULARY) -> ModelConfig:
    """The preset's model for a vocabulary of that size."""
    return ModelConfig.build(vocab_size, vocab_size, **preset_model(name, num_householder))
