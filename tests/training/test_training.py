"""Training: what a run's numbers depend on, and that nothing is lost when it is cut off."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from run_folder import metrics
from runs import run_config, same, weights

from deltaproduct.errors import UsageError
from deltaproduct.seeds import evaluation_generator, training_generator
from deltaproduct.tasks import get_task
from deltaproduct.training import TrainConfig, train
from deltaproduct.training.checkpoint import Progress
from deltaproduct.training.loop import OneProcess, new_model, new_optimizer, train_step
from deltaproduct.training.objectives.task import Curriculum, TaskObjective, masked_loss, sample_batch

HELPERS = Path(__file__).parents[1] / "helpers"


def test_resuming_reproduces_the_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch):
    config = run_config()
    train(config, tmp_path / "whole", checkpoint_every=3, log_every=1, show=False)
    calls = []

    def cut_off(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:  # after the checkpoint of step 6, with step 7 already logged
            raise KeyboardInterrupt
        return train_step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("deltaproduct.training.loop.train_step", cut_off)
        train(config, tmp_path / "cut", checkpoint_every=3, log_every=1, show=False)
    train(config, tmp_path / "cut", resume=True, checkpoint_every=3, log_every=1, show=False)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    for name in ("optimizer-0-of-1.safetensors", "optimizer.json"):
        assert (tmp_path / "whole" / "checkpoint" / name).read_bytes() == (
            tmp_path / "cut" / "checkpoint" / name
        ).read_bytes()
    lines = []
    for run in ("whole", "cut"):
        lines.append([{k: v for k, v in row.items() if k != "seconds"} for row in metrics(tmp_path / run)])
    assert lines[0] == lines[1] and [row["step"] for row in lines[0]] == list(range(1, 13))


KILLED = """
    import json, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from kills import kill_and_resume, warmed_up
    from deltaproduct.files import recover_folder, verified_folder
    place = Path(sys.argv[2])
    checkpoint, reached, kills = place / "run" / "checkpoint", 0, 0

    def check(done):
        global reached, kills
        if done == kills:
            return  # the run has ended
        kills, step = done, 0
        recover_folder(checkpoint)
        if checkpoint.exists():
            verified_folder(checkpoint, "checkpoint")
            step = json.loads((checkpoint / "training.json").read_text())["progress"]["step"]
        if step < reached:
            sys.exit(f"kill {kills} threw the run back from step {reached} to {step}")
        reached = step

    warmed_up(place, 120)
    kill_and_resume(place / "run", 120, 20, check)
    print(kills, reached)
"""


@pytest.mark.slow("kills")
@pytest.mark.timeout(300)  # 20 starts: 10 s where nothing else runs
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    """A checkpoint every step keeps the process inside the file operations most of the time."""
    arguments = [
        sys.executable,
        "-c",
        textwrap.dedent(KILLED),
        str(HELPERS),
        str(tmp_path),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    kills, reached = map(int, done.stdout.split())
    assert kills == 20 and 10 <= reached < 120
    assert same(weights(tmp_path / "warm"), weights(tmp_path / "run"))
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 121))
    leftovers = [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".") and p.is_dir()]
    assert leftovers == []


def test_seed_decides_weights_and_data(tmp_path):
    one, again, other = (new_model(run_config(seed=s)).state_dict() for s in (1, 1, 2))
    assert same(one, again) and not same(one, other)
    settings, task = run_config().training, get_task("S3")
    a, b, c = (sample_batch(task, settings, step, 0)[0] for step in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    other_seed = sample_batch(task, replace(settings, seed=1), 3, 0)[0]
    assert not torch.equal(a, other_seed)
    before = torch.random.get_rng_state()
    train(run_config(steps=1), tmp_path / "r", show=False)
    assert torch.equal(before, torch.random.get_rng_state()), "training touched the global generator"


def test_training_and_evaluation_seeds_never_meet():
    """The CPU generator uses a seed's low 32 bits, so those must differ, whatever the seeds."""
    low = 2**32 - 1
    training = {training_generator(s, b).initial_seed() & low for s in range(50) for b in range(0, 2**31, 2**28)}
    evaluation = {evaluation_generator(s, n).initial_seed() & low for s in range(50) for n in (1, 128, 8192)}
    assert max(training) < 2**31 <= min(evaluation)
    run = [training_generator(0, b).initial_seed() for b in range(1000)]
    assert len(set(run)) == 1000


