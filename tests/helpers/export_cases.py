"""Small models for tests of exporting, and whether a program is the model."""

import pytest
import torch

from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.export import DecodingStep

V = 11

STEPS = 40


def build(**changes) -> SequenceModel:
    """A model where state tracking is hard: β near 2, no decay unless asked for, keys that are much alike."""
    settings = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "intermediate_size": 16, "beta_bias_init": 5.0}
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig.build(vocab_size=V, num_labels=V, defaults=settings, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        model.embedding.weight[:] = model.embedding.weight[:1] + 0.3 * model.embedding.weight
    return model


@torch.no_grad()
def assert_program_is_the_model(run, model: SequenceModel, batch_size: int) -> None:
    """`run` goes on from its own state; the model reads all tokens in one pass, as it would without any step."""
    tokens = torch.randint(V, (batch_size, STEPS), generator=torch.Generator().manual_seed(2))
    want, _ = model(tokens)
    state, logits = DecodingStep(model).initial(batch_size), []
    for column in tokens.T:
        now, *state = run(column.contiguous(), *state)
        assert all(x.is_contiguous() for x in state)  # or compiled code would misread it
        logits.append(now)
    got = torch.stack(logits, 1)
    c = model.config
    bound = 1e-5 if c.num_hidden_layers == 1 else 8 * 2**-24 * c.num_hidden_layers * (c.hidden_size**0.5 + 3 * STEPS)
    assert got.shape == want.shape and (got - want).abs().max() <= bound * want.abs().max()
    assert want[:, -1].std() > 0.1 * want.std()  # the state has not died away, so that this compares something


def needed(to: str) -> None:
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
