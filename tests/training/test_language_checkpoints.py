"""Checkpoints of language runs: read on any number of ranks, never run, and refused in one line if they are odd."""

import io
import math
import pickle
import re
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from commands import run as command
from corpora import corpus_of_words
from ranks import on_ranks
from run_folder import metrics
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from deltaproduct.errors import UsageError
from deltaproduct.files import MANIFEST, read_json, replaced_folder, write_json
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.training import LanguageConfig, Run, loop
from deltaproduct.training.checkpoint import COUNTED, MOMENTS, Progress, load_checkpoint, save_checkpoint
from deltaproduct.training.distributed import Ranks
from deltaproduct.training.loop import OneProcess, new_optimizer
from deltaproduct.training.objectives.language import LanguageLoss, LossTrend

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # by what saves as it was once
STEPS, DONE = 20, 8
MODEL = ModelConfig.build(257, 257, hidden_size=16, num_hidden_layers=1, num_heads=2, head_dim=4, num_householder=2,
                    intermediate_size=24, tie_word_embeddings=True)  # fmt: skip
CONFIG = Run(LanguageConfig(steps=STEPS, corpus="none", context=32, batch_size=4), MODEL)
ALONE = OneProcess(torch.device("cpu"))
SHARD = "optimizer-0-of-1.safetensors"
OLD = "__0_0.distcp"
PROGRESS = Progress(LossTrend(4.0, 3.5), DONE, 1.5)


def fresh(
    ranks: OneProcess = ALONE, parallel: str = "ddp"
) -> tuple[torch.nn.Module, SequenceModel, torch.optim.Optimizer]:
    """(the module around the model, the model, an optimiser that has not made a step)"""
    torch.manual_seed(0)
    model = SequenceModel(MODEL)
    wrapped = ranks.wrap(LanguageLoss(model), parallel, blocks=model.blocks, precision="float32")
    return wrapped, model, new_optimizer(model, CONFIG.training)


def moment_of(name: str, moment: str, shape: torch.Size) -> torch.Tensor:
    """A value that no other moment, parameter or row has."""
    generator = torch.Generator().manual_seed(sum(map(ord, name + moment)))
    return torch.rand(shape, generator=generator) + 1e-3


def stepped(ranks: OneProcess = ALONE, parallel: str = "ddp") -> tuple[Any, SequenceModel, torch.optim.Optimizer]:
    """`fresh` with an optimiser that says to have made DONE steps, with the moments of `moment_of`."""
    wrapped, model, optimizer = fresh(ranks, parallel)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        optimizer.state[p]["step"].fill_(DONE)
        for moment in MOMENTS:
            x, value = optimizer.state[p][moment], moment_of(name, moment, p.shape)
            if isinstance(x, DTensor):
                mine = [*value.chunk(ranks.size), *[value[:0]] * ranks.size][ranks.rank]  # there may be fewer chunks
                x.to_local().copy_(mine)
            else:
                x.copy_(value)
    return wrapped, model, optimizer


def save_pickled(
    folder: Path, model: Any, optimizer: Any, progress: Any, config: Run, ranks: OneProcess, wrapped: Any
) -> None:
    """What `save_checkpoint` did of a language run before this format was there."""
    with replaced_folder(folder) as new:
        dcp.save({"optimizer": get_optimizer_state_dict(wrapped, optimizer)}, checkpoint_id=new, no_dist=True)
        model.write_files(new)
        write_json(new / "training.json", {"progress": progress.to_dict(), "config": config.to_dict()})


def save(
    folder: Path, wrapped: Any, model: Any, optimizer: Any, *, progress: Any = PROGRESS, ranks: OneProcess = ALONE
) -> None:
    save_checkpoint(folder, model, optimizer, progress, CONFIG, ranks, wrapped)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save(folder, *stepped())
    return folder


@pytest.fixture(scope="module")
def pickled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pickled") / "checkpoint"
    wrapped, model, optimizer = stepped()
    save_pickled(folder, model, optimizer, PROGRESS, CONFIG, ALONE, wrapped)
    return folder


