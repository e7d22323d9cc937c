"""models.hf: what a call is given beside its tokens decides the answer, or is refused."""

from itertools import chain

import pytest
import torch
from torch.nn import functional as F

from deltaproduct.errors import UsageError

pytest.importorskip("transformers", minversion="5.17")

from transformers import DataCollatorWithFlattening
from transformers.utils import logging

from deltaproduct.models.hf import DeltaProductCache, DeltaProductConfig, DeltaProductForCausalLM

pytestmark = pytest.mark.neighbours

logging.set_verbosity_error()

VOCAB = 7
TINY = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "initializer_range": 0.5}  # fmt: skip
MIXERS = {
    "deltaproduct": {"use_forget_gate": True},
    "hybrid": {"mixer": ["deltaproduct", "attention"]},
    "lstm": {"mixer": "lstm"},
}
EACH = pytest.mark.parametrize("changed", MIXERS.values(), ids=MIXERS)
SAMPLES = [[1, 2, 3, 4, 5], [6], [0, 5, 5], [2, 2, 4, 1]]
LENGTHS = [len(sample) for sample in SAMPLES]
NEAR = 1e-4  # logits of size 1 to 10 in float32: what test_hf.py allows, and why


def build(changed: dict | None = None) -> DeltaProductForCausalLM:
    torch.manual_seed(0)
    return DeltaProductForCausalLM(DeltaProductConfig(VOCAB, **(TINY | (changed or {})))).eval()


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor([tokens])


def positions(lengths=LENGTHS, start: int = 0) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None] + start


def numbers(lengths=LENGTHS) -> torch.Tensor:
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int()


def refusal(match: str, call, *args, **kwargs) -> None:
    with pytest.raises(UsageError, match=match) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def alone(model, samples=SAMPLES) -> torch.Tensor:
    """The logits of every sample by itself, one after the other: [1,N,V]."""
    return torch.cat([model(ids(*sample)).logits for sample in samples], 1)


def loss_alone(model, samples=SAMPLES) -> torch.Tensor:
    """The mean over all tokens that have one before them in their own sample."""
    terms = [
        F.cross_entropy(model(ids(*s)).logits[0, :-1], torch.tensor(s[1:]).long(), reduction="none") for s in samples
    ]
    return torch.cat(terms).mean()


# Packed samples

WAYS = {
    "position_ids": {},
    "position_ids_from_2": {"position_ids_start": 2},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


@EACH
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@torch.no_grad()
def test_samples_of_the_flattening_collator_stay_apart(changed, way):
    model = build(changed)
    try:
        collator = DataCollatorWithFlattening(**way)
    except TypeError:
        pytest.skip("this transformers has no position_ids_start")
    batch = collator([{"input_ids": sample} for sample in SAMPLES])
    out = model(**batch, output_hidden_states=True)
    assert (out.logits - alone(model)).abs().max() <= NEAR
    assert torch.isclose(out.loss, loss_alone(model), rtol=1e-5)  # a mean of 9 in float32
    assert all(x.shape == (1, 13, 16) for x in out.hidden_states)
    assert out.past_key_values.batch_size == len(SAMPLES)
    together = model(batch["input_ids"], labels=batch["labels"]).loss
    assert (together - out.loss).abs() > 1e-2  # else this would not show that they are kept apart
    assert torch.equal(model.model(**{k: v for k, v in batch.items() if k != "labels"})[0], out.hidden_states[-1])


@torch.no_grad()
def test_no_loss_asks_how_the_next_sample_begins():
    """Labels without the collator's -100, which count the first tokens of samples."""
    model, given = build(), ids(*chain(*SAMPLES))
    want = loss_alone(model)
    ends = torch.tensor([0, 5, 6, 9, 13])
    for packing in ({"position_ids": positions()}, {"seq_idx": numbers()}, {"cu_seqlens": ends}):
        assert torch.isclose(model(given, labels=given, **packing).loss, want, rtol=1e-5)
        # As the Trainer counts: 12 labels of this call have a token before them, 9 in their own sample.
        for count in (torch.tensor(12), 12):
            assert torch.isclose(model(given, labels=given, num_items_in_batch=count, **packing).loss, want, rtol=1e-5)
        ones = model(given, labels=given, num_items_in_batch=3, seq_idx=torch.arange(13)[None]).loss
        assert ones == 0  # samples of one token each
        half = model(given, labels=given, num_items_in_batch=torch.tensor(24), **packing).loss
        assert torch.isclose(2 * half, want, rtol=1e-5)
    ignored = given.clone()
    ignored[0, :5] = 3
    renamed = model(given, labels=ignored, ignore_index=3, position_ids=positions()).loss
    minus = ignored.masked_fill(ignored == 3, -100)
    assert torch.isclose(renamed, model(given, labels=minus, position_ids=positions()).loss, rtol=1e-6)
    shifted = F.pad(given, (0, 1), value=-100)[:, 1:]
    shifted[0, [4, 5, 8]] = -100
    assert torch.isclose(model(given, shift_labels=shifted, position_ids=positions()).loss, want, rtol=1e-5)


@EACH
@torch.no_grad()
def test_rows_may_hold_several_samples_each_and_padding(changed):
    model = build(changed)
    rows = [[SAMPLES[0], SAMPLES[1]], [SAMPLES[2], SAMPLES[3]]]
    width = 10  # of 6 and 7 tokens: padding on both sides, and once between two samples
    given, mask = torch.full((2, width), 3), torch.zeros(2, width, dtype=torch.long)
    place, number = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for b, (row, gaps) in enumerate(zip(rows, ((1, 0), (0, 2)), strict=True)):
        column = 0
        for i, (sample, gap) in enumerate(zip(row, gaps, strict=True)):
            column += gap
            columns = slice(column, column + len(sample))
            given[b, columns], mask[b, columns] = torch.tensor(sample), 1
            place[b, columns], number[b, columns] = torch.arange(len(sample)), i
            column += len(sample)
    want = alone(model)[0]
    for packing in ({"position_ids": place}, {"seq_idx": number}, {"position_ids": place, "seq_idx": number}):
        out = model(given, attention_mask=mask, output_hidden_states=True, **packing)
        assert (out.logits[mask.bool()] - want).abs().max() <= NEAR
        assert out.hidden_states[0].shape == (2, width, 16)
        labels = given.masked_fill(mask == 0, -100)
        loss = model(given, attention_mask=mask, labels=labels, **packing).loss
        assert torch.isclose(loss, loss_alone(model), rtol=1e-5)
    both = torch.tensor([[1, 2, 3, 0, 1], [4, 4, 4, 6, 6]])
    out = model(both, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))  # one row for all
    assert (out.logits[:, 3:] - model(both[:, 3:]).logits).abs().max() <= NEAR
    assert out.past_key_values.batch_size == 4


