"""lm-eval: answers of our model class against whole forward passes, the offline tasks against readers of their own, and
the same figures through transformers' wrapper."""

import contextlib
import io
import json
import re
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from deltaproduct.corpus.tokenizer import DOCUMENT, ByteTokenizer, train_bpe
from deltaproduct.errors import UsageError
from deltaproduct.evaluation import harness
from deltaproduct.evaluation.harness import AVERAGED, PAPERS_TASKS, evaluate_harness
from deltaproduct.evaluation.lm_eval_tasks import FOLDER, OFFLINE_TASKS
from deltaproduct.evaluation.lm_eval_tasks.generate import DOCUMENTS, GENERATED, MOST_EVENTS, as_lines
from deltaproduct.models import ModelConfig, SequenceModel

pytestmark = pytest.mark.neighbours

with_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None or find_spec("datasets") is None, reason="lm-eval or its datasets are not installed"
)
BYTES = ByteTokenizer()
SMALL = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "intermediate_size": 32}
# β = 2·σ(6): reflections that forget nothing, as where states are tracked.
TRACKING = {"num_householder": 2, "beta_bias_init": 6.0}
MODELS = {
    "deltaproduct": TRACKING,
    "gated": {"num_householder": 3, "use_forget_gate": True, "use_output_gate": True},
    "hybrid": TRACKING | {"mixer": ["deltaproduct", "attention"]},
}


def language_model(vocab_size: int = BYTES.vocab_size, **fields) -> SequenceModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "num_labels": vocab_size, "initializer_range": None}
    return SequenceModel(ModelConfig.build(**SMALL | sizes | fields)).eval()


def harness_model(model, tokenizer=BYTES, batch_size=3):
    from deltaproduct.evaluation.harness_model import HarnessModel

    return HarnessModel(model, tokenizer, batch_size)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture
def no_probing(monkeypatch):
    # simple_evaluate runs pip and imports transformers to describe the machine: half of what a small evaluation takes.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


class Chain(torch.nn.Module):
    """After byte x comes successor[x], with probability 1 but for rounding: a language model whose texts are known.
    With scale 0 every token is as likely as another."""

    def __init__(self, successors: dict[int, int], scale: float = 50.0):
        super().__init__()
        size = BYTES.vocab_size
        self.config = ModelConfig.build(vocab_size=size, num_labels=size)
        self.embedding = torch.nn.Embedding(1, 1)
        self.head = torch.nn.Identity()
        self.successor, self.scale = torch.arange(size), scale
        for x, y in successors.items():
            self.successor[x] = y

    def hidden(self, tokens, state=None, *, cu_seqlens=None, mask=None):
        return self.scale * F.one_hot(self.successor[tokens], BYTES.vocab_size).float(), state


# ---------------------------------------------------------------------------------------------------- the offline tasks


