"""`deltaproduct lm generate`: text as it comes, conversations that go on, and one clear line for every mistake."""

import json
import os
import random
import shutil
import signal

import pytest
import torch
import tyro

from deltaproduct.cli.lm_generate import LmGenerate, TextStream
from deltaproduct.corpus.tokenizer import ByteTokenizer
from deltaproduct.errors import UsageError
from deltaproduct.models import ModelConfig, SequenceModel
from deltaproduct.models.sampling import Sampling
from deltaproduct.models.streaming import Stream


def build(vocab_size: int = 257) -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig.build(vocab_size=vocab_size, num_labels=vocab_size, hidden_size=16, num_heads=2, head_dim=4)
    return SequenceModel(config).eval()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "run"
    build().save_pretrained(folder / "checkpoint")
    ByteTokenizer().save(folder / "tokenizer")
    return folder


def generate(capsys, *arguments) -> tuple[str, str]:
    """Standard output and standard error of the command."""
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    tyro.cli(LmGenerate, args=[str(a) for a in arguments], config=flat).run()
    out, err = capsys.readouterr()
    return out, err


def figures(capsys, *arguments) -> dict:
    out, err = generate(capsys, *arguments, "--json")
    assert err == ""
    return json.loads(out)


def test_writes_what_the_stream_writes(capsys, run_folder):
    stream = Stream(build(), Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=4))
    stream.prefill([256, *"Wie schön".encode()])
    want = list(stream.generate(30, stop=[256]))
    sampling = ["--temperature", "0.8", "--top-k", "50", "--top-p", "0.9", "--seed", "4", "--max-tokens", "30"]
    for source in (run_folder, run_folder / "checkpoint"):
        found = figures(capsys, source, "--prompt", "Wie schön", *sampling)
        assert found["tokens"] == want and found["text"] == ByteTokenizer().decode(want)
        assert found["prompt_tokens"] == 11 and found["written_tokens"] == len(want)
        assert found["position"] == 11 + len(want) and found["tokens_written_per_second"] > 0
        assert found["ended"] == ("max_tokens" if len(want) == 30 else "document")
    out, err = generate(capsys, run_folder, "--prompt", "Wie schön", *sampling)
    assert out == ByteTokenizer().decode(want) + "\n"
    assert "read 11 tokens" in err and f"wrote {len(want)} (" in err and "tokens/s" in err


def test_text_appears_as_it_comes(run_folder, monkeypatch):
    """Each token's text is printed before the next token is drawn."""
    events = []
    model_writes = Stream.generate

    def write(self, tokens, stop=()):
        for token in model_writes(self, tokens, stop):
            events.append("token")
            yield token

    monkeypatch.setattr(Stream, "generate", write)
    monkeypatch.setattr("builtins.print", lambda *_, **options: events.append(options.get("flush")))
    LmGenerate(source=run_folder, max_tokens=3).run()
    assert events[:6] == ["token", True] * 3


