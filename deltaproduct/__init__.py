"""Linear RNNs whose state transition is a product of Householder reflections, and how far they track state.

The rooms, in the order in which a datum goes through them: `tasks` → `models` → `layers` → `ops` → `evaluation` →
`plots`. `deltaproduct.ops.delta_product` is the recurrence; `deltaproduct.models.SequenceModel` is a model made of it.
What a first program needs can be imported from here; PyTorch is imported when the first of these names is used.
"""

from typing import TYPE_CHECKING

from deltaproduct.late import late
from deltaproduct.renamed import install as _install

if TYPE_CHECKING:
    from deltaproduct.layers import DeltaProduct, GatedDeltaNet
    from deltaproduct.models import ModelConfig, SequenceModel
    from deltaproduct.ops import delta_product
    from deltaproduct.tasks import get_task
    from deltaproduct.theory import compile_automaton, compile_group, verify
    from deltaproduct.training import train

__version__ = "0.1.0"
__all__ = [
    "DeltaProduct",
    "GatedDeltaNet",
    "ModelConfig",
    "SequenceModel",
    "compile_automaton",
    "compile_group",
    "delta_product",
    "get_task",
    "train",
    "verify",
]

__getattr__, __dir__ = late(
    __name__,
    {
        "layers": ("DeltaProduct", "GatedDeltaNet"),
        "models": ("ModelConfig", "SequenceModel"),
        "ops": ("delta_product",),
        "tasks": ("get_task",),
        "theory": ("compile_automaton", "compile_group", "verify"),
        "training": ("train",),
    },
)
_install()