def read_documents(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def last_print(text):
    """What Python prints last."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(text, {})
    return out.getvalue().split()[-1]


def who_has_the_penny(text):
    (owner,) = re.findall(r"(\w+) is the only one having a penny", text)
    for a, b in re.findall(r"(\w+) and (\w+) trade coins", text):
        owner = {a: b, b: a}.get(owner, owner)
    return owner


def number_asked_for(text):
    told = dict(re.findall(r"(\w+)'s number is (\d+)\.", text))
    return told[re.search(r"(\w+)'s number is$", text)[1]]


READERS = {"code_swaps": last_print, "entities": who_has_the_penny, "recall": number_asked_for}


@pytest.mark.parametrize("name", GENERATED)
def test_shipped_documents_are_what_the_generator_makes(name):
    assert (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8") == as_lines(name)


@pytest.mark.parametrize("name", GENERATED)
def test_answers_are_those_of_somebody_who_reads_the_text(name):
    documents = read_documents(name)
    for document in documents:
        answer = document["answer"]
        assert READERS[name](document["text"]) == (answer if "choices" not in document else document["choices"][answer])
    events = [document["events"] for document in documents]
    assert len(events) == DOCUMENTS and all(events.count(n) == DOCUMENTS // MOST_EVENTS for n in range(1, 9))


def test_no_answer_is_much_more_frequent_than_another():
    # Of 96 answers each of five is expected 19 times, with a standard deviation of 4: 4 of those either way.
    for name in ("code_swaps", "entities"):
        answers = [document["answer"] for document in read_documents(name)]
        assert all(abs(answers.count(i) - 19) <= 16 for i in range(5))


class Uniform(Chain):
    """All tokens are as likely."""

    def __init__(self):
        super().__init__({})
        self.head = torch.zeros_like


# ------------------------------------------------------------------------------------------------------ our model class


def whole(model, ids):
    """ln p [T−1,V] of each next token, in one pass over ids."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0, :-1].log_softmax(-1)


def expected_answer(model, context, continuation):
    before = [BYTES.document_token, *context.rstrip().encode()]
    ids = [BYTES.document_token, *(context + continuation).encode()]
    rows, targets = whole(model, ids)[len(before) - 1 :], torch.tensor(ids[len(before) :])
    return rows.gather(1, targets[:, None]).sum().item(), bool((rows.argmax(1) == targets).all())


# Few different bytes, so that keys are few and much alike; contexts of 0 to 60 bytes, shared and not.
PAIRS = [
    ("abab" * 9, " a"), ("abab" * 9, " b"), ("abab" * 9, "b" * 30), ("abab" * 9, "c"), ("", "abba"), ("", "b"),
    ("aa ", "ba"), ("aa", " ba"), ("b" * 60, "a" * 25), ("ab", "ab" * 20), ("ab", "ab"),
]  # fmt: skip


@with_lm_eval
@pytest.mark.parametrize("piece", [30, 2048])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_whole_passes(monkeypatch, name, piece):
    """In float64, so that what is left is rounding: below 1e-9 for sums of 30 terms near 6."""
    monkeypatch.setattr("deltaproduct.evaluation.harness_model.PIECE_TOKENS", piece)
    model = language_model(**MODELS[name]).double()
    answers = harness_model(model).loglikelihood(requests(*PAIRS))
    for pair, (score, greedy) in zip(PAIRS, answers, strict=True):
        wanted, wanted_greedy = expected_answer(model, *pair)
        assert score == pytest.approx(wanted, abs=1e-9) and greedy == wanted_greedy
    texts = ["ab" * 50, "", "b", "aab" * 30]
    rolling = harness_model(model).loglikelihood_rolling(requests(*((text,) for text in texts)))
    assert rolling == pytest.approx([expected_answer(model, "", text)[0] for text in texts], abs=1e-9)


@with_lm_eval
def test_greedy_answers_are_known_where_the_text_is():
    # Padding is token 0: what the model makes of it must not count.
    model = harness_model(Chain({97: 98, 98: 99, 99: 97, 0: 1}))
    pairs = [("a", "bca"), ("a", "b"), ("a", "bcb"), ("a", "c"), ("", "b"), ("ab", "cabc")]
    assert [greedy for _, greedy in model.loglikelihood(requests(*pairs))] == [True, True, False, False, False, True]


@with_lm_eval
def test_a_context_is_read_once(monkeypatch):
    model, read = language_model(), []
    hidden = model.hidden

    def counting(tokens, state=None, *, mask=None):
        read.append(tokens.numel() if mask is None else int(mask.sum()))
        return hidden(tokens, state, mask=mask)

    monkeypatch.setattr(model, "hidden", counting)
    harness_model(model).loglikelihood(requests(*(("a" * 99, end) for end in ("b", "c", "dd", "eee"))))
    assert sum(read) == 100 + 0 + 0 + 1 + 2  # the last token of each only is predicted


@with_lm_eval
def test_a_long_text_is_one_stream_in_pieces(monkeypatch):
    """Never more than a piece at once, and never cut: 20 times as much as a piece has."""
    monkeypatch.setattr("deltaproduct.evaluation.harness_model.PIECE_TOKENS", 100)
    model, widths = language_model(**TRACKING).double(), []
    hidden = model.hidden

    def watched(tokens, *args, **options):
        widths.append(tokens.numel())
        return hidden(tokens, *args, **options)

    monkeypatch.setattr(model, "hidden", watched)
    text = "abba" * 500
    (score,) = harness_model(model).loglikelihood_rolling(requests((text,)))
    assert max(widths) == 100
    monkeypatch.undo()
    assert score == pytest.approx(expected_answer(model, "", text)[0], abs=1e-7)  # of some 10,000 nats


def naive_greedy(model, context, most):
    ids = [BYTES.document_token, *context.encode()]
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return BYTES.decode(ids[-most:])


@with_lm_eval
@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_whole_passes(name):
    model = language_model(**MODELS[name]).double()
    prompts = ["abab" * 5, "", "b", "aaa", "ba" * 9]
    texts = harness_model(model).generate_until(
        requests(*((prompt, {"until": [], "max_gen_toks": 6 + i}) for i, prompt in enumerate(prompts)))
    )
    assert texts == [naive_greedy(model, prompt, 6 + i) for i, prompt in enumerate(prompts)]


@with_lm_eval
def test_texts_end_where_they_should():
    letters = {ord(a): ord(b) for a, b in zip("abcdefg", "bcdefga", strict=True)}
    model = harness_model(
        Chain(letters | {ord("x"): ord("y"), ord("y"): BYTES.document_token, BYTES.document_token: 122})
    )
    cases = [
        ("a", {"until": ["e"], "max_gen_toks": 20}, "bcd"),
        ("a", {"until": ["ga", "fg"], "max_gen_toks": 20}, "bcde"),
        ("g", {"until": "bc", "max_gen_toks": 20}, "a"),
        ("a", {"until": ["z", ""], "max_gen_toks": 9}, "bcdefgabc"),
        ("x", {"until": [], "max_gen_toks": 9}, "y"),  # the document token ends a text
        ("a", {"until": ["b"]}, ""),
        ("a", {"max_gen_toks": 0}, ""),
    ]
    texts = model.generate_until(requests(*((prompt, options) for prompt, options, _ in cases)))
    assert texts == [text for *_, text in cases]
    with pytest.raises(UsageError, match="do_sample"):
        model.generate_until(requests(("a", {"do_sample": True, "temperature": 1.0})))


# ----------------------------------------------------------------------------------------------------- evaluate_harness


@with_lm_eval
def test_offline_tasks_run(no_probing, capsys):
    model = language_model().train()
    before = torch.get_rng_state()
    report = evaluate_harness(model, BYTES, ["offline", "deltaproduct_prose"], limit=5)
    assert capsys.readouterr().out == "" and model.training and torch.equal(before, torch.get_rng_state())
    assert json.loads(json.dumps(report)) == report
    assert report["samples"] == dict.fromkeys(OFFLINE_TASKS, 5) and report["limit"] == 5
    assert report["versions"].keys() == {"lm_eval", *OFFLINE_TASKS}
    metrics = {name.removeprefix("deltaproduct_"): set(values) for name, values in report["tasks"].items()}
    assert metrics["code_swaps"] == metrics["entities"] == {"acc", "acc_stderr"}
    assert metrics["recall"] == {"exact_match", "exact_match_stderr"}
    assert metrics["prose"] == {"word_perplexity", "byte_perplexity", "bits_per_byte"}


@with_lm_eval
def test_figures_are_right_where_the_model_is_known(no_probing):
    """A model that writes "3" and nothing else, and one under which all 257 tokens are alike."""
    documents = read_documents("code_swaps")
    share = sum(document["answer"] == 2 for document in documents) / len(documents)
    report = evaluate_harness(Chain(dict.fromkeys(range(257), ord("3"))), BYTES, ["deltaproduct_code_swaps"])
    assert report["tasks"]["deltaproduct_code_swaps"]["acc"] == share
    report = evaluate_harness(Chain({}, scale=0), BYTES, ["deltaproduct_prose"])
    assert report["tasks"]["deltaproduct_prose"]["byte_perplexity"] == pytest.approx(257, rel=1e-6)


@with_lm_eval
def test_right_numbers_are_recognised(no_probing, monkeypatch):
    """Texts as a model that has read the question would write them, with a space before, half of them wrong."""
    documents = read_documents("recall")
    answers = [f" {d['answer'] if i % 2 else '0000'}" for i, d in enumerate(documents)]
    monkeypatch.setattr(
        "deltaproduct.evaluation.harness_model.HarnessModel.generate_until", lambda self, requests: answers
    )
    report = evaluate_harness(language_model(), BYTES, ["deltaproduct_recall"])
    assert report["tasks"]["deltaproduct_recall"]["exact_match"] == 0.5


ARC = {"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}
RECALL = {"text": "Name: Ann. Town:", "value": "Rome"}
PAPERS_DATA = {  # a document of each data set, by its name on the hub
    "EleutherAI/wikitext_document_level": {"page": "three short words"},
    "EleutherAI/lambada_openai": {"text": "and so on"},
    "baber/piqa": {"goal": "Rest.", "sol1": "Sit.", "sol2": "Run.", "label": 0},
    "Rowan/hellaswag": {"activity_label": "X", "ctx_a": "A", "ctx_b": "b", "endings": ["c", "dd"], "label": "1"},
    "allenai/winogrande": {"sentence": "A likes B as _ is kind.", "option1": "A", "option2": "B", "answer": "2"},
    "allenai/ai2_arc": ARC,
    "hazyresearch/based-swde-v2": RECALL,
    "hazyresearch/based-squad": RECALL,
    "hazyresearch/based-fda": RECALL,
}


@with_lm_eval
def test_papers_tasks_run_where_their_data_are(no_probing, monkeypatch):
    """lm-eval's own task files, on documents made up here: their metrics are those that `PAPERS_TASKS` names."""
    from datasets import Dataset

    def made_up(path, **options):
        return dict.fromkeys(("train", "validation", "test"), Dataset.from_list([PAPERS_DATA[path]] * 2))

    monkeypatch.setattr("datasets.load_dataset", made_up)
    report = evaluate_harness(Chain({}, scale=0), BYTES, ["papers", "ai2_arc"])
    assert report["samples"] == dict.fromkeys(report["samples"], 2)
    papers = report["papers"]
    assert papers.keys() == {*PAPERS_TASKS, "average"}
    assert papers["wikitext"]["word_perplexity"] == pytest.approx(257 ** (17 / 3))  # 17 bytes, 3 words
    assert papers["lambada_openai"] == pytest.approx({"perplexity": 257**3, "acc": 0})  # of " on"
    assert papers["fda"] == papers["swde"] == papers["squad_completion"] == {"contains": 0}
    assert "arc_easy" in report["tasks"]  # by way of the tag, and once


@with_lm_eval
def test_papers_metrics_and_their_mean(monkeypatch):
    values = {name: {f"{m},none": i + 0.5 for m in PAPERS_TASKS[name]} for i, name in enumerate(PAPERS_TASKS)}
    values["lambada_openai"]["perplexity,none"] = 99
    values["hellaswag"] |= {"acc,none": 99, "acc_norm_stderr,none": "N/A", "alias": "hellaswag"}
    results = {"results": values, "n-samples": {}, "versions": {}}

    def canned(*, model, **options):
        assert not model.model.training
        return results

    monkeypatch.setattr("lm_eval.simple_evaluate", canned, raising=False)
    monkeypatch.setattr(harness, "load_tasks", lambda names: names)
    report = evaluate_harness(language_model().train(), BYTES, ["papers"])
    assert report["papers"].pop("average") == {"acc": 4}  # of 1.5 … 6.5: lambada_openai to arc_challenge
    assert {name: tuple(metrics) for name, metrics in report["papers"].items()} == PAPERS_TASKS
    assert report["tasks"]["hellaswag"] == {"acc_norm": 3.5, "acc": 99}
    del values[AVERAGED[0]]
    assert "average" not in evaluate_harness(language_model(), BYTES, ["papers"])["papers"]


@with_lm_eval
@pytest.mark.parametrize("name", ["programs", "group"])
def test_a_task_that_runs_what_the_model_writes_is_refused(tmp_path, monkeypatch, name):
    from datasets import Dataset

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"test": Dataset.from_list([{"text": "a"}])})
    (tmp_path / "programs.yaml").write_text(
        "task: programs\ndataset_path: x\nunsafe_code: true\noutput_type: generate_until\ntest_split: test\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: exact_match}]\n'
    )
    (tmp_path / "group.yaml").write_text("group: group\ntask: [programs]\n")
    monkeypatch.setattr(harness, "task_folders", lambda: [tmp_path])
    with pytest.raises(UsageError, match="task programs runs programs that the model writes"):
        evaluate_harness(language_model(), BYTES, [name])


