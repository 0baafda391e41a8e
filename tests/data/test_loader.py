import itertools
import threading

import numpy as np
import pytest
import torch

from glalm.data.loader import IGNORED, Windows, batches, read_ahead, sequential
from glalm.data.order import window_ids
from glalm.data.shards import TokenSet

T = 16


@pytest.fixture
def windows(prepared):
    return Windows(TokenSet(prepared, "train"), T)


@pytest.fixture
def stream(prepared):
    tokens = TokenSet(prepared, "train")
    return np.concatenate([tokens.document(i) for i in range(tokens.num_documents)]).astype(np.int64)


def take(n, **arguments):
    return list(itertools.islice(batches(**arguments), n))


def test_every_token_but_the_first_is_a_target_once(windows, stream):
    targets = np.concatenate([window[1:] for window in (windows[i] for i in range(len(windows)))])
    assert targets.tolist() == stream[1 : len(stream) - windows.dropped_tokens].tolist()
    assert 0 <= windows.dropped_tokens < T
    assert all(len(windows[i]) == T + 1 for i in range(len(windows)))
    assert windows[3].tolist() == stream[3 * T : 4 * T + 1].tolist()


@pytest.mark.parametrize(("length", "count", "dropped"), [(None, 1, 0), (1, None, 0), (7, None, None)])
def test_window_counts_at_the_edges(prepared, stream, length, count, dropped):
    length = length or len(stream) - 1
    windows = Windows(TokenSet(prepared, "train"), length)
    assert len(windows) == (count or (len(stream) - 1) // length)
    assert windows.dropped_tokens == ((len(stream) - 1) % length if dropped is None else dropped)
    assert windows[len(windows) - 1][-1] == stream[-1 - windows.dropped_tokens]


def test_too_few_tokens_are_refused(prepared, stream):
    tokens = TokenSet(prepared, "train")
    with pytest.raises(ValueError, match=rf"length={len(stream)} needs {len(stream) + 1} tokens"):
        Windows(tokens, len(stream))
    with pytest.raises(ValueError, match="length=0"):
        Windows(tokens, 0)
    for i in (-1, len(Windows(tokens, T))):
        with pytest.raises(IndexError):
            Windows(tokens, T)[i]


def test_batches_are_the_windows_of_the_order_with_labels_shifted(windows, stream):
    for step, batch in take(5, windows=windows, seed=3, batch_size=8):
        rows = np.stack([stream[i * T : i * T + T + 1] for i in window_ids(3, step, 8, len(windows))])
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["input_ids"].is_contiguous() and batch["labels"].is_contiguous()
        assert batch["input_ids"].tolist() == rows[:, :-1].tolist()
        assert batch["labels"].tolist() == rows[:, 1:].tolist()


def test_resuming_at_a_step_gives_what_would_have_come(windows):
    whole = take(12, windows=windows, seed=1, batch_size=24)
    resumed = take(5, windows=windows, seed=1, batch_size=24, start_step=7)
    assert [step for step, _ in whole] == list(range(12))
    for (step_a, a), (step_b, b) in zip(whole[7:], resumed, strict=True):
        assert step_a == step_b
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_make_up_the_same_step(windows, world):
    whole = take(3, windows=windows, seed=1, batch_size=8)
    ranks = [take(3, windows=windows, seed=1, batch_size=8, rank=r, world=world) for r in range(world)]
    for step, batch in whole:
        for key in batch:
            parts = [b[key] for rank in ranks for s, b in rank if s == step]
            assert {len(p) for p in parts} == {8 // world}
            assert torch.equal(torch.cat(parts), batch[key])


def test_wrong_sizes_are_refused_before_the_first_batch(windows):
    for wrong, message in [
        ({"batch_size": 6, "world": 4}, "batch_size=6 is not a multiple of world=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 8, "rank": 2, "world": 2}, "rank=2"),
        ({"batch_size": 8, "start_step": -1}, "step=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            batches(windows, seed=0, **wrong)
    with pytest.raises(ValueError, match="batch_size=0"):
        sequential(windows, 0)
    with pytest.raises(ValueError, match="limit=0"):
        sequential(windows, 2, limit=0)
    with pytest.raises(ValueError, match="rank=2"):
        sequential(windows, 2, rank=2, world=2)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("batch_size", "limit"), [(4, None), (7, None), (1000, None), (4, 1), (3, 50), (3, 10**6)])
def test_sequential_has_windows_once_in_order_evenly_spaced_in_equal_shapes(windows, stream, world, batch_size, limit):
    ranks = [list(sequential(windows, batch_size, rank=rank, world=world, limit=limit)) for rank in range(world)]
    assert len({tuple(b["labels"].shape for b in rank) for rank in ranks}) == 1
    assert all(len(b["labels"]) <= batch_size for b in ranks[0])
    inputs, labels = (
        torch.cat([torch.cat([b[key] for b in same]) for same in zip(*ranks, strict=True)])
        for key in ("input_ids", "labels")
    )
    count = min(limit or len(windows), len(windows))
    assert len(ranks[0]) == -(-count // (batch_size * world))
    assert len(labels) - count < world
    chosen = [i * len(windows) // count for i in range(count)]
    assert len(set(chosen)) == count and (limit != 50 or chosen[-1] > 0.9 * len(windows))
    assert labels[labels != IGNORED].tolist() == [t for i in chosen for t in stream[i * T + 1 : (i + 1) * T + 1]]
    assert inputs[:count].flatten().tolist() == [t for i in chosen for t in stream[i * T : (i + 1) * T]]


def readers():
    return [t for t in threading.enumerate() if t.name == "glalm-read-ahead"]


def test_the_thread_ends_with_the_generator(windows):
    before = len(readers())
    items = batches(windows, seed=0, batch_size=4)
    assert len(readers()) == before  # none before it is asked for
    next(items)
    assert len(readers()) == before + 1
    items.close()
    assert len(readers()) == before
    list(sequential(windows, 8))
    assert len(readers()) == before


def test_reading_ahead_is_bounded():
    made = []
    third = threading.Event()

    def numbers():
        for i in range(100):
            made.append(i)
            if i == 3:
                third.set()
            yield i

    items = read_ahead(numbers(), depth=2)
    assert next(items) == 0
    assert third.wait(5)  # one was taken, two are in the queue, one waits for room
    assert not threading.Event().wait(0.05) and len(made) == 4
    assert list(items) == list(range(1, 100))


def test_errors_reach_the_consumer_after_the_items_before_them():
    def numbers():
        yield from range(3)
        raise OSError("disk on fire")

    items = read_ahead(numbers())
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk on fire"):
        next(items)
    assert not readers()
