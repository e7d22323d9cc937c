"""Token by token: a whole model in one call of the native engine per token, or by calling the model.

B sequences · V size of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from deltaproduct.errors import UsageError
from deltaproduct.layers import Mixer
from deltaproduct.layers.parts import emit_linear
from deltaproduct.layers.plain import Watch, first_unusual
from deltaproduct.models.sequence_model import Block, SequenceModel
from deltaproduct.models.states import check_state
from deltaproduct.ops.engine_program import EngineProgram


class NotDecodable(UsageError):
    """The native decoder cannot compute what this model computes; calling the model token by token always can."""


class Decoder:
    """Labels one token after the other of `batch_size` sequences, carrying their state itself.

    What it computes is `model(tokens, state)` with one token, without gradients, in little more time than it takes to
    read the weights. It never calls the model's modules: it reads their weights, where the model has them, so that new
    values show at once. Every token begins with a look at whether the modules are still the same; where some were
    replaced, moved, wrapped or given other options, the decoder reads the model anew and keeps its state.

    Raises:
        NotDecodable: (a `UsageError`) there is no native engine, the model is not float32 on the CPU, or a module of
            it computes something else than its weights say: an adapter, a hook, a parametrization, a quantised or
            replaced module, a mixer without `emit`. The message names it. A call raises this too, if the model has
            become such a one; the state is then as it was before the call.
    """

    def __init__(self, model: SequenceModel, batch_size: int = 1):
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}.")
        self.batch_size = batch_size
        self._model = model
        self._read_model()

    def _read_model(self, carried: tuple[Any, ...] | None = None) -> None:
        """Read the model, and go on from a state; before this has succeeded, nothing of an earlier reading changes."""
        model = self._model
        try:
            program = EngineProgram(self.batch_size)
        except UsageError as e:
            raise NotDecodable(str(e)) from None
        if reason := unsupported_reason(model):
            raise NotDecodable(
                f"The native decoder reads weights and calls no module, so that it cannot serve this model: {reason}. "
                "Call the model token by token."
            )
        try:
            x = program.buffer(self.batch_size, model.embedding.embedding_dim)
            states = tuple(block.emit(program, x) for block in model.blocks if isinstance(block, Block))
            logits = emit_linear(program, model.head, model.norm.emit(program, x))
        except (UsageError, AttributeError, RuntimeError, ValueError) as e:  # the others: a module of another kind
            raise NotDecodable(str(e)) from e
        check_state(model, carried, self.batch_size)
        _copy(carried, states)
        self.vocab_size = model.embedding.num_embeddings
        self._embedding = model.embedding.weight.detach()
        self._program, self._x, self._states, self._logits = program, x, states, logits
        self._watch = Watch(model, model.parameters())

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits [B,num_labels] after one more token of each sequence, tokens [B]."""
        if tokens.shape != (self.batch_size,) or tokens.dtype not in (torch.int32, torch.int64):
            raise UsageError(f"tokens must be {self.batch_size} ints, not {tokens.dtype} {list(tokens.shape)}.")
        if self._watch.changed():
            self._read_model(self._states)
        torch.index_select(self._embedding, 0, tokens, out=self._x)
        self._program.run()
        return self._logits.clone()

    @property
    def state(self) -> tuple[Any, ...]:
        """A copy of the carried state, as `SequenceModel` takes and returns it."""
        return tuple(type(s)(*(None if x is None else x.clone() for x in s)) for s in self._states)

    def load(self, state: tuple[Any, ...] | None) -> None:
        """Go on from such a state, of B sequences; None starts afresh.

        Raises:
            UsageError: it is not a state of this model and of B sequences; the carried one is then as it was.
        """
        if self._watch.changed():
            self._read_model()
        check_state(self._model, state, self.batch_size)
        _copy(state, self._states)


class ModelDecoder:
    """What `Decoder` does for one sequence, by calling the model: for every mixer, device and precision."""

    def __init__(self, model: SequenceModel):
        self.state: tuple[Any, ...] | None = None
        self._model = model

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits [1,V] after one more token, tokens [1]."""
        logits, self.state = self._model(tokens[:, None].to(self._model.device), self.state)
        return logits[:, 0]

    def load(self, state: tuple[Any, ...] | None) -> None:
        """Go on from such a state; None starts afresh."""
        device = self._model.device
        self.state = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, state)


def decoder_for(model: SequenceModel) -> Decoder | ModelDecoder:
    """The native decoder where it can serve and no other backend was asked for, and otherwise the model itself."""
    if any(mixer.backend not in ("auto", "cpu") for mixer in model.mixers()):
        return ModelDecoder(model)
    try:
        return Decoder(model)
    except NotDecodable:
        return ModelDecoder(model)


@torch.no_grad()
def _copy(state: tuple[Any, ...] | None, into: tuple[Any, ...]) -> None:
    for i, own in enumerate(into):
        given = None if state is None else state[i]
        for j, x in enumerate(own):
            if x is not None:
                x.zero_() if given is None else x.copy_(given[j])


def unsupported_reason(model: SequenceModel) -> str | None:
    """Why the weights of a model do not say all that it computes, or not to the native engine; None if they do."""
    for name, module in model.named_modules():
        if isinstance(module, Mixer) and type(module).emit is Mixer.emit:
            return f"{name} ({type(module).__name__}) has no native decoding"
        if isinstance(module, Mixer) and module.context_parallel is not None:
            return f"{name} has a sequence divided over processes"
    if reason := first_unusual(model, owner=SequenceModel):
        return reason
    for name, x in model.named_parameters():
        if reason := _tensor_reason(x):
            return f"{name} is {reason}, and the engine takes contiguous float32 on the CPU"
    return _structure_reason(model)


def _structure_reason(model: SequenceModel) -> str | None:
    """Whether the model's own parts are of the classes that the decoder reads."""
    wanted: list[tuple[str, nn.Module, type]] = [
        ("embedding", model.embedding, nn.Embedding),
        ("head", model.head, nn.Linear),
        *((f"blocks.{i}", block, Block) for i, block in enumerate(model.blocks)),
    ]
    for name, module, kind in wanted:
        if not isinstance(module, kind):
            return f"{name} is a {type(module).__name__} and no {kind.__name__}"
    return None


def _tensor_reason(x: Tensor) -> str | None:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return f"{x.dtype} on {x.device}"
    return None if x.is_contiguous() else "not contiguous"