@with_lm_eval
@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it.\nRetry later."), ValueError()])
def test_data_that_cannot_be_had(monkeypatch, error):
    def unreachable(**options):
        raise error

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    for name in PAPERS_TASKS:
        with pytest.raises(UsageError, match=f"data of the task {name} .*HF_DATASETS_OFFLINE") as caught:
            evaluate_harness(language_model(), BYTES, [name])
        assert "\n" not in str(caught.value)


@with_lm_eval
@pytest.mark.parametrize(
    "whole_index",
    [False, pytest.param(True, marks=[pytest.mark.slow("harness"), pytest.mark.ci])],
    ids=["part of lm-eval's tasks", "all of them"],
)
def test_unknown_tasks(monkeypatch, whole_index):
    import lm_eval.tasks

    if not whole_index:
        own, folders = lm_eval.tasks.TaskManager, harness.task_folders()
        monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: own(include_defaults=False, include_path=folders))
    for name, near in (
        ("helaswag", "mean 'hellaswag'"),
        ("deltaproduct_prse", "mean 'deltaproduct_prose'"),
        ("?!", "papers"),
    ):
        with pytest.raises(UsageError, match=rf"no task '{re.escape(name)}'.*{near}"):
            evaluate_harness(language_model(), BYTES, ["offline", name])
    with pytest.raises(UsageError, match="at least one task"):
        evaluate_harness(language_model(), BYTES, [])


