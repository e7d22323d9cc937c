"""The operator's backends against one another, against the loop people write themselves, and against the machine.

No row is timed before its output and all its gradients have been held against the float64 reference on the same
inputs. Then every row runs in turn, again and again, in one process; medians and ranges are reported.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaproduct.benchmarks.roofline import Roofline, measure_roofline
from deltaproduct.benchmarks.timing import Timing, interleaved, peak_extra_bytes
from deltaproduct.errors import UsageError
from deltaproduct.machine import choose_device, command_line, describe_machine
from deltaproduct.ops import BACKENDS, delta_product, resolve_backend
from deltaproduct.ops.inputs import DTYPES, compute_dtype, expand_heads

if TYPE_CHECKING:
    from rich.console import Console

TEXTBOOK = "textbook_loop"
LOOPS = ("reference", TEXTBOOK)

REPEATS, QUICK_REPEATS = 7, 3
ERROR_LIMIT = 1e-3  # relative to max|·|; far above float32's rounding here (1e-6 to 3e-4), far below a wrong formula
GIB = 1 << 30
CHECK_BYTES = GIB // 2  # float64 states that the correctness check may keep: decides how long its prefix is
LOOP_BYTES = 4 * GIB  # states that a loop may keep for its backward
LOOP_STEPS = 1 << 14  # Householder steps that a loop may take: beyond them it is launch overhead that is timed
TEXTBOOK_BYTES = 16 * GIB  # zeros that the textbook loop's backward may write


@dataclass(frozen=True)
class OpShape:
    """B, T, H (= HV), K (= V) and N of one problem; `gate` adds a forget gate g."""

    batch: int
    length: int
    num_heads: int
    head_dim: int
    num_householder: int
    gate: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "length", "num_heads", "head_dim", "num_householder"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} of a benchmark's shape must be a whole number of at least 1, not {value!r}.")

    @classmethod
    def parse(cls, text: str) -> "OpShape":
        """The inverse of `label`: "B64 T128 H4 K32 N2", with " gated" after it where there is a gate."""
        found = re.fullmatch(r"B(\d+)\s*T(\d+)\s*H(\d+)\s*K(\d+)\s*N(\d+)(\s+gated)?", text.strip())
        if not found:
            raise UsageError(f"{text!r} is not a shape; write it as 'B64 T128 H4 K32 N2', or '… N2 gated'.")
        b, t, h, k, n, gate = found.groups()
        return cls(int(b), int(t), int(h), int(k), int(n), gate is not None)

    @property
    def label(self) -> str:
        sizes = f"B{self.batch} T{self.length} H{self.num_heads} K{self.head_dim} N{self.num_householder}"
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
        per_matrix = 2 * self.head_dim * self.head_dim
        return self.tokens * self.num_heads * per_matrix * (2 * self.num_householder + 1)

    @property
    def training_flops(self) -> int:
        """Forward and backward: 4 × `forward_flops` (the forward, its recomputation, and twice it for two operands)."""
        return 4 * self.forward_flops


DEFAULT_SHAPES = (OpShape(64, 128, 4, 32, 2), OpShape(16, 512, 8, 64, 3), OpShape(1, 4096, 4, 128, 2))
QUICK_SHAPES = (OpShape(4, 64, 2, 16, 2),)
SCALING_SHAPE = OpShape(1, 4096, 2, 32, 2)
SCALING_LENGTHS = (4096, 8192, 16384, 32768, 65536)
QUICK_SCALING_LENGTHS = (256, 512, 1024)


@dataclass(frozen=True)
class NotRun:
    """A backend that has no row, and why."""

    backend: str
    reason: str


@dataclass
class Row:
    """One backend on one shape. What was not measured is None.

    `status` is "timed"; "wrong": its error is above the limit or no finite number, so it was not timed; or "failed": it
    raised. `reason` says more in the last two cases.
    """

    backend: str
    status: str = "timed"
    reason: str | None = None
    error: float | None = None  # largest of output's and gradients' max|x − x64| / max|x64|
    worst: str | None = None  # the tensor that has it: "o" or "d_" and an input's name
    forward: Timing | None = None  # forward alone, without recording for a backward
    forward_backward: Timing | None = None
    forward_gflops: float | None = None  # GFLOP/s by `OpShape.forward_flops`
    gflops: float | None = None  # GFLOP/s of forward and backward by `OpShape.training_flops`
    roofline_share: float | None = None  # of `gflops`, or of `forward_gflops` without a backward
    speedup: float | None = None  # over the reference row's time, for the same work as `roofline_share`
    peak_extra_bytes: int | None = None  # of one forward and backward (or forward), beyond the inputs


@dataclass
class ShapeResult:
    shape: OpShape
    label: str
    forward_flops: int
    checked_length: int  # tokens of the prefix on which correctness was checked; all of them where it equals T
    rows: list[Row]
    left_out: list[NotRun]


@dataclass
class _Report:
    """What every report carries, so that its numbers can be placed."""

    machine: dict[str, Any]
    command: str
    device: str
    dtype: str
    repeats: int
    backward: bool
    seed: int
    error_limit: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold: no NaN, no tuple."""
        return dataclasses.asdict(self)


