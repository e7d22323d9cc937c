"""The model: embedding → blocks (pre-norm mixer, pre-norm MLP) → norm → head.

B batch · T tokens · D hidden size · S packed sequences.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaproduct.errors import UsageError
from deltaproduct.files import read_folder, read_json, replaced_folder, whole_folder, write_json
from deltaproduct.layers import Mixer
from deltaproduct.layers.initialization import draw_weights
from deltaproduct.layers.parts import RMSNorm, SwiGLU
from deltaproduct.layers.states import device_of
from deltaproduct.models.config import ModelConfig, own_values
from deltaproduct.models.folders import CONFIG, MODEL_TYPE, why_no_checkpoint
from deltaproduct.models.saving import check_is_its_configuration, own_class, without_sharing
from deltaproduct.models.size import check_stored
from deltaproduct.models.weights import WEIGHTS, check_weights, read_weights, write_tensors
from deltaproduct.ops import resolve_backend
from deltaproduct.ops.context_parallel import ContextParallel
from deltaproduct.ops.engine_program import EngineProgram

PIECE_TOKENS = 1 << 15  # of all sequences together, that go through a model at once where nobody says how many


def check_layers(state: Any, layers: int) -> None:
    """`UsageError` unless a model's state has a part for each of its layers."""
    if not isinstance(state, tuple | list) or len(state) != layers:
        what = f"of {len(state)} layers" if isinstance(state, tuple | list) else f"a {type(state).__name__}"
        raise UsageError(
            f"The state is {what} and this model has {layers}; give it the state that this model returned, or None."
        )


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) if there is an MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer: Mixer = config.mixer.build(config.hidden_size, config.norm_eps)
        self.mlp: SwiGLU | None = None
        if config.mlp_size:
            self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(
        self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens=cu_seqlens, mask=mask)
        x = x + y
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state

    def emit(self, program: EngineProgram, x: Tensor) -> Any:
        """Emit one token for native decoding, x [B,D] in place; returns the mixer's state (`Mixer.emit`)."""
        state = self.mixer.emit(program, self.mixer_norm.emit(program, x), onto=x)
        if self.mlp is not None:
            self.mlp.emit(program, self.mlp_norm.emit(program, x), onto=x)
        return state


def draw_with_deviation(module: nn.Module, config: Any) -> None:
    """Draw the weight of a linear map or an embedding with the deviation of a `ModelConfig` or what has its fields;
    without one, the former keeps what it has."""
    std, embedding_std = config.initializer_range, config.embedding_init_std
    if isinstance(module, nn.Linear) and std is not None:
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=embedding_std if embedding_std is not None else std or 1.0)


RECOMPUTE = "SequenceModel.recompute is now gradient_checkpointing; the old name goes with the next release."


