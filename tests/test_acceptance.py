"""The claims of the README, from nothing: minutes each, so only `make test-all` runs them."""

import resource

import pytest

from deltaproduct.evaluation import evaluate_lengths
from deltaproduct.experiments.word_problems import s3
from deltaproduct.tasks import get_task
from deltaproduct.training import train

pytestmark = [pytest.mark.slow("exhaustive"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def s3_runs(tmp_path_factory):
    """One seed of each configuration of `reproduce s3`, by label."""
    out = tmp_path_factory.mktemp("s3")
    return {job.label: train(job.config, out / job.name, show=False) for job in s3("cpu", [7])}


def test_only_two_reflections_with_negative_eigenvalues_track_s3(s3_runs):
    task = get_task("S3")
    accuracy = {label: evaluate_lengths(model, task, (128, 512)) for label, model in s3_runs.items()}
    best = accuracy.pop("DeltaProduct_2[-1,1]")
    assert best[128].accuracy >= 0.999 and best[512].accuracy >= 0.99
    assert all(result[128].accuracy <= 0.5 for result in accuracy.values())


def test_a_million_tokens_stream_in_little_memory(s3_runs):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate_lengths(s3_runs["DeltaProduct_2[-1,1]"], get_task("S3"), [1_000_000], sequences=1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # The data are three int64 or bool arrays of a million, the counts three more: 50 MB. Activations of a million
    # tokens at once would be 64 floats each in a dozen tensors: 3 GB.
    assert grown < 300_000  # kilobytes
