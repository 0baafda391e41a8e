import itertools
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glalm import IGNORE_INDEX
from glalm.data.loader import Windows, flatten_batch, read_ahead, sequential_batches, training_batches
from glalm.data.order import Order
from glalm.data.shards import TokenSet
from glalm.prepare.pipeline import prepare_data

T = 16


@pytest.fixture
def windows(prepared):
    return Windows(TokenSet(prepared, "train"), T)


@pytest.fixture
def stream(prepared):
    tokens = TokenSet(prepared, "train")
    return np.concatenate([tokens.read_document(i) for i in range(tokens.num_documents)]).astype(np.int64)


def batches(windows, *, seed, batch_size, weights=None, **options):
    return training_batches(windows, Order(seed, batch_size, windows.source_windows, weights), **options)


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
    with pytest.raises(ValueError, match=rf"length={len(stream)} need {len(stream) + 1} tokens"):
        Windows(tokens, len(stream))
    empty = SimpleNamespace(source_tokens={}, folder="data/mine", split="validation", is_complete=True)
    with pytest.raises(ValueError, match=r"No document is in that split. .* with a larger --validation SHARE"):
        Windows(empty, T)
    with pytest.raises(ValueError, match="length=0"):
        Windows(tokens, 0)
    for i in (-1, len(Windows(tokens, T))):
        with pytest.raises(IndexError):
            Windows(tokens, T)[i]


