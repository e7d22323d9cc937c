"""The recurrence in Triton kernels: what is allocated and launched, and what PyTorch is told about it.

The algorithm is the one of `chunkwise.py` (ops/README.md). Forward: `prepare` for all chunks at once, then a scan that
emits outputs. Backward: both again, now writing every chunk's state and errors, a scan back, and the gradients for all
chunks at once. Kept in between: the inputs, and the state at every segment's start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from deltaproduct.ops import transforms
from deltaproduct.ops.autograd import Gradients, as_given, cotangent_of_output, empty_gradients, register_gradients
from deltaproduct.ops.differentiable import differentiable
from deltaproduct.ops.inputs import NORM_EPS, Arguments
from deltaproduct.ops.transforms import Tensors
from deltaproduct.ops.triton.decode import decode_kernel
from deltaproduct.ops.triton.gates import gates_kernel
from deltaproduct.ops.triton.gradients import gradients_kernel
from deltaproduct.ops.triton.layout import Layout, tile
from deltaproduct.ops.triton.prepare import prepare_kernel
from deltaproduct.ops.triton.reverse import reverse_kernel
from deltaproduct.ops.triton.scan import scan_kernel
from deltaproduct.ops.triton.segments import segments_kernel

INTERPRETED_PROCESSORS = 1


@dataclass(frozen=True)
class Precision:
    """How products are made, by what the inputs are.

    Attributes:
        dtype: of the inputs as the kernels read them, and of what one kernel leaves to the next where that only enters
            products again.
        mode: see `parts.product`.
    """

    dtype: torch.dtype
    work: torch.dtype
    mode: str

    @classmethod
    def of(cls, precise: bool, *inputs: Tensor) -> "Precision":
        dtypes = {x.dtype for x in inputs}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        if dtype == torch.bfloat16:
            if precise:
                return cls(dtype, torch.float32, "split")
            return cls(dtype, torch.bfloat16, "fast")
        if dtype == torch.float16 and not precise:
            return cls(dtype, torch.float32, "tf32")
        if dtype == torch.float32 and _tf32_allowed() and not precise:
            return cls(dtype, torch.float32, "tf32")
        return cls(dtype, torch.float32, "tf32x3")


def _tf32_allowed() -> bool:
    """Whether PyTorch itself would use tf32, by whichever of its two ways of asking for that."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # where it was set this way, PyTorch refuses to answer by the older name
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


@cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def _on_its_device(
    function: Callable[Concatenate[Tensor, Rest], Result],
) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Launch kernels where the first argument is, which need not be the current device."""

    @wraps(function)
    def run(x: Tensor, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with torch.cuda.device_of(x):
            return function(x, *args, **kwargs)

    return run


class _Run:
    """One call: its sizes, its tables, and its kernels with what they all are given."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, scale: float,
        qk_l2norm: bool, precise: bool,
    ):  # fmt: skip
        self.precision = Precision.of(precise, q, k, v)
        q, k, v = (x.to(self.precision.dtype).contiguous() for x in (q, k, v))
        self.q, self.k, self.v, self.beta = q, k, v, beta.contiguous()
        self.g = None if g is None else g.contiguous()
        self.scale = scale
        self.layout = layout = Layout.of(k, v, cu_seqlens, processors(k.device))
        self.starts: Tensor | None
        table, self.starts, owners = layout.tables(cu_seqlens) or (None, None, None)
        # Where chunks lie, and segments.
        self.chunk_places = table, layout.length, layout.chunks
        self.places = table, self.starts, owners, layout.length, layout.chunks, layout.segments
        self.heads, (self.key_dim, self.value_dim) = v.shape[3], (k.shape[4], v.shape[4])
        self.sizes = {
            "H": k.shape[3], "HV": v.shape[3], "K": self.key_dim, "N": k.shape[2], "C": layout.rows,
            "TOKENS": layout.tokens, "BT": layout.token_rows, "BK": tile(self.key_dim), "PACKED": layout.packed,
            "MODE": self.precision.mode,
        }  # fmt: skip
        self.norm = {"EPS": NORM_EPS, "NORMALISE": qk_l2norm, "GATED": g is not None}
        self.decays: Tensor | None = None
        self.prepared: tuple[Tensor, ...] = ()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.k.new_empty(shape, dtype=dtype)

    def states(self, slots: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty(slots, self.heads, self.key_dim, self.value_dim, dtype=dtype)

    def prepare(self) -> None:
        """What depends on no state; `self.prepared` are the arguments of the scans."""
        layout, work = self.layout, self.precision.work
        count, rows, token_rows = layout.all_chunks, layout.rows, layout.token_rows
        inverse = self.empty(count, self.heads, rows, rows)
        attend = self.empty(count, self.heads, token_rows, rows, dtype=work)
        seen, writes = (self.empty(count, self.heads, rows) for _ in range(2))
        reads, whole = self.empty(count, self.heads, token_rows), self.empty(count, self.heads)
        self.prepared = inverse, attend, seen, writes, reads, whole
        if self.g is not None:
            self.decays = self.empty(count, self.heads, 2, token_rows)
            gates_kernel[count, self.heads](
                self.g, self.decays, *self.chunk_places,
                HV=self.heads, TOKENS=layout.tokens, BT=token_rows, PACKED=layout.packed,
            )  # fmt: skip
        prepare_kernel[count, self.heads](
            self.q, self.k, self.beta, self.decays, *self.prepared, self.scale, *self.chunk_places,
            **self.sizes, **self.norm,
        )  # fmt: skip

    def scan(
        self, *, segmented: bool, start: Tensor | None = None, o: Tensor | None = None, final: Tensor | None = None,
        kept: Tensor | None = None, states: Tensor | None = None, errors: Tensor | None = None,
        summary: Tensor | None = None,
    ) -> None:  # fmt: skip
        layout = self.layout
        widths = (self.value_dim,) if summary is None else (self.value_dim, self.key_dim)
        scan_kernel[self._side_by_side(segmented, *widths)](
            self.q, self.k, self.v, *self.prepared, start, o, final, kept, states, errors, summary,
            *self.places, **self.sizes, V=self.value_dim, SPAN=layout.span,
            START=start is not None, OUTPUT=o is not None, FINAL=final is not None, KEEP=kept is not None,
            REPLAY=states is not None, SUMMARY=summary is not None, SEGMENTED=segmented,
        )  # fmt: skip

    def reverse(
        self, *, segmented: bool, d_o: Tensor, d_end: Tensor | None, d_start: Tensor | None,
        d_v: Tensor | None = None, d_states: Tensor | None = None,
    ) -> None:  # fmt: skip
        layout = self.layout
        reverse_kernel[self._side_by_side(segmented, self.value_dim)](
            self.q, self.k, d_o, *self.prepared, d_end, d_v, d_states, d_start,
            *self.places, **self.sizes, V=self.value_dim, SPAN=layout.span,
            END=d_end is not None, STORE=d_v is not None, DONE=d_start is not None, SEGMENTED=segmented,
        )  # fmt: skip

    def chain(self, summary: Tensor, start: Tensor | None, final: Tensor, *, added: Tensor | None = None) -> Tensor:
        """The states at all segments' borders, from their summaries; backwards where `added` is given."""
        found = self.states(self.layout.all_segments)
        mode = "tf32x3" if self.precision.mode == "split" else self.precision.mode
        segments_kernel[self._side_by_side(False, self.value_dim)](
            summary, added, start, found, final, self.starts, self.layout.segments,
            HV=self.heads, K=self.key_dim, BK=self.sizes["BK"], V=self.value_dim, START=start is not None,
            REVERSE=added is not None, PACKED=self.layout.packed, MODE=mode,
        )  # fmt: skip
        return found

    def _side_by_side(self, segmented: bool, *widths: int) -> Callable[[dict[str, Any]], tuple[int]]:
        """The grid of a scan over blocks of so many columns: see `scan.program_place`."""
        runs = self.layout.all_segments if segmented else self.layout.sequences
        return lambda meta: (sum(-(-width // meta["BV"]) for width in widths) * self.heads * runs,)


@torch.library.custom_op("deltaproduct::triton_forward", mutates_args=())
@_on_its_device
def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, keep: bool, qk_l2norm: bool = False, precise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, final state, the states at segments' starts, the segments' summaries): the last two for a backward."""
    run = _Run(q, k, v, beta, g, cu_seqlens, scale, qk_l2norm, precise)
    layout = run.layout
    start = None if initial_state is None else initial_state.float().contiguous()
    o = torch.empty_like(v[:, :, 0], memory_format=torch.contiguous_format)
    final = run.states(layout.sequences)
    run.prepare()
    if layout.segmented:
        summary = run.empty(layout.all_segments, run.heads, run.key_dim, run.value_dim + run.key_dim)
        run.scan(segmented=True, summary=summary)
        kept: Tensor | None = run.chain(summary, start, final)
        run.scan(segmented=True, start=kept, o=o)
    else:
        summary, kept = run.empty(0), run.states(layout.all_segments) if keep else None
        run.scan(segmented=False, start=start, o=o, final=final, kept=kept)
    if kept is None or not keep:
        kept, summary = run.empty(0), run.empty(0)
    return o, final, kept, summary


@triton_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, keep: bool, qk_l2norm: bool = False, precise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = Layout.of(k, v, cu_seqlens, processors(k.device))
    heads, key_dim, value_dim = v.shape[3], k.shape[4], v.shape[4]

    def empty(*shape: int) -> Tensor:
        return k.new_empty(shape, dtype=torch.float32)

    o = torch.empty_like(v[:, :, 0], memory_format=torch.contiguous_format)
    final = empty(layout.sequences, heads, key_dim, value_dim)
    if not keep:
        return o, final, empty(0), empty(0)
    kept = empty(layout.all_segments, heads, key_dim, value_dim)
    wide = (layout.all_segments, heads, key_dim, value_dim + key_dim) if layout.segmented else (0,)
    return o, final, kept, empty(*wide)


@torch.library.custom_op("deltaproduct::triton_backward", mutates_args=())
@_on_its_device
def triton_backward(
    d_o: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, kept: Tensor,
    summary: Tensor, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool, precise: bool,
) -> Gradients:  # fmt: skip
    """The gradients of q, k, v, beta, g (empty where g is None) and the initial state."""
    run = _Run(q, k, v, beta, g, cu_seqlens, scale, qk_l2norm, precise)
    layout, work = run.layout, run.precision.work
    d_o = d_o.to(run.precision.dtype).contiguous()
    d_end = None if d_final is None else d_final.float().contiguous()
    d_q, d_k, d_v, d_beta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta))
    d_g = v.new_empty(0) if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    d_initial = run.states(layout.sequences)
    run.prepare()
    states, d_states = (run.states(layout.all_chunks, work) for _ in range(2))
    errors = torch.empty_like(run.v, dtype=work)
    run.scan(segmented=True, start=kept, states=states, errors=errors)
    # What the next kernel multiplies with; the gradient itself where that is as good.
    exact_d_v = d_v if d_v.dtype == work else torch.empty_like(errors)
    if layout.segmented:
        added = run.states(layout.all_segments)
        run.reverse(segmented=True, d_o=d_o, d_end=None, d_start=added)
        ends = run.chain(summary, d_end, d_initial, added=added)
        run.reverse(segmented=True, d_o=d_o, d_end=ends, d_start=None, d_v=exact_d_v, d_states=d_states)
    else:
        run.reverse(segmented=False, d_o=d_o, d_end=d_end, d_start=d_initial, d_v=exact_d_v, d_states=d_states)
    if exact_d_v is not d_v:
        d_v.copy_(exact_d_v)
    gradients_kernel[layout.all_chunks, k.shape[3]](
        run.q, run.k, run.beta, run.decays, d_o, run.prepared[1], errors, states, d_states, exact_d_v,
        d_q, d_k, d_beta, d_g, run.scale, *run.chunk_places,
        **run.sizes, **run.norm, V=run.value_dim,
    )  # fmt: skip
    return d_q, d_k, d_v, d_beta, d_g, d_initial


@triton_backward.register_fake
def _(
    d_o: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, kept: Tensor,
    summary: Tensor, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool, precise: bool,
) -> Gradients:  # fmt: skip
    return empty_gradients(q, k, v, beta, g, kept, cu_seqlens)


def _first(inputs: Tensors, kept: Sequence[Tensor], cotangents: Tensors, options: Sequence[Any]) -> Tensors:
    x, (scale, _, qk_l2norm, precise) = Arguments._make(inputs), options
    d_o, d_final = cotangent_of_output(x, cotangents[0]), cotangents[1]
    return as_given(x, triton_backward(d_o, d_final, *x[:5], *kept, x.cu_seqlens, scale, qk_l2norm, precise))


def _again(inputs: Tensors, cotangents: Tensors, options: Sequence[Any]) -> Tensors:
    scale, _, qk_l2norm, precise = options
    fast = partial(fused, scale=scale, qk_l2norm=qk_l2norm, precise=precise)
    rule = transforms.Rule(fast, partial(differentiable, scale=scale, qk_l2norm=qk_l2norm))
    return rule.once(cotangents[0], cotangents[1], inputs)


register_gradients(triton_forward, _first, _again)


def fused(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool, *, precise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator in Triton kernels; shapes as in `delta_product`. Returns (o [B,T,HV,V], final state)."""
    given = (x for x in (q, k, v, beta, g, initial_state) if x is not None)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return triton_forward(q, k, v, beta, g, initial_state, cu_seqlens, scale, keep, qk_l2norm, precise)[:2]


@torch.library.custom_op("deltaproduct::triton_step", mutates_args=())
def triton_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, qk_l2norm: bool
) -> tuple[Tensor, Tensor]:
    """(o [B,HV,V], the state after one token), shapes as in `delta_product_step`."""
    new_state = torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
    return _decode(q, k, v, beta, g, state, new_state, scale, qk_l2norm), new_state


@triton_step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, qk_l2norm: bool
) -> tuple[Tensor, Tensor]:
    new_state = torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
    return torch.empty_like(v[:, 0], memory_format=torch.contiguous_format), new_state


@torch.library.custom_op("deltaproduct::triton_step_inplace", mutates_args=("state",))
def triton_step_inplace(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, qk_l2norm: bool
) -> Tensor:
    """The same with the state overwritten: contiguous and float32."""
    return _decode(q, k, v, beta, g, state, state, scale, qk_l2norm)


@triton_step_inplace.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, qk_l2norm: bool
) -> Tensor:
    return torch.empty_like(v[:, 0], memory_format=torch.contiguous_format)


