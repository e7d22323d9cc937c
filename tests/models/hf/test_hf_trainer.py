"""models.hf in transformers' Trainer and pipelines: what they decide by a model's class and signature."""

import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("accelerate")

from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from deltaproduct.corpus.tokenizer import ByteTokenizer
from deltaproduct.models.hf import DeltaProductConfig, DeltaProductForCausalLM

pytestmark = pytest.mark.neighbours

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCAB = 11
TINY = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "initializer_range": 0.5}  # fmt: skip
SAMPLES = [[1, 2, 3, 4, 5, 9], [6, 7], [0, 5, 5], [2, 2, 4, 1, 10]]


def build(vocab_size: int = VOCAB, **changed) -> DeltaProductForCausalLM:
    torch.manual_seed(0)
    return DeltaProductForCausalLM(DeltaProductConfig(vocab_size, **(TINY | changed)))


def trainer(model, folder, data, collator=None, **settings) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        disable_tqdm=True, save_strategy="no", logging_steps=1, **settings,
    )  # fmt: skip
    return Trainer(model, arguments, data_collator=collator, train_dataset=data, eval_dataset=data)


def rows(width: int = 6, count: int = 4) -> list[dict]:
    given = torch.randint(VOCAB, (count, width), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in given]


def smoothed(logits: torch.Tensor, targets: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Cross-entropy with (1-ε) of the weight on the target and ε on all tokens alike (arXiv 1512.00567, section 7)."""
    log_p = logits.log_softmax(-1)
    hit = -log_p.gather(-1, targets[..., None])[..., 0]
    return ((1 - epsilon) * hit - epsilon * log_p.mean(-1)).mean()


def test_label_smoothing_is_of_the_next_token(tmp_path):
    model, data = build(), rows()
    run = trainer(model, tmp_path, data, label_smoothing_factor=0.1)
    got = run.evaluate()["eval_loss"]
    given = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        logits = model.eval()(given).logits
    want = smoothed(logits[:, :-1], given[:, 1:], 0.1)
    assert math.isclose(got, float(want), rel_tol=1e-5)
    assert abs(got - float(smoothed(logits, given, 0.1))) > 1e-2  # what it would be of the tokens themselves
    plain = trainer(model, tmp_path, data).evaluate()["eval_loss"]
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())
    assert math.isclose(plain, float(want), rel_tol=1e-5)


def test_the_class_is_a_causal_language_model_to_transformers(capfd):
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["deltaproduct"] == "DeltaProductForCausalLM"
    assert MODEL_FOR_CAUSAL_LM_MAPPING[DeltaProductConfig] is DeltaProductForCausalLM
    classes = [x for x in MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.values() if x is DeltaProductForCausalLM]
    assert len(classes) == 1 and DeltaProductForCausalLM.can_generate()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "way",
    [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True, "return_position_ids": False}],
    ids=["position_ids", "cu_seq_lens", "seq_idx"],
)
def test_training_on_flattened_samples_is_training_on_each(accumulate, way, tmp_path):
    """A step's loss and gradient are those of all tokens that have one before them in their own sample."""
    model = build()
    data = [{"input_ids": sample} for sample in SAMPLES * accumulate]
    run = trainer(
        model, tmp_path, data, DataCollatorWithFlattening(**way), max_steps=1, learning_rate=0.0, weight_decay=0.0,
        gradient_accumulation_steps=accumulate, max_grad_norm=0.0,
    )  # fmt: skip
    gradients = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.__setitem__(name, p.grad.clone()))
    loss = run.train().training_loss
    other = build()
    terms = [
        F.cross_entropy(other(torch.tensor([s])).logits[0, :-1], torch.tensor(s[1:]), reduction="none") for s in SAMPLES
    ]
    want = torch.cat(terms).mean()
    want.backward()
    want = float(want.detach())
    assert math.isclose(loss, want, rel_tol=1e-5)
    for name, p in other.named_parameters():
        # Sums of some twenty float32 terms in another order, through norms that enlarge them.
        assert (gradients[name] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name
    assert math.isclose(run.evaluate()["eval_loss"], want, rel_tol=1e-5)


def test_columns_that_say_where_samples_begin_reach_the_model(tmp_path):
    """The Trainer drops the columns of a data set that are not in forward's signature."""
    model = build()
    given, place = torch.tensor(SAMPLES[0] + SAMPLES[1]), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    number = torch.tensor([0] * 6 + [1] * 2)
    losses = []
    for extra in ({"position_ids": place}, {"seq_idx": number}, {}):
        losses.append(trainer(model, tmp_path, [{"input_ids": given, "labels": given} | extra]).evaluate()["eval_loss"])
    with torch.no_grad():
        one, two = (model.eval()(torch.tensor([s]), labels=torch.tensor([s])).loss for s in SAMPLES[:2])
    want = float(5 * one + two) / 6
    assert math.isclose(losses[0], want, rel_tol=1e-5) and math.isclose(losses[1], want, rel_tol=1e-5)
    assert abs(losses[2] - want) > 1e-3


def test_recomputation_in_the_trainer_changes_no_step(tmp_path):
    after = []
    for checkpointed in (False, True):
        model, runs = build(), []
        model.blocks[1].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        run = trainer(model, tmp_path, rows(), max_steps=2, gradient_checkpointing=checkpointed)
        run.train()
        assert len(runs) == (4 if checkpointed else 2)
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*after)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "seed": 1}
    whole = build()
    run = trainer(whole, tmp_path / "a", rows(count=8), **settings)
    run.args.save_strategy = "steps"
    run.train()
    again = build(initializer_range=0.1)
    trainer(again, tmp_path / "b", rows(count=8), **settings).train(str(tmp_path / "a" / "checkpoint-2"))
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_pipeline_of_texts(tmp_path, caplog):
    from transformers import AutoTokenizer

    model = build(257, eos_token_id=256, pad_token_id=256).eval()
    ByteTokenizer().save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with caplog.at_level("ERROR", logger="transformers"):
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert "is not supported" not in caplog.text
    text = generate("to be, ", max_new_tokens=5, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    prompt = torch.tensor([list(b"to be, ")])
    want = model.generate(prompt, max_new_tokens=5, do_sample=False)[0].tolist()
    assert list(text) == want and want[:7] == list(b"to be, ")
