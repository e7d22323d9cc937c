"""Token by token on the native engine: a whole model in one call per token.

B sequences.
"""

from typing import Any

import torch
from torch import Tensor

from deltaproduct.errors import UsageError
from deltaproduct.models.sequence_model import Block, SequenceModel
from deltaproduct.ops.tape import Tape


class Decoder:
    """Labels one token after the other of `batch_size` sequences, carrying their state itself.

    What it computes is `model(tokens, state)` with one token, in little more time than it takes to read the weights.
    They are read where the model has them: changing their values shows at once, while replacing the tensors does not
    and needs a new decoder.

    Raises:
        UsageError: there is no native engine, the model is not float32 on the CPU, or a mixer cannot be recorded.
    """

    def __init__(self, model: SequenceModel, batch_size: int = 1):
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}.")
        self.batch_size, self.vocab_size = batch_size, model.config.vocab_size
        self._embedding = model.embedding.weight.detach()
        self._tape = Tape(batch_size)
        self._x = self._tape.buffer(batch_size, model.config.hidden_size)
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self._states = tuple(block.record(self._tape, self._x) for block in blocks)
        self._logits = self._tape.product(model.norm.record(self._tape, self._x), model.head.weight.detach())

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits [B,num_labels] after one more token of each sequence, tokens [B]."""
        if tokens.shape != (self.batch_size,) or tokens.dtype not in (torch.int32, torch.int64):
            raise UsageError(f"tokens must be {self.batch_size} ints, not {tokens.dtype} {list(tokens.shape)}.")
        torch.index_select(self._embedding, 0, tokens, out=self._x)
        self._tape.play()
        return self._logits.clone()

    @property
    def state(self) -> tuple[Any, ...]:
        """A copy of the carried state, as `SequenceModel` takes and returns it."""
        return tuple(type(s)(*(None if x is None else x.clone() for x in s)) for s in self._states)

    @torch.no_grad()
    def load(self, state: tuple[Any, ...] | None) -> None:
        """Go on from such a state, of B sequences; None starts afresh."""
        for i, own in enumerate(self._states):
            for j, x in enumerate(own):
                if x is not None:
                    x.zero_() if state is None else x.copy_(state[i][j])
