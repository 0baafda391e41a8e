import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from tiny import llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MambaConfig, MambaForCausalLM

from glalm.config.strict import ConfigError, RunError
from glalm.evals import extrapolation as module
from glalm.evals.eval_model import EvalModel
from glalm.evals.evaluator import EvalContext
from glalm.evals.extrapolation import (
    bucket_edges,
    bucket_index,
    build_results,
    iterate_spans,
    last_filled_edge,
    length_multiples,
    load_blocks,
    load_longest_documents,
    losses_by_bucket,
)
from glalm.evals.options import EvalConfig, ExtrapolationConfig
from glalm.hf import GLALMConfig, GLALMForCausalLM

T = 8
EDGES = bucket_edges(T, 96)


@pytest.fixture(scope="module")
def texts(stream):
    """The second fills 12 buckets of T / 2, the others all 24."""
    return stream(100, 50, 97, 140).documents


def softmax() -> GLALMForCausalLM:
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}
    return GLALMForCausalLM(GLALMConfig(**shape, mixer="attention", initializer_range=0.3)).eval()


def by_bucket(losses: np.ndarray) -> np.ndarray:
    filled = len(losses) // 4
    return np.array([*losses[: 4 * filled].reshape(filled, 4).mean(1), *[np.nan] * (24 - filled)])[:24]


@pytest.fixture(scope="module")
def truth(texts, true_losses):
    """Mean nats [4 texts, 24 buckets] from one forward over each whole text."""
    return np.stack([by_bucket(true_losses(text)[:96]) for text in texts])


def read(model, texts, context="stateful", segment=T, batch_size=3, advance=int) -> torch.Tensor:
    return losses_by_bucket(EvalModel(model), texts, EDGES, segment, context, batch_size, context_of(advance))


def context_of(advance) -> EvalContext:
    context = EvalContext()
    context.advance = advance
    return context


def test_carried_is_one_forward_over_the_whole_text(model, texts, truth):
    np.testing.assert_allclose(read(model, texts), truth, atol=1e-5)


@pytest.mark.parametrize("segment", [5, 33, 96])
def test_carried_segments_of_any_length_give_the_same(model, texts, truth, segment):
    np.testing.assert_allclose(read(model, texts, segment=segment, batch_size=1), truth, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [softmax, lambda: llama(vocab_size=64)], ids=["ours", "transformers'"])
def test_softmax_attention_carries_its_keys_and_values(make, texts):
    model = make()
    ids = torch.from_numpy(texts[0][:97].astype(np.int64))[None]
    log_p = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    nats = -log_p.gather(-1, ids[:, 1:, None])[0, :, 0]
    np.testing.assert_allclose(read(model, texts[:1])[0], by_bucket(nats.numpy()), atol=1e-5)


