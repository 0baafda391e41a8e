import copy
import dataclasses
import itertools
import json
import math
import re
import statistics
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("lm_eval")

import datasets
import lm_eval.tasks
from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from glalm.config.strict import ConfigError, RunError
from glalm.evals import harness, local_tasks
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext
from glalm.evals.harness import (
    PAPER,
    HarnessEvaluator,
    HarnessLM,
    RecallEvaluator,
    collect_metrics,
    paper_table,
    set_fewshot,
)
from glalm.evals.inputs import open_eval_model
from glalm.evals.options import EvalConfig, HarnessConfig

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


@pytest.fixture(scope="module", autouse=True)
def few_tasks():
    """The harness knows its tasks after reading all of its files, for seconds: here some of them."""
    tasks = Path(lm_eval.tasks.__file__).parent
    names = ("anli", "arc", "lambada", "wikitext", "sciq", "winogrande", "fda", "swde", "squad_completion")
    with pytest.MonkeyPatch.context() as patch:
        few = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[tasks / name for name in names])
        patch.setattr(local_tasks, "load_harness_tasks", lambda: few)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of exactly the tokens of its tokenizer: the harness's own model also draws ids beyond them."""
    model = tiny.llama(max_position_embeddings=256, vocab_size=259)
    return tiny.saved(tmp_path_factory.mktemp("model") / "llama", model)


@pytest.fixture(scope="module")
def eval_model(folder, tmp_path_factory) -> EvalModel:
    config = EvalConfig(checkpoint=str(folder), runs_dir=str(tmp_path_factory.mktemp("runs")))
    return open_eval_model(config, torch.device("cpu"))


def harness_lm(eval_model: EvalModel, max_length: int = 64, **options) -> HarnessLM:
    return HarnessLM(eval_model, HarnessConfig(**options), max_length, EvalContext())


def text(words: int, seed: int) -> str:
    picked = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picked)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


# ------------------------------------------------------------------------------------- against the harness's own model


@pytest.mark.parametrize("adds_bos", [False, True])
def test_log_likelihoods_are_those_of_the_harness_own_model(adds_bos, tmp_path):
    folder = tiny.saved(tmp_path / "model", tiny.llama(), adds_bos)
    eval_model = open_eval_model(EvalConfig(checkpoint=str(folder), runs_dir=str(tmp_path)), torch.device("cpu"))
    asked = [(text(n, n), " " + text(1 + k % 2, 10 * n + k)) for n in range(1, 9) for k in range(1 + n % 4)]
    asked += [("", "alpha"), ("ends in a space ", "beta"), (text(20, 0), " too long")]  # more than 64 bytes
    requests = instances("loglikelihood", asked)
    theirs = HFLM(
        pretrained=eval_model.causal_lm, tokenizer=tiny.tokenizer(tmp_path, adds_bos), max_length=64, batch_size=3
    )
    ours = harness_lm(eval_model, batch_tokens=100).loglikelihood(requests)
    for (nats, greedy), (expected, likeliest) in zip(ours, theirs.loglikelihood(requests, True), strict=True):
        assert nats == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest


def test_rolling_log_likelihoods_are_those_of_the_harness_own_model(eval_model, tmp_path):
    requests = instances("loglikelihood_rolling", [(text(n, n),) for n in (3, 40, 11, 12)])
    theirs = HFLM(pretrained=eval_model.causal_lm, tokenizer=tiny.tokenizer(tmp_path), max_length=64, batch_size=3)
    expected = theirs.loglikelihood_rolling(requests, True)
    assert harness_lm(eval_model, batch_tokens=100).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-6)
    carried = harness_lm(eval_model, batch_tokens=100, stateful=True).loglikelihood_rolling(requests)
    assert carried[0] == pytest.approx(expected[0], rel=1e-5)  # shorter than 64
    assert carried[1] != pytest.approx(expected[1], rel=1e-3)
    whole = harness_lm(eval_model, max_length=10_000).loglikelihood_rolling(requests)
    assert carried == pytest.approx(whole, rel=1e-5)


