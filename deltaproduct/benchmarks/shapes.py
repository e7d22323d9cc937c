"""Sizes of the operator's problems: what a row has to compute, and the shapes that are usual."""

import re
from dataclasses import dataclass

from deltaproduct.errors import UsageError


@dataclass(frozen=True)
class OpShape:
    """B, T, H (= HV), K, V (None: as K) and N of one problem; `gate` adds a forget gate g."""

    batch: int
    length: int
    num_heads: int
    head_dim: int
    num_householder: int
    gate: bool = False
    value_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "length", "num_heads", "head_dim", "num_householder", "value_dim"):
            value = self.values if name == "value_dim" else getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} of a benchmark's shape must be a whole number of at least 1, not {value!r}.")

    @classmethod
    def parse(cls, text: str) -> "OpShape":
        """The inverse of `label`: "B64 T128 H4 K32 N2", with V before N where it is not K, and " gated" for a gate."""
        found = re.fullmatch(r"B(\d+)\s*T(\d+)\s*H(\d+)\s*K(\d+)(?:\s*V(\d+))?\s*N(\d+)(\s+gated)?", text.strip())
        if not found:
            raise UsageError(f"{text!r} is not a shape; write it as 'B64 T128 H4 K32 N2', or '… N2 gated'.")
        b, t, h, k, v, n, gate = found.groups()
        return cls(int(b), int(t), int(h), int(k), int(n), gate is not None, None if v is None else int(v))

    @property
    def values(self) -> int:
        """V."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def label(self) -> str:
        values = "" if self.value_dim is None else f" V{self.value_dim}"
        sizes = f"B{self.batch} T{self.length} H{self.num_heads} K{self.head_dim}{values} N{self.num_householder}"
        return sizes + (" gated" if self.gate else "")

    @property
    def tokens(self) -> int:
        """B·T."""
        return self.batch * self.length

    @property
    def steps(self) -> int:
        """T·N: what a loop has to do one after another."""
        return self.length * self.num_householder

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of the recurrent form: B·T·N·HV·(4·K·V) + B·T·HV·2·K·V.

        Per Householder step and head Sᵀk is K·V multiply-adds, 2KV flops, and the rank-one update of S another 2KV;
        per token the read-out Sᵀq is 2KV. Vectors (β, v − Sᵀk) and the gate are left out: they are of order K, or
        fused into the update. It is a nominal count, the same for every row, so that rates order as times do; an
        arrangement that does more arithmetic to use the hardware better is not credited for it.
        """
        per_matrix = 2 * self.head_dim * self.values
        return self.tokens * self.num_heads * per_matrix * (2 * self.num_householder + 1)

    @property
    def training_flops(self) -> int:
        """Forward and backward: 4 × `forward_flops` (the forward, its recomputation, and twice it for two operands)."""
        return 4 * self.forward_flops

    def fewest_bytes(self, itemsize: int, backward: bool) -> int:
        """What has to be moved at least: every input read once and every result written once, in each of the passes.

        The forward reads q, k, v, β and g and writes o; the backward reads them and the gradient of o, and writes
        theirs. States stay where they are, and nothing is kept from one pass to the other.
        """
        inputs = self.head_dim * (1 + self.num_householder) + (self.values + 1) * self.num_householder + self.gate
        per_head = inputs + self.values
        if backward:
            per_head += 2 * inputs + self.values
        return self.tokens * self.num_heads * per_head * itemsize


DEFAULT_SHAPES = (OpShape(64, 128, 4, 32, 2), OpShape(16, 512, 8, 64, 3), OpShape(1, 4096, 4, 128, 2))
QUICK_SHAPES = (OpShape(4, 64, 2, 16, 2),)
# On a GPU: training, many short sequences, one long one, wide values; each with 1 to 4 steps, gated and not.
GPU_SHAPES = tuple(
    OpShape(batch, length, heads, keys, n, gate, values)
    for batch, length, heads, keys, values in (
        (8, 4096, 8, 128, None),
        (32, 512, 8, 64, None),
        (1, 65536, 8, 128, None),
        (8, 4096, 16, 128, 256),
    )
    for n in (1, 2, 3, 4)
    for gate in (False, True)
)

# Of `bench scaling`, whose lengths are others, and of `bench ops --step`, where B and T do not count.
SCALING_SHAPE = OpShape(1, 4096, 2, 32, 2)
OP_STEP_SHAPE, QUICK_OP_STEP_SHAPE = OpShape(1, 1, 8, 128, 2), OpShape(1, 1, 2, 16, 2)
