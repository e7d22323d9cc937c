"""`deltaproduct lm train`: train a language model on a corpus; by a launcher or under torchrun, on many processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from deltaproduct.cli.flags import (
    BackendName,
    check_given,
    chosen_mixers,
    config_flags,
    differing_options,
    model_flags,
    model_of,
    stored_values,
    value_of,
    values_of,
    with_options,
)
from deltaproduct.cli.outputs import check_folder, say
from deltaproduct.errors import UsageError
from deltaproduct.launchers.options import RAY_RANK_OPTIONS, SLURM_RANK_OPTIONS, parse_options
from deltaproduct.training.config import LanguageConfig, Run
from deltaproduct.training.corpus_place import find_corpus, is_corpus
from deltaproduct.training.folder_kinds import CONFIG, why_not
from deltaproduct.training.presets import PRESETS, get_preset, preset_model

if TYPE_CHECKING:
    from deltaproduct.corpus import Corpus
    from deltaproduct.launchers.ranks import RankLauncher

DEFAULT = "tiny"
_ModelFlags: Any = model_flags(preset_model(DEFAULT))
_TrainFlags: Any = config_flags(
    "LanguageFlags", LanguageConfig, get_preset(DEFAULT).training, group="training", leave_out=("corpus",)
)


@dataclass(kw_only=True)
class LmTrain(_ModelFlags, _TrainFlags):  # type: ignore[misc]
    """Train a language model on a corpus that `lm prepare` made.

    To train on many processes have --launcher start them, or start this with torchrun.
    """

    preset: Annotated[str, tyro.conf.arg(help=f"what the other flags default to: {', '.join(PRESETS)}")] = DEFAULT
    data: Annotated[Path, tyro.conf.arg(help="folder of the corpus; with --resume where the run left it")]
    out: Annotated[Path, tyro.conf.arg(help="folder of the run; created")]
    resume: Annotated[bool, tyro.conf.arg(help="continue the run in --out; other flags default to its own")] = False
    allow_pickled_optimizer: Annotated[
        bool,
        tyro.conf.arg(help="with --resume: read also an optimiser in pickles, as earlier versions saved it"),
    ] = False
    device: Annotated[str, tyro.conf.arg(help="auto, cpu or cuda")] = "auto"
    backend: BackendName = "auto"
    parallel: Annotated[str, tyro.conf.arg(help="ddp: every process has the model; fsdp: each has a share")] = "ddp"
    context_parallel: Annotated[int, tyro.conf.arg(help="processes that each sequence is divided over")] = 1
    gradient_checkpointing: Annotated[
        bool, tyro.conf.arg(help="run blocks again in the backward pass, which saves memory")
    ] = False
    compile: Annotated[bool, tyro.conf.arg(help="torch.compile every block")] = False
    log_every: Annotated[int, tyro.conf.arg(help="steps between metric lines")] = 10
    checkpoint_every: Annotated[int, tyro.conf.arg(help="steps between checkpoints")] = 100
    verify: Annotated[bool, tyro.conf.arg(help="compare the corpus' sha256 before training")] = True

    launcher: Annotated[
        Literal["local", "slurm", "ray"],
        tyro.conf.arg(help="local: this process; else a cluster's, with --data and --out on a disk that it shares"),
    ] = "local"
    launcher_options: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME=VALUE,…",
            help="what to ask of a cluster, such as nodes=2,gpus_per_node=8,partition=gpu of slurm or "
            f"address=auto,num_workers=16 of ray. slurm: {', '.join(SLURM_RANK_OPTIONS)}; "
            f"ray: {', '.join(RAY_RANK_OPTIONS)}",
        ),
    ] = None

    def run(self) -> None:
        for name in ("log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")
        check_folder(self.out)
        from deltaproduct.corpus.sidecar import SIDECAR
        from deltaproduct.launchers import get_rank_launcher
        from deltaproduct.training.run_folder import check_steps

        if (self.out / CONFIG).is_file() and (found := why_not(self.out, "language run")):
            raise UsageError(found)
        stored = stored_run(self.out) if self.resume else None
        if stored is not None:
            check_steps(self.out, stored, self.steps)
        if stored is not None and (self.data / SIDECAR).is_file() and not is_corpus(self.data, stored.training.corpus):
            raise UsageError(
                f"{self.out} was trained on another corpus than {self.data}; give that one with --data, or begin a new "
                "run with another --out."
            )
        launcher = get_rank_launcher(self.launcher, self.out, parse_options(self.launcher_options))
        last = self.train() if launcher is None else self._train_by(launcher)
        if last:
            say(
                f"{self.out}: {last['tokens']:,} tokens in {last['seconds']:,.0f} s; loss {last['loss']:.3f}, "
                f"validation {last['validation_loss']:.3f} nats a token"
            )

    def train(self) -> dict[str, Any]:
        """Train on the processes that all call this; the last line of the metrics, on the one that writes them, or
        nothing."""
        from deltaproduct.corpus import Corpus
        from deltaproduct.training.distributed import Ranks
        from deltaproduct.training.loop import train
        from deltaproduct.training.metrics import last_metrics
        from deltaproduct.training.objectives.language import LanguageObjective
        from deltaproduct.training.run_folder import METRICS

        with Ranks.started(self.device, context_parallel=self.context_parallel) as ranks:
            corpus = Corpus.open(self.data, verify=self.verify and ranks.first)
            run = self._run_on(corpus)
            train(
                run,
                self.out,
                LanguageObjective(run.training, corpus),
                ranks,
                resume=self.resume,
                backend=self.backend,
                parallel=self.parallel,
                gradient_checkpointing=self.gradient_checkpointing,
                compile=self.compile,
                log_every=self.log_every,
                checkpoint_every=self.checkpoint_every,
                allow_pickled_optimizer=self.allow_pickled_optimizer,
            )
            return (last_metrics(self.out / METRICS) or {}) if ranks.first else {}

    def _train_by(self, launcher: RankLauncher) -> dict[str, Any]:
        """Have the launcher's processes train. What can be refused is refused here, before a cluster's queue."""
        from deltaproduct.corpus import Corpus
        from deltaproduct.launchers.ranks import followed
        from deltaproduct.training.metrics import last_metrics
        from deltaproduct.training.run_folder import METRICS

        if "RANK" in os.environ:
            raise UsageError("A launcher starts the processes itself; call the command without torchrun.")
        if (self.out / CONFIG).exists() and not self.resume:
            raise UsageError(f"{self.out} already holds a run; add --resume to continue it, or choose another folder.")
        run = self._run_on(Corpus.open(self.data, verify=False))
        # With `resume`, as ranks that have to be started again go on from the checkpoint; a new folder is just begun.
        there = replace(self, data=self.data.absolute(), out=self.out.absolute(), resume=True)
        with followed(self.out / METRICS, f"{self.out.name} seed {self.seed}", run.training.steps) as tick:
            launcher.run(there.train, tick)
        return last_metrics(self.out / METRICS) or {}

    def _run_on(self, corpus: Corpus) -> Run[LanguageConfig]:
        stored = stored_run(self.out) if self.resume and (self.out / CONFIG).is_file() else None
        model = model_of(self, corpus.vocab_size, corpus.vocab_size, None if stored is None else stored.model)
        return Run(LanguageConfig(corpus=corpus.fingerprint, **values_of(self, LanguageConfig)), model)


def stored_run(out: Path) -> Run[LanguageConfig] | None:
    """The run that --resume continues; None where a process of torchrun may begin it, as it has to be able to start all
    its processes again with the same command.

    Raises:
        UsageError: there is no run of a language model.
    """
    if found := why_not(out, "language run"):
        raise UsageError(found)
    if (out / CONFIG).is_file():
        from deltaproduct.training.run_folder import read_run

        stored = read_run(out)
        if not isinstance(stored.training, LanguageConfig):
            raise UsageError(f"{out} is a run on a task; `deltaproduct train --resume` continues it.")
        return stored
    if "RANK" in os.environ:
        return None
    raise UsageError(f"{out} holds no run to resume; leave out --resume to begin one.")


def _stored(arguments: Sequence[str]) -> Run[LanguageConfig] | None:
    """The run that --resume continues, if these arguments are not a question for help."""
    out = value_of("--out", arguments)
    if out is None or "--resume" not in arguments or not {"-h", "--help"}.isdisjoint(arguments):
        return None
    return stored_run(Path(out))


def _of_preset(arguments: Sequence[str]) -> dict[str, Any]:
    """What the preset of the arguments says of the model."""
    name, steps = value_of("--preset", arguments) or DEFAULT, value_of("--num-householder", arguments)
    plain = steps is not None and steps.isascii() and steps.isdecimal() and len(steps) < 10
    return preset_model(name, int(steps or 0)) if plain else preset_model(name)


def command(arguments: Sequence[str]) -> type[LmTrain]:
    """`LmTrain` with the options of the mixers that are asked for, or that the run to be continued has.

    Raises:
        UsageError: a flag is given that none of these mixers has a use for.
    """
    stored = _stored(arguments)
    names = ("deltaproduct",) if stored is None else tuple(options.name for options in stored.model.mixers)
    mixers = chosen_mixers(arguments, names)
    check_given(mixers, arguments)
    leave_out = () if stored is None else differing_options(stored.model)
    return with_options(LmTrain, mixers, _of_preset(arguments), leave_out)


def defaults(arguments: Sequence[str]) -> LmTrain:
    """What the flags default to: with --resume the run in --out and its corpus, else what --preset says."""
    out, name = value_of("--out", arguments), value_of("--preset", arguments) or DEFAULT
    missing: dict[str, Any] = {"data": tyro.MISSING, "out": tyro.MISSING}
    stored = _stored(arguments)
    if stored is not None and out is not None:
        values = stored_values(stored.model, arguments) | vars(stored.training)
        if value_of("--data", arguments) is None:
            missing["data"] = find_corpus(Path(out), stored.training.corpus)
    else:
        values = _of_preset(arguments) | dict(get_preset(name).training)
    kind = command(arguments)
    known = {f.name for f in fields(kind)}
    return kind(preset=name, **missing, **{k: v for k, v in values.items() if k in known})
