"""What every construction hands over: the sizes of its model first, which cost little, and the weights when asked."""

from collections.abc import Callable
from dataclasses import dataclass

from deltaproduct.models import ModelConfig, SequenceModel


@dataclass(frozen=True)
class Plan:
    """A model to be.

    Attributes:
        strategy: the construction's name.
        config: of the model, with all its sizes.
        build: writes the weights; the model is float32, in evaluation mode.
    """

    strategy: str
    config: ModelConfig
    build: Callable[[], SequenceModel]

    @property
    def num_householder(self) -> int:
        """The most Householder factors per token in any layer."""
        return max(options.num_householder for options in self.config.mixers)

    @property
    def cost(self) -> tuple[int, int, int]:
        """Layers, Householder factors per token, width: the fewer the better, in this order."""
        return self.config.num_hidden_layers, self.num_householder, self.config.hidden_size