def test_mistakes(monkeypatch):
    model = language_model()
    with pytest.raises(UsageError, match="limit must be at least 1, not 0"):
        evaluate_harness(model, BYTES, ["offline"], limit=0)
    with pytest.raises(UsageError, match="batch_size must be at least 1, not 0"):
        evaluate_harness(model, BYTES, ["offline"], batch_size=0)
    with pytest.raises(UsageError, match="reads 300 tokens and predicts 300, but the tokenizer has 257"):
        evaluate_harness(language_model(300), BYTES, ["offline"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"\[eval\]"):
        evaluate_harness(model, BYTES, ["offline"])


# ------------------------------------------------------------------------------------------------- through transformers


@with_lm_eval
def test_transformers_wrapper_gives_the_same(no_probing, tmp_path):
    """The same task files through `simple_evaluate` on both: every log-likelihood to 1e-4, every text, every figure."""
    hf = pytest.importorskip("deltaproduct.models.hf")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_bpe(300, [document["text"] for document in read_documents("prose")])
    model = language_model(300, **TRACKING)
    model.save_pretrained(tmp_path / "model")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.inner, bos_token=DOCUMENT, eos_token=DOCUMENT, pad_token=DOCUMENT
    )
    ids = [(DOCUMENT, tokenizer.document_token)]
    fast.backend_tokenizer.post_processor = TemplateProcessing(single=f"{DOCUMENT} $A", special_tokens=ids)
    causal = hf.DeltaProductForCausalLM.from_pretrained(tmp_path / "model")
    causal.generation_config.eos_token_id = tokenizer.document_token  # or a text goes on behind its end

    def evaluate(lm, names):
        return lm_eval.simple_evaluate(
            lm, tasks=harness.load_tasks(names), task_manager=TaskManager(include_defaults=False),
            limit=12, bootstrap_iters=0, random_seed=None, numpy_random_seed=None, torch_random_seed=None,
        )  # fmt: skip

    ours = evaluate(harness_model(model, tokenizer, batch_size=5), ["offline"])
    # For a rolling log-likelihood the wrapper itself writes BOS before a text, and scores the tokenizer's own after it.
    rolling = OFFLINE_TASKS[-1:]
    for bos, names in ((True, OFFLINE_TASKS[:-1]), (False, rolling)):
        options = {"device": "cpu", "dtype": "float32", "batch_size": 4, "max_length": 4096}
        theirs = evaluate(HFLM(causal, tokenizer=fast, add_bos_token=bos, **options), names)
        for name in names:
            assert len(ours["samples"][name]) == (6 if name in rolling else 12)
            for sample, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
                assert sample["doc"] == other["doc"]
                for answer, its in zip(flat(sample["resps"]), flat(other["resps"]), strict=True):
                    # The wrapper adds up in float32, whose neighbours near 3,500 are 2.4e-4 apart: four of those.
                    tolerance = 1e-3 if name in rolling else 1e-4
                    assert answer == (pytest.approx(its, abs=tolerance) if isinstance(its, float) else its)
            for metric, value in ours["results"][name].items():
                other = theirs["results"][name][metric]
                assert value == (pytest.approx(other, rel=1e-5) if isinstance(other, float) else other)


def flat(nested):
    for x in nested:
        if isinstance(x, list | tuple):
            yield from flat(x)
        else:
            yield x


# ---- models of which parts are not the whole


class Halved(SequenceModel):
    def forward(self, *arguments, **options):
        logits, state = super().forward(*arguments, **options)
        return logits / 2, state


@with_lm_eval
def test_a_model_whose_call_is_more_than_its_parts_is_refused():
    config = ModelConfig.build(BYTES.vocab_size, BYTES.vocab_size, **SMALL)
    hooked, replaced = SequenceModel(config), SequenceModel(config)
    hooked.register_forward_hook(lambda model, given, done: (done[0] / 2, done[1]))
    replaced.forward = Halved(config).forward
    for model, reason in ((hooked, "a hook"), (replaced, "a forward"), (Halved(config), "a forward")):
        with pytest.raises(UsageError, match=f"this one has {reason}") as refusal:
            harness_model(model)
        assert "\n" not in str(refusal.value)
