"""What `generate` carries from token to token: the mixers' states, in transformers' terms.

B batch · T tokens.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DynamicCache

from deltaproduct.errors import UsageError


class DeltaProductCache(DynamicCache):
    """The state of every mixer after the tokens so far; its size does not depend on how many they were.

    (A hybrid's attention layers are the exception: their part of the state is a cache of keys and values and grows.)

    It is a `DynamicCache`, for the sake of the checks on types, which holds no layer of that class's own: those count
    tokens by their keys, and a linear layer has none.
    """

    is_compileable = False  # attention's states change their shapes
    is_croppable = False
    is_initialized = False

    def __init__(self) -> None:
        super().__init__()
        self.state: tuple[Any, ...] | None = None  # as SequenceModel takes and returns it
        self.tokens_seen = 0
        self.layers_of: tuple[Any, ...] | None = None  # what the state belongs to, layer by layer

    def advance(self, state: tuple[Any, ...], tokens: int, layers_of: tuple[Any, ...] | None = None) -> None:
        """Replace the state by the one after so many more tokens of each sequence, padding counted.

        layers_of: of the model that computed it, as `check` compares it.
        """
        self.state, self.layers_of = state, layers_of
        self.tokens_seen += tokens

    def check(self, sequences: int, layers_of: tuple[Any, ...]) -> None:
        """`UsageError` unless the state is of so many sequences and of a model with such layers."""
        if self.state is None:
            return
        if len(self.state) != len(layers_of):
            raise UsageError(
                f"past_key_values are of {len(self.state)} layers and this model has {len(layers_of)}; leave them out, "
                "and read the tokens before with this model."
            )
        if self.layers_of not in (None, layers_of):
            raise UsageError(
                "past_key_values are of a model with other layers than this one; leave them out, and read the tokens "
                "before with this model."
            )
        if self.batch_size not in (-1, sequences):
            raise UsageError(
                f"past_key_values hold {self.batch_size} sequences, and the tokens are of {sequences}: repeat or "
                "choose rows with their batch_repeat_interleave and batch_select_indices."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """T, tokens seen of each sequence, padding counted: the columns of the attention mask that are behind it."""
        return self.tokens_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns, offset) of a mask over all tokens so far and `query_length` more."""
        return self.tokens_seen + query_length, 0

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first token."""
        return next((x.shape[0] for x in tree_leaves(self.state) if x is not None), -1)

    @property
    def num_bytes(self) -> int:
        """Memory of the state."""
        return sum(x.numel() * x.element_size() for x in tree_leaves(self.state) if x is not None)

    def reset(self) -> None:
        """Start afresh."""
        self.state, self.tokens_seen, self.layers_of = None, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, beam_idx [B] ints: beam search."""
        self._replace_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`, ints or bools."""
        self._replace_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other."""
        self._replace_rows(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused with a `UsageError`: what a token did to a state cannot be undone."""
        raise UsageError(
            "A recurrent state cannot forget its last tokens again, so assisted and speculative decoding, with this "
            "model as the main one or as the assistant, are not available; decode greedily, by sampling or with beams."
        )

    activate_past_recording = crop  # the first thing that such decoding asks for

    def _replace_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = tree_map(lambda x: None if x is None else change(x), self.state)

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens_seen={self.tokens_seen}, num_bytes={self.num_bytes})"


def require_cache(given: Any) -> DeltaProductCache:
    """`given`, if it is such a cache; `UsageError` otherwise."""
    if not isinstance(given, DeltaProductCache):
        raise UsageError(
            f"past_key_values must be a DeltaProductCache, which this model makes itself where none is given, not a "
            f"{type(given).__name__}."
        )
    return given
