"""SequenceModel's modules under transformers' interface: the weights have the same names in both.

B batch · T tokens · D hidden size · L layers · S packed sequences.
"""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from deltaproduct.errors import UsageError
from deltaproduct.models.hf.cache import DeltaProductCache, require_cache
from deltaproduct.models.hf.checkpoint import CheckpointedModel
from deltaproduct.models.hf.config import DeltaProductConfig
from deltaproduct.models.sequence_model import SequenceModel, check_layers, draw_with_deviation


class DeltaProductPreTrainedModel(CheckpointedModel):
    """What the model with and without a head have in common."""

    config_class = DeltaProductConfig
    supports_gradient_checkpointing = True
    _is_stateful = True  # `generate` then refuses assisted decoding by itself
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    parts: ClassVar[tuple[str, ...]] = ("embedding", "blocks", "norm")  # of SequenceModel

    def __init__(self, config: DeltaProductConfig):
        super().__init__(config)
        whole = SequenceModel(config.model_config())
        for name in self.parts:
            self.add_module(name, getattr(whole, name))
        self.gradient_checkpointing = False
        if not any(p.is_meta for p in self.parameters()):
            for module in self.modules():
                module._is_hf_initialized = True  # SequenceModel has drawn everything, each mixer in its own way
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a module's own parameters as SequenceModel does, but for those that a checkpoint has filled.

        transformers calls it where a checkpoint lacks weights, for resized embeddings, and from `post_init`,
        `init_weights` and `initialize_weights` of a model that was built on "meta" and has got memory by `to_empty`.
        """
        own = list(module.parameters(recurse=False))
        filled = [p for p in own if getattr(p, "_is_hf_initialized", False)]
        if len(filled) == len(own):
            return
        reset = getattr(module, "reset_parameters", None)
        if reset is None:  # a module that somebody else has added
            super()._init_weights(module)
            return
        values = [p.detach().clone() for p in filled]
        reset()
        draw_with_deviation(module, self.config)
        with torch.no_grad():
            for parameter, value in zip(filled, values, strict=True):
                parameter.copy_(value)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def transform(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: DeltaProductCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        cu_seqlens: Tensor | None,
    ) -> BaseModelOutputWithPast:
        """Embedding, blocks and norm; the arguments are those of `DeltaProductModel.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("Give either input_ids or inputs_embeds.")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = None if past_key_values is None else require_cache(past_key_values)
        mask = real_tokens(attention_mask, x, 0 if cache is None else cache.tokens_seen)
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)

        before = [None] * len(self.blocks) if cache is None or cache.state is None else cache.state
        check_layers(before, len(self.blocks))
        after, between = [], []
        for block, state in zip(self.blocks, before, strict=True):
            if keep_all:
                between.append(x)
            call = partial(block, cu_seqlens=cu_seqlens, mask=mask)
            if self.gradient_checkpointing and self.training:
                x, state = self._gradient_checkpointing_func(call, x, state)
            else:
                x, state = call(x, state)
            after.append(state)
        x = self.norm(x)

        if use_cache:
            cache = DeltaProductCache() if cache is None else cache
            cache.advance(tuple(after), x.shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*between, x) if keep_all else None,
        )


class DeltaProductModel(DeltaProductPreTrainedModel):
    """The model without its head: [B,T] tokens → [B,T,D]."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^head\.weight$"]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DeltaProductCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: [B,T] ints below vocab_size.
            attention_mask: [B,T], or [B, tokens that the cache has seen + T]: 0 where a token is padding, which may lie
                anywhere and leaves every state alone.
            past_key_values: what an earlier call returned; None starts afresh.
            inputs_embeds: [B,T,D] in place of input_ids.
            use_cache: return the state after the last token, in past_key_values itself if they are given; None: if they
                are given, or if the configuration says so and this is no training.
            output_hidden_states: return every block's input as well.
            cu_seqlens: [S+1] ints from 0 to T, B = 1: packed sequences. The cache is then of S sequences.
            kwargs: what transformers hands to every model; ignored.

        Returns:
            last_hidden_state [B,T,D]; past_key_values; hidden_states: L + 1 of [B,T,D], the last after the norm.

        Raises:
            UsageError: arguments contradict each other, or a mask or a cache is of another kind.
        """
        return self.transform(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states, cu_seqlens
        )


class DeltaProductForCausalLM(DeltaProductPreTrainedModel, GenerationMixin):
    """The language model: [B,T] tokens → logits [B,T,vocab_size] of the next ones, and their loss."""

    parts = (*DeltaProductPreTrainedModel.parts, "head")
    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "embedding.weight"}  # where the configuration ties

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DeltaProductCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens; the arguments that are not below are `DeltaProductModel.forward`'s.

        Args:
            labels: [B,T], input_ids once more: they are shifted here, and those of -100 do not count. Give -100 for
                padding, and for the first token of every packed sequence.
            logits_to_keep: compute the logits of that many last positions, 0 for all, or of these positions (a 1-D
                tensor of ints).
            num_logits_to_keep: the older name of logits_to_keep.
            kwargs: `num_items_in_batch`, by which the Trainer divides the loss; the rest is ignored.

        Returns:
            loss, the mean cross-entropy in nats, if there are labels; logits; past_key_values; hidden_states.

        Raises:
            UsageError: as there, or labels are given beside logits_to_keep.
        """
        keep = logits_to_keep if num_logits_to_keep is None else num_logits_to_keep
        if labels is not None and not (isinstance(keep, int) and keep == 0):
            raise UsageError(
                "A loss needs the logits of all positions: leave out logits_to_keep where there are labels."
            )
        done = self.transform(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states, cu_seqlens
        )
        x = done.last_hidden_state
        logits = self.head(x[:, -keep:] if isinstance(keep, int) else x[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=done.past_key_values, hidden_states=done.hidden_states
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` calls forward with.

        Raises:
            UsageError: a prompt is padded on the right, where its continuation would begin with the padding.
        """
        if is_first_iteration and attention_mask is not None:
            # A row of padding alone is the beginning of a prompt that is padded on the left and read in chunks.
            padded_right = (attention_mask[:, -1] == 0) & (attention_mask != 0).any(1)
            if bool(padded_right.any()):
                raise UsageError(
                    "generate goes on from the last column of the prompts, and the attention mask says that it is "
                    "padding in some of them: pad on the left (tokenizer.padding_side='left')."
                )
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache: a plain DynamicCache could not count this model's tokens


def real_tokens(attention_mask: Tensor | None, x: Tensor, tokens_seen: int) -> Tensor | None:
    """The part of a mask that is about x [B,T,D], as bools [B,T] that are True at real tokens; None if all are."""
    if attention_mask is None:
        return None
    batch, tokens = x.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape not in ((batch, tokens), (batch, tokens_seen + tokens)):
        raise UsageError(
            f"attention_mask must be [B,T] = {[batch, tokens]}, or with the {tokens_seen} tokens before them "
            f"{[batch, tokens_seen + tokens]}, not {list(attention_mask.shape)}."
        )
    mask = attention_mask[:, -tokens:].bool()
    if torch.compiler.is_compiling():  # a graph cannot depend on what the mask says
        return mask
    return None if bool(mask.all()) else mask