def test_packed_samples_have_the_gradients_of_separate_ones():
    gradients = []
    for packed in (False, True):
        model = build().train()
        given = ids(*chain(*SAMPLES))
        if packed:
            model(given, labels=given, position_ids=positions()).loss.backward()
        else:
            loss_alone(model).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # Sums of some ten float32 terms in another order, through two norms that enlarge them.
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * gradients[0].abs().max()


@torch.no_grad()
def test_positions_that_only_count_change_nothing():
    model, given = build(MIXERS["hybrid"]), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1]])
    want, mask = model(given).logits, torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]])
    for place in (torch.arange(4)[None], torch.arange(4).expand(2, 4) + 5):
        assert torch.equal(model(given, position_ids=place).logits, want)
    padded = model(given, attention_mask=mask).logits
    # As generate counts them (padding has 0), and as columns.
    for place in ((mask.cumsum(1) - 1).clamp(min=0), torch.arange(4)[None]):
        assert torch.equal(model(given, attention_mask=mask, position_ids=place).logits, padded)
    cache = model(given[:, :2]).past_key_values
    rest = model(given[:, 2:], past_key_values=cache, position_ids=torch.tensor([[2, 3]])).logits
    assert (rest - want[:, 2:]).abs().max() <= NEAR
    # A row that is padding so far begins at 0 although the cache has seen its columns.
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache = model(given[:, :2], attention_mask=mask[:, :2]).past_key_values
    place = torch.tensor([[0, 1], [2, 3]])
    out = model(given[:, 2:], attention_mask=mask, past_key_values=cache, position_ids=place)
    assert (out.logits - model(given, attention_mask=mask).logits[:, 2:]).abs().max() <= NEAR


def test_what_contradicts_itself_is_refused():
    model, given = build(), ids(*chain(*SAMPLES))
    ends = torch.tensor([0, 5, 6, 9, 13])
    other = torch.tensor([0, 4, 6, 9, 13])
    refusal("cu_seqlens and cu_seq_lens_k differ", model, given, cu_seqlens=ends, cu_seq_lens_k=other)
    refusal("cu_seq_lens_q and cu_seq_lens_k differ", model, given, cu_seq_lens_q=ends, cu_seq_lens_k=ends + 3)
    refusal("max_length_q=4, but", model, given, cu_seq_lens_q=ends, max_length_q=4)
    refusal("column 4 of row 0", model, given, position_ids=positions(), cu_seqlens=other)
    refusal("seq_idx begins .* column 5 .* position_ids goes on", model, given, seq_idx=numbers(),
            position_ids=positions([13]))  # fmt: skip
    refusal(r"jump from 1 to 5 at column 2 of row 0", model, ids(1, 2, 3), position_ids=ids(0, 1, 5))
    refusal(r"position_ids must be \[B,T\]", model, given, position_ids=positions()[None])
    refusal(r"seq_idx must be \[B,T\]", model, given, seq_idx=numbers()[:, 1:])
    refusal("beside padding", model, given, cu_seqlens=ends, attention_mask=(torch.arange(13) > 2)[None].long())
    refusal("batch of 1", model, given.expand(2, -1), cu_seq_lens_q=ends)
    cache = model(ids(1, 2, 3)).past_key_values
    refusal("begin at 0, but", model, ids(4, 5), past_key_values=cache, position_ids=ids(0, 1))
    refusal("inside these tokens", model, ids(4, 5), past_key_values=cache, position_ids=ids(3, 0))
    refusal("begins at 0, but", model, ids(4, 5), past_key_values=cache, cache_position=torch.arange(2))
    assert cache.tokens_seen == 3
    assert model(ids(4, 5), past_key_values=cache, cache_position=torch.arange(3, 5)).logits.shape == (1, 2, VOCAB)