def test_generation_is_that_of_the_harness_own_model(eval_model, tmp_path):
    requests = instances(
        "generate_until",
        [(text(n, n), {"until": ["\n", "e"], "max_gen_toks": 20}) for n in (1, 7, 3)]
        + [(text(30, 30), {"until": "zz", "max_gen_toks": 5}), ("alpha", {"until": ["\n"], "max_gen_toks": 9})],
    )
    theirs = HFLM(pretrained=eval_model.causal_lm, tokenizer=tiny.tokenizer(tmp_path), max_length=64, batch_size=2)
    expected = theirs.generate_until(requests, True)
    assert harness_lm(eval_model, batch_tokens=130).generate_until(requests) == expected
    assert max(map(len, expected)) > 3
    with pytest.raises(ConfigError, match=r"max_length=20 leaves no room before the 20 tokens"):
        harness_lm(eval_model, max_length=20).generate_until(requests)


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "temperature": 3.0, "top_p": 0.8}, {"temperature": 0.5}], ids=str
)
def test_a_tasks_options_of_sampling_reach_generation(options, eval_model, tmp_path):
    """Drawn from the same random numbers, a text is that of the harness's own model."""
    [request] = instances("generate_until", [(text(7, 7), {"until": ["zz"], "max_gen_toks": 30, **options})])
    # The harness's own model would draw tokens that the tokenizer lacks.
    causal_lm = tiny.llama(vocab_size=eval_model.tokenizer.vocab_size)
    theirs = HFLM(pretrained=causal_lm, tokenizer=tiny.tokenizer(tmp_path), max_length=64, batch_size=1)
    found = []
    for lm in (harness_lm(dataclasses.replace(eval_model, causal_lm=causal_lm)), theirs):
        torch.manual_seed(5)
        found.append(lm.generate_until([request], True))
    assert found[0] == found[1]


def test_text_is_not_generated_from_logits_that_are_nan(eval_model):
    causal_lm = copy.deepcopy(eval_model.causal_lm)
    [*_, last] = causal_lm.parameters()
    last.data.fill_(math.nan)
    lm = harness_lm(dataclasses.replace(eval_model, causal_lm=causal_lm))
    with pytest.raises(RunError, match="logits of the next token are NaN"):
        lm.generate_until(instances("generate_until", [("alpha", {"until": ["zz"], "max_gen_toks": 5})]))


def test_greedy_tasks_give_generation_no_options_of_sampling(eval_model, monkeypatch):
    given = []
    monkeypatch.setattr(eval_model.causal_lm, "generate", lambda ids, **options: given.append(options) or ids)
    for options in ({}, {"do_sample": False, "temperature": 0.7, "top_p": 0.5}, {"temperature": 0.0, "num_beams": 3}):
        arguments = ("alpha", {"until": ["zz"], "max_gen_toks": 5, **options})
        harness_lm(eval_model).generate_until(instances("generate_until", [arguments]))
    assert [options["do_sample"] for options in given] == [False] * 3
    assert not {"temperature", "top_p", "top_k"} & set().union(*given)
    assert [options.get("num_beams") for options in given] == [None, None, 3]


def test_tokens_that_the_tokenizer_lacks_are_not_generated(eval_model, monkeypatch):
    """A model's vocabulary may be larger, and SentencePiece cannot decode an id of its own."""
    options = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1e3}
    [request] = instances("generate_until", [("alpha", options)])
    decoded = set()
    decode = eval_model.tokenizer.decode
    monkeypatch.setattr(eval_model.tokenizer, "decode", lambda ids: decoded.update(ids) or decode(ids))
    for limit in (259, 130):
        monkeypatch.setattr(eval_model.tokenizer, "vocab_size", limit)
        decoded.clear()
        torch.manual_seed(0)
        harness_lm(eval_model).generate_until([request])
        assert 0.8 * limit < max(decoded) < limit


