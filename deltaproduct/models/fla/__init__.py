"""flash-linear-attention's checkpoints: its configurations and its layouts of weights, to ours and back."""