def test_batches_are_the_windows_of_the_order_with_labels_shifted(windows, stream):
    order = Order(3, 8, {"all": len(windows)})
    for step, batch in take(5, windows=windows, seed=3, batch_size=8):
        rows = np.stack([stream[i * T : i * T + T + 1] for i in order.window_ids(step)])
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
    ranks = [take(3, windows=windows, seed=1, batch_size=8, rank=r, world_size=world) for r in range(world)]
    for step, batch in whole:
        for key in batch:
            parts = [b[key] for rank in ranks for s, b in rank if s == step]
            assert {len(p) for p in parts} == {8 // world}
            assert torch.equal(torch.cat(parts), batch[key])


def test_wrong_sizes_are_refused_before_the_first_batch(windows):
    for wrong, message in [
        ({"batch_size": 6, "world_size": 4}, "batch_size=6 is not a multiple of world_size=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 8, "rank": 2, "world_size": 2}, "rank=2"),
        ({"batch_size": 8, "start_step": -1}, "step=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            batches(windows, seed=0, **wrong)
    with pytest.raises(ValueError, match="batch_size=0"):
        sequential_batches(windows, 0)
    with pytest.raises(ValueError, match="limit=0"):
        sequential_batches(windows, 2, limit=0)
    with pytest.raises(ValueError, match="rank=2"):
        sequential_batches(windows, 2, rank=2, world_size=2)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("batch_size", "limit"), [(4, None), (7, None), (1000, None), (4, 1), (3, 50), (3, 10**6)])
def test_sequential_has_windows_once_in_order_evenly_spaced_in_equal_shapes(windows, stream, world, batch_size, limit):
    ranks = [
        list(sequential_batches(windows, batch_size, rank=rank, world_size=world, limit=limit)) for rank in range(world)
    ]
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
    assert labels[labels != IGNORE_INDEX].tolist() == [t for i in chosen for t in stream[i * T + 1 : (i + 1) * T + 1]]
    assert inputs[:count].flatten().tolist() == [t for i in chosen for t in stream[i * T : (i + 1) * T]]


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("glalm-read-ahead")]


def test_the_thread_ends_with_the_generator(windows):
    before = len(readers())
    items = batches(windows, seed=0, batch_size=4)
    assert len(readers()) == before  # No thread starts before the first batch is requested.
    next(items)
    assert len(readers()) == before + 1
    items.close()
    assert len(readers()) == before
    list(sequential_batches(windows, 8))
    assert len(readers()) == before


def test_reading_ahead_is_bounded():
    made, third = [], threading.Event()

    def numbers():
        for i in range(100):
            made.append(i)
            yield i

    def read(i):
        if i == 3:
            third.set()
        return i

    items = read_ahead(read, numbers(), depth=2)
    assert made == []  # Nothing is read before the first result is requested.
    assert next(items) == 0
    assert made == [0, 1, 2] and not third.is_set()
    assert list(items) == list(range(1, 100))


def test_the_number_of_workers_does_not_change_what_is_read(windows):
    one, four = (take(20, windows=windows, seed=1, batch_size=4, workers=n) for n in (1, 4))
    for (step_a, a), (step_b, b) in zip(one, four, strict=True):
        assert step_a == step_b and torch.equal(a["input_ids"], b["input_ids"])
    slow = read_ahead(lambda i: threading.Event().wait(0.01 * (i % 3)) or i, range(30), workers=4)
    assert list(slow) == list(range(30))  # The order does not depend on which thread is faster.


def test_as_many_workers_read_at_once_as_are_given(windows, monkeypatch):
    batch, calls, together = Windows.load_batch, itertools.count(), threading.Barrier(3)

    def meeting(self, ids):
        if next(calls) < 3:
            together.wait(20)  # Raises unless three threads meet.
        return batch(self, ids)

    monkeypatch.setattr(Windows, "load_batch", meeting)
    assert [step for step, _ in take(5, windows=windows, seed=1, batch_size=4, workers=3)] == list(range(5))


def test_errors_reach_the_consumer_after_the_items_before_them():
    def read(i):
        if i == 3:
            raise OSError("disk on fire")
        return i

    items = read_ahead(read, range(10))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk on fire"):
        next(items)
    assert not readers()


@pytest.fixture(scope="module")
def mixed_set(texts, tmp_path_factory):
    """A set of two sources with short documents."""
    root = tmp_path_factory.mktemp("two")
    for name, part in (("long", texts[30:]), ("short", texts[:30])):
        (root / name).mkdir()
        for i, text in enumerate(part):
            (root / name / f"{i:02d}.txt").write_text(text)
    held_out = {"validation": 0.1}
    prepare_data(
        [root / "short", root / "long"],
        root / "set",
        vocab_size=400,
        held_out=held_out,
        shard_tokens=500,
        progress=False,
    )
    return root / "set"


def test_windows_of_several_sources_cross_no_border(mixed_set):
    tokens = TokenSet(mixed_set, "train")
    windows = Windows(tokens, T)
    assert list(windows.source_windows) == ["long", "short"]
    begin = first = dropped = 0
    for name, count in tokens.source_tokens.items():
        stream = tokens.read_tokens(begin, begin + count)
        for i in range(windows.source_windows[name]):
            assert windows[first + i].tolist() == stream[i * T : i * T + T + 1].tolist()
        covered = windows.source_windows[name] * T + 1
        assert 0 <= count - covered < T  # The last window exists.
        begin, first, dropped = begin + count, first + windows.source_windows[name], dropped + count - covered
    assert (first, dropped) == (len(windows), windows.dropped_tokens)
    manifest = json.loads((mixed_set / "manifest.json").read_text())
    assert manifest["splits"]["train"]["left_over"]["256"] == Windows(tokens, 256).dropped_tokens


def test_weights_reach_the_batches(mixed_set):
    windows = Windows(TokenSet(mixed_set, "train"), T)
    weights = {"short": 1.0, "long": 0.0}
    last = windows.tokens.read_tokens(windows.tokens.source_tokens["long"], windows.tokens.num_tokens)
    rows = {tuple(last[i * T : (i + 1) * T].tolist()) for i in range(windows.source_windows["short"])}
    seen = {
        tuple(r.tolist())
        for _, b in take(60, windows=windows, seed=0, batch_size=8, weights=weights)
        for r in b["input_ids"]
    }
    assert seen <= rows and len(seen) == min(len(rows), 480)
    with pytest.raises(ValueError, match="must name each source"):
        batches(windows, seed=0, batch_size=8, weights={"short": 1.0})


def test_reset_marks_each_document_and_masks_the_seam(mixed_set):
    tokens = TokenSet(mixed_set, "train")
    plain, reset = Windows(tokens, T), Windows(tokens, T, reset_state=True)
    ids = np.arange(len(plain))
    a, b = plain.load_batch(ids), reset.load_batch(ids)
    assert torch.equal(a["input_ids"], b["input_ids"]) and "starts" not in a
    begins = a["input_ids"] == tokens.bos_id  # Each document has a BOS and an EOS token.
    begins[:, 0] = True
    assert torch.equal(b["starts"], begins) and begins[:, 1:].any()
    seam = a["labels"] == tokens.bos_id
    assert (b["labels"][seam] == IGNORE_INDEX).all() and torch.equal(b["labels"][~seam], a["labels"][~seam])


def test_packed_rows(mixed_set):
    batch = Windows(TokenSet(mixed_set, "train"), T, reset_state=True).load_batch(np.arange(5))
    row = flatten_batch(batch)
    assert row["input_ids"].shape == row["labels"].shape == (1, 5 * T)
    bounds = row["cu_seqlens"].tolist()
    assert bounds[0] == 0 and bounds[-1] == 5 * T and {T, 2 * T, 3 * T, 4 * T} <= set(bounds)
    assert bounds[:-1] == batch["starts"].flatten().nonzero().flatten().tolist()