def test_the_prompt_from_a_file_or_none(capsys, run_folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("In a hole\n", encoding="utf-8")
    from_file = figures(capsys, run_folder, "--prompt-file", tmp_path / "prompt.txt")
    assert from_file == from_file | {"prompt_tokens": 11}
    assert from_file["tokens"] == figures(capsys, run_folder, "--prompt", "In a hole\n")["tokens"]
    assert figures(capsys, run_folder, "--max-tokens", "0") == {
        "text": "", "tokens": [], "prompt_tokens": 1, "written_tokens": 0, "position": 1, "ended": "max_tokens",
        "tokens_read_per_second": pytest.approx(1, rel=1e12), "tokens_written_per_second": None,
        "native": Stream(build()).is_native,
    }  # fmt: skip


def test_a_document_ends(capsys, run_folder, tmp_path, monkeypatch):
    model = build()
    with torch.no_grad():
        model.head.weight.zero_()  # all logits are equal, and the first of them is taken
    monkeypatch.setattr(SequenceModel, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(ByteTokenizer, "document_token", 0)
    shutil.copytree(run_folder, tmp_path / "run")
    ByteTokenizer().save(tmp_path / "run" / "tokenizer")
    found = figures(capsys, tmp_path / "run", "--prompt", "a", "--temperature", "0")
    assert found["tokens"] == [] and found["ended"] == "document"


def test_a_conversation_goes_on(capsys, run_folder, tmp_path):
    together = figures(capsys, run_folder, "--prompt", "a", "--max-tokens", "40", "--seed", "2", "--temperature", "0.9")
    first = figures(capsys, run_folder, "--prompt", "a", "--max-tokens", "15", "--seed", "2", "--temperature", "0.9",
                    "--save-state", tmp_path / "s" / "saved")  # fmt: skip
    assert together["written_tokens"] == 40 and first["written_tokens"] == 15  # no document ended
    load = ["--load-state", tmp_path / "s" / "saved", "--max-tokens", "25"]
    rest = figures(capsys, run_folder, *load)
    assert first["tokens"] + rest["tokens"] == together["tokens"]
    assert rest["position"] == together["position"] and rest["prompt_tokens"] == 0
    # More may be said first, other draws asked for, and the save may be replaced.
    more = figures(capsys, run_folder, *load, "--prompt", "xyz", "--save-state", tmp_path / "s" / "saved")
    assert more["prompt_tokens"] == 3 and more["position"] == 17 + 3 + 25
    assert figures(capsys, run_folder, *load)["position"] == 45 + 25
    assert figures(capsys, run_folder, *load, "--seed", "3")["tokens"] != figures(capsys, run_folder, *load)["tokens"]


SAMPLES = [
    "plain",
    "é€😀 and again 😀😀é",
    b"\xff\xff\xffabc\xf0\x9f\x98",  # never text; and a character that is cut off
    b"\xe2\x82\xe2\x82\xac\x80\x80\xf0\x9f\x98\x80\xf0\xe2",
    b"\x80" * 20,
    "a � in the text itself �",
]


def test_an_interrupted_conversation_is_saved(run_folder, tmp_path, monkeypatch):
    step = Stream._step

    def interrupted(stream, token):
        step(stream, token)
        if stream.position == 14:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Stream, "_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    command = LmGenerate(source=run_folder, prompt="Wie schön", max_tokens=30, save_state=tmp_path / "saved")
    with pytest.raises(KeyboardInterrupt):
        command.run()
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    saved = Stream.load(tmp_path / "saved", build())
    assert saved.position == 14  # 11 of the prompt and three more
    whole = Stream(build(), Sampling())
    whole.prefill([256, *"Wie schön".encode()])
    list(whole.generate(3))
    assert torch.equal(saved.logits, whole.logits) and list(saved.generate(5)) == list(whole.generate(5))


@pytest.mark.parametrize("sample", SAMPLES, ids=ascii)
def test_characters_appear_when_they_are_complete(sample):
    tokens = list(sample.encode() if isinstance(sample, str) else sample)
    stream, shown = TextStream(ByteTokenizer()), ""
    for i, token in enumerate(tokens):
        shown += stream.add(token)
        so_far = ByteTokenizer().decode(tokens[: i + 1])
        assert so_far.removesuffix("�") == shown  # no more is held back than one unfinished character
    assert shown + stream.rest() == ByteTokenizer().decode(tokens)


def test_random_bytes_of_any_spelling():
    """Half of them are the bytes that characters begin and go on with, so that all kinds of unfinished ones occur."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = rng.choices(range(256), k=rng.randrange(12)) + rng.choices([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98], k=12)
        stream = TextStream(ByteTokenizer())
        assert "".join(map(stream.add, tokens)) + stream.rest() == ByteTokenizer().decode(tokens)


def test_refused(run_folder, tmp_path, capsys):
    def refused(match: str, **options) -> None:
        with pytest.raises(UsageError, match=match):
            LmGenerate(**({"source": run_folder} | options)).run()

    refused("does not exist", source=tmp_path / "none")
    refused("not both", prompt="a", prompt_file=tmp_path / "p")
    refused("cannot be read", prompt_file=tmp_path / "p")
    refused("max_tokens", max_tokens=-1)
    refused("top_p", top_p=2.0)
    refused("other than", save_state=run_folder)
    refused("not a folder", load_state=tmp_path / "none")
    build().save_pretrained(tmp_path / "alone" / "model")
    refused("no tokenizer beside it", source=tmp_path / "alone" / "model")
    build(300).save_pretrained(tmp_path / "larger" / "checkpoint")
    ByteTokenizer().save(tmp_path / "larger" / "tokenizer")
    refused("257 tokens and the model .* 300", source=tmp_path / "larger")
    assert capsys.readouterr().out == ""  # nothing was written before
    assert (run_folder / "checkpoint").is_dir()
