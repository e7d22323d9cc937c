"""What a training run is: data, model, optimisation, seed. Everything that decides a run's numbers is in here."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from deltaproduct.errors import UsageError
from deltaproduct.layers.options import check_kinds, option
from deltaproduct.models import ModelConfig
from deltaproduct.models.config import reasons, strict_converter, usage_error
from deltaproduct.renamed import renamed_names

_CONVERTER = strict_converter()


@dataclass(frozen=True)
class OptimizerConfig:
    """What every kind of training has: AdamW with linear warm-up and a cosine, a number of steps, a seed.

    Attributes:
        kind: what it is that is trained on.
        smaller_batch: what to lower where a step does not fit into memory.

    Raises:
        UsageError: a value is impossible; the message names the field.
    """

    kind: ClassVar[str]
    smaller_batch: ClassVar[str]

    steps: int = option(350, "optimiser steps in all")
    seed: int = option(0, "decides initial weights and training data")
    lr: float = option(1e-2, "peak learning rate")
    min_lr_ratio: float = option(0.02, "what the cosine ends at, as a share of lr")
    warmup_steps: int = option(50, "steps of linear warm-up")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.99, "AdamW")
    eps: float = option(1e-8, "AdamW")
    weight_decay: float = option(0.0, "AdamW, on matrices only")
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    grad_accumulation: int = option(1, "micro-batches that a step's batch is split into")
    precision: str = option("float32", "float32, or bfloat16 for autocast (state and solves stay float32)")

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("steps", "grad_accumulation"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("steps", "warmup_steps"):
            self._require(name, getattr(self, name) < 2**53, "below 2⁵³")
        for name in ("lr", "eps"):
            self._require(name, getattr(self, name) > 0 and math.isfinite(getattr(self, name)), "positive")
        for name in ("warmup_steps", "weight_decay", "clip"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("min_lr_ratio", "beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._require("seed", 0 <= self.seed < 2**31, "between 0 and 2³¹ − 1")
        self._require("precision", self.precision in ("float32", "bfloat16"), "float32 or bfloat16")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {wanted}, not {getattr(self, name)}.")

    @property
    def largest_batch(self) -> int:
        """The most tokens that are computed at once, by all processes together."""
        raise NotImplementedError

    def learning_rate(self, step: int) -> float:
        """The rate of step 0 … steps−1: linear warm-up, then a cosine from lr to min_lr_ratio · lr."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        through = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * through)))


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """How a model is trained on a task: a curriculum of lengths.

    The curriculum's stage i trains at lengths[i] with batches of batch_sizes[i] sequences. It ends when the running
    mean of the loss falls below `stage_loss`, or after `stage_steps[i]` steps, whichever is set and comes first. The
    learning rate's schedule runs over all steps and takes no notice of stages. With `min_length`, all sequences of a
    batch have one length, drawn anew for each batch.
    """

    kind: ClassVar[str] = "a task"
    smaller_batch: ClassVar[str] = "batch_sizes or lengths, or raise grad_accumulation"

    task: str = option("S3", "what to learn; `deltaproduct tasks list` shows the names")
    lengths: tuple[int, ...] = option((8, 128), "curriculum of sequence lengths, BOS not counted")
    min_length: int | None = option(None, "draw each batch's length from this to its stage's; None: the stage's")
    batch_sizes: tuple[int, ...] = option(
        (256, 64), "sequences per step in each stage; a single number: the same in all"
    )
    stage_steps: tuple[int, ...] = option((), "most steps in each stage but the last; empty: no limit")
    stage_loss: float | None = option(0.1, "move on when the running mean of the loss is below this; None: never")
    num_samples: int | None = option(None, "train on this many sequences per stage, over and over; None: fresh")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("lengths", len(self.lengths) > 0 and min(self.lengths) >= 1, "one or more lengths of at least 1")
        shortest = min(self.lengths)
        fits = self.min_length is None or 1 <= self.min_length <= shortest
        self._require("min_length", fits, f"from 1 to the shortest of lengths, {shortest}")
        self._require("batch_sizes", len(self.batch_sizes) > 0 and min(self.batch_sizes) >= 1, "sizes of at least 1")
        if len(self.batch_sizes) not in (1, len(self.lengths)):
            raise UsageError(f"batch_sizes has {len(self.batch_sizes)} entries for {len(self.lengths)} lengths.")
        if any(size % self.grad_accumulation for size in self.batch_sizes):
            raise UsageError(f"grad_accumulation={self.grad_accumulation} does not divide {self.batch_sizes}.")
        if self.stage_steps and len(self.stage_steps) != len(self.lengths) - 1:
            wanted = len(self.lengths) - 1
            raise UsageError(f"stage_steps has {len(self.stage_steps)} entries; {wanted + 1} lengths need {wanted}.")
        self._require("stage_steps", all(n >= 1 for n in self.stage_steps), "steps of at least 1")
        if len(self.lengths) > 1 and not self.stage_steps and self.stage_loss is None:
            raise UsageError("A curriculum of several lengths needs stage_steps or stage_loss to say when to move on.")
        self._require("stage_loss", self.stage_loss is None or math.isfinite(self.stage_loss), "a finite number")
        smallest = max(self.batch_sizes)
        self._require(
            "num_samples", self.num_samples is None or self.num_samples >= smallest, f"at least a batch ({smallest})"
        )

    def batch_size(self, stage: int) -> int:
        return self.batch_sizes[stage if len(self.batch_sizes) > 1 else 0]

    @property
    def largest_batch(self) -> int:
        sizes = self.batch_sizes * (len(self.lengths) if len(self.batch_sizes) == 1 else 1)
        return max(size // self.grad_accumulation * (1 + length) for size, length in zip(sizes, self.lengths))


@dataclass(frozen=True)
class LanguageConfig(OptimizerConfig):
    """How a language model is trained on a corpus: the next token, in windows of `context` tokens."""

    kind: ClassVar[str] = "a corpus"
    smaller_batch: ClassVar[str] = "batch_size or context, or raise grad_accumulation"

    steps: int = option(1000, "optimiser steps in all")
    lr: float = option(2e-3, "peak learning rate")
    min_lr_ratio: float = option(0.1, "what the cosine ends at, as a share of lr")
    beta2: float = option(0.95, "AdamW")
    weight_decay: float = option(0.01, "AdamW, on matrices only")
    corpus: str = option("", "fingerprint of the corpus, so that a run is only continued on its own data")
    context: int = option(512, "T, tokens of a window")
    batch_size: int = option(16, "windows per step, over all processes")
    packed: bool = option(False, "let every document begin with an empty state, wherever it lies in a window")
    max_rise: float = option(2.0, "stop when the mean loss is this many nats above its lowest; 0: never")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("max_rise", 0 <= self.max_rise < math.inf, "0 or more")
        if self.batch_size % self.grad_accumulation:
            raise UsageError(
                f"grad_accumulation={self.grad_accumulation} does not divide batch_size={self.batch_size}."
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @property
    def largest_batch(self) -> int:
        return self.tokens_per_step // self.grad_accumulation


Settings = TypeVar("Settings", bound=OptimizerConfig, covariant=True)


@dataclass(frozen=True)
class Run(Generic[Settings]):
    """A run: how to train, and what."""

    training: Settings
    model: ModelConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"training": asdict(self.training), "model": self.model.to_dict()}

    @staticmethod
    def from_dict(values: Any) -> "Run[Any]":
        """The inverse of `to_dict`: its settings are those of a corpus where they name one, else of a task.

        Raises:
            UsageError: fields are unknown, missing or mistyped.
        """
        if not isinstance(values, dict) or set(values) != {"training", "model"}:
            raise UsageError("This is not a run's configuration: it should have the keys training and model.")
        training = values["training"]
        settings = LanguageConfig if isinstance(training, dict) and "corpus" in training else TrainConfig
        try:
            found = _CONVERTER.structure(training, settings)
        except Exception as e:
            if mistake := usage_error(e):
                raise mistake from e
            raise UsageError(f"This is not a training configuration: {reasons(e, 'training')}.") from e
        return Run(found, ModelConfig.from_dict(values["model"]))

    def differences(self, other: "Run[Any]") -> list[str]:
        """The fields in which two runs differ, as "name: mine and theirs"; or what each is trained on."""
        if type(self.training) is not type(other.training):
            return [f"training on {self.training.kind} and on {other.training.kind}"]
        mine, theirs = vars(self.training), vars(other.training)
        pairs = {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
        pairs |= self.model.differences(other.model)
        return [f"{name}: {a} and {b}" for name, (a, b) in pairs.items()]


if TYPE_CHECKING:  # a type checker would take any name for one of this module's
    AnyRun = Run[Any]
    RunConfig = Run[TrainConfig]
    LanguageRun = Run[LanguageConfig]
    OptimiserConfig = OptimizerConfig
else:
    __getattr__ = renamed_names(
        __name__, {"RunConfig": "Run", "LanguageRun": "Run", "AnyRun": "Run", "OptimiserConfig": "OptimizerConfig"}
    )