def test_reset_starts_every_segment_from_an_empty_state(model, texts, truth, true_losses):
    fresh = [[true_losses(t[a : a + T + 1]) for a in range(0, (len(t) - 1) // T * T, T)] for t in texts]
    fresh = np.stack([by_bucket(np.concatenate(segments)[:96]) for segments in fresh])
    np.testing.assert_allclose(read(model, texts, "reset"), fresh, atol=1e-5)
    assert np.nanmax(np.abs(fresh - truth)[:, 2:]) > 1e-2  # what came before matters


def test_sliding_sees_half_a_window_or_more_before_each_token(model, texts, true_losses):
    def windows(text: np.ndarray) -> np.ndarray:
        end = (len(text) - 1) // 4 * 4
        later = [true_losses(text[a - 4 : a + 5])[4:] for a in range(T, end, 4)]
        return np.concatenate([true_losses(text[: T + 1]), *later])[:96]

    expected = np.stack([by_bucket(windows(text)) for text in texts])
    np.testing.assert_allclose(read(model, texts, "sliding_window"), expected, atol=1e-5)


@pytest.mark.parametrize("context", ["stateful", "sliding_window", "reset"])
@pytest.mark.parametrize("length, segment", [(23, 8), (8, 8), (3, 8), (64, 7), (5, 1)])
def test_every_position_is_scored_once(context, length, segment):
    spans = list(iterate_spans(length, segment, context))
    scored = [position for span in spans for position in range(span.first_scored, span.stop)]
    assert scored == list(range(length))
    assert all(span.stop - span.start <= segment and span.start >= 0 for span in spans)


def test_counts_sum_to_the_tokens_read(model, texts):
    done = []
    nats = read(model, texts, advance=done.append)
    buckets = build_results({"stateful": nats}, EDGES, T)["contexts"]["stateful"]["buckets"]
    assert [b["documents"] for b in buckets] == [4] * 12 + [3] * 12
    assert sum(b["tokens"] for b in buckets) == sum(done) == 3 * 96 + 48


def test_a_bucket_is_a_mean_over_the_documents_that_fill_it(model, texts, truth):
    buckets = build_results({"stateful": read(model, texts)}, EDGES, T)["contexts"]["stateful"]["buckets"]
    assert [(b["start"], b["end"]) for b in buckets] == [(4 * i, 4 * i + 4) for i in range(24)]
    np.testing.assert_allclose([b["nats_per_token"] for b in buckets], np.nanmean(truth, 0), atol=1e-5)
    np.testing.assert_allclose([b["perplexity"] for b in buckets], np.exp(np.nanmean(truth, 0)), rtol=1e-5)
    errors = np.nanstd(truth, 0, ddof=1) / np.sqrt([4] * 12 + [3] * 12)
    np.testing.assert_allclose([b["standard_error"] for b in buckets], errors, rtol=1e-3)


def test_ratios_compare_the_documents_that_fill_both(model, texts, truth):
    result = build_results({n: read(model, texts, n) for n in ("stateful", "reset")}, EDGES, T)
    ratios = result["contexts"]["stateful"]["ratios"]
    assert [*ratios] == ["2", "4", "8", "10", "12"]
    for n, r in ratios.items():
        change = truth[:, 2 * int(n) - 1] - truth[:, 1]  # the buckets ending at n T and at T
        change = change[~np.isnan(change)]
        error = change.std(ddof=1) / math.sqrt(len(change))
        assert r["documents"] == len(change) == (4 if int(n) < 6.25 else 3)
        assert r["ratio"] == pytest.approx(math.exp(change.mean()), rel=1e-4)
        assert r["low"] == pytest.approx(math.exp(change.mean() - error), rel=1e-3)
        assert r["high"] == pytest.approx(math.exp(change.mean() + error), rel=1e-3)
    reset = read(model, texts, "reset").numpy()
    gain = math.exp(np.nanmean(truth[:, 7] - reset[:, 7]))
    assert result["stateful_over_reset"]["4"]["ratio"] == pytest.approx(gain, rel=1e-4)


@pytest.mark.parametrize("other", ["reset", "sliding_window"])
def test_worth_of_the_state_in_ranges_of_positions(model, texts, truth, other):
    contexts = {name: read(model, texts, name) for name in ("stateful", other)}
    ranges = build_results(contexts, EDGES, T)[f"{other}_minus_stateful"]
    assert [(each["start"], each["end"]) for each in ranges] == [(8, 16), (16, 32), (32, 64), (64, 96)]
    gain = contexts[other].numpy() - truth
    for each in ranges:
        per_document = gain[:, each["start"] // 4 : each["end"] // 4].mean(1)  # buckets of 4 positions
        per_document = per_document[~np.isnan(per_document)]
        assert each["documents"] == len(per_document) == (4 if each["end"] <= 48 else 3)
        assert each["nats_per_token"] == pytest.approx(per_document.mean(), abs=1e-5)
        error = per_document.std(ddof=1) / math.sqrt(len(per_document))
        assert each["standard_error"] == pytest.approx(error, rel=1e-3)


def test_wide_buckets_count_by_their_tokens():
    edges = bucket_edges(9, 27)  # 0, 4, 9, 13, 18, 22, 27
    gain = torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0, 3.0]], dtype=torch.float64)
    [near, far] = module.summarize_gains(gain, edges, 9)
    assert near["nats_per_token"] == pytest.approx((4 * 1 + 5 * 2) / 9) and near["standard_error"] is None
    assert (far["start"], far["end"], far["nats_per_token"]) == (18, 27, 3.0)


def test_a_bucket_that_no_document_fills_is_reported_empty(model, texts):
    result = build_results({"stateful": read(model, texts[1:2])}, EDGES, T)["contexts"]["stateful"]
    assert len(result["buckets"]) == 24
    empty = result["buckets"][12]
    assert (empty["documents"], empty["tokens"]) == (0, 0)
    assert empty["perplexity"] is empty["nats_per_token"] is empty["standard_error"] is None
    assert result["ratios"]["8"] == {"ratio": None, "low": None, "high": None, "documents": 0}
    assert all(b["standard_error"] is None for b in result["buckets"])  # one document has none
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_processes_share_the_batches(model, texts, truth, batch_size, thread_contexts):
    contexts = thread_contexts(2)
    done = [[], []]
    for context, counts in zip(contexts, done, strict=True):
        context.advance = counts.append
    with ThreadPoolExecutor(2) as pool:
        read_share = partial(losses_by_bucket, EvalModel(model), texts, EDGES, T, "stateful", batch_size)
        found = list(pool.map(read_share, contexts))
    for nats in found:
        np.testing.assert_allclose(nats, truth, atol=1e-5)
    assert sum(map(sum, done)) == 3 * 96 + 48 and all(map(sum, done))


def test_what_was_read_before_a_restart_is_not_read_again(model, texts, truth, tmp_path):
    counts = []
    for advance in (lambda n: counts.append(n) if len(counts) < 15 else 1 / 0, counts.append):
        context = context_of(advance)
        context.use_partial_results(tmp_path / "parts.json", {})
        try:
            nats = losses_by_bucket(EvalModel(model), texts, EDGES, T, "stateful", 2, context)
        except ZeroDivisionError:
            counts.clear()
    np.testing.assert_allclose(nats, truth, atol=1e-5)
    assert sum(counts) == 96 + 48  # the second batch alone


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_memory_does_not_grow_with_the_length(model, stream):
    text = stream(4801).documents[0]  # more tokens than the model's largest matrix has elements

    def largest(length: int) -> int:
        with LargestTensor() as seen:
            losses_by_bucket(EvalModel(model), [text], bucket_edges(32, length), 32, "stateful", 1, EvalContext())
        return seen.numel

    assert largest(4800) < 1.2 * largest(320) < 4800


def test_less_than_ten_lengths_is_allowed_with_a_warning(model, texts):
    edges = bucket_edges(T, 79)
    nats = losses_by_bucket(EvalModel(model), texts[:1], edges, T, "stateful", 1, EvalContext())
    with pytest.warns(UserWarning, match="extrapolation.max_length=80"):
        result = build_results({"stateful": nats}, edges, T)["contexts"]["stateful"]
    assert result["buckets"][-1]["end"] == 76  # the last, incomplete bucket is left out
    assert [*result["ratios"]] == ["2", "4", "8", "9"]


def test_the_documents_that_reach_furthest_are_read(stream):
    split = stream(10, 41, 40, 300, 41)
    assert [len(d) for d in load_longest_documents(split, [0, 20, 40], 2)] == [41, 300]
    assert [len(d) for d in load_longest_documents(split, [0, 20, 40], 4)] == [41, 40, 300, 41]
    assert [len(d) for d in load_longest_documents(split, [0, 9], None)] == [10, 41, 40, 300, 41]


def test_no_document_fills_a_bucket(stream):
    with pytest.raises(ConfigError, match=r"301 tokens that fill one bucket \(the longest have 300, 41, 41\)"):
        load_longest_documents(stream(10, 41, 40, 300, 41), [0, 300], 2)


def test_blocks_are_the_stream_cut_end_to_end(stream):
    split = stream(10, 41, 40)
    found = load_blocks(split, [0, 10, 20], None)
    np.testing.assert_array_equal(np.stack(found), [split.stream[i * 20 : i * 20 + 21] for i in range(4)])
    assert len(load_blocks(split, [0, 10, 20], 3)) == 3
    with pytest.raises(ConfigError, match="length=91 need 92 tokens"):
        load_blocks(split, [0, 91], None)


def test_edges_include_every_multiple_of_the_training_length():
    assert bucket_edges(8, 35) == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert bucket_edges(5, 21) == [0, 2, 5, 7, 10, 12, 15, 17, 20]
    assert bucket_edges(1, 3) == [0, 1, 2, 3]
    assert bucket_edges(2048, 28672, 2048) == [2048 * i for i in range(15)]  # the paper's


def test_buckets_by_position():
    edges = [0, 3, 6, 9]
    assert [bucket_index(p, edges) for p in (1, 3, 4, 9)] == [0, 0, 1, 2]
    assert [last_filled_edge(tokens, edges) for tokens in (0, 3, 4, 9, 10, 50)] == [0, 0, 3, 6, 9, 9]


def test_multiples():
    assert length_multiples(1) == []
    assert length_multiples(3) == [2, 3]
    assert length_multiples(24) == [2, 4, 8, 10, 16, 20, 24]
    assert length_multiples(80) == [2, 4, 8, 10, 16, 20, 32, 40, 64, 80]


# -------------------------------------------------------------------------------------------------------- the job


@pytest.fixture
def split(stream, monkeypatch):
    split = stream(100, 50, 97, 140)
    split.sha256 = "f"
    monkeypatch.setattr(module, "open_split", lambda config, model, name: split)


def config(**settings) -> EvalConfig:
    return EvalConfig(batch_size=2, extrapolation=ExtrapolationConfig(**{"max_length": 96} | settings))


def test_the_job_reads_every_context_and_says_what_is_empty(model, split, truth):
    evaluator = module.ExtrapolationEvaluator(
        EvalModel(model, train_length=T), config(contexts=["reset", "stateful"], max_length=160)
    )
    done = []
    results = evaluator.run(context_of(done.append))
    assert [*results["contexts"]] == ["reset", "stateful"]
    assert evaluator.total_units == sum(done) == 2 * (96 + 48 + 96 + 136)
    found = [b["nats_per_token"] for b in results["contexts"]["stateful"]["buckets"]]
    np.testing.assert_allclose(found[:24], np.nanmean(truth, 0), atol=1e-5)
    lines = evaluator.summarize(results)
    assert "no document fills the 6 buckets from position 136 on" in lines
    [gain] = [each for each in results["reset_minus_stateful"] if each["start"] == 32]
    nats = f"{gain['nats_per_token']:.4f} ± {gain['standard_error']:.4f} nats"
    assert f"reset minus stateful, positions 32 to 64: {nats}" in lines
    assert evaluator.settings["train_length"] == T and evaluator.settings["max_length"] == 160


@torch.no_grad()
def test_a_model_that_cannot_go_on_from_a_state_reads_carried_text_whole(texts, split):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}
    mamba = MambaForCausalLM(MambaConfig(**shape)).eval()
    results = module.ExtrapolationEvaluator(
        EvalModel(mamba, train_length=T), config(contexts=["stateful", "reset"])
    ).run(EvalContext())
    ids = torch.tensor(np.stack([x[:97] for x in texts if len(x) >= 97]).astype(np.int64))
    log_p = mamba(ids[:, :-1], use_cache=False).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    expected = -log_p.view(3, 24, 4).mean((0, 2))[12:]  # the buckets that these three alone fill
    carried, reset = ([b["nats_per_token"] for b in c["buckets"][12:]] for c in results["contexts"].values())
    np.testing.assert_allclose(carried, expected, atol=1e-5)
    assert np.abs(np.array(reset) - expected.numpy()).max() > 1e-2


