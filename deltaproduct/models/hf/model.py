"""SequenceModel's modules under transformers' interface: the weights have the same names in both.

B batch · T tokens · D hidden size · L layers · S packed sequences.
"""

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from deltaproduct.errors import UsageError, did_you_mean
from deltaproduct.models import sequence_model
from deltaproduct.models.config import every_option
from deltaproduct.models.hf.arguments import check_other_arguments, packing_of, read_layout
from deltaproduct.models.hf.cache import DeltaProductCache, require_cache
from deltaproduct.models.hf.checkpoint import CheckpointedModel
from deltaproduct.models.hf.config import DeltaProductConfig
from deltaproduct.models.sequence_model import SequenceModel, draw_with_deviation


class Block(GradientCheckpointingLayer, sequence_model.Block):
    """SequenceModel's block, which transformers knows as a layer: it recomputes every layer or every nth, and wraps
    each by itself where a model is sharded."""


def _drawn(config: DeltaProductConfig) -> SequenceModel:
    """The modules with fresh weights."""
    whole = SequenceModel(config.model_config())
    for block in whole.blocks:
        block.__class__ = Block
    return whole


class DeltaProductPreTrainedModel(CheckpointedModel):
    """What the model with and without a head have in common."""

    config_class = DeltaProductConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # `generate` then refuses assisted decoding by itself
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    parts: ClassVar[tuple[str, ...]] = ("embedding", "blocks", "norm")  # of SequenceModel
    with_head: nn.Module | None = None  # the model whose parts these are

    def __init__(self, config: DeltaProductConfig, with_head: nn.Module | None = None, **unknown: Any):
        """with_head: a model that has the parts already; `UsageError` if anything else is given."""
        if unknown:
            name = min(unknown)
            near = did_you_mean(name, (*config.to_dict(), *every_option()))
            raise UsageError(
                f"{type(self).__name__} has no argument {name!r}{near}; fields of its configuration are given to "
                "DeltaProductConfig."
            )
        super().__init__(config)
        self.__dict__["with_head"] = with_head  # which is no module of this one
        whole = _drawn(config) if with_head is None else with_head
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


class DeltaProductModel(DeltaProductPreTrainedModel):
    """The model without its head: [B,T] tokens → [B,T,D]."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^head\.weight$"]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.parts and self.with_head is not None:
            setattr(self.with_head, name, value)

    def init_weights(self) -> None:
        """Draw the weights, unless they are another model's, which draws them itself."""
        if self.with_head is None:
            super().init_weights()

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
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Packed sequences, several in a row, are told apart by any of position_ids, seq_idx, cu_seqlens and cu_seq_lens_q
        and _k; those that are given have to agree. Each begins with an empty state, and the cache that is returned is
        then of S sequences, in the order of the rows.

        Args:
            input_ids: [B,T] ints below vocab_size.
            attention_mask: [B,T], or [B, tokens that the cache has seen + T]: 0 where a token is padding, which may lie
                anywhere and leaves every state alone, and 1 elsewhere.
            past_key_values: what an earlier call returned; None starts afresh.
            inputs_embeds: [B,T,D] in place of input_ids.
            use_cache: return the state after the last token, in past_key_values itself if they are given; None: if they
                are given, or if the configuration says so and this is no training.
            output_hidden_states: return every block's input as well.
            cu_seqlens: [S+1] ints from 0 to T, B = 1: packed sequences, which past_key_values of S sequences go before.
            position_ids: [B,T] or [1,T] ints. Where they do not increase, a packed sequence begins; nothing else about
                them matters, since the model counts by itself.
            seq_idx: [B,T] or [1,T] ints, the number of each token's packed sequence.
            cu_seq_lens_q, cu_seq_lens_k: transformers' names of cu_seqlens.
            max_length_q, max_length_k: the longest of those sequences, which this model does not need to know.
            token_type_ids: zeros, as some tokenizers give them.
            kwargs: what transformers hands to every model. It is ignored where it means nothing to this model, and
                refused where the answer would have to be another.

        Returns:
            last_hidden_state [B,T,D]; past_key_values; hidden_states: L + 1 of [B,T,D], the last after the norm.

        Raises:
            UsageError: arguments contradict each other, or a mask or a cache is of another kind, or an argument is one
                that this model does not know or cannot follow.
        """
        x = self._embedded(input_ids, inputs_embeds)
        cache = None if past_key_values is None else require_cache(past_key_values)
        seen = 0 if cache is None else cache.tokens_seen
        if kwargs.get("output_attentions") is None:
            kwargs["output_attentions"] = self.config.output_attentions
        called = self if self.with_head is None else self.with_head
        check_other_arguments(kwargs | {"token_type_ids": token_type_ids}, called.forward, seen)
        packing = packing_of(
            position_ids, seq_idx, cu_seqlens, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        )
        layout = read_layout(x, attention_mask, cache, packing)
        layers_of = tuple((type(block.mixer), block.mixer.state_size) for block in self.blocks)
        if cache is not None:
            cache.check(layout.sequences(len(x)), layers_of)
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)

        before = [None] * len(self.blocks) if cache is None or cache.state is None else cache.state
        after, between = [], []
        y, mask = layout.pack(x)
        for block, state in zip(self.blocks, before, strict=True):
            if keep_all:
                between.append(layout.unpack(y, x))
            y, state = block(y, state, cu_seqlens=layout.cu_seqlens, mask=mask)
            after.append(state)
        y = layout.unpack(self.norm(y), x)

        if use_cache:
            cache = DeltaProductCache() if cache is None else cache
            cache.advance(tuple(after), x.shape[1], layers_of)
        return BaseModelOutputWithPast(
            last_hidden_state=y,
            past_key_values=cache if use_cache else None,
            hidden_states=(*between, y) if keep_all else None,
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B,T,D], of either."""
        width = self.config.hidden_size
        if input_ids is None and inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
                raise UsageError(f"inputs_embeds must be [B,T,{width}], not {list(inputs_embeds.shape)}.")
            return inputs_embeds
        if input_ids is None or inputs_embeds is not None:
            raise UsageError("Give either input_ids or inputs_embeds.")
        if input_ids.dim() != 2:
            raise UsageError(f"input_ids must be [B,T], not {list(input_ids.shape)}.")
        return self.embedding(input_ids)


