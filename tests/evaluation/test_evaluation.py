"""Evaluation: scores of models whose mistakes are known, streamed in pieces."""

import pytest
import torch

from deltaproduct import evaluation
from deltaproduct.errors import UsageError
from deltaproduct.evaluation import evaluate_length, evaluate_lengths, scores
from deltaproduct.experiments.recipes import state_tracking_model
from deltaproduct.models import SequenceModel
from deltaproduct.models import sequence_model as module
from deltaproduct.tasks import get_task


class Oracle(torch.nn.Module):
    """Labels S3 rightly up to position `until`, then wrongly; its state is (product so far, position)."""

    def __init__(self, task, until=10**9, wrong_at=()):
        super().__init__()
        self.embedding = torch.nn.Embedding(1, 1)
        self.config = state_tracking_model(task)
        self.task, self.until, self.wrong_at = task, until, set(wrong_at)

    def forward(self, tokens, state=None):
        product, position = state or (torch.full(tokens.shape[:1], self.task.identity), 0)
        labels = []
        for column in tokens.unbind(1):
            if position:  # position 0 is BOS
                product = self.task.table[product, column]
            wrong = position > self.until or position in self.wrong_at
            labels.append((product + 1) % self.task.num_labels if wrong else product)
            position += 1
        logits = torch.nn.functional.one_hot(torch.stack(labels, 1), self.task.num_labels).float()
        return logits, (product, position)


@pytest.mark.parametrize("piece", [7, 10**6])
def test_scores_of_known_mistakes(monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE_TOKENS", piece)
    task = get_task("S3")
    right = evaluate_length(Oracle(task), task, 50, sequences=5)
    assert (right.accuracy, right.sequence_accuracy) == (1.0, 1.0)
    late = evaluate_length(Oracle(task, until=40), task, 50, sequences=5)
    assert (late.accuracy, late.sequence_accuracy) == (0.8, 0.0)
    once = evaluate_length(Oracle(task, wrong_at={20}), task, 50, sequences=5)
    assert once.accuracy == pytest.approx(0.98)
    assert once.by_position[1:].tolist() == [1.0] * 19 + [0.0] + [1.0] * 30
    assert once.prefix_by_position[1:].tolist() == [1.0] * 19 + [0.0] * 31  # all later positions have a wrong prefix
    assert once.by_position[0].isnan()  # BOS is not scored


def test_pieces_and_batches_do_not_change_a_models_scores(monkeypatch):
    """Whole, in pieces and in several batches of sequences: the same predictions, so the same scores."""
    task = get_task("S3")
    torch.manual_seed(0)
    model = SequenceModel(state_tracking_model(task)).double()
    whole = evaluate_length(model, task, 300, sequences=6)
    monkeypatch.setattr(module, "PIECE_TOKENS", 64)
    pieces = evaluate_length(model, task, 300, sequences=6)
    assert torch.equal(whole.by_position.nan_to_num(), pieces.by_position.nan_to_num())
    assert whole.accuracy == pieces.accuracy


def test_data_are_the_same_each_time_and_differ_by_seed():
    task = get_task("S3")
    torch.manual_seed(0)
    model = SequenceModel(state_tracking_model(task))
    one, again, other = (evaluate_length(model, task, 100, sequences=8, seed=s).accuracy for s in (0, 0, 1))
    assert one == again != other


def test_long_sequences_take_constant_memory_in_the_model():
    """Length 100,000 goes through in pieces: the model never sees more than PIECE_TOKENS at once."""
    task, seen = get_task("Z2"), []

    class Watching(Oracle):
        def forward(self, tokens, state=None):
            seen.append(tokens.numel())
            logits = torch.zeros(*tokens.shape, self.task.num_labels)
            return logits, (state or 0) + 1

    evaluate_length(Watching(task), task, 100_000, sequences=2)
    assert max(seen) <= module.PIECE_TOKENS and sum(seen) == 2 * 100_001


def test_bad_requests_get_one_line():
    task = get_task("S3")
    model = SequenceModel(state_tracking_model(task))
    for call, word in (
        (lambda: evaluate_lengths(model, get_task("S4"), [8]), "num_labels|vocab_size"),
        (lambda: evaluate_lengths(model, task, [0]), "length"),
        (lambda: evaluate_lengths(model, task, [8], sequences=0), "sequences"),
    ):
        with pytest.raises(UsageError, match=word) as e:
            call()
        assert "\n" not in str(e.value)


def test_json_has_two_keys():
    task = get_task("S3")
    out = scores(evaluation.evaluate_lengths(SequenceModel(state_tracking_model(task)), task, [8, 16], sequences=2))
    assert set(out) == {"accuracy", "sequence_accuracy"}
    assert all(list(by_length) == ["8", "16"] for by_length in out.values())
