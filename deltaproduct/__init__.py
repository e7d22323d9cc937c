"""Linear RNNs whose state transition is a product of Householder reflections, and how far they track state.

The rooms, in the order in which a datum goes through them: `tasks` → `models` → `layers` → `ops` → `evaluation` →
`plots`. `deltaproduct.ops.delta_product` is the recurrence; `deltaproduct.models.SequenceModel` is a model made of it.
"""

__version__ = "0.1.0"

from deltaproduct.renamed import install as _install

_install()