def edited(folder: Path, to: Path, edit: Callable[[Path], Any]) -> Path:
    """A copy of a checkpoint that was changed by somebody who then made its manifest anew."""
    with replaced_folder(to) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
        (new / MANIFEST).unlink()
        edit(new)
    return to


def load(folder: Path, **options: Any) -> tuple[Progress[LossTrend], SequenceModel, torch.optim.Optimizer]:
    wrapped, model, optimizer = fresh()
    return load_checkpoint(folder, model, optimizer, LossTrend, CONFIG, ALONE, wrapped, **options), model, optimizer


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_restored(model: SequenceModel, optimizer: torch.optim.Optimizer) -> None:
    for name, p in model.named_parameters():
        assert float(optimizer.state[p]["step"]) == DONE
        for moment in MOMENTS:
            x = optimizer.state[p][moment]
            whole = x.full_tensor() if isinstance(x, DTensor) else x
            assert torch.equal(whole, moment_of(name, moment, p.shape)), (name, moment)


def save_on(folder: Path, parallel: str) -> None:
    with Ranks.started("cpu") as ranks:
        save(folder, *stepped(ranks, parallel), ranks=ranks)


def load_on(folder: Path, parallel: str, allow: bool = False) -> None:
    with Ranks.started("cpu") as ranks:
        wrapped, model, optimizer = fresh(ranks, parallel)
        progress = load_checkpoint(
            folder, model, optimizer, LossTrend, CONFIG, ranks, wrapped, allow_pickled_optimizer=allow
        )
        assert progress == PROGRESS
        assert_restored(model, optimizer)


@pytest.mark.slow("ranks")
@pytest.mark.parametrize(
    ("before", "after"),
    [(("fsdp", 3), ("fsdp", 2)), (("fsdp", 2), ("ddp", 3)), (("ddp", 3), ("fsdp", 2)), (("one", 1), ("fsdp", 3))],
)  # fmt: skip
def test_as_many_ranks_as_there_are_read_what_others_wrote(tmp_path, before, after):
    for (parallel, size), work in ((before, save_on), (after, load_on)):
        on_ranks(size, work, tmp_path / "c", parallel) if size > 1 else work(tmp_path / "c", "ddp")
    files = {p.name for p in (tmp_path / "c").iterdir()}
    assert {name for name in files if name.startswith("optimizer")} == {
        "optimizer.json", *(f"optimizer-{rank}-of-{before[1]}.safetensors" for rank in range(before[1]))
    }  # fmt: skip
    assert set(read_json(tmp_path / "c" / MANIFEST)["files"]) == files - {MANIFEST}
    assert files - {MANIFEST} == {name for name in files if name.endswith((".json", ".safetensors"))} - {MANIFEST}


