"""What SequenceModel.from_pretrained is pointed at: it loads, or one line says what to type instead."""

import json
import shutil

import pytest
import torch
from saved_models import build, logits

from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.fla.checkpoint import write_fla
from deltaproduct.models.streaming import Stream


def refusal(folder, match: str) -> str:
    with pytest.raises(UsageError, match=match) as refused:
        SequenceModel.from_pretrained(folder)
    said = str(refused.value)
    assert "\n" not in said and len(said) < 600 and said.endswith(".")
    return said


@pytest.mark.parametrize("tied", [False, True])
def test_shards(tied, tmp_path):
    model = build("transformers", tie_word_embeddings=tied)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="5KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()
    loaded = SequenceModel.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model)) and loaded.is_tied == tied
    loaded.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(SequenceModel.from_pretrained(tmp_path / "whole")), logits(model))

    good = shards[0].read_bytes()
    shards[0].write_bytes(good[:-1])
    refusal(folder, f"corrupt: {shards[0].name}")
    shards[0].unlink()
    refusal(folder, f"incomplete: {shards[0].name} is missing")
    shards[0].write_bytes(good)
    SequenceModel.from_pretrained(folder)


def test_shards_that_are_not_what_the_index_says(tmp_path):
    """With a manifest that agrees with the files, as of somebody who edits a folder on purpose."""
    from saved_models import seal

    model = build("transformers")
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="5KB")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first, second = sorted(set(good["weight_map"].values()))[:2]
    name = next(name for name, file in good["weight_map"].items() if file == first)
    for changed, match in (
        ({name: second}, f"{second} does not hold {name}"),
        ({name: "../elsewhere.safetensors"}, "not in its own folder"),
        ({name: "none.safetensors"}, r"none\.safetensors is missing"),
        ({"extra.weight": first}, r"does not hold extra\.weight"),
    ):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | changed}))
        seal(folder)
        refusal(folder, match)
    index.write_text(json.dumps(good | {"weight_map": {n: f for n, f in good["weight_map"].items() if n != name}}))
    seal(folder)
    refusal(folder, f"{name} has shape none")
    index.write_text(json.dumps({}))
    seal(folder)
    refusal(folder, "no weight_map")
    index.write_text(json.dumps(good))
    seal(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][first]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refusal(folder, f"{first}, which its manifest does not list")


def test_paths_that_are_no_folder(tmp_path):
    build().save_pretrained(tmp_path / "model")
    refusal(tmp_path / "none", "is not a folder of this machine")
    refusal("somebody/some-model", "has to be downloaded first")
    said = refusal(tmp_path / "model" / "model.safetensors", "is a file and not a folder")
    assert str(tmp_path / "model") in said


def test_a_runs_folder_and_a_trainers(tmp_path):
    run = tmp_path / "run"
    build().save_pretrained(run / "checkpoint")
    (run / "config.json").write_text(json.dumps({"training": {}, "model": {}}))
    assert str(run / "checkpoint") in refusal(run, "load .*checkpoint")
    SequenceModel.from_pretrained(run / "checkpoint")
    trainer = tmp_path / "trainer"
    for step in (5, 10):
        build().save_pretrained(trainer / f"checkpoint-{step}")
    refusal(trainer, "2 of them, checkpoint-10 to checkpoint-5; load .*checkpoint-10")


def test_flash_linear_attentions_folder(tmp_path):
    model = build(use_forget_gate=True, use_output_gate=True)
    write_fla(model, tmp_path / "fla")
    said = refusal(tmp_path / "fla", "flash-linear-attention")
    assert f"deltaproduct lm convert {tmp_path / 'fla'} --to ours" in said
    (tmp_path / "fla" / "manifest.json").unlink()  # as they publish them
    refusal(tmp_path / "fla", "flash-linear-attention")


def test_a_folder_without_its_manifest(tmp_path):
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    refusal(tmp_path / "model", r"has no manifest\.json, without which .* Copy the whole folder")


def test_pickled_weights_are_written_anew_by_what_the_line_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    import deltaproduct.models.hf  # noqa: F401

    model = build("transformers")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "manifest.json").unlink()
    said = refusal(folder, r"pytorch_model\.bin")
    assert f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})" in said
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "anew")
    assert torch.equal(logits(SequenceModel.from_pretrained(tmp_path / "anew")), logits(model))


def test_other_kinds(tmp_path):
    model = build()
    stream = Stream(model)
    stream.prefill([1, 2])
    stream.save(tmp_path / "conversation")
    refusal(tmp_path / "conversation", "--load-state")
    for name, file, values, match in (
        ("adapter", "adapter_config.json", {"peft_type": "LORA"}, "peft.PeftModel.from_pretrained"),
        ("program", "step.json", {}, "exported"),
        ("llama", "config.json", {"model_type": "llama"}, "model type 'llama'"),
        ("damaged", "config.json", [3], "not a checkpoint of this library"),
        ("empty", "notes.json", {}, "not a checkpoint of this library"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(values))
        refusal(tmp_path / name, match)
    (tmp_path / "damaged" / "config.json").write_text("{")
    refusal(tmp_path / "damaged", "not a checkpoint of this library")


def test_a_folder_that_a_dead_process_left_is_put_right_first(tmp_path):
    SequenceModel(ModelConfig.build(5, 5, hidden_size=8, num_heads=1, head_dim=8)).save_pretrained(tmp_path / "model")
    shutil.move(tmp_path / "model", tmp_path / ".model.old")
    SequenceModel.from_pretrained(tmp_path / "model")