@dataclass
class OpsBenchmark(_Report):
    """What `bench_ops` found."""

    roofline: Roofline
    shapes: list[ShapeResult]
    unavailable: list[NotRun]  # backends that cannot serve here
    benchmark: str = field(default="ops", init=False)


@dataclass(frozen=True)
class ScalingPoint:
    length: int  # T
    time: Timing  # forward and backward, or forward alone
    us_per_token: float  # microseconds of the median, per token: B·T of them
    ratio: float  # us_per_token over that of the shortest T: 1 where cost is linear in T
    peak_extra_bytes: int | None


@dataclass
class ScalingBenchmark(_Report):
    """What `bench_scaling` found. `reason` is None, or why points are missing: the backend is wrong, or a T failed."""

    backend: str
    why_backend: str
    shape: OpShape  # of the shortest T
    label: str
    error: float | None
    checked_length: int
    reason: str | None
    points: list[ScalingPoint]
    benchmark: str = field(default="scaling", init=False)


def textbook_loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    """The recurrence as people usually write it in PyTorch: index token and step, einsum, append → o [B,T,HV,V].

    Shapes as in `delta_product`; scale K^-½, no initial state, arithmetic in float32 or better. It is a peer to compare
    with and serves nothing else: the specification is `ops/reference.py`, which it deliberately does not call. It
    differs from that in one habit. The backward of x[:, t, j] fills a zero tensor as large as the whole of x and adds
    it to the gradient, T·N times over, so the backward's cost is quadratic in T; the reference unbinds once instead.
    """
    dtype, heads = compute_dtype(q, k, v, beta), v.shape[3]
    q, k = (expand_heads(x.to(dtype), heads) for x in (q, k))
    state = q.new_zeros(q.shape[0], heads, k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t].to(dtype).exp()[..., None, None]
        for j in range(k.shape[2]):
            error = v[:, t, j].to(dtype) - torch.einsum("bhkv,bhk->bhv", state, k[:, t, j])
            step = beta[:, t, j].to(dtype)[..., None] * k[:, t, j]
            state = state + torch.einsum("bhk,bhv->bhkv", step, error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * k.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1).to(v.dtype)


def row_names() -> list[str]:
    """What `backends` may name: every backend of the operator, and the textbook loop."""
    return [*BACKENDS, TEXTBOOK]