@_on_its_device
def _decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, new_state: Tensor, scale: float,
    qk_l2norm: bool,
) -> Tensor:  # fmt: skip
    batch, steps, heads, value_dim = v.shape
    key_dim = k.shape[3]
    o = torch.empty_like(v[:, 0], memory_format=torch.contiguous_format)
    q, k, v, beta, state = (x.contiguous() for x in (q, k, v, beta, state))
    g = None if g is None else g.contiguous()
    decode_kernel[lambda meta: (-(-value_dim // meta["BV"]) * heads * batch,)](
        q, k, v, beta, g, state, new_state, o, scale,
        H=k.shape[2], HV=heads, K=key_dim, V=value_dim, N=steps, BK=tile(key_dim), EPS=NORM_EPS,
        NORMALISE=qk_l2norm, GATED=g is not None,
    )  # fmt: skip
    return o


def decode(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, qk_l2norm: bool,
    *, precise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token, in one kernel unless there is a gradient; shapes as in `delta_product_step`: (o [B,HV,V], state)."""
    given = (x for x in (q, k, v, beta, g, state) if x is not None)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return triton_step(q, k, v, beta, g, state, scale, qk_l2norm)
    g = None if g is None else g.unsqueeze(1)
    q, k, v, beta = (x.unsqueeze(1) for x in (q, k, v, beta))
    o, state = fused(q, k, v, beta, g, state, None, scale, qk_l2norm, precise=precise)
    return o.squeeze(1), state