def test_a_text_ends_where_the_model_ends_it(eval_model, monkeypatch):
    """Rows of a batch go on until the last one has ended."""
    lm = harness_lm(eval_model)
    after = torch.tensor(
        [[*eval_model.tokenizer.encode("beta"), lm.eot_token_id, *eval_model.tokenizer.encode("gamma")]]
    )
    monkeypatch.setattr(eval_model.causal_lm, "generate", lambda ids, **_: torch.cat([ids, after], 1))
    for until, expected in ((["zz"], "beta"), (["zz", "t", "e"], "b")):
        [found] = lm.generate_until(instances("generate_until", [("alpha", {"until": until, "max_gen_toks": 20})]))
        assert found.strip() == expected


@given(st.tuples(st.text("ab \n", max_size=5), st.text("ab \n", max_size=5)))
@example(("", ""))
@example((" ", "b"))
@example(("a", ""))
@settings(deadline=None, max_examples=12)
def test_a_request_of_blanks_or_of_nothing_is_scored_as_any_other(eval_model, pair):
    """The tokenizer has one id per byte and adds no BOS, so a text's ids are those of its parts."""
    context, continuation = pair
    encode = eval_model.tokenizer.encode
    before = context.rstrip()
    ids = encode(context[len(before) :] + continuation)
    start = encode(before) or [eval_model.tokenizer.bos_id]
    logits = eval_model.causal_lm(torch.tensor([start + ids])).logits[0].log_softmax(-1)
    expected = sum(logits[len(start) + i - 1, token].item() for i, token in enumerate(ids))
    others = [("alpha", " beta"), ("", "gamma")]
    alone = harness_lm(eval_model).loglikelihood(instances("loglikelihood", others))
    found = harness_lm(eval_model).loglikelihood(instances("loglikelihood", [others[0], pair, others[1]]))
    nats = [answer.log_likelihood for answer in found]
    assert nats == pytest.approx([alone[0].log_likelihood, expected, alone[1].log_likelihood], abs=1e-4)


def test_texts_without_a_token_end_nothing(eval_model):
    lm = harness_lm(eval_model, stateful=True)
    [nothing, some] = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("",), ("alpha",)]))
    assert nothing == 0 and some < 0
    options = {"until": [], "max_gen_toks": 3, "do_sample": False}
    asked = instances("generate_until", [("", options), (eval_model.tokenizer.decode([1]), options)])
    assert len(lm.generate_until(asked[:1])) == 1


def test_a_task_that_fails_leaves_the_others(eval_model, data_dir, monkeypatch):
    run_task = harness.run_task

    def broken(name, *arguments):
        return 1 / 0 if name == "arc_easy" else run_task(name, *arguments)

    monkeypatch.setattr(harness, "run_task", broken)
    results = found(eval_model, data_dir, ["arc_easy", "lambada_openai"])
    assert results["missing"] == {"arc_easy": "ZeroDivisionError: division by zero"}
    assert [*results["tasks"]] == ["lambada_openai"]


