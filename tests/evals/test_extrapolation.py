import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glalm.evals.extrapolation import (
    bucket_edges,
    bucket_losses,
    extrapolation,
    long_documents,
    multiples,
)
from glalm.strict import ConfigError

T = 8


@pytest.fixture(scope="module")
def documents(stream):
    return stream(100, 97, 140).documents


@pytest.fixture(scope="module")
def truth(documents, true_losses):
    """Mean nats [3 documents, 24 buckets of T / 2] from one forward over each whole document."""
    return np.stack([true_losses(d)[:96].reshape(24, T // 2).mean(1) for d in documents])


def test_is_the_full_length_forward_by_position(model, documents, truth):
    done = []
    result = extrapolation(model, documents, T, max_length=96, batch_size=2, advance=done.append)
    buckets = result["buckets"]
    assert [(b["start"], b["end"]) for b in buckets] == [(4 * i, 4 * i + 4) for i in range(24)]
    np.testing.assert_allclose([b["nats_per_token"] for b in buckets], truth.mean(0), atol=1e-4)
    np.testing.assert_allclose([b["perplexity"] for b in buckets], np.exp(truth.mean(0)), rtol=1e-4)
    errors = truth.std(0, ddof=1) / math.sqrt(3)
    np.testing.assert_allclose([b["standard_error"] for b in buckets], errors, atol=1e-4)
    assert all((b["documents"], b["tokens"]) == (3, 12) for b in buckets)
    assert sum(done) == 2 * 3 * 96  # once with the state carried, once with it reset


def test_ratios_compare_the_same_documents(model, documents, truth):
    result = extrapolation(model, documents, T, max_length=96, batch_size=4)
    assert [*result["ratios"]] == ["2", "4", "8", "10", "12"]
    for n in (2, 4, 8, 10, 12):
        change = truth[:, 2 * n - 1] - truth[:, 1]  # the buckets ending at n T and at T
        error = change.std(ddof=1) / math.sqrt(3)
        assert result["ratios"][str(n)] == pytest.approx(math.exp(change.mean()), rel=1e-4)
        band = [math.exp(change.mean() - error), math.exp(change.mean() + error)]
        assert result["ratio_bands"][str(n)] == pytest.approx(band, rel=1e-3)


@pytest.mark.parametrize("segment", [5, 8, 33, 96])
def test_segments_of_any_length_give_the_same(model, documents, truth, segment):
    edges = bucket_edges(T, 96)
    np.testing.assert_allclose(bucket_losses(model, documents, edges, segment), truth, atol=1e-4)


def test_the_control_starts_every_segment_from_an_empty_state(model, documents, truth, true_losses):
    result = extrapolation(model, documents, T, max_length=96, batch_size=2)
    fresh = np.stack(
        [
            np.concatenate([true_losses(d[a : a + T + 1]).reshape(2, T // 2).mean(1) for a in range(0, 96, T)])
            for d in documents
        ]
    )
    assert np.abs(fresh - truth)[:, 2:].max() > 1e-2  # what came before matters
    np.testing.assert_allclose([b["nats_per_token"] for b in result["reset"]], fresh.mean(0), atol=1e-4)
    for n, ratio in result["carried_over_reset"].items():
        i = 2 * int(n) - 1
        assert ratio == pytest.approx(math.exp((truth - fresh)[:, i].mean()), rel=1e-4)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_memory_does_not_grow_with_the_length(model, stream):
    document = stream(9601).documents[0]  # more tokens than the model's largest matrix has elements

    def largest(length: int) -> int:
        with LargestTensor() as seen:
            extrapolation(model, [document], 32, length, batch_size=1)
        return seen.numel

    assert largest(9600) == largest(320) < 9600


def test_one_document_has_no_standard_error(model, documents):
    result = extrapolation(model, documents[:1], T, 80, batch_size=4)
    assert all(b["standard_error"] is None for b in result["buckets"])
    assert result["ratio_bands"]["10"] == [None, None]


def test_less_than_ten_lengths_is_allowed_with_a_warning(model, documents):
    with pytest.warns(UserWarning, match="extrapolation.max_length=80"):
        result = extrapolation(model, documents, T, 79, batch_size=4)
    assert result["buckets"][-1]["end"] == 76  # the last, incomplete bucket is left out
    assert [*result["ratios"]] == ["2", "4", "8", "9"]


def test_a_document_that_is_too_short_is_refused(model, documents):
    with pytest.raises(ValueError, match="number 1 has fewer than max_length \\+ 1 = 98"):
        extrapolation(model, documents, T, 97, batch_size=4)


def test_the_first_documents_that_are_long_enough_are_read(stream):
    split = stream(10, 41, 40, 300, 41)
    chosen = long_documents(split, max_length=40, count=2)
    assert [len(d) for d in chosen] == [41, 300]
    assert chosen[0] is split.document(1)


def test_no_document_is_long_enough(stream):
    with pytest.raises(ConfigError, match=r"301 tokens.* have 300, 41, 41.*max_length=299 or less"):
        long_documents(stream(10, 41, 40, 300, 41), max_length=300, count=2)


def test_edges_include_every_multiple_of_the_training_length():
    assert bucket_edges(8, 35) == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert bucket_edges(5, 21) == [0, 2, 5, 7, 10, 12, 15, 17, 20]
    assert bucket_edges(1, 3) == [0, 1, 2, 3]


def test_multiples():
    assert multiples(1) == []
    assert multiples(3) == [2, 3]
    assert multiples(24) == [2, 4, 8, 10, 16, 20, 24]
    assert multiples(80) == [2, 4, 8, 10, 16, 20, 32, 40, 64, 80]
