"""States are the caller's: no tensor of one keeps more memory than its numbers take, or shares it with anything."""

from io import BytesIO
from itertools import chain

import pytest
import torch
from mixer_cases import CASES, build
from torch.utils._pytree import tree_leaves, tree_map

from deltaproduct.layers import MIXERS, Mixer
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.streaming import Stream

B, T, D = 3, 40, 12  # T is longer than the chunks of every mixer, so that their loops run more than once
WAYS = ("whole", "token", "nothing", "packed", "padded")


def tensors(state) -> list[torch.Tensor]:
    return [s for s in tree_leaves(state) if s is not None]


def storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def assert_owned(state, *others) -> None:
    """Every tensor has its storage to itself: `others` are states and tensors that it might share it with."""
    for s in tensors(state):
        assert s.untyped_storage().nbytes() == s.numel() * s.element_size()
    own = [storage(s) for s in tensors(state) if s.numel()]
    assert len(set(own)) == len(own)
    assert set(own).isdisjoint(storage(s) for s in chain.from_iterable(map(tensors, others)) if s.numel())


def arguments(way: str, x: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """x as this way of running takes it: three sequences in each of them, the second one without a token if ragged."""
    if way == "token":
        return x[:, :1].contiguous(), {}
    if way == "nothing":
        return x[:, :0].contiguous(), {}
    if way == "packed":
        return torch.cat((x[:1], x[1:2, :5]), 1), {"cu_seqlens": torch.tensor([0, T, T, T + 5])}
    if way == "padded":
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[1], mask[2, ::2] = False, False
        return x, {"mask": mask}
    return x, {}


@pytest.mark.parametrize(
    ("name", "options", "dtype", "backend"),
    [
        *((*case.values, torch.float32, "auto") for case in CASES),
        *((name, {}, dtype, "auto") for name in MIXERS for dtype in (torch.float64, torch.bfloat16)),
        *(
            ("deltaproduct", {"use_forget_gate": True}, torch.float32, backend)
            for backend in ("chunkwise", "reference")
        ),
    ],
    ids=str,
)
def test_a_state_has_its_storage_to_itself(name, options, dtype, backend):
    mixer: Mixer = build(name, options, dtype)
    mixer.backend = backend
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = list(mixer.parameters())
    assert_owned(mixer.init_state(B, dtype, "cpu"), weights)
    with torch.set_grad_enabled(dtype == torch.float64):  # some mixers take another way where there are gradients
        _, start = mixer(x[:, :6].contiguous())
        before = tree_map(lambda s: s.detach().clone(), tensors(start))
        for way in WAYS:
            given, how = arguments(way, x)
            _, fresh = mixer(given, **how)
            assert_owned(fresh, given, weights)
            y, end = mixer(given, start, **how)
            assert_owned(end, start, given, weights)
            # Whatever the caller does with the result, the state that it came from gives it once more.
            for s in tensors(end):
                s.detach().fill_(3)
            again, _ = mixer(given, start, **how)
            assert torch.equal(again, y)
            assert all(torch.equal(a, b) for a, b in zip(before, tensors(start), strict=True))


def test_a_cache_without_the_columns_of_other_rows_owns_what_is_left():
    mixer = build("attention", {}, torch.float32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 2:] = False
    _, state = mixer(torch.randn(2, 9, D), mask=mask)
    short = tree_map(lambda s: s[1:].clone(), state).trimmed()
    assert short.keys.shape[1] == 2
    assert_owned(short, state)


HYBRID = {"mixer": ["deltaproduct", "mamba", "attention"]}


def language_model() -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(
        ModelConfig.build(
            9, 9, hidden_size=16, num_heads=2, head_dim=8, intermediate_size=0, num_hidden_layers=3, **HYBRID
        )
    ).eval()


def saved_bytes(state) -> int:
    buffer = BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


@torch.no_grad()
def test_a_long_prompt_leaves_a_conversation_of_the_size_that_it_reports():
    model = language_model()
    stream = Stream(model)
    stream.prefill(torch.arange(4096) % 9)
    assert not stream.is_native  # where states are the mixers' own
    assert_owned(stream.state)
    needed = sum(s.numel() * s.element_size() for s in tensors(stream.state))
    assert needed == 4 * model.state_size_after(4096) + 8  # float32, and the length of the row in its cache
    # A file has some 300 bytes a tensor beside its numbers, and a few thousand altogether.
    assert needed <= saved_bytes(stream.state) <= needed + 10_000


@torch.no_grad()
def test_transformers_cache_is_of_the_size_that_it_reports():
    pytest.importorskip("transformers")
    from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

    ours = language_model().config.to_dict()
    model = DeltaProductForCausalLM(DeltaProductConfig(**ours)).eval()
    cache = model(torch.arange(2 * 1024).view(2, -1) % 9).past_key_values
    assert_owned(cache.state)
    assert cache.num_bytes <= saved_bytes(cache.state) <= cache.num_bytes + 10_000
    for change in (
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([True, False, False, True])),
        lambda: cache.batch_select_indices(torch.tensor([1])),
    ):
        before = cache.state
        change()
        assert_owned(cache.state, before)