class SequenceModel(nn.Module):
    """A stack of blocks that labels every position of a token sequence; `config` says of what."""

    gradient_checkpointing: bool = False  # blocks keep only their inputs for the backward pass and run again in it

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config.layer(i)) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self._initialise()

    @property
    def recompute(self) -> bool:
        """The name of earlier versions for `gradient_checkpointing`; it goes with the next release."""
        warnings.warn(RECOMPUTE, DeprecationWarning, stacklevel=2)
        return self.gradient_checkpointing

    @recompute.setter
    def recompute(self, value: bool) -> None:
        warnings.warn(RECOMPUTE, DeprecationWarning, stacklevel=2)
        self.gradient_checkpointing = value

    def init_weights(self) -> Self:
        """Draw all weights again as the constructor does: the same numbers from the same state of PyTorch's generator.

        A model that was built on "meta" has none until then: `model.to_empty(device=...).init_weights()`.

        Raises:
            UsageError: the model is still on "meta".
        """
        for child in self.children():
            draw_weights(child)
        self._initialise()
        return self

    def _initialise(self) -> None:
        """What differs from PyTorch's draws: the deviations of the configuration, and a head that is the embedding."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw_with_deviation(module, self.config)
        draw_with_deviation(self.embedding, self.config)
        if self.config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        state: tuple[Any, ...] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Label every position.

        Args:
            tokens: [B,T] ints below vocab_size.
            state: what an earlier call returned; None starts afresh.
            cu_seqlens: [S+1] ints from 0 to T, B = 1: packed sequences.
            mask: [B,T] bool, True = a real token.

        Returns:
            (logits [B,T,num_labels], state).
        """
        x, state = self.hidden(tokens, state, cu_seqlens=cu_seqlens, mask=mask)
        return self.head(x), state

    def hidden(
        self,
        tokens: Tensor,
        state: tuple[Any, ...] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """What the head would see: (x [B,T,D], state), with the arguments of `forward`. A loss that takes the head's
        weight beside it need never hold the logits of all positions."""
        if state is not None:
            check_layers(state, len(self.blocks))
        x = self.embedding(tokens)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        states = []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state[i]
            if again:
                x, after = checkpoint(block, x, before, cu_seqlens=cu_seqlens, mask=mask, use_reentrant=False)
            else:
                x, after = block(x, before, cu_seqlens=cu_seqlens, mask=mask)
            states.append(after)
        return self.norm(x), tuple(states)

    def run_in_pieces(
        self,
        tokens: Tensor | Iterable[Tensor],
        state: tuple[Any, ...] | None = None,
        *,
        piece: int | None = None,
        mask: Tensor | None = None,
        hidden: bool = False,
    ) -> "Iterator[Piece]":
        """Read a sequence in pieces, carrying the state: `run_in_pieces` below, with this model."""
        return run_in_pieces(self, tokens, state, piece=piece, mask=mask, hidden=hidden)

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding share their weight, whatever the configuration says."""
        weight = getattr(self.head, "weight", None)
        return weight is not None and weight is getattr(self.embedding, "weight", None)

    @property
    def state_size(self) -> int:
        """Floats of state carried per sequence."""
        return sum(mixer.state_size for mixer in self.mixers())

    def state_size_after(self, tokens: int) -> int:
        """The same after so many tokens: more where a layer keeps a cache of them."""
        return sum(mixer.state_size_after(tokens) for mixer in self.mixers())

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, a tied embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens (`device_of`): the embedding's device."""
        return device_of(self)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: the embedding's precision, float32 where it has no floating-point weights."""
        return next((p.dtype for p in self.embedding.parameters() if p.is_floating_point()), torch.float32)

    def use_backend(self, name: str) -> Self:
        """Choose the operator's backend for every layer; `UsageError` if it cannot serve this model's device."""
        resolve_backend(name, device=self.device, dtype=self.dtype)
        for mixer in self.mixers():
            mixer.backend = name
        return self

    def use_context_parallel(self, context_parallel: ContextParallel | None) -> Self:
        """Have each of several processes hold a span of every sequence, and run the same model on it.

        The model then takes the span's tokens and gives their logits; a state that it is given is the whole sequence's
        (`ops.context_parallel`).

        Raises:
            UsageError: a mixer cannot be divided that way.
        """
        for mixer in self.mixers():
            if context_parallel is not None and not mixer.divisible:
                raise UsageError(f"{type(mixer).__name__} cannot divide a sequence over processes; DeltaProduct can.")
            mixer.context_parallel = context_parallel
        return self

    def mixers(self) -> list[Mixer]:
        """The layers' mixers, in order."""
        return [module for module in self.modules() if isinstance(module, Mixer)]

    def write_files(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the configuration and the weights into a folder that someone else puts in place.

        weights: in place of the model's own, for one whose parameters lie on several processes.

        Raises:
            UsageError: as `save_pretrained`.
        """
        config, tensors = self.as_saved(weights)
        write_json(folder / CONFIG, {"model_type": MODEL_TYPE} | config.to_dict())
        write_tensors(folder / WEIGHTS, tensors)

    def as_saved(self, weights: Mapping[str, Tensor] | None = None) -> tuple[ModelConfig, dict[str, Tensor]]:
        """What a checkpoint of the model as it is now holds, on the CPU; of a tied head no weight of its own.

        weights, Raises: as `write_files`.
        """
        whole = self.state_dict() if weights is None else dict(weights)
        embedding, head = (whole.get(f"{name}.weight") for name in ("embedding", "head"))
        config = self._saved_config(embedding, head, gathered=weights is not None)
        if config.tie_word_embeddings and embedding is not None:
            whole["head.weight"] = embedding
        with torch.device("meta"):
            described = own_class(self)(config)
        check_is_its_configuration(self, described, whole)
        if config.tie_word_embeddings:
            del whole["head.weight"]
        return config, without_sharing(whole)

    def _saved_config(self, embedding: Tensor | None, head: Tensor | None, *, gathered: bool) -> ModelConfig:
        """The configuration, with the embedding and the head tied if they are, which may be otherwise than it says."""
        tied = self.is_tied
        if not tied and gathered and self.config.tie_word_embeddings:  # gathering may have made two tensors of one
            tied = head is None or (embedding is not None and torch.equal(embedding, head))
        if tied == self.config.tie_word_embeddings:
            return self.config
        return self.config.changed(tie_word_embeddings=tied)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and manifest.json (sizes and sha256), replacing the folder in one step.

        What is written is the model as it is: the configuration says that head and embedding are tied if they share
        their weight now, whatever it said when the model was built.

        Raises:
            UsageError: the folder cannot be written, or the model is no longer the one that its configuration describes
                (a part was replaced, resized, wrapped, quantised or given other options); the message says where. What
                was there before is untouched.
        """
        with replaced_folder(Path(folder)) as fresh:
            self.write_files(fresh)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Load what `save_pretrained` wrote, ours or that of `models.hf`, whole or in shards, in evaluation mode.

        Raises:
            UsageError: it is missing or corrupt, or weights and configuration do not belong together. Of a folder of
                another kind (a run's, flash-linear-attention's, an adapter's, …) the message says what loads it.
        """
        folder = Path(folder)
        try:
            return read_folder(folder, "checkpoint", cls.read_files).to(device).eval()
        except UsageError:
            if reason := why_no_checkpoint(whole_folder(folder)):
                raise UsageError(reason) from None
            raise

    @classmethod
    def read_files(cls, folder: Path, files: list[str]) -> Self:
        """The inverse of `write_files`, for a folder whose `files` have been verified; `UsageError` as there."""
        if CONFIG not in files:
            raise UsageError(f"The checkpoint {folder} has no {CONFIG}.")
        values = read_json(folder / CONFIG)
        kind = values.pop("model_type", None) if isinstance(values, dict) else None
        if kind != MODEL_TYPE:
            raise UsageError(f"The checkpoint {folder} is of model type {kind!r}, not {MODEL_TYPE!r}.")
        if "transformers_version" in values:  # models.hf wrote it, with entries of transformers' beside ours
            values = own_values(values)
        config = ModelConfig.from_dict(values)
        tensors = read_weights(folder, files, pickles=False)
        check_weights(tensors, folder)
        # Before a model of very many layers is built, which takes long.
        if (last := f"blocks.{config.num_hidden_layers - 1}.mixer_norm.weight") not in tensors:
            raise UsageError(f"The checkpoint {folder} does not fit its configuration: it has no {last}.")
        check_stored(config, {name: tuple(x.shape) for name, x in tensors.items()}, folder)
        with torch.device("meta"):
            model = cls(config)
        if config.tie_word_embeddings and "embedding.weight" in tensors:
            tensors["head.weight"] = tensors["embedding.weight"]
        expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        if expected != found:
            name = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
            raise UsageError(
                f"The checkpoint {folder} does not fit its configuration: {name} has shape {found.get(name, 'none')} "
                f"and should have {expected.get(name, 'none')}."
            )
        model.load_state_dict(tensors, assign=True)
        if config.tie_word_embeddings:
            model.head.weight = model.embedding.weight
        if len(kinds := {x.dtype for x in tensors.values()}) > 1:
            model._check_precisions(folder, kinds)
        return model

    @torch.no_grad()
    def _check_precisions(self, folder: Path, kinds: set[torch.dtype]) -> None:
        """`UsageError` unless the model computes with weights of several precisions, which depends on where they are:
        norms may be more precise than what multiplies, for instance."""
        try:
            self(torch.zeros(1, 1, dtype=torch.long))
        except RuntimeError as e:
            names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            raise UsageError(
                f"The weights in {folder} are of {names}, and not in a way that a model can compute with. Save it anew "
                "after model.to(one of them)."
            ) from e


class Piece(NamedTuple):
    """What a model has read of B sequences, t tokens at a time."""

    start: int  # the piece's first token
    x: Tensor  # [B,t,num_labels] logits, or [B,t,D] what the head would see
    state: Any  # after its last token


@torch.no_grad()
def run_in_pieces(
    model: nn.Module,
    tokens: Tensor | Iterable[Tensor],
    state: Any = None,
    *,
    piece: int | None = None,
    mask: Tensor | None = None,
    hidden: bool = False,
) -> Iterator[Piece]:
    """Read B sequences piece by piece, from the state that the piece before has left: T may be any length.

    Nothing is kept but the state, no gradient is followed, and the caller's autocast does not reach the model. The
    pieces together are what one call would give, but for rounding.

    Args:
        model: a `SequenceModel`, or whatever is called as one is.
        tokens: [B,T] ints, on any device; or the pieces [B,t] one after another, so that all of T need never be there.
        state: what an earlier call returned; None starts afresh.
        piece: tokens of each sequence at a time, where `tokens` is one tensor; None means as many as make
            `PIECE_TOKENS` of all sequences together.
        mask: [B,T] bool, True = a real token, for one tensor of tokens. At padding x means nothing and the state stays.
        hidden: give what the head would see in place of the logits, which are then never computed.

    Raises:
        UsageError: piece is below 1.
    """
    device = device_of(model)
    run: Any = model.hidden if hidden else model
    if isinstance(tokens, Tensor):
        size = max(1, PIECE_TOKENS // max(1, len(tokens))) if piece is None else piece
        if size < 1:
            raise UsageError(f"piece must be at least 1, not {piece}.")
        whole = tokens
        tokens = (whole[:, lo : lo + size] for lo in range(0, whole.shape[1], size))
    start = 0
    for part in tokens:
        stop = start + part.shape[1]
        real = None if mask is None or mask[:, start:stop].all() else mask[:, start:stop].to(device)
        with torch.autocast(device.type, enabled=False):
            x, state = run(part.to(device), state, **({} if real is None else {"mask": real}))
        yield Piece(start, x, state)
        start = stop


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and no gradients, for the time of a `with`; then every module has the mode again that
    it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(modes[model])
        for module, mode in modes.items():  # those that were in another mode than the model itself
            module.training = mode
