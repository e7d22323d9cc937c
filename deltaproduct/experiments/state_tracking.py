"""The recipe that `deltaproduct train` starts from; its help shows it, and need not wait for PyTorch."""

from typing import Any

# One layer that tracks state on a laptop. What each choice does for S3 is measured in docs/LOG.md: no convolution, MLP
# or gate, because the recurrence alone should do the work; keys and values without an activation, so that they can
# point anywhere on the sphere; β near 2 from the start, so that the first transitions are already reflections.
STATE_TRACKING: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 0,
    "num_heads": 4,
    "head_dim": 16,
    "num_householder": 2,
    "allow_neg_eigval": True,
    "use_short_conv": False,
    "qkv_activation": "identity",
    "beta_bias_init": 4.0,
    "initializer_range": None,
    "embedding_init_std": 1.0,
}