def test_fixed_sample_count_repeats_its_batches():
    settings, task = replace(run_config().training, num_samples=24), get_task("S3")  # three batches of 8
    epochs = [
        sorted(sample_batch(task, settings, step, 0)[0].flatten().tolist() for step in range(3 * e, 3 * e + 3))
        for e in range(4)
    ]
    assert epochs[0] == epochs[1] == epochs[2] == epochs[3]
    assert len({tuple(batch) for batch in epochs[0]}) == 3
    orders = {tuple(sample_batch(task, settings, 3 * e, 0)[0].flatten().tolist()) for e in range(12)}
    assert len(orders) > 1, "every epoch begins with the same batch"


def test_gradient_accumulation_is_the_whole_batch():
    """Equal but for float32 rounding of sums in another order: 1e-6 relative, a hundred times the unit roundoff."""
    config = run_config()
    results = []
    for parts in (1, 4):
        settings = replace(config.training, grad_accumulation=parts, clip=0.0)
        model = new_model(config)
        objective, progress, alone = TaskObjective(settings), Progress(Curriculum()), OneProcess(torch.device("cpu"))
        sums, norm = train_step(objective, model, new_optimizer(model, settings), progress, alone)
        figures = objective.after_step(replace(progress, step=1), sums).figures
        results.append((figures["loss"], figures["accuracy"], norm))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_loss_is_the_mean_over_what_is_scored():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=rng, dtype=torch.float64).requires_grad_()
    labels, mask = torch.randint(4, (3, 5), generator=rng), torch.rand(3, 5, generator=rng) < 0.5
    loss = masked_loss(logits, labels, mask)
    chosen = logits.detach().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert loss.item() == pytest.approx(-sum(float(x) for x in chosen[mask]) / int(mask.sum()), rel=1e-6)
    loss.backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask)


def test_learning_rate_warms_up_and_falls_to_its_floor():
    settings = TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.02)
    rates = [settings.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.51) and rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_curriculum_moves_on_when_learnt_or_when_time_is_up():
    settings = TrainConfig(lengths=(4, 8, 16), batch_sizes=(2,), stage_steps=(3, 100), stage_loss=0.5)
    curriculum, stages = Curriculum(), []
    for step, loss in enumerate((2.0, 2.0, 2.0, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1), start=1):
        stages.append(curriculum.stage)
        curriculum.advance(settings, step, loss)

    # Three steps without learning, then until the running mean of .9, .9, .1, .1, … is below one half.
    def mean(losses):
        recent_first = [(0.9**i, x) for i, x in enumerate(reversed(losses))]
        return sum(w * x for w, x in recent_first) / sum(w for w, _ in recent_first)

    seen = [0.9, 0.9]
    while mean(seen) >= 0.5:
        seen.append(0.1)
    assert stages == [0] * 3 + [1] * len(seen) + [2] * (12 - 3 - len(seen))


def test_a_loss_that_is_no_number_stops_with_one_line(tmp_path):
    config = run_config(lr=1e30, clip=0.0, warmup_steps=0)
    with pytest.raises(
        UsageError, match=r"Step 2 has a loss of .* and a gradient of norm nan; there is no checkpoint yet"
    ):
        train(config, tmp_path / "r", show=False)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"lengths": (0,)}, "lengths"),
        ({"lengths": ()}, "lengths"),
        ({"batch_sizes": (8, 4, 2)}, "batch_sizes"),
        ({"stage_steps": (1, 2)}, "stage_steps"),
        ({"stage_steps": (), "stage_loss": None}, "stage_loss"),
        ({"num_samples": 2}, "num_samples"),
        ({"grad_accumulation": 3}, "grad_accumulation"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"seed": -1}, "seed"),
        ({"precision": "int8"}, "precision"),
    ],
)
def test_impossible_settings_are_named(changes, word):
    with pytest.raises(UsageError, match=word) as e:
        run_config(**changes)
    assert "\n" not in str(e.value)


def test_a_run_is_not_overwritten_or_mixed_up(tmp_path):
    train(run_config(steps=2), tmp_path / "r", show=False)
    with pytest.raises(UsageError, match="already holds a run"):
        train(run_config(steps=2), tmp_path / "r", show=False)
    with pytest.raises(UsageError, match=r"steps: 3 and 2"):
        train(run_config(steps=3), tmp_path / "r", resume=True, show=False)
    stored = json.loads((tmp_path / "r" / "run.json").read_text())
    assert stored["finished"] and stored["steps"] == 2 and stored["machine"]["torch"] == torch.__version__


def test_mixed_precision_trains(tmp_path):
    model = train(run_config(steps=3, precision="bfloat16"), tmp_path / "r", show=False)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())
