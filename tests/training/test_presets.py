"""The papers' models have the papers' sizes."""

import pytest
import torch

from deltaproduct.errors import UsageError
from deltaproduct.models import SequenceModel
from deltaproduct.training.config import LanguageConfig
from deltaproduct.training.presets import PRESETS, get_preset, preset_config

# Millions of parameters as published (arXiv 2502.10297 and its code).
PUBLISHED = {
    ("213m", 1): 213.8, ("213m", 2): 214.2, ("213m", 3): 214.0,
    ("392m", 1): 392.2, ("392m", 2): 392.4, ("392m", 3): 392.5,
    ("805m", 1): 805.4, ("805m", 2): 806.4, ("805m", 3): 806.0,
    ("340m", 1): 341.6, ("340m", 2): 392.4, ("340m", 3): 443.2, ("340m", 4): 494.1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "steps"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(name, steps):
    with torch.device("meta"):
        model = SequenceModel(preset_config(name, steps))
    assert model.num_parameters == pytest.approx(PUBLISHED[name, steps] * 1e6, rel=2e-3)


def test_the_models_of_a_matched_preset_are_equally_large():
    for name in ("tiny", "213m", "392m", "805m"):
        with torch.device("meta"):
            sizes = [SequenceModel(preset_config(name, n)).num_parameters for n in PRESETS[name].sizes]
        assert max(sizes) / min(sizes) < 1.01, (name, sizes)


def test_every_preset_trains_as_the_papers_say_or_says_how():
    for name, preset in PRESETS.items():
        settings = LanguageConfig(**preset.training)
        if name != "tiny":
            assert settings.tokens_per_step == 524_288
            assert (settings.lr, settings.warmup_steps, settings.precision) == (3e-4, 512, "bfloat16")


def test_unknown_presets():
    with pytest.raises(UsageError, match="213m, 340m"):
        get_preset("7b")
    with pytest.raises(UsageError, match="num_householder 1, 2, 3, not 4"):
        preset_config("213m", 4)
