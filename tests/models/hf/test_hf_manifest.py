"""Folders that transformers loads are checked against their manifest, and can be sealed after a change on purpose."""

import json
import pickle
import shutil

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file

from deltaproduct.errors import UsageError
from deltaproduct.files import reseal_folder, seal_folder, verified_folder
from deltaproduct.models import ModelConfig, SequenceModel

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("deltaproduct.models.hf")

CONFIG = ModelConfig.build(vocab_size=11, num_labels=11, hidden_size=16, num_heads=2, head_dim=4, num_hidden_layers=2)
TOKENS = torch.arange(9)[None]


def ours(folder):
    torch.manual_seed(0)
    SequenceModel(CONFIG).save_pretrained(folder)


def theirs(folder, **options):
    torch.manual_seed(0)
    hf.DeltaProductForCausalLM(hf.DeltaProductConfig(**CONFIG.to_dict())).save_pretrained(folder, **options)


def sharded(folder):
    theirs(folder, max_shard_size="4KB")


def flip(path):
    """Change one bit within the last number of a file, or the last digit that there is in it."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".json":
        at = max(i for i, byte in enumerate(data) if chr(byte).isdigit())
        data[at] = ord("7") if data[at] != ord("7") else ord("3")
    else:
        data[-1] ^= 1
    path.write_bytes(data)


def logits(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()(TOKENS).logits.detach()


@pytest.mark.parametrize("save", [ours, theirs, sharded])
def test_a_changed_file_is_refused_and_says_how_to_keep_it(tmp_path, save):
    save(tmp_path / "whole")
    names = json.loads((tmp_path / "whole" / "manifest.json").read_text())["files"]
    read = [name for name in names if name.endswith((".safetensors", ".json"))]
    assert {"config.json"} < set(read) and (save is not sharded or len(read) > 5)
    for name in read:
        folder = tmp_path / "changed"
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        flip(folder / name)
        with pytest.raises(UsageError, match=rf"{name} does not match .*`deltaproduct seal ") as refused:
            transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert "\n" not in str(refused.value)
        (folder / name).unlink()
        with pytest.raises(UsageError if name != "config.json" else Exception, match=f"{name}"):
            transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("load", ["DeltaProductConfig", "DeltaProductModel", "DeltaProductForCausalLM"])
def test_every_class_checks_the_configuration(tmp_path, load):
    theirs(tmp_path / "sub" / "folder")
    path = tmp_path / "sub" / "folder" / "config.json"
    path.write_text(path.read_text().replace("1e-05", "2e-05"))
    for place, options in ((path.parent, {}), (str(path.parent), {}), (tmp_path / "sub", {"subfolder": "folder"})):
        with pytest.raises(UsageError, match=r"config\.json does not match"):
            getattr(hf, load).from_pretrained(place, **options)


def test_a_configuration_needs_no_more_than_its_own_file(tmp_path):
    theirs(tmp_path)
    flip(tmp_path / "model.safetensors")
    assert hf.DeltaProductConfig.from_pretrained(tmp_path).model_config() == CONFIG


def test_what_others_add_to_a_folder_or_change_beside_it_does_not_matter(tmp_path):
    theirs(tmp_path)
    expected = logits(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "trainer_state.json").write_text("{}")
    torch.save({"lr": 1.0}, tmp_path / "optimizer.pt")
    (tmp_path / "README.md").write_text("A model.")
    (tmp_path / "modeling_deltaproduct.py").write_text("# another version of it, which is not run here")
    assert torch.equal(logits(tmp_path), expected)
    assert torch.equal(logits(tmp_path, dtype="float32", device_map="cpu"), expected)


def test_the_files_of_a_run_that_transformers_does_not_read_are_not_checked(tmp_path):
    ours(tmp_path)
    expected = logits(tmp_path)
    (tmp_path / "optimizer.safetensors").write_bytes(b"1")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"]["optimizer.safetensors"] = {"bytes": 2, "sha256": "0" * 64}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert torch.equal(logits(tmp_path), expected)


def test_a_pickle_in_the_place_of_the_weights_is_not_run(tmp_path):
    """transformers looks for pytorch_model.bin where there is no model.safetensors."""
    ours(tmp_path)
    for name in ("model.safetensors", "manifest.json"):
        (tmp_path / name).unlink()

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match="are a pickle that is damaged, or holds more than tensors") as refused:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("name", "content", "match"), [
    ("model.safetensors", b"", "is not a safetensors file"), ("generation_config.json", b"null", "holds no entries"),
    ("model.safetensors", (10**18).to_bytes(8, "little"), "is not a safetensors file"),
    ("generation_config.json", b"[" * 9000, "nested too deeply"),
])  # fmt: skip
def test_files_that_say_what_they_should_not(tmp_path, name, content, match):
    theirs(tmp_path)
    (tmp_path / name).write_bytes(content)
    seal_folder(tmp_path)
    with pytest.raises(UsageError, match=match) as refused:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value) and name in str(refused.value)


@pytest.mark.parametrize("index", [
    {"weight_map": 1}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../x"}}, {"weight_map": {}, "metadata": 1}, [],
])  # fmt: skip
def test_an_index_that_is_none(tmp_path, index):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    seal_folder(tmp_path)
    with pytest.raises(UsageError, match=r"model\.safetensors\.index\.json"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path):
    """transformers would turn them into floats."""
    theirs(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"].long()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    seal_folder(tmp_path)
    with pytest.raises(UsageError, match=r"model\.safetensors has norm\.weight of I64"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_without_a_manifest_loads_as_transformers_has_it(tmp_path):
    theirs(tmp_path)
    expected = logits(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert torch.equal(logits(tmp_path), expected)


def test_the_model_that_an_adapter_names_is_checked_too(tmp_path):
    theirs(tmp_path / "base")
    flip(tmp_path / "base" / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    values = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"base is corrupt: model\.safetensors"):
        hf.DeltaProductForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("save", [ours, theirs])
def test_sealing_accepts_the_change_and_lists_no_files_of_others(tmp_path, capsys, save):
    folder = tmp_path / "a folder"
    save(folder)
    before = set(json.loads((folder / "manifest.json").read_text())["files"])
    expected = logits(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("1e-05", "1e-01"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError):
        SequenceModel.from_pretrained(folder)
    capsys.readouterr()  # transformers' bars
    status, out, err = run(capsys, "seal", folder)
    assert status == 0 and err == "" and out == f"{folder}: sealed; new or changed: config.json\n"
    assert set(verified_folder(folder, "checkpoint")) == before
    assert not torch.equal(logits(folder), expected)
    assert SequenceModel.from_pretrained(folder).config.norm_eps == 0.1
    capsys.readouterr()
    assert run(capsys, "seal", folder)[1] == f"{folder}: nothing changed\n"
    theirs(folder)  # removes what the manifest lists and it does not write, so that no file of others may be listed
    assert (folder / "tokenizer.json").exists() and torch.equal(logits(folder), expected)


def test_sealing_notices_shards_that_came_and_went(tmp_path):
    theirs(tmp_path / "one")
    sharded(tmp_path / "many")
    expected = logits(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").unlink()
    moved = [p for p in (tmp_path / "many").iterdir() if p.name.startswith("model") and p.suffix != ".py"]
    moved = [p for p in moved if "safetensors" in p.name]
    for path in moved:
        shutil.copy(path, tmp_path / "one")
    assert reseal_folder(tmp_path / "one") == sorted(["model.safetensors", *(p.name for p in moved)])
    assert torch.equal(logits(tmp_path / "one"), expected)


@pytest.mark.parametrize(("content", "message"), [
    (None, "has no manifest"), ("{", "not valid JSON"), ("[]", "damaged or of another version"),
])  # fmt: skip
def test_what_was_never_sealed_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    status, out, err = run(capsys, "seal", tmp_path)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
