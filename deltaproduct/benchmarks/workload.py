"""Inputs of one shape, and the work that every row does with them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.benchmarks.correctness import HARD_ERROR_LIMIT, error_limit, judge
from deltaproduct.benchmarks.implementations import IMPLEMENTATIONS, Operator
from deltaproduct.benchmarks.report import Row
from deltaproduct.benchmarks.settings import BenchmarkSettings
from deltaproduct.benchmarks.shapes import OpShape
from deltaproduct.errors import first_line
from deltaproduct.memory import check_memory
from deltaproduct.ops import delta_product
from deltaproduct.renamed import renamed_names

COSINE = 0.99  # of any two keys of hard inputs, as in `tests/ops/test_operator_hard.py`
GIB = 1 << 30
# float64 states that the correctness check may keep: decides how long its prefix is.
CHECK_BYTES = {"cpu": GIB // 2, "cuda": 16 * GIB}


class Workload:
    """Inputs of one shape, and the work that a row does with them."""

    def __init__(self, shape: OpShape, settings: BenchmarkSettings) -> None:
        self.shape, self.settings = shape, settings
        generator = torch.Generator().manual_seed(settings.seed)
        b, t, n, h, d = shape.batch, shape.length, shape.num_householder, shape.num_heads, shape.head_dim
        values = shape.values
        floats = b * t * h * (d + n * (d + values + 1) + values)  # q, k, v, β and the output's gradient
        check_memory(f"The inputs of a problem of {t:,} tokens", 4 * floats, "its batch, length or heads")

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        x = {
            "q": F.normalize(normal(b, t, h, d), dim=-1),
            "k": F.normalize(normal(b, t, n, h, d), dim=-1),
            "v": normal(b, t, n, h, values),
            "beta": 2 * torch.rand(b, t, n, h, generator=generator),
        }
        if settings.hard:
            common = F.normalize(normal(d), dim=-1)
            x["k"] = F.normalize(COSINE**0.5 * common + (1 - COSINE) ** 0.5 * x["k"], dim=-1)
            x["beta"] = 1.9 + 0.05 * x["beta"]
        if shape.gate:
            x["g"] = F.logsigmoid(normal(b, t, h) + 3)
        to, backward = (settings.device, settings.dtype), settings.backward
        self.x = {name: y.to(*to).requires_grad_(backward) for name, y in x.items()}
        self.d_o = normal(b, t, h, values).to(*to)
        kept_per_token = 8 * n * b * h * d * values
        self.checked_length = max(1, min(t, CHECK_BYTES[settings.device.type] // kept_per_token))
        self._wanted: dict[str, Tensor] | None = None

    def work(self, name: str) -> Callable[[], dict[str, Tensor]]:
        """One forward and backward (forward alone without `backward`) of the row `name`."""
        return lambda: _outcome(_operator(name), self.x, self.d_o if self.settings.backward else None)

    def forward(self, name: str) -> Callable[[], Tensor]:
        """One forward of the row `name` for inference: nothing is kept for a backward."""

        def run() -> Tensor:
            with torch.no_grad():
                return _operator(name)(**self.x)

        return run

    def check(self, name: str) -> Row:
        """A row with its error against the float64 reference on the first `checked_length` tokens."""
        if self._wanted is None:
            self._wanted = _outcome(_operator("reference"), *self._prefix(torch.float64))
        # Of hard inputs the error is what is asked, and only nonsense is not timed.
        limit = HARD_ERROR_LIMIT if self.settings.hard else error_limit(self.settings.dtype, self.settings.device)
        x, d_o = self._prefix(None)
        try:
            got = _outcome(_operator(name), x, d_o)
        except Exception as e:  # a row may be anyone's code: its failure is a finding, and the other rows go on
            no_backward = first_line(e, with_kind=True)
        else:
            return Row(name, **judge(got, self._wanted, limit))
        try:  # it may be the backward alone that cannot run here
            with torch.no_grad():
                got = _outcome(_operator(name), x, None)
        except Exception:
            return Row(name, status="failed", reason=no_backward)
        if d_o is None:
            return Row(name, status="failed", reason=no_backward)
        return Row(name, no_backward=no_backward, **judge(got, {"o": self._wanted["o"]}, limit))

    def _prefix(self, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], Tensor | None]:
        t, backward = self.checked_length, self.settings.backward
        x = {n: y.detach()[:, :t].to(dtype or y.dtype).requires_grad_(backward) for n, y in self.x.items()}
        return x, self.d_o[:, :t].to(dtype or self.d_o.dtype) if backward else None


def token_inputs(
    shape: OpShape, batch: int, generator: torch.Generator, *, num_heads: int | None = None
) -> dict[str, Tensor]:
    """Random inputs of one token of `delta_product_step`, on the CPU in float32: q, k, v, beta, g where gated, state.

    Args:
        shape: HV, K, V, N and whether gated; its B and T do not count.
        num_heads: H; None is HV.
    """
    n, heads, keys, values = shape.num_householder, shape.num_heads, shape.head_dim, shape.values
    key_heads = heads if num_heads is None else num_heads

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=generator)

    x = {
        "q": F.normalize(normal(key_heads, keys), dim=-1),
        "k": F.normalize(normal(n, key_heads, keys), dim=-1),
        "v": normal(n, heads, values),
        "beta": 2 * torch.sigmoid(normal(n, heads)),
    }
    if shape.gate:
        x["g"] = F.logsigmoid(normal(heads) + 3)
    return x | {"state": normal(heads, keys, values)}


def _operator(name: str) -> Operator:
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name].load()
    return lambda **x: delta_product(**x, backend=name)[0]


def _outcome(operator: Operator, x: dict[str, Tensor], d_o: Tensor | None) -> dict[str, Tensor]:
    """The output "o" and, unless d_o is None, the gradients of Σ o·d_o by every input: "d_q" and so on."""
    o = operator(**x)
    if d_o is None:
        return {"o": o}
    gradients = torch.autograd.grad(o, list(x.values()), d_o)
    return {"o": o.detach()} | {f"d_{name}": y for name, y in zip(x, gradients, strict=True)}


__getattr__ = renamed_names(__name__, {"Problem": "Workload"})
