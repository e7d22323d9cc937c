"""Decoding one token, beside the time in which memory can deliver what a token needs.

With a batch of one, a step reads every weight once and does two operations with it: the memory sets the pace. The floor
is therefore measured, in the same run and in turn with the step: as many bytes read as there are weights, and as many
copied as there are states.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaproduct.benchmarks.correctness import judge
from deltaproduct.benchmarks.report import GenerateBenchmark, GenerateTimes
from deltaproduct.benchmarks.settings import BenchmarkSettings
from deltaproduct.benchmarks.shapes import OpShape
from deltaproduct.benchmarks.timing import interleaved
from deltaproduct.benchmarks.workload import token_inputs
from deltaproduct.errors import UsageError, first_line
from deltaproduct.layers import DeltaProduct
from deltaproduct.models import Decoder, ModelConfig, SequenceModel
from deltaproduct.models.size import FLOAT
from deltaproduct.ops import BACKENDS, delta_product_step
from deltaproduct.renamed import renamed_names

GENERATE_MODEL = ModelConfig.build(
    vocab_size=256, num_labels=256, hidden_size=1024, num_hidden_layers=24, num_heads=8, head_dim=128, num_householder=2
)
QUICK_GENERATE_MODEL = GENERATE_MODEL.changed(hidden_size=64, num_hidden_layers=2, num_heads=2, head_dim=16)
REPEATS, QUICK_REPEATS = 20, 5
CHECKED_LENGTH = 16  # tokens compared between stepwise and whole
WARM_UP = 3  # calls of each before the first that is timed
COLUMNS = 4096  # of the matrix as which a matrix-vector product reads the weights; from 1024 on it hardly matters


def bench_generate(
    config: ModelConfig | None = None,
    *,
    batch_size: int = 1,
    device: str = "auto",
    repeats: int | None = None,
    quick: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> GenerateBenchmark:
    """Check, then time, decoding with the carried state, in float32.

    Args:
        config: a model of DeltaProduct layers; None is GENERATE_MODEL, or QUICK_GENERATE_MODEL when `quick`.
        batch_size: sequences decoded at once.
        device: "auto", "cpu" or "cuda".
        repeats: timed calls; None is 20, or 5 when `quick`.
        seed: of the weights and of the tokens.
        progress: called with a line before each stage.

    Raises:
        UsageError: an unknown device, fewer than one repeat or sequence, or a layer that is no DeltaProduct.
    """
    say = progress or (lambda line: None)
    if repeats is None:
        repeats = QUICK_REPEATS if quick else REPEATS
    settings = BenchmarkSettings.of(device=device, repeats=repeats, backward=False, seed=seed)
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}.")
    config = config or (QUICK_GENERATE_MODEL if quick else GENERATE_MODEL)
    say("building the model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SequenceModel(config).to(settings.device).eval()
    if any(not isinstance(mixer, DeltaProduct) for mixer in model.mixers()):
        raise UsageError("bench generate measures models whose layers are all DeltaProduct or its presets.")

    # Of an embedding that is not the head as well, a step reads only the rows of its tokens.
    table = 0 if model.is_tied else model.embedding.weight.numel()
    rows = 0 if config.tie_word_embeddings else batch_size * config.hidden_size
    weight_bytes = FLOAT * (model.num_parameters - table + rows)
    state_bytes = FLOAT * model.state_size * batch_size
    tokens = torch.randint(
        config.vocab_size, (batch_size, CHECKED_LENGTH), generator=torch.Generator().manual_seed(seed)
    ).to(settings.device)
    limit = stepwise_error_limit(config)
    say(f"checking {CHECKED_LENGTH} tokens")
    found = _check(model, tokens, limit)
    times = None
    if found["status"] == "timed":
        say(f"timing {settings.repeats} tokens")
        times = _measure(model, tokens, weight_bytes, state_bytes, settings)
    return GenerateBenchmark(
        **settings.circumstances(),
        error_limit=limit,
        model=config.to_dict(),
        batch_size=batch_size,
        num_parameters=model.num_parameters,
        weight_bytes=weight_bytes,
        state_bytes=state_bytes,
        moved_bytes=weight_bytes + 2 * state_bytes,
        checked_length=CHECKED_LENGTH,
        error=found.get("error"),
        reason=found["reason"],
        times=times,
    )


def stepwise_error_limit(config: ModelConfig) -> float:
    """How far stepwise and whole may be apart, relative to max|logits|: 8·u·L·(√n + T·N).

    Both do the same arithmetic in another order. A sum of n terms then differs by about √n·u, u = 2⁻²⁴ being float32's
    unit roundoff and n the longest sum of a layer; T·N transitions of norm ≤ 1 each add a rounding of their own; and
    the residual stream adds up what its L layers do. The factor 8 is for the largest of many entries being above
    their typical size.
    """
    longest = max(config.hidden_size, config.mlp_size, *(x.num_heads * x.head_dim for x in config.mixers))
    steps = CHECKED_LENGTH * max(getattr(x, "num_householder", 1) for x in config.mixers)
    return 8 * 2.0**-24 * config.num_hidden_layers * (longest**0.5 + steps)


def _decoders(model: SequenceModel, batch_size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways to decode: each takes the next tokens [B], carries the state itself and returns logits [B,labels]."""
    state = None

    def call(tokens: Tensor) -> Tensor:
        nonlocal state
        with torch.inference_mode():
            logits, state = model(tokens[:, None], state)
        return logits[:, 0]

    ways: dict[str, Callable[[Tensor], Tensor]] = {"model": call}
    if BACKENDS["cpu"].unsupported_reason(model.device, torch.float32) is None:
        ways["decoder"] = Decoder(model, batch_size)
    return ways