def test_processes_share_the_requests(eval_model, monkeypatch, thread_contexts):
    asked = {
        "loglikelihood": [(text(2 + i % 5, i % 5), " " + text(1 + i % 3, 50 + i)) for i in range(15)],
        "loglikelihood_rolling": [(text(n, n),) for n in (3, 40, 11)],
        "generate_until": [(text(n, n), {"until": ["e"], "max_gen_toks": 9}) for n in (1, 7, 3, 2, 5)],
    }
    read = [0, 0]
    count = EvalModel.forward_features

    def counted(self, input_ids, *args, **kwargs):
        if threading.current_thread().name in ("0", "1"):
            read[int(threading.current_thread().name)] += len(input_ids)
        return count(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(EvalModel, "forward_features", counted)
    for options in ({}, {"stateful": True}):
        alone = harness_lm(eval_model, batch_tokens=100, **options)
        expected = {kind: getattr(alone, kind)(instances(kind, arguments)) for kind, arguments in asked.items()}
        contexts = thread_contexts(2)
        found = [None, None]

        def process(rank: int, options=options, contexts=contexts, found=found) -> None:
            lm = harness_lm(eval_model, batch_tokens=100, **options)
            lm.context = contexts[rank]
            found[rank] = {kind: getattr(lm, kind)(instances(kind, arguments)) for kind, arguments in asked.items()}

        threads = [threading.Thread(target=process, args=(rank,), name=str(rank)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for results in found:
            assert results["generate_until"] == expected["generate_until"]
            assert results["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], rel=1e-6)
            nats = [nats for nats, _ in expected["loglikelihood"]]
            assert [nats for nats, _ in results["loglikelihood"]] == pytest.approx(nats, abs=1e-4)
    assert 0.5 < read[0] / read[1] < 2


# --------------------------------------------------------------------------------------------------- tasks offline

ARC = [
    {"query": f"Question: {text(3, i)}?", "choices": [text(1 + i % 3, 7 * i + k) for k in range(4)], "gold": i % 4}
    for i in range(6)
]


@pytest.fixture
def data_dir(tmp_path):
    for task, name, rows in [
        ("arc_easy", "test.jsonl", ARC),
        (
            "lambada_openai",
            "test-00000-of-00001.jsonl",
            [{"text": f"{text(5, i)} {text(1, 90 + i)}"} for i in range(4)],
        ),
        ("fda", "validation.jsonl", [{"text": text(6, i), "value": text(1, i)} for i in range(3)]),
    ]:
        (tmp_path / "tasks" / task).mkdir(parents=True)
        (tmp_path / "tasks" / task / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "wikitext2").mkdir()
    (tmp_path / "tasks" / "wikitext2" / "wiki.test.tokens.txt").write_text(
        " \n = One thing = \n \n Some <unk> text . \n \n = = A part = = \n \n More . \n"
        " = Another = \n \n Other text . \n"
    )
    return tmp_path / "tasks"


def found(eval_model: EvalModel, data_dir, tasks: list[str], context: EvalContext | None = None, **options) -> dict:
    config = EvalConfig(
        evals=["zero_shot"], data_dir=str(data_dir), harness=HarnessConfig(tasks=tasks, max_length=128, **options)
    )
    return HarnessEvaluator(eval_model, config).run(context or EvalContext())


def test_scores_of_tasks_equal_those_computed_directly(eval_model, data_dir):
    results = found(eval_model, data_dir, ["arc_easy", "lambada_openai", "wikitext"])
    assert results["missing"] == {}
    tasks, encode = results["tasks"], eval_model.tokenizer.encode

    @torch.no_grad()
    def nats(context: str, continuation: str) -> float:
        before = encode(context) or [1]
        row = torch.tensor([before + encode(continuation)])
        logp = eval_model.causal_lm(row[:, :-1]).logits.double().log_softmax(-1)[0, len(before) - 1 :]
        return logp.gather(-1, row[0, len(before) :, None]).sum().item()

    right = normalised = 0
    bits = text_bytes = 0.0
    for row in ARC:
        scores = [nats(f"{row['query']}\nAnswer:", f" {choice}") for choice in row["choices"]]
        each = [s / len(c) for s, c in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["gold"]
        normalised += each.index(max(each)) == row["gold"]
        bits -= scores[row["gold"]] / math.log(2)
        text_bytes += len(row["choices"][row["gold"]]) + 1  # with the space before it
    assert tasks["arc_easy"]["acc"] == pytest.approx(right / 6)
    assert tasks["arc_easy"]["acc_norm"] == pytest.approx(normalised / 6)
    assert (tasks["arc_easy"]["samples"], tasks["arc_easy"]["num_fewshot"]) == (6, 0)
    assert tasks["arc_easy"]["centered_acc"] == pytest.approx((right / 6 - 0.25) / 0.75)
    assert tasks["arc_easy"]["answer_bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-4)

    texts = [f"{text(5, i)} {text(1, 90 + i)}" for i in range(4)]
    mean = sum(nats(t.rpartition(" ")[0], " " + t.rpartition(" ")[2]) for t in texts) / 4
    last_words = sum(len(t.rpartition(" ")[2]) + 1 for t in texts)
    assert tasks["lambada_openai"]["centered_acc"] == tasks["lambada_openai"]["acc"]
    assert tasks["lambada_openai"]["answer_bits_per_byte"] == pytest.approx(
        -4 * mean / math.log(2) / last_words, rel=1e-3
    )
    assert "centered_acc" not in tasks["wikitext"]
    assert results["summary"] == {
        name: pytest.approx((tasks["arc_easy"][name] + tasks["lambada_openai"][name]) / 2)
        for name in ("centered_acc", "answer_bits_per_byte")
    }
    assert tasks["lambada_openai"]["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-3)

    pages = [
        " = One thing = \n \n Some <unk> text . \n \n = = A part = = \n \n More . \n",
        " = Another = \n \n Other text . \n",
    ]
    assert local_tasks.split_wikitext((data_dir / "wikitext2/wiki.test.tokens.txt").read_text()) == pages
    words = 0
    total = 0.0
    for page, clean in zip(
        pages,
        [" = One thing =\n\nSome <unk> text.\n\n== A part ==\n\nMore.\n", " = Another =\n\nOther text.\n"],
        strict=True,
    ):
        words += len(page.split()) + 2  # as the harness counts: what is before the first space and after the last
        total += nats("", clean)
    assert tasks["wikitext"]["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-3)


def test_right_answers_after_contexts_that_differ(eval_model, data_dir):
    """WinoGrande's choices are in the contexts, before one continuation."""
    rows = [
        {"sentence": f"Ann told Maria that _ was late {i}.", "option1": "Ann", "option2": "Maria"} for i in range(4)
    ]
    answers = [1, 2, 2, 1]
    (data_dir / "winogrande").mkdir()
    lines = [json.dumps(row | {"answer": str(answer)}) for row, answer in zip(rows, answers, strict=True)]
    (data_dir / "winogrande" / "validation.jsonl").write_text("\n".join(lines))
    scores = found(eval_model, data_dir, ["winogrande"])["tasks"]["winogrande"]
    pairs = [(f"Ann told Maria that {('Ann', 'Maria')[a - 1]}", f" was late {i}.") for i, a in enumerate(answers)]
    nats = [answer.log_likelihood for answer in harness_lm(eval_model).loglikelihood(instances("loglikelihood", pairs))]
    text_bytes = sum(len(continuation) for _, continuation in pairs)
    assert scores["answer_bits_per_byte"] == pytest.approx(-sum(nats) / math.log(2) / text_bytes, rel=1e-5)
    assert scores["centered_acc"] == pytest.approx(2 * scores["acc"] - 1)


def test_rows_of_evaluation_suites_become_the_hubs():
    options = ["Ann told Maria that Ann", "Ann told Maria that Maria"]
    row = {"context_options": options, "continuation": "was late.", "gold": 1}
    made = local_tasks.ROW_CONVERTERS["winogrande"](row)
    assert made == {"sentence": "Ann told Maria that _ was late.", "option1": "Ann", "option2": "Maria", "answer": "2"}
    made = local_tasks.ROW_CONVERTERS["copa"]({"query": "It rained, therefore", "choices": ["a.", "b."], "gold": 1})
    assert made == {"premise": "It rained.", "question": "effect", "choice1": "a.", "choice2": "b.", "label": 1}
    made = local_tasks.ROW_CONVERTERS["boolq"](
        {"query": "Passage: P\nQuestion: is it?", "choices": ["no", "yes"], "gold": 0}
    )
    assert made == {"passage": "P", "question": "is it", "label": 0}
    made = local_tasks.ROW_CONVERTERS["hellaswag"]({"query": "Ironing: A man: he", "choices": ["a", "b"], "gold": 1})
    assert (made["activity_label"], made["ctx_a"], made["endings"], made["label"]) == (
        "Ironing",
        "A man: he",
        ["a", "b"],
        "1",
    )
    made = local_tasks.ROW_CONVERTERS["openbookqa"]({"query": "Q", "choices": ["x", "y"], "gold": 1})
    assert made == {"question_stem": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}


def test_files_of_a_split(tmp_path):
    for name in (
        "validation.jsonl",
        "validation_other.jsonl",
        "test-1-of-2.parquet",
        "test-2-of-2.parquet",
        "notes.md",
    ):
        (tmp_path / "piqa").mkdir(exist_ok=True)
        (tmp_path / "piqa" / name).touch()
    names = {split: [p.name for p in paths] for split, paths in local_tasks.find_task_files(tmp_path, "piqa").items()}
    assert names == {"validation": ["validation.jsonl"], "test": ["test-1-of-2.parquet", "test-2-of-2.parquet"]}


def test_parquet(tmp_path, eval_model, data_dir):
    before = found(eval_model, data_dir, ["lambada_openai"])
    file = data_dir / "lambada_openai" / "test-00000-of-00001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    datasets.Dataset.from_list(rows).to_parquet(file.with_suffix(".parquet"))
    file.unlink()
    assert found(eval_model, data_dir, ["lambada_openai"]) == before


def test_missing_data_or_task_leaves_the_others(eval_model, data_dir):
    results = found(eval_model, data_dir, ["sciq", "arc_easy", "arc_esay"], limit=2)
    assert [*results["tasks"]] == ["arc_easy"]
    assert results["tasks"]["arc_easy"]["samples"] == 2
    assert "put the split test of the data set allenai/sciq at" in results["missing"]["sciq"]
    assert f"{data_dir}/sciq/test.jsonl" in results["missing"]["sciq"]
    assert results["missing"]["arc_esay"].startswith("harness has no task arc_esay; some of similar names: arc_")

    (data_dir / "sciq").mkdir()
    (data_dir / "sciq" / "test.jsonl").write_text('{"question": "no more columns"}\n')
    broken = found(eval_model, data_dir, ["sciq", "arc_easy"], limit=2)
    assert [*broken["tasks"]] == ["arc_easy"]
    assert "its data cannot be read in data_dir" in broken["missing"]["sciq"]
    assert "'support' is undefined" in broken["missing"]["sciq"]


def test_an_answer_longer_than_is_read_leaves_the_other_tasks(eval_model, data_dir):
    results = found(eval_model, data_dir, ["arc_easy", "lambada_openai"])
    long = json.dumps({**ARC[0], "choices": ["a", "b", "c", "d" * 140]}) + "\n"
    with (data_dir / "arc_easy" / "test.jsonl").open("a") as file:
        file.write(long)
    changed = found(eval_model, data_dir, ["arc_easy", "lambada_openai"])
    assert changed["tasks"] == {"lambada_openai": results["tasks"]["lambada_openai"]}
    assert changed["missing"]["arc_easy"].startswith("harness.max_length=128 is less than the 141 tokens of an answer")


@pytest.mark.parametrize("options", [{}, {"stateful": True}])
def test_a_task_of_scores_that_are_not_finite_is_missing(eval_model, data_dir, options, monkeypatch):
    nan_head = copy.deepcopy(eval_model.causal_lm)
    nan_head.lm_head.weight.data.fill_(math.nan)
    broken = EvalModel(nan_head, tokenizer=eval_model.tokenizer)
    tasks = ["arc_easy", "wikitext", "lambada_openai"]
    results = found(broken, data_dir, tasks, **options)
    assert results["tasks"] == {}
    assert [*results["missing"]] == tasks
    for reason in results["missing"].values():
        assert re.fullmatch(r"\d+ of \d+ log-likelihoods are not finite: the model's logits overflow", reason)


def test_a_result_that_cannot_be_saved_leaves_the_others(tmp_path):
    context = EvalContext()
    context.use_partial_results(tmp_path / "parts.json", {"settings": "these"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        context.load_or_compute("first", lambda: math.nan)
    assert context.load_or_compute("second", lambda: 2) == 2
    assert json.loads((tmp_path / "parts.json").read_text())["second"] == 2


def test_damaged_partial_results_are_computed_again(tmp_path, caplog):
    path = tmp_path / "parts.json"
    path.write_text('{"inputs": {"sett')
    context = EvalContext()
    context.use_partial_results(path, {"settings": "these"})
    assert f"{path}" in caplog.text and "is computed again" in caplog.text
    assert context.load_or_compute("first", lambda: 1) == 1
    assert json.loads(path.read_text()) == {"inputs": {"settings": "these"}, "first": 1}


def test_a_metric_by_a_filter_keeps_its_error_and_is_the_only_score(eval_model):
    found = {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.25, "alias": "gsm8k"}
    about = {"versions": {"gsm8k": 3.0}, "n-shot": {"gsm8k": 5}, "n-samples": {"gsm8k": {"effective": 1319}}}
    values = collect_metrics("gsm8k", {"results": {"gsm8k": found}, **about})
    assert (values["version"], values["num_fewshot"], values["samples"]) == (3.0, 5, 1319)
    config = EvalConfig(harness=HarnessConfig(tasks=["gsm8k"], max_length=128))
    evaluator = HarnessEvaluator(eval_model, config)
    results = {"tasks": {"gsm8k": values}, "missing": {}}
    assert evaluator.summarize(results) == ["gsm8k: exact_match (strict-match) 0.5 ± 0.25"]
    assert evaluator.metrics(results) == {"gsm8k/exact_match (strict-match)": 0.5}


def test_other_data_of_a_tag_are_other_settings(eval_model, data_dir):
    harness = HarnessConfig(tasks=["ai2_arc"], max_length=128)
    config = EvalConfig(evals=["zero_shot"], data_dir=str(data_dir), harness=harness)
    before = HarnessEvaluator(eval_model, config).settings
    assert HarnessEvaluator(eval_model, config).settings == before
    (data_dir / "arc_easy" / "test.jsonl").write_text(json.dumps(ARC[0]))
    assert HarnessEvaluator(eval_model, config).settings != before


def test_bad_settings(eval_model, data_dir, tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        found(eval_model, tmp_path / "nowhere", ["arc_easy"])
    with pytest.raises(ConfigError, match=r"harness\.max_length: model has learned positions for 100 tokens"):
        bounded = EvalModel(eval_model.causal_lm, tokenizer=eval_model.tokenizer, max_length=100)
        found(bounded, data_dir, ["arc_easy"])
    with pytest.raises(ConfigError, match=r"harness\.stateful: model cannot read a text of any length in parts"):
        bounded = EvalModel(eval_model.causal_lm, tokenizer=eval_model.tokenizer, max_length=200)
        found(bounded, data_dir, ["wikitext"], stateful=True)
    with pytest.raises(ConfigError, match="the tokenizer has 259 tokens, model only 200"):
        found(EvalModel(tiny.llama(vocab_size=200), tokenizer=eval_model.tokenizer), data_dir, ["arc_easy"])


@pytest.mark.parametrize("own, wanted, shots", [(None, None, 0), (None, 5, 5), (3, None, 3), (3, 5, 5), (0, 5, 0)])
def test_a_task_that_has_no_examples_by_its_own_config_keeps_none(own, wanted, shots):
    config = {"num_fewshot": own}
    task = SimpleNamespace(
        get_config=config.get,
        set_config=lambda key, value: config.update({key: value}),
        set_fewshot_seed=lambda seed: None,
    )
    set_fewshot(task, wanted)
    assert config == {"num_fewshot": shots}


def test_few_shot_comes_from_the_split_at_hand(eval_model, data_dir):
    assert found(eval_model, data_dir, ["arc_easy"], num_fewshot=2)["tasks"]["arc_easy"]["num_fewshot"] == 2


def test_recall_tasks_generate(eval_model, data_dir, monkeypatch):
    asked = []
    generate = HarnessLM.generate_until
    monkeypatch.setattr(
        HarnessLM, "generate_until", lambda self, r, *_: asked.append([x.args for x in r]) or generate(self, r)
    )
    config = EvalConfig(evals=["recall"], data_dir=str(data_dir), harness=HarnessConfig(max_length=128))
    results = RecallEvaluator(eval_model, config).run(EvalContext())
    assert results["tasks"]["fda"]["samples"] == 3
    assert 0 <= results["tasks"]["fda"]["contains"] <= 1
    assert asked[0][0] == (text(6, 0), {"until": ["\n"], "max_gen_toks": 48})
    assert [*results["missing"]] == ["swde", "squad_completion"]
    assert "hazyresearch/based-swde-v2" in results["missing"]["swde"]


def test_a_split_of_its_own_name_is_not_asked_for_in_a_folder(eval_model, data_dir):
    reason = found(eval_model, data_dir, ["anli_r1"])["missing"]["anli_r1"]
    assert reason.startswith(f"its split test_r1 cannot be read from data_dir={data_dir}, only train, validation and")


def test_a_killed_evaluator_goes_on_after_its_last_task(eval_model, data_dir, tmp_path, monkeypatch):
    ran = []
    run = HarnessLM.loglikelihood
    monkeypatch.setattr(HarnessLM, "loglikelihood", lambda self, r, *_: ran.append(len(r)) or run(self, r))
    whole = found(eval_model, data_dir, ["arc_easy", "lambada_openai"])
    assert ran == [24, 4]

    for tasks in (["arc_easy"], ["arc_easy", "lambada_openai"]):
        context = EvalContext()
        context.use_partial_results(tmp_path / "parts.json", {"settings": "these"})
        results = found(eval_model, data_dir, tasks, context)
    assert ran == [24, 4, 24, 4]
    assert results == whole
    context = EvalContext()
    context.use_partial_results(tmp_path / "parts.json", {"settings": "others"})
    found(eval_model, data_dir, ["arc_easy"], context)
    assert ran == [24, 4, 24, 4, 24]


def test_what_a_task_samples_depends_on_no_task_before_it(eval_model, data_dir, monkeypatch):
    drawn, generate = [], HarnessLM.generate_until
    monkeypatch.setattr(
        HarnessLM, "generate_until", lambda self, r, *_: drawn.append(torch.rand(3).tolist()) or generate(self, r)
    )
    for seed, tasks in enumerate((["fda"], ["lambada_openai", "fda"])):
        expected = torch.manual_seed(seed).clone_state()
        found(eval_model, data_dir, tasks)
        assert torch.equal(torch.get_rng_state(), expected.get_state())  # nor does anything outside on what it samples
    assert drawn[0] == drawn[1]


def test_the_papers_table():
    tasks = {task: {} for task, _ in PAPER.values()}
    for i, (task, metric) in enumerate(PAPER.values()):
        tasks[task][metric] = float(i) if i < 2 else 0.1 * i
    row = paper_table(tasks)
    assert [*row] == [*PAPER, "Avg"]
    assert (row["LMB ppl"], row["LMB"]) == (1.0, pytest.approx(20))
    assert row["Avg"] == pytest.approx((20 + 30 + 40 + 50 + 60 + 70) / 6)


def test_standard_errors_fork_no_processes(monkeypatch):
    """Forked, they would keep train.py's handler of SIGTERM and outlive the harness's attempt to end them."""
    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("a pool of processes"))
    nats = [-1.0, -2.0, -3.0, -6.0]
    every = [math.exp(-sum(drawn) / 4) for drawn in itertools.product(nats, repeat=4)]
    found = metrics.bootstrap_stderr(metrics.perplexity, nats, iters=1000)
    assert found == pytest.approx(statistics.pstdev(every), rel=0.15)