def bench_ops(
    shapes: Sequence[OpShape] | None = None,
    *,
    backends: Sequence[str] | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = torch.float32,
    repeats: int | None = None,
    backward: bool = True,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> OpsBenchmark:
    """Check, then time, every backend on every shape.

    Args:
        shapes: None is DEFAULT_SHAPES, or QUICK_SHAPES when `quick`.
        backends: rows, of `row_names()`; None is all that can serve. Speed-ups need "reference" among them.
        device: "auto", "cpu" or "cuda".
        dtype: of the inputs: float64, float32, bfloat16 or float16, or its name.
        repeats: timed runs of each row, forward and forward+backward each; None is 7, or 3 when `quick`. A row that
            has taken 20 s stops after three.
        backward: also check and time gradients.
        quick: a few seconds in all.
        seed: of the inputs: unit keys, β uniform in (0,2), g (where gated) the logarithm of gates near 1.
        progress: called with a line before each stage.

    Raises:
        UsageError: an unknown backend, device or dtype, one that cannot serve and was named, fewer than one repeat.
    """
    say = progress or (lambda line: None)
    chosen = _device(device)
    dtype = _dtype(dtype)
    repeats = _repeats(repeats, quick)
    if shapes is None:
        shapes = QUICK_SHAPES if quick else DEFAULT_SHAPES
    if not shapes:
        raise UsageError("There is no shape to benchmark.")
    names, unavailable = _serving(backends, chosen, dtype)

    def roofline() -> Roofline:
        return measure_roofline(chosen, compute_dtype(torch.empty(0, dtype=dtype)), repeats=3 if quick else 8)

    say("roofline")
    before = roofline()
    results = [_bench_shape(s, names, chosen, dtype, repeats, backward, seed, say) for s in shapes]
    best = Roofline.best(before, roofline())
    for result in results:
        for row in result.rows:
            _rate(row, result, best)
    return OpsBenchmark(
        **_circumstances(chosen, dtype, repeats, backward, seed),
        roofline=best,
        shapes=results,
        unavailable=unavailable,
    )


def bench_scaling(
    lengths: Sequence[int] | None = None,
    *,
    backend: str = "auto",
    shape: OpShape = SCALING_SHAPE,
    device: str = "auto",
    dtype: torch.dtype | str = torch.float32,
    repeats: int | None = None,
    backward: bool = True,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> ScalingBenchmark:
    """Time per token of one backend at growing T, which is constant where cost is linear in T.

    Args:
        lengths: T, two or more; None is 4096 … 65536, or shorter ones when `quick`.
        backend: "auto" or a name; the loops are left out, since at such T they time Python.
        shape: everything but T.
        device, dtype, repeats, backward, quick, seed, progress: as for `bench_ops`.

    Raises:
        UsageError: as `bench_ops`, a loop was named, or fewer than two different lengths.
    """
    say = progress or (lambda line: None)
    chosen = _device(device)
    dtype = _dtype(dtype)
    repeats = _repeats(repeats, quick)
    if lengths is None:
        lengths = QUICK_SCALING_LENGTHS if quick else SCALING_LENGTHS
    shapes = [dataclasses.replace(shape, length=t) for t in sorted(set(lengths))]
    if len(shapes) < 2:
        raise UsageError("A scaling benchmark needs at least two different lengths.")
    if backend in LOOPS:
        raise UsageError(f"{backend!r} is a plain loop, which the scaling benchmark leaves out; choose another.")
    name, why = resolve_backend(backend, device=chosen, dtype=compute_dtype(torch.empty(0, dtype=dtype)))

    problem = _Problem(shapes[0], chosen, dtype, seed, backward)
    say(f"{shapes[0].label}: checking {name}")
    row = problem.check(name)
    points: list[ScalingPoint] = []
    if row.status == "timed":
        problems = {s.length: _Problem(s, chosen, dtype, seed, backward) for s in shapes}
        memory: dict[int, int | None] = {}
        for t, p in problems.items():
            say(f"T={t}: measuring memory")
            try:  # the first run at this length is also the warm-up
                memory[t] = peak_extra_bytes(p.work(name), chosen)
            except Exception as e:
                row.reason = f"T={t} failed: {_first_line(e)}"
                break
        say(f"timing {len(memory)} lengths, {repeats} runs each")
        times = interleaved({t: problems[t].work(name) for t in memory}, repeats=repeats, device=chosen)
        per_token = {t: 1e3 * timing.median_ms / problems[t].shape.tokens for t, timing in times.items()}
        first = per_token.get(shapes[0].length, math.nan)  # there are no points without it
        points = [ScalingPoint(t, times[t], us, us / first, memory[t]) for t, us in per_token.items()]
    return ScalingBenchmark(
        **_circumstances(chosen, dtype, repeats, backward, seed),
        backend=name,
        why_backend=why,
        shape=shapes[0],
        label=shapes[0].label,
        error=row.error,
        checked_length=problem.checked_length,
        reason=row.reason,
        points=points,
    )


# --- What is run ------------------------------------------------------------------------------------------------------


class _Problem:
    """Inputs of one shape, and the work that a row does with them."""

    def __init__(self, shape: OpShape, device: torch.device, dtype: torch.dtype, seed: int, backward: bool) -> None:
        self.shape, self.backward = shape, backward
        generator = torch.Generator().manual_seed(seed)
        b, t, n, h, d = shape.batch, shape.length, shape.num_householder, shape.num_heads, shape.head_dim

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        x = {
            "q": F.normalize(normal(b, t, h, d), dim=-1),
            "k": F.normalize(normal(b, t, n, h, d), dim=-1),
            "v": normal(b, t, n, h, d),
            "beta": 2 * torch.rand(b, t, n, h, generator=generator),
        }
        if shape.gate:
            x["g"] = F.logsigmoid(normal(b, t, h) + 3)
        self.x = {name: y.to(device, dtype).requires_grad_(backward) for name, y in x.items()}
        self.d_o = normal(b, t, h, d).to(device, dtype)
        kept_per_token = 8 * n * b * h * d * d
        self.checked_length = max(1, min(t, CHECK_BYTES // kept_per_token))
        self._wanted: tuple[Tensor, ...] | None = None

    def work(self, name: str) -> Callable[[], tuple[Tensor, ...]]:
        """One forward and backward (forward alone without `backward`) of the row `name`."""
        return lambda: _outcome(_operator(name), self.x, self.d_o if self.backward else None)

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
        row = Row(name)
        try:
            got = _outcome(_operator(name), *self._prefix(None))
        except Exception as e:  # a row may be anyone's code: its failure is a finding, and the other rows go on
            return dataclasses.replace(row, status="failed", reason=_first_line(e))
        errors: dict[str, float] = {}
        names = ["o", *(f"d_{x}" for x in self.x)][: len(self._wanted)]
        for tensor, have, want in zip(names, got, self._wanted, strict=True):
            if have.shape != want.shape:
                reason = f"{tensor} has shape {list(have.shape)} and should have {list(want.shape)}"
                return dataclasses.replace(row, status="wrong", reason=reason, worst=tensor)
            size = max(want.abs().max().item(), torch.finfo(torch.float32).tiny)
            errors[tensor] = (have.double() - want).abs().max().item() / size
            if not math.isfinite(errors[tensor]):
                return dataclasses.replace(row, status="wrong", reason=f"{tensor} is not finite", worst=tensor)
        worst, limit = max(errors, key=lambda name: errors[name]), error_limit(self.d_o.dtype)
        row.worst, row.error = worst, errors[worst]
        if errors[worst] > limit:
            row.status, row.reason = "wrong", f"the error of {worst} is {errors[worst]:.1e}, above {limit:.1e}"
        return row

    def _prefix(self, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], Tensor | None]:
        t = self.checked_length
        x = {n: y.detach()[:, :t].to(dtype or y.dtype).requires_grad_(self.backward) for n, y in self.x.items()}
        return x, self.d_o[:, :t].to(dtype or self.d_o.dtype) if self.backward else None


def _operator(name: str) -> Callable[..., Tensor]:
    if name == TEXTBOOK:
        return textbook_loop
    return lambda **x: delta_product(**x, backend=name)[0]


def _outcome(operator: Callable[..., Tensor], x: dict[str, Tensor], d_o: Tensor | None) -> tuple[Tensor, ...]:
    """The output and, unless d_o is None, the gradients of Σ o·d_o by every input."""
    o = operator(**x)
    return (o,) if d_o is None else (o.detach(), *torch.autograd.grad(o, list(x.values()), d_o))


def error_limit(dtype: torch.dtype) -> float:
    """The largest error at which a row is still timed: ERROR_LIMIT, plus the rounding of results in a short dtype."""
    if dtype == torch.float64:
        return 1e-9  # to tell a row that works in float32 although its inputs are float64
    return ERROR_LIMIT + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)


def _bench_shape(
    shape: OpShape,
    names: list[str],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    backward: bool,
    seed: int,
    say: Callable[[str], None],
) -> ShapeResult:
    problem = _Problem(shape, device, dtype, seed, backward)
    rows, left_out = [], []
    for name in names:
        if reason := _too_large(name, shape, backward, compute_dtype(problem.d_o).itemsize):
            left_out.append(NotRun(name, reason))
            continue
        say(f"{shape.label}: checking {name}")
        row = problem.check(name)
        if row.status == "timed":
            say(f"{shape.label}: measuring memory of {name}")
            try:  # the first run at full size is also the warm-up
                row.peak_extra_bytes = peak_extra_bytes(problem.work(name), device)
                problem.forward(name)()
            except Exception as e:
                row.status, row.reason = "failed", _first_line(e)
        rows.append(row)
    timed = [row for row in rows if row.status == "timed"]
    say(f"{shape.label}: timing {len(timed)} rows, {repeats} runs each")
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for row in timed:
        runs[row.backend, "forward"] = problem.forward(row.backend)
        if backward:
            runs[row.backend, "forward_backward"] = problem.work(row.backend)
    for (name, phase), timing in interleaved(runs, repeats=repeats, device=device).items():
        setattr(next(row for row in timed if row.backend == name), phase, timing)
    return ShapeResult(shape, shape.label, shape.forward_flops, problem.checked_length, rows, left_out)


def _too_large(name: str, shape: OpShape, backward: bool, itemsize: int) -> str | None:
    """Why a loop is not run on this shape; None if it is."""
    if name not in LOOPS:
        return None
    if shape.steps > LOOP_STEPS:
        return f"a loop of T·N = {shape.steps} steps is more than {LOOP_STEPS}"
    states = shape.steps * shape.batch * shape.num_heads * shape.head_dim**2 * itemsize
    if backward and states > LOOP_BYTES:
        return f"a state per step comes to {states / GIB:.1f} GiB, more than {LOOP_BYTES // GIB}"
    one = 2 * shape.steps * shape.batch * shape.num_heads * shape.head_dim * itemsize  # k and v
    if name == TEXTBOOK and backward and shape.steps * one > TEXTBOOK_BYTES:
        zeros, limit = shape.steps * one / GIB, TEXTBOOK_BYTES // GIB
        return f"its backward, quadratic in T, would write {zeros:.0f} GiB of zeros, more than {limit}"
    return None


def _rate(row: Row, result: ShapeResult, roofline: Roofline) -> None:
    """Fill in what follows from the times."""
    shape = result.shape
    if row.forward:
        row.forward_gflops = shape.forward_flops / row.forward.median_ms / 1e6
    if row.forward_backward:
        row.gflops = shape.training_flops / row.forward_backward.median_ms / 1e6
    rate = row.gflops or row.forward_gflops
    if rate:
        row.roofline_share = rate / roofline.gflops
    base = next((r for r in result.rows if r.backend == "reference"), None)
    mine, theirs = _main_timing(row), base and _main_timing(base)
    if mine and theirs:
        row.speedup = theirs.median_ms / mine.median_ms


def _main_timing(row: Row) -> Timing | None:
    return row.forward_backward or row.forward


def _serving(
    backends: Sequence[str] | None, device: torch.device, dtype: torch.dtype
) -> tuple[list[str], list[NotRun]]:
    """The rows to run, and the backends that cannot serve; naming one of those is an error."""
    dtype = compute_dtype(torch.empty(0, dtype=dtype))
    if backends is not None:
        names = list(dict.fromkeys(backends))
        if not names:
            raise UsageError(f"There is no backend to benchmark; choose from {', '.join(row_names())}.")
        for name in names:
            if name not in row_names():
                raise UsageError(f"There is no backend {name!r} to benchmark; choose from {', '.join(row_names())}.")
            if name != TEXTBOOK:
                resolve_backend(name, device=device, dtype=dtype)
        return names, []
    obstacles = {name: b.obstacle(device, dtype) for name, b in BACKENDS.items()}
    names = [*(name for name, reason in obstacles.items() if reason is None), TEXTBOOK]
    return names, [NotRun(name, reason) for name, reason in obstacles.items() if reason is not None]


def _circumstances(device: torch.device, dtype: torch.dtype, repeats: int, backward: bool, seed: int) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "command": command_line(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "backward": backward,
        "seed": seed,
        "error_limit": error_limit(dtype),
    }


def _device(name: str) -> torch.device:
    device = choose_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Benchmarks run on cpu or cuda, not {name!r}: no other device's clock is known here.")
    return device


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise UsageError(f"dtype {dtype!r} cannot be benchmarked; choose float64, float32, bfloat16 or float16.")
    return found


def _repeats(repeats: int | None, quick: bool) -> int:
    if repeats is None:
        return QUICK_REPEATS if quick else REPEATS
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise UsageError(f"repeats must be a whole number of at least 1, not {repeats!r}.")
    return repeats


def _first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__


# --- What is shown ----------------------------------------------------------------------------------------------------


def render(report: OpsBenchmark | ScalingBenchmark, console: "Console") -> None:
    """Print a report's tables and, beneath them, what is needed to judge them."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
        made.padding = (0, 1, 0, 0)  # eight columns in 80 characters
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left", no_wrap=True)
        return made

    def note(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    both = "fwd+bwd" if report.backward else "forward"
    if isinstance(report, ScalingBenchmark):
        title = f"{report.backend}, {re.sub('T[0-9]+ ', '', report.label)}, {both}"
        shown = table(title, "T", "ms", "µs/token", "ratio", "MiB")
        for p in report.points:
            shown.add_row(
                str(p.length), _ms(p.time), _number(p.us_per_token), f"{p.ratio:.2f}", _mib(p.peak_extra_bytes)
            )
        if report.points:
            console.print(shown)
            note(f"ms: median of {report.repeats}, and below it the range.")
            note("ratio: µs/token over that of the shortest T; 1 is linear in T.")
        if report.reason:
            note(f"{report.backend}: {report.reason}.")
        note(f"{report.backend}: {report.why_backend}.")
        if report.error is not None:
            note(f"Error against the float64 reference, first {report.checked_length} tokens: {report.error:.1e}.")
    else:
        for result in report.shapes:
            times = ["forward ms", "fwd+bwd ms"] if report.backward else ["forward ms"]
            shown = table(result.label, "backend", "error", *times, "GFLOP/s", "roofline", "× ref.", "MiB")
            for row in result.rows:
                first = _ms(row.forward) if row.status == "timed" else row.status.upper()
                shown.add_row(
                    escape(row.backend),
                    "–" if row.error is None else f"{row.error:.0e}",
                    *([first, _ms(row.forward_backward)] if report.backward else [first]),
                    _number(row.gflops if report.backward else row.forward_gflops),
                    "–" if row.roofline_share is None else f"{100 * row.roofline_share:.1f}%",
                    _number(row.speedup),
                    _mib(row.peak_extra_bytes),
                )
            if result.rows:
                console.print(shown)
            else:
                note(f"{result.label}: no row")
            if result.rows and result.checked_length < result.shape.length:
                note(f"Correctness was checked on the first {result.checked_length} tokens.")
            for row in result.rows:
                if row.status != "timed":
                    note(f"{row.backend} is {row.status} and was not timed: {row.reason}.")
                elif (timing := _main_timing(row)) and timing.runs < report.repeats:
                    note(f"{row.backend} is slow and had {timing.runs} runs.")
            for other in result.left_out:
                note(f"{other.backend} is left out: {other.reason}.")
            note("")
        for other in report.unavailable:
            note(f"{other.backend} cannot serve: {other.reason}.")
        r = report.roofline
        on = f"threads: {r.threads}" if report.device == "cpu" else f"precision {r.precision!r}"
        note(f"Roofline: {r.gflops:.1f} GFLOP/s, a {r.size}×{r.size} {r.dtype} matrix product in this run, {on}.")
        note(f"ms: median of {report.repeats}, and below it the range. GFLOP/s to MiB: of {both}.")
        note("roofline: share of it. × ref.: how many times as fast as the reference.")
        note("Flops are the recurrence's own, B·T·H·2K²·(2N+1) forward and 4 × that forward and backward.")
        note(f"error: max|x − x64| / max|x64| over the output{' and all gradients' if report.backward else ''}.")
        note("MiB: most memory held beyond the inputs, results included.")
    m = report.machine
    where = m["cpu"] if report.device == "cpu" else ", ".join(m["gpus"])
    note(f"{where}, cores: {m['cores']}, threads: {m['threads']}, torch {m['torch']}, {report.dtype}.")


def _ms(t: Timing | None) -> str:
    return "–" if t is None else f"{_number(t.median_ms)}\n{_number(t.min_ms)}–{_number(t.max_ms)}"


def _number(x: float | None) -> str:
    """Three figures or so."""
    if x is None:
        return "–"
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"


def _mib(n: int | None) -> str:
    return "–" if n is None else _number(n / 2**20)
