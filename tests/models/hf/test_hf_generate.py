"""models.hf: generate from embeddings, and from a cache that has read some or all of the prompt."""

import pytest
import torch

from deltaproduct.errors import UsageError

pytest.importorskip("transformers", minversion="5.17")

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from deltaproduct.models.hf import DeltaProductCache, DeltaProductConfig

pytestmark = pytest.mark.neighbours

logging.set_verbosity_error()

VOCAB = 7
TINY = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "initializer_range": 0.5}  # fmt: skip
EACH = pytest.mark.parametrize("changed", [{}, {"mixer": ["deltaproduct", "attention"]}], ids=["", "hybrid"])
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def build(changed: dict | None = None):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(DeltaProductConfig(VOCAB, **(TINY | (changed or {})))).eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)), mask


@EACH
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_embeddings_give_the_text_of_their_tokens(changed, more):
    model, (given, mask) = build(changed), prompts()
    embedded, texts = model.get_input_embeddings()(given), []
    for prompt in ({"input_ids": given}, {"inputs_embeds": embedded}, {"inputs_embeds": embedded, "input_ids": given}):
        torch.manual_seed(3)
        texts.append(model.generate(**prompt, attention_mask=mask, **(GREEDY | more)))
    assert torch.equal(texts[0][:, 9:], texts[1])  # of embeddings alone, only what is new comes back
    assert torch.equal(texts[0], texts[2])


@EACH
def test_embeddings_that_are_no_tokens(changed):
    """A prefix of numbers, as prompt tuning learns it, by hand: step by step with the cache."""
    model = build(changed)
    prefix = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out, want = model(inputs_embeds=prefix), []
        for _ in range(6):
            want.append(out.logits[:, -1].argmax(-1))
            out = model(want[-1][:, None], past_key_values=out.past_key_values)
    got = model.generate(inputs_embeds=prefix, **GREEDY)
    assert torch.equal(got, torch.stack(want, 1)) and len(got.unique()) > 1


@EACH
@pytest.mark.parametrize("known", [1, 8])
def test_a_cache_of_a_part_of_the_prompt_goes_on(changed, known):
    model, (given, mask) = build(changed), prompts()
    want = model.generate(given, attention_mask=mask, **GREEDY)

    def cache() -> DeltaProductCache:
        with torch.no_grad():
            return model(given[:, :known], attention_mask=mask[:, :known], use_cache=True).past_key_values

    assert torch.equal(model.generate(given, attention_mask=mask, past_key_values=cache(), **GREEDY), want)
    rest = model.generate(given[:, known:], attention_mask=mask, past_key_values=cache(), **GREEDY)
    assert torch.equal(rest[:, 9 - known :], want[:, 9:])
    embedded = model.get_input_embeddings()(given)
    got = model.generate(inputs_embeds=embedded, attention_mask=mask, past_key_values=cache(), **GREEDY)
    assert torch.equal(got, want[:, 9:])


@pytest.mark.parametrize("seen", [9, 11])
@pytest.mark.parametrize("way", ["ids", "mask", "keyword", "embeddings", "chunks", "beams"])
def test_a_prompt_that_has_been_read_is_not_read_again(seen, way):
    model, (given, mask) = build(), prompts()
    text = torch.cat((given, given), 1)[:, :seen]
    with torch.no_grad():
        cache = model(text).past_key_values
    rows = {"past_key_values": cache}
    call = {
        "ids": lambda: model.generate(given, **rows, **GREEDY),
        "mask": lambda: model.generate(given, attention_mask=mask, **rows, **GREEDY),
        "keyword": lambda: model.generate(input_ids=given, **rows, **GREEDY),
        "embeddings": lambda: model.generate(inputs_embeds=model.embedding(given), **rows, **GREEDY),
        "chunks": lambda: model.generate(given, prefill_chunk_size=4, **rows, **GREEDY),
        "beams": lambda: model.generate(given, num_beams=2, **rows, **GREEDY),
    }[way]
    with pytest.raises(UsageError, match=f"already read {seen} tokens, and the prompt has 9") as error:
        call()
    assert "\n" not in str(error.value) and cache.tokens_seen == seen


def test_generating_with_positions_and_kinds_of_tokens():
    """As some tokenizers and callers give them."""
    model, (given, mask) = build(), prompts()
    want = model.generate(given, attention_mask=mask, **GREEDY)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    for more in ({"position_ids": place}, {"token_type_ids": torch.zeros_like(given)}, {"output_attentions": False}):
        assert torch.equal(model.generate(given, attention_mask=mask, **more, **GREEDY), want)
    with pytest.raises(UsageError, match="must all be 0"):
        model.generate(given, token_type_ids=torch.ones_like(given), **GREEDY)
    with pytest.raises(UsageError, match="no attention weights"):
        model.generate(given, output_attentions=True, return_dict_in_generate=True, **GREEDY)


def test_pages_of_keys_are_refused():
    """transformers catches what its loop over pages raises, and gives the prompts back as if they were answers."""
    model, (given, _) = build(), prompts()
    for call in (
        lambda: model.generate(given, cache_implementation="paged", max_new_tokens=3),
        lambda: model.generate_batch([[1, 2, 3]], max_new_tokens=3),
        lambda: model.init_continuous_batching(),
    ):
        with pytest.raises(UsageError, match="carries states") as error:
            call()
        assert "\n" not in str(error.value)