class DeltaProductForCausalLM(DeltaProductPreTrainedModel, GenerationMixin):
    """The language model: [B,T] tokens → logits [B,T,vocab_size] of the next ones, and their loss."""

    parts = (*DeltaProductPreTrainedModel.parts, "head")
    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "embedding.weight"}  # where the configuration ties

    @property
    def model(self) -> DeltaProductModel:
        """The model without its head, of the same modules: `base_model` and `get_decoder()`, and part of every call.

        It is no module of this one, so that weights keep SequenceModel's names. What replaces a part of one of the two
        replaces it in both.
        """
        base = self.__dict__.get("_without_head")
        if base is None or base.with_head is not self:  # a replica or a shallow copy has the other's
            base = DeltaProductModel(self.config, self)
            self.__dict__["_without_head"] = base
        for name in DeltaProductModel.parts:
            if base._modules[name] is not self._modules[name]:
                base._modules[name] = self._modules[name]
        if base.training != self.training:
            base.training = self.training
        return base

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":
            for part in DeltaProductModel.parts:
                setattr(self, part, getattr(value, part))
        else:
            super().__setattr__(name, value)

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
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens; the arguments that are not below are `DeltaProductModel.forward`'s.

        Args:
            labels: [B,T], input_ids once more: they are shifted here, and those of -100 do not count, nor does the
                first token of a packed sequence. Give -100 for padding.
            logits_to_keep: compute the logits of that many last positions, 0 for all, or of these positions (a 1-D
                tensor of ints).
            num_logits_to_keep: the older name of logits_to_keep.
            kwargs: `num_items_in_batch`, the labels of a whole step, by which the Trainer has the loss divided (less
                the share of them that begin packed sequences); `ignore_index` in place of -100; `shift_labels`, labels
                [B,T] that have been shifted already; the rest as there.

        Returns:
            loss, the mean cross-entropy in nats, if there are labels; logits; past_key_values; hidden_states.

        Raises:
            UsageError: as there, or labels are given beside logits_to_keep.
        """
        keep = logits_to_keep if num_logits_to_keep is None else num_logits_to_keep
        loss_options = {name: kwargs.pop(name) for name in ("ignore_index", "shift_labels") if name in kwargs}
        wanted = labels is not None or loss_options.get("shift_labels") is not None
        if wanted and not (isinstance(keep, int) and keep == 0):
            raise UsageError(
                "A loss needs the logits of all positions: leave out logits_to_keep where there are labels."
            )
        packing = packing_of(
            position_ids, seq_idx, cu_seqlens, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        )
        count, tokens = kwargs.get("num_items_in_batch"), input_ids if inputs_embeds is None else inputs_embeds
        for name, value in (("labels", labels), ("shift_labels", loss_options.get("shift_labels"))):
            if value is not None and tokens is not None and value.shape != tokens.shape[:2]:
                raise UsageError(f"{name} must be [B,T] = {list(tokens.shape[:2])}, not {list(value.shape)}.")
        if labels is not None:
            ignored, given = loss_options.get("ignore_index", -100), labels
            cache = None if past_key_values is None else require_cache(past_key_values)
            labels = read_layout(labels, attention_mask, cache, packing).without_borders(labels, ignored)
            if count is not None and labels is not given:
                # The count is of all calls of a step. The other calls are taken to have as many such borders.
                before, now = ((x[:, 1:] != ignored).sum() for x in (given, labels))
                count = count * torch.where(now > 0, now / before.clamp(min=1), 1)
        done = self.model(
            input_ids, attention_mask, past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            use_cache=use_cache, output_hidden_states=output_hidden_states, token_type_ids=token_type_ids,
            return_dict=True, **packing, **kwargs,
        )  # fmt: skip
        x = done.last_hidden_state
        logits = self.head(x[:, -keep:] if isinstance(keep, int) else x[:, keep])
        loss = None
        if wanted:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size,
                num_items_in_batch=count, **loss_options,
            )  # fmt: skip
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=done.past_key_values, hidden_states=done.hidden_states
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`.

        Raises:
            UsageError: past_key_values has read the whole prompt, or more, so that nothing is left to go on from; or
                the cache is asked for in pages.
        """
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(cache, DeltaProductCache) and cache.tokens_seen:
            prompts = (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
            length = next((x.shape[1] for x in prompts if x is not None), 1)  # 1: BOS alone
            # A mask that is longer is of the whole text, and the prompt of its new tokens.
            if cache.tokens_seen >= length and (mask is None or mask.shape[1] <= length):
                raise UsageError(
                    f"past_key_values has already read {cache.tokens_seen} tokens, and the prompt has {length}: give "
                    "the whole text, with at least one token that has not been read, or an attention_mask of the whole "
                    "text beside the new tokens."
                )
        if kwargs.get("cache_implementation") == "paged":
            self.init_continuous_batching()
        return super().generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused with a `UsageError`, for `generate_batch` and the server too: it keeps keys and values by pages."""
        raise UsageError(
            "Continuous batching keeps pages of keys and values, and this model carries states; call generate with a "
            "batch of prompts that are padded on the left."
        )

    generate_batch = init_continuous_batching

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
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
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache: a plain DynamicCache could not count this model's tokens