def test_one_process(saved):
    progress, model, optimizer = load(saved)
    assert progress == PROGRESS
    assert_restored(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == CONFIG.training.lr


def test_a_parameter_without_a_gradient(tmp_path):
    wrapped, model, optimizer = stepped()
    unused = model.norm.weight
    del optimizer.state[unused]
    save(tmp_path / "c", wrapped, model, optimizer)
    _, model, optimizer = load(tmp_path / "c")
    state = optimizer.state[model.norm.weight]
    assert float(state["step"]) == 0 and not any(state[moment].any() for moment in MOMENTS)


def test_steps_that_float32_cannot_count(tmp_path):
    wrapped, model, optimizer = stepped()
    for p in model.parameters():
        optimizer.state[p]["step"].fill_(COUNTED).add_(1)
    config = Run(LanguageConfig(steps=2**30, corpus="none"), MODEL)
    progress = Progress(LossTrend(4.0, 3.5), COUNTED + 5, 1.5)
    save_checkpoint(tmp_path / "c", model, optimizer, progress, config, ALONE, wrapped)
    wrapped, model, optimizer = fresh()
    assert load_checkpoint(tmp_path / "c", model, optimizer, LossTrend, config, ALONE, wrapped) == progress


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        values = safetensors.torch.load_file(folder / SHARD)
        change(values)
        safetensors.torch.save_file(values, folder / SHARD)

    return edit


def state(change: Callable[[dict[str, Any]], Any], file: str = "optimizer.json") -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        values = read_json(folder / file)
        change(values)
        write_json(folder / file, values)

    return edit


def progress(**changed: Any) -> Callable[[Path], Any]:
    return state(lambda values: values["progress"].update(changed), "training.json")


def without(*keys: str, file: str = "optimizer.json") -> Callable[[Path], Any]:
    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[int(key) if isinstance(values, list) else key]
        del values[int(keys[-1]) if isinstance(values, list) else keys[-1]]

    return state(change, file)


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


NORM, HEAD = "exp_avg.norm.weight", "exp_avg_sq.embedding.weight"
ODD = {
    "no index": (lambda d: (d / "optimizer.json").unlink(), "has no optimizer.json"),
    "an empty index": (text("optimizer.json", ""), "optimizer.json is not valid JSON"),
    "a list for an index": (text("optimizer.json", "[]"), "damaged or of another version"),
    "another format": (state(lambda v: v.update(format=2)), "damaged or of another version"),
    "a format that is true": (state(lambda v: v.update(format=True)), "damaged or of another version"),
    "another entry": (state(lambda v: v.update(code="x")), "damaged or of another version"),
    "no steps": (without("steps"), "damaged or of another version"),
    "steps of another parameter": (state(lambda v: v["steps"].update(x=8)), "of other parameters: it has \"x\""),
    "steps of one less": (without("steps", "norm.weight"), "of other parameters: it lacks norm.weight"),
    "steps that are negative": (state(lambda v: v["steps"].update({"norm.weight": -8})), "no number of steps for norm"),
    "steps that are no integer": (state(lambda v: v["steps"].update({"norm.weight": 8.0})), "no number of steps"),
    "steps that are null": (state(lambda v: v["steps"].update({"norm.weight": None})), "no number of steps for norm"),
    "steps of another time": (state(lambda v: v["steps"].update({"norm.weight": 9})), "norm.weight 9 times, .* done 8"),
    "steps beyond counting": (state(lambda v: v["steps"].update({"norm.weight": 10**90})), "1.67.* times, .* done 8"),
    "no steps, but moments": (state(lambda v: v["steps"].update({"norm.weight": 0})), "norm.weight 0 times"),
    "a file outside": (state(lambda v: v.update(files=["../x.safetensors"])), "'../x.safetensors'"),
    "a file that is none": (state(lambda v: v.update(files=[1])), "names the file 1"),
    "a file twice": (state(lambda v: v["files"].append(SHARD)), "twice"),
    "no files": (state(lambda v: v.update(files=[])), "has 0 rows"),
    "a file of something else": (state(lambda v: v.update(files=["model.safetensors"])), "does not have"),
    "a file that is no tensors": (state(lambda v: v.update(files=["config.json"])), "cannot be read"),
    "one group": (without("groups", "0"), "2 groups"),
    "groups that are none": (state(lambda v: v.update(groups=[1, 2])), "Group 0 .* does not have params"),
    "a group without betas": (without("groups", "1", "betas"), "Group 1 .* does not have"),
    "another weight decay": (state(lambda v: v["groups"][0].update(weight_decay=9.0)), "0 .* another weight_decay"),
    "other betas": (state(lambda v: v["groups"][1].update(betas=[0.9, 0.5])), "Group 1 .* another betas"),
    "betas of another kind": (state(lambda v: v["groups"][0].update(betas="fast")), "Group 0 .* another betas"),
    "another eps": (state(lambda v: v["groups"][0].update(eps=1e-3)), "Group 0 .* another eps"),
    "ascending": (state(lambda v: v["groups"][0].update(maximize=True)), "Group 0 .* another maximize"),
    "a rate that is true": (state(lambda v: v["groups"][0].update(lr=True)), "Group 0 .* no learning rate"),
    "a negative rate": (state(lambda v: v["groups"][0].update(lr=-1.0)), "Group 0 .* no learning rate"),
    "a rate of another kind": (state(lambda v: v["groups"][1].update(lr=[1])), "Group 1 .* no learning rate"),
    "another order": (state(lambda v: v["groups"][0]["params"].reverse()), "Group 0 .* of other parameters"),
    "an empty file": (text(SHARD, ""), "cannot be read"),
    "no safetensors": (text(SHARD, "x" * 500), "cannot be read"),
    "a cut file": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-4]), "cannot be read"),
    "a header beyond the file": (lambda d: (d / SHARD).write_bytes(struct.pack("<Q", 2**40) + b"{}"), "cannot be read"),
    "no tensors": (tensors(dict.clear), "has 0 rows"),
    "a parameter less": (tensors(lambda t: t.pop(NORM)), "0 rows of exp_avg.norm.weight, which has 16"),
    "a parameter more": (tensors(lambda t: t.update(x=torch.zeros(1))), "holds 'x'"),
    "a row less": (tensors(lambda t: t.update({HEAD: t[HEAD][:-1].clone()})), "256 rows of .*, which has 257"),
    "another width": (tensors(lambda t: t.update({HEAD: t[HEAD][:, 1:].clone()})), r"shape \[257, 15\]"),
    "another rank": (tensors(lambda t: t.update({HEAD: t[HEAD][0].clone()})), r"shape \[16\]"),
    "a number": (tensors(lambda t: t.update({NORM: torch.tensor(1.0)})), r"shape \[\]"),
    "integers": (tensors(lambda t: t.update({NORM: t[NORM].long()})), "torch.int64, not torch.float32"),
    "half precision": (tensors(lambda t: t.update({NORM: t[NORM].half()})), "torch.float16, not torch.float32"),
    "not a number": (tensors(lambda t: t[NORM].fill_(math.nan)), "impossible numbers in exp_avg of norm.weight"),
    "infinity": (tensors(lambda t: t[HEAD][3].fill_(math.inf)), "impossible numbers in exp_avg_sq of embedding"),
    "a negative square": (tensors(lambda t: t[HEAD][256].neg_()), "impossible numbers in exp_avg_sq of embedding"),
    "no training.json": (lambda d: (d / "training.json").unlink(), "has no training.json"),
    "training.json of another shape": (text("training.json", "[1]"), "training.json is damaged: it holds no entries"),
    "a progress of another shape": (state(lambda v: v.update(progress=8), "training.json"), "does not say how far"),
    "a field less": (without("progress", "seconds", file="training.json"), "does not say how far"),
    "a field more": (progress(code="x"), "does not say how far"),
    "a negative step": (progress(step=-1), "step must be a whole number from 0 to 20, not -1"),
    "a step beyond the last": (progress(step=21), "from 0 to 20, not 21"),
    "a long step": (progress(step=10**4000), "an integer of 4,001 digits"),
    "half a step": (progress(step=8.5), "from 0 to 20, not 8.5"),
    "a step in words": (progress(step="8"), "from 0 to 20, not '8'"),
    "a step that is true": (progress(step=True), "from 0 to 20, not True"),
    "seconds that are no number": (progress(seconds=math.nan), "has NaN"),
    "seconds that are too many": (progress(seconds=10**4000), "an integer of 4,001 digits"),
    "negative seconds": (progress(seconds=-1.0), "seconds must be 0 or more"),
    "a mean in words": (progress(loss_mean="4"), "loss_mean must be a finite number"),
    "a mean without end": (progress(lowest_mean=math.inf), "has Infinity"),
    "no mean": (progress(loss_mean=None), "no loss_mean or lowest_mean of 8 steps"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_an_odd_checkpoint_is_one_line(saved, tmp_path, what):
    edit, words = ODD[what]
    message = refusal(edited(saved, tmp_path / "c", edit))
    assert re.search(words, message), message


def test_a_file_that_the_manifest_does_not_list(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    (tmp_path / "c" / "more.safetensors").write_bytes((saved / SHARD).read_bytes())
    state(lambda v: v.update(files=["more.safetensors"]))(tmp_path / "c")
    assert "optimizer.json does not match" in refusal(tmp_path / "c")
    edited(saved, tmp_path / "d", state(lambda v: v.update(files=["more.safetensors"])))
    (tmp_path / "d" / "more.safetensors").write_bytes((saved / SHARD).read_bytes())
    assert "'more.safetensors'" in refusal(tmp_path / "d")


def read_on(folder: Path) -> str:
    """What a rank says of a checkpoint that cannot be read."""
    with Ranks.started("cpu") as ranks:
        wrapped, model, optimizer = fresh(ranks, "fsdp")
        with pytest.raises(UsageError) as error:
            load_checkpoint(folder, model, optimizer, LossTrend, CONFIG, ranks, wrapped)
        return str(error.value)


@pytest.mark.slow("ranks")
def test_what_one_rank_reads_and_another_does_not_stops_both(saved, tmp_path):
    folder = edited(saved, tmp_path / "c", tensors(lambda t: t[HEAD][256].neg_()))  # in the last rank's rows
    first, second = on_ranks(2, read_on, folder)
    assert first == second and "Rank 1: " in first and "impossible numbers in exp_avg_sq" in first
    (folder / SHARD).unlink()  # which the first rank alone looks at
    first, second = on_ranks(2, read_on, folder)
    assert first == second and "Rank 0: " in first and f"{SHARD} is missing" in first


def fail_on(folder: Path, failing: int, name: str) -> str:
    """What a rank says where one of them has no room to write the file of a name."""
    with Ranks.started("cpu") as ranks:
        parts = stepped(ranks, "fsdp")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / name).stat().st_size // 2, hard))
        try:
            with pytest.raises(UsageError) as error:
                save(folder, *parts, progress=Progress(LossTrend(4.0, 3.5), 9, 1.5), ranks=ranks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return str(error.value)


@pytest.mark.slow("ranks")
@pytest.mark.parametrize(("rank", "name"), [(1, "optimizer-1-of-2.safetensors"), (0, "model.safetensors")])
def test_a_rank_without_room_is_named_and_the_old_checkpoint_stays(tmp_path, rank, name):
    on_ranks(2, save_on, tmp_path / "c", "fsdp")
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    for message in on_ranks(2, fail_on, tmp_path / "c", rank, name):
        assert message.startswith(f"Rank {rank}: ") and "cannot be written" in message and "\n" not in message
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before


class Hostile:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def hostile_index(mark: Path, folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Hostile(mark)  # which is not needed: all else is as it was, and the run would go on
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def hostile_entry(mark: Path, folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    (place,) = (v for k, v in index.storage_data.items() if k.fqn == "optimizer.param_groups.0.foreach")
    buffer = io.BytesIO()
    torch.save(Hostile(mark), buffer)
    place.offset, place.length = (folder / OLD).stat().st_size, len(buffer.getvalue())
    (folder / OLD).write_bytes((folder / OLD).read_bytes() + buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))


ATTACKS = {"index": (hostile_index, r"its index names \S*open, .* not run"),
           "entry": (hostile_entry, "foreach is damaged or holds more than numbers, and was not run")}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_of_a_checkpoint_runs(pickled, saved, tmp_path, attack):
    plant, words = ATTACKS[attack]
    mark = tmp_path / "it ran"
    folder = edited(pickled, tmp_path / "c", lambda new: plant(mark, new))
    message = refusal(folder)
    assert "can run code" in message and "--allow-pickled-optimizer" in message
    assert not mark.exists()
    message = refusal(folder, allow_pickled_optimizer=True)
    assert re.search(words, message), message
    assert not mark.exists()

    def beside(new: Path) -> None:  # a checkpoint of today, with the other's files in it
        for name in (".metadata", OLD):
            shutil.copy(folder / name, new / name)

    for allowed in (False, True):
        load(edited(saved, tmp_path / "d", beside), allow_pickled_optimizer=allowed)
    assert not mark.exists()


def test_the_attacks_are_attacks(pickled, tmp_path):
    """They would run where PyTorch reads the folder by itself."""
    for attack, (plant, _) in ATTACKS.items():
        mark = tmp_path / f"{attack} ran"
        folder = edited(pickled, tmp_path / attack, lambda new, plant=plant, mark=mark: plant(mark, new))
        wrapped, _, optimizer = fresh()
        dcp.load({"optimizer": get_optimizer_state_dict(wrapped, optimizer)}, checkpoint_id=folder, no_dist=True)
        assert mark.exists()


def index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = pickle.loads((folder / ".metadata").read_bytes())
        found = change(found) or found
        (folder / ".metadata").write_bytes(pickle.dumps(found))

    return edit


def places(**changed: Any) -> Callable[[Path], None]:
    return index(lambda found: [vars(place).update(changed) for place in found.storage_data.values()] and None)


ODD_PICKLES = {
    "a file outside": (places(relative_path="../x"), "names a file that the manifest does not list"),
    "extensions": (places(transform_descriptors=["stream.zstd"]), "asks for extensions"),
    "no index": (index(lambda found: {"a": 1}), "its index is none of PyTorch's"),
    "an empty index": (lambda d: (d / ".metadata").write_bytes(b""), "cannot be read"),
    "no entries": (index(lambda found: found.state_dict_metadata.clear()), "cannot be read"),
    "a file cut": (lambda d: (d / OLD).write_bytes((d / OLD).read_bytes()[:100]), "cannot be read"),
    "another step": (progress(step=9), "8 times, but the run has done 9 steps"),
}


@pytest.mark.parametrize("what", ODD_PICKLES)
def test_an_odd_checkpoint_of_an_earlier_version_is_one_line(pickled, tmp_path, what):
    edit, words = ODD_PICKLES[what]
    message = refusal(edited(pickled, tmp_path / "c", edit), allow_pickled_optimizer=True)
    assert re.search(words, message), message


def test_another_optimiser_of_an_earlier_version_is_one_line(tmp_path):
    wrapped, model, optimizer = stepped()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    save_pickled(tmp_path / "c", model, optimizer, PROGRESS, CONFIG, ALONE, wrapped)
    assert "another weight_decay" in refusal(tmp_path / "c", allow_pickled_optimizer=True)


@pytest.mark.slow("ranks")
def test_an_earlier_version_on_one_process_and_on_two(pickled):
    got, model, optimizer = load(pickled, allow_pickled_optimizer=True)
    assert got == PROGRESS
    assert_restored(model, optimizer)
    on_ranks(2, load_on, pickled, "fsdp", True)


class CutOff(Exception):
    pass


def test_a_run_of_an_earlier_version_goes_on_bit_for_bit_and_without_pickles(tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus").mkdir()
    corpus = corpus_of_words(tmp_path / "corpus")
    arguments = ("lm", "train", "--data", corpus, "--steps", STEPS, "--context", 32, "--batch-size", 4,
                 "--hidden-size", 16, "--num-hidden-layers", 1, "--num-heads", 2, "--head-dim", 4,
                 "--log-every", 1, "--checkpoint-every", DONE)  # fmt: skip
    assert command(capsys, *arguments, "--out", tmp_path / "whole")[0] == 0

    def saving(*parts: Any) -> None:
        save_pickled(*parts)
        raise CutOff

    monkeypatch.setattr(loop, "save_checkpoint", saving)
    with pytest.raises(CutOff):
        command(capsys, *arguments, "--out", tmp_path / "run")
    monkeypatch.undo()
    again = ("lm", "train", "--data", corpus, "--out", tmp_path / "run", "--resume", "--log-every", 1)
    status, _, said = command(capsys, *again)
    assert status == 2 and said.count("\n") == 1 and "--allow-pickled-optimizer" in said
    assert command(capsys, *again, "--allow-pickled-optimizer")[0] == 0
    run, whole = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "whole"))
    assert run == whole and len(run) == STEPS
    for name, x in SequenceModel.from_pretrained(tmp_path / "whole" / "checkpoint").state_dict().items():
        assert torch.equal(x, SequenceModel.from_pretrained(tmp_path / "run" / "checkpoint").state_dict()[name])
    left = {p.name for p in (tmp_path / "run" / "checkpoint").iterdir()}
    assert not {".metadata", OLD} & left and {"optimizer.json", SHARD} <= left