@pytest.mark.parametrize(
    "last, advice",
    [
        (48, r"extrapolation\.max_length=48 evaluates the positions before"),
        (8, r"extrapolation\.max_length=8 evaluates the positions before"),
        (4, "that is within the training length; evaluate an earlier checkpoint, or write precision=fp32"),
    ],
)
def test_losses_that_are_no_numbers_are_no_lack_of_documents(texts, last, advice):
    class Overflows:
        device = torch.device("cpu")

        def require_train_length(self, evaluator):
            return T

        def score_tokens(self, ids, targets, state, return_state, shard):
            read = (state or 0) + ids.shape[1]
            losses = torch.zeros(ids.shape)
            losses[0] = math.nan if read > last else 1  # of one document
            return losses.masked_fill(targets == -100, 0), read

    with pytest.raises(RunError, match=rf"context stateful: .* after position {last} are not finite: .*{advice}"):
        losses_by_bucket(Overflows(), texts, EDGES, T // 2, "stateful", 2, EvalContext())


def test_demands(model, split):
    for width in (16, 3):  # with 16 the buckets of one and of two training lengths were the same
        with pytest.raises(ConfigError, match=rf"extrapolation\.bucket={width} does not divide the training length 8"):
            module.ExtrapolationEvaluator(EvalModel(model, train_length=T), config(bucket=width))
    module.ExtrapolationEvaluator(EvalModel(model, train_length=T), config(bucket=2))
    with pytest.raises(ConfigError, match=r"max_length=7 is under the training length 8; write .*max_length=80"):
        module.ExtrapolationEvaluator(EvalModel(model, train_length=T), config(max_length=7))
    with pytest.raises(ConfigError, match="the training length of model is not known"):
        module.ExtrapolationEvaluator(EvalModel(model), config())
    limited = EvalModel(model, train_length=T, max_length=64)
    with pytest.raises(ConfigError, match=r"extrapolation\.max_length: model has learned positions for 64"):
        module.ExtrapolationEvaluator(limited, config())
    module.ExtrapolationEvaluator(
        limited, config(contexts=["sliding_window", "reset"])
    )  # which read the training length alone


def test_settings():
    with pytest.raises(ConfigError, match=r"extrapolation\.bucket=100 is longer"):
        config(bucket=100)
    with pytest.raises(ConfigError, match="each once"):
        config(contexts=["stateful", "stateful"])