# Masks and caches


def test_masks_of_another_kind_are_refused():
    model, given = build(), ids(1, 2, 3, 4)
    for values in ([1, 1, 2, 2], [0.0, 0.0, -1e9, -1e9], [0.5, 1, 1, 1]):
        refusal("attention_mask must be 1 at tokens", model, given, attention_mask=torch.tensor([values]))
    for kind in (torch.bool, torch.float32, torch.int32):
        mask = torch.tensor([[0, 1, 1, 1]]).to(kind)
        assert torch.equal(model(given, attention_mask=mask).logits, model(given, attention_mask=mask.long()).logits)


def test_a_cache_of_other_sequences_or_another_model_is_refused():
    model = build()
    cache = model(torch.tensor([[1, 2], [3, 4]])).past_key_values
    refusal("hold 2 sequences, and the tokens are of 6", model, torch.zeros(6, 1).long(), past_key_values=cache)
    refusal("hold 2 sequences", model.generate, ids(1, 2, 3), past_key_values=cache, max_new_tokens=2)
    for changed in (MIXERS["lstm"], {"num_hidden_layers": 1}, {"head_dim": 4}):
        refusal(
            "model with other layers|of 2 layers and this model has 1",
            build(changed),
            torch.tensor([[1], [2]]),
            past_key_values=cache,
        )
    assert cache.tokens_seen == 2
    cache.batch_repeat_interleave(3)
    assert model(torch.zeros(6, 1).long(), past_key_values=cache).logits.shape == (6, 1, VOCAB)
    assert isinstance(cache, DeltaProductCache) and cache.tokens_seen == 3


# Arguments of other models


@torch.no_grad()
def test_arguments_that_mean_nothing_are_left_aside():
    model, given = build(), ids(1, 2, 3, 4)
    want = model(given).logits
    for harmless in (
        {"output_attentions": False}, {"output_attentions": None}, {"output_router_logits": False}, {"is_causal": True},
        {"num_items_in_batch": torch.tensor(3)}, {"token_type_ids": torch.zeros_like(given)}, {"head_mask": None},
        {"cache_position": torch.arange(4)}, {"return_dict": True}, {"max_length_q": 4}, {"pixel_values": None},
    ):  # fmt: skip
        assert torch.equal(model(given, **harmless).logits, want), harmless


def test_arguments_that_would_change_the_answer_are_refused():
    model, given = build(), ids(1, 2, 3, 4)
    for name, value, match in (
        ("output_attentions", True, "return no attention weights"),
        ("output_router_logits", True, "no experts"),
        ("is_causal", False, "cannot look ahead"),
        ("token_type_ids", torch.ones_like(given), "must all be 0"),
        ("head_mask", torch.ones(2, 2), "no argument 'head_mask'"),
        ("encoder_hidden_states", torch.ones(1, 2, 16), "no argument 'encoder_hidden_states'"),
        ("atention_mask", torch.ones_like(given), "did you mean 'attention_mask'"),
        ("position_id", torch.ones_like(given), "did you mean 'position_ids'"),
        ("is_casual", False, "did you mean 'is_causal'"),
    ):
        refusal(match, model, given, **{name: value})
        refusal(match, model.model, given, **{name: value})
    refusal("no argument 'labels'", type(model.model)(model.config), given, labels=given)
    refusal("no argument 'lables' .did you mean 'labels'", model, given, lables=given)
    model.config.output_attentions = True
    refusal("no attention weights", model, given)


def test_shapes_are_checked():
    model, given = build(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    refusal(r"input_ids must be \[B,T\], not \[3\]", model, given[0])
    refusal(r"inputs_embeds must be \[B,T,16\], not \[2, 3, 5\]", model, inputs_embeds=torch.zeros(2, 3, 5))
    for labels in (given[:1], given[:, :2], given[None]):
        refusal(r"labels must be \[B,T\] = \[2, 3\]", model, given, labels=labels)
        refusal(r"shift_labels must be \[B,T\] = \[2, 3\]", model, given, shift_labels=labels)