def _check(model: SequenceModel, tokens: Tensor, limit: float) -> dict[str, Any]:
    """Whether one token after the other gives the logits of all at once, in every way; tokens [B,T]."""
    try:
        with torch.inference_mode():
            whole, _ = model(tokens)
        ways = _decoders(model, tokens.shape[0])
        got = {way: torch.stack([decode(x) for x in tokens.T], dim=1) for way, decode in ways.items()}
    except Exception as e:
        return {"status": "failed", "reason": first_line(e, with_kind=True)}
    return judge(got, dict.fromkeys(got, whole.double()), limit)


def _measure(
    model: SequenceModel, tokens: Tensor, weight_bytes: int, state_bytes: int, settings: BenchmarkSettings
) -> GenerateTimes:
    """Time a token, its recurrence, and the memory traffic that it cannot do without."""
    reads = _reads(weight_bytes, settings.device)
    # Ones, not zeros: pages that nobody has written are all one and the same page, which the cache holds.
    source, target = (torch.ones(max(1, state_bytes // FLOAT), device=settings.device) for _ in range(2))
    ways = {way: _rounds(decode, tokens) for way, decode in _decoders(model, tokens.shape[0]).items()}
    runs: dict[str, Callable[[], object]] = {
        **ways,
        "recurrent": _recurrences(model, tokens.shape[0], settings),
        "states": lambda: target.copy_(source),
        **reads,
    }
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    times = interleaved(runs, repeats=settings.repeats, device=settings.device)
    token_by = {way: times[way] for way in ways}
    token = min(token_by.values(), key=lambda timing: timing.median_ms)
    weights_by = {way: times[way] for way in reads}
    weights = min(weights_by.values(), key=lambda timing: timing.median_ms)
    floor_ms = weights.median_ms + times["states"].median_ms
    return GenerateTimes(
        token=token,
        token_by=token_by,
        recurrent=times["recurrent"],
        weights=weights,
        weights_by=weights_by,
        states=times["states"],
        floor_ms=floor_ms,
        floor_gb_per_s=(weight_bytes + 2 * state_bytes) / floor_ms / 1e6,
        ratio=token.median_ms / floor_ms,
        tokens_per_second=1e3 * tokens.shape[0] / token.median_ms,
    )


def _rounds(decode: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], Tensor]:
    """Decode a column of tokens [B,T] with each call, going round."""
    columns = itertools.cycle(tokens.T)
    return lambda: decode(next(columns))


def _recurrences(model: SequenceModel, batch: int, settings: BenchmarkSettings) -> Callable[[], None]:
    """One token's recurrent step of every layer and nothing else; a layer has its own inputs and carries its state."""
    generator = torch.Generator().manual_seed(settings.seed)
    inputs: list[dict[str, Any]] = []
    states: list[Tensor] = []
    for layer in model.mixers():
        assert isinstance(layer, DeltaProduct)  # bench_generate has made sure
        shape = OpShape(
            1, 1, layer.num_v_heads, layer.head_dim, layer.num_householder, layer.use_forget_gate, layer.head_v_dim
        )
        x = token_inputs(shape, batch, generator, num_heads=layer.num_heads)
        x = {name: y.to(settings.device) for name, y in x.items()}
        states.append(x.pop("state"))
        inputs.append(x)

    def run() -> None:
        with torch.inference_mode():
            for i, x in enumerate(inputs):
                _, states[i] = delta_product_step(**x, state=states[i])

    return run


def _reads(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to read `size` bytes once; which is fastest depends on the machine and on its libraries.

    They lie in one piece, since going from tensor to tensor is the model's cost and not the memory's.
    """
    rows = -(-size // (FLOAT * COLUMNS))
    matrix = torch.ones(rows, COLUMNS, device=device)
    flat, vector = matrix.view(-1), torch.ones(COLUMNS, device=device)
    return {
        "sum": lambda: flat.sum(),
        "dot": lambda: torch.dot(flat, flat),
        "matrix-vector": lambda: torch.mv(matrix, vector),
    }


__getattr__ = renamed_names(
    __name__,
    {
        "STEP_MODEL": "GENERATE_MODEL",
        "QUICK_STEP_MODEL": "QUICK_GENERATE_MODEL",
        "bench_step": "bench_generate",
        "error_limit": "stepwise_error_limit",
    },
)
