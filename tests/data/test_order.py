from collections import Counter
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.data import order as module
from glalm.data.order import CYCLE, Order, cycle_counts, permute_indices, rank_slice, round_keys

seeds = st.integers(-(2**70), 2**70)


def window_ids(seed, step, batch_size, num_windows):
    """Return the window ids of a step, for one source."""
    return Order(seed, batch_size, {"all": num_windows}).window_ids(step)


@given(seeds, st.integers(1, 700), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_has_each_window_once_whatever_the_batch_size(seed, n, batch_size, epoch):
    first, last = epoch * n // batch_size, ((epoch + 1) * n - 1) // batch_size
    ids = np.concatenate([window_ids(seed, step, batch_size, n) for step in range(first, last + 1)])
    start = epoch * n - first * batch_size
    assert ids.dtype == np.int64
    assert sorted(ids[start : start + n]) == list(range(n))


@given(seeds, st.integers(0, 1000), st.integers(1, 300), st.integers(1, 6))
def test_the_order_does_not_depend_on_the_batch_size(seed, step, n, share):
    batch_size = 8 * share
    one_by_one = [window_ids(seed, batch_size * step + i, 1, n)[0] for i in range(batch_size)]
    assert window_ids(seed, step, batch_size, n).tolist() == one_by_one


@given(seeds, st.integers(0, 10**9), st.integers(1, 10**9), st.integers(1, 6))
def test_any_number_of_ranks_reads_the_same_ids(seed, step, n, share):
    ids = window_ids(seed, step, 8 * share, n)
    for world in (1, 2, 4, 8):
        slices = [rank_slice(ids, rank, world) for rank in range(world)]
        assert {len(s) for s in slices} == {8 * share // world}
        assert np.concatenate(slices).tolist() == ids.tolist()


@given(seeds, st.integers(1, 2**40))
def test_large_sets_need_no_memory_and_stay_one_to_one(seed, n):
    places = np.unique(np.linspace(0, n - 1, 500).astype(np.int64))
    ids = permute_indices(places, n, round_keys(seed, 0))
    assert ids.min() >= 0 and ids.max() < n
    assert len(np.unique(ids)) == len(places)


def test_seeds_and_epochs_have_orders_of_their_own():
    n = 1000
    orders = [window_ids(seed, epoch, n, n) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, order in enumerate(orders):
        assert (order == np.arange(n)).sum() < 10
        for other in orders[:i]:
            assert (order == other).sum() < 10  # Unrelated permutations have 1 on average.


def test_neighbours_are_scattered():
    n = 10_000
    order = window_ids(3, 0, n, n)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 0.02


@pytest.mark.parametrize("n", [2, 3, 5, 12, 30])
def test_each_window_comes_first_equally_often(n):
    epochs = 200 * n
    first = Counter(int(permute_indices(np.array([0]), n, round_keys(7, e))[0]) for e in range(epochs))
    chi_square = sum((first[i] - 200) ** 2 / 200 for i in range(n))
    assert chi_square < n - 1 + 5 * (2 * (n - 1)) ** 0.5  # Five standard deviations.


def test_the_order_of_a_run_never_changes():
    # The expected values come from a scalar transcription of the definition in Python's integers.
    small = window_ids(seed=0, step=0, batch_size=8, num_windows=1000)
    assert small.tolist() == [929, 233, 303, 411, 480, 955, 789, 865]
    large = window_ids(seed=5, step=2 * 10**8, batch_size=4, num_windows=306_152_344)  # Its third epoch.
    assert large.tolist() == [195660243, 55580278, 140287535, 280144968]


def test_the_order_of_a_mixture_never_changes():
    # Computed as above. The second step is in the third cycle, many epochs into source a.
    windows, weights = {"a": 50, "b": 900}, {"a": 1, "b": 3}
    assert Order(3, 8, windows, weights).window_ids(0).tolist() == [53, 14, 493, 24, 451, 841, 10, 898]
    assert Order(3, 4, windows, weights).window_ids(700).tolist() == [181, 721, 29, 405]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        Order(0, 8, {"all": 10}).window_ids(-1)
    for batch_size, windows in ((0, 10), (8, 0)):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} and windows={{'all': {windows}}} must be at"):
            Order(0, batch_size, {"all": windows})
    with pytest.raises(ValueError, match="batch_size=10 is not a multiple of world_size=4"):
        rank_slice(np.arange(10), 0, 4)
    with pytest.raises(ValueError, match="rank=4 is not one of world_size=4"):
        rank_slice(np.arange(8), 4, 4)


SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=5).map(lambda n: {f"source {i}": x for i, x in enumerate(n)})


@st.composite
def orders(draw):
    windows = draw(SIZES)
    some = st.lists(st.floats(0, 10), min_size=len(windows), max_size=len(windows)).filter(lambda w: sum(w) > 0.01)
    weights = draw(st.none() | some.map(lambda w: dict(zip(windows, w, strict=True))))
    return Order(draw(seeds), 8 * draw(st.integers(1, 6)), windows, weights)


def source_ids(order):
    """Yield (source, window of the source) in the order in which a run reads them, without end."""
    edges = np.cumsum([0, *order.windows.values()])
    for step in count():
        for i in order.window_ids(step).tolist():
            source = int(np.searchsorted(edges, i, side="right")) - 1
            yield source, i - int(edges[source])


@settings(max_examples=40)
@given(orders(), st.data())
def test_each_source_has_each_window_once_an_epoch_whatever_the_weights(order, data):
    """The shares of the ranks make up the step, however a run changes between 4, 2 and 8 ranks."""
    sizes, seen = list(order.windows.values()), {i: [] for i in range(len(order.windows))}
    edges = np.cumsum([0, *sizes])
    for step in range(min(60, 3 * sum(sizes) // order.batch_size + 1)):
        world = data.draw(st.sampled_from([1, 2, 4, 8])) if step < 10 else 8
        for rank in range(world):
            for i in rank_slice(order.window_ids(step), rank, world).tolist():
                source = int(np.searchsorted(edges, i, side="right")) - 1
                seen[source].append(i - int(edges[source]))
    if order.weights is None:
        whole = [i + int(edges[s]) for s, i in islice(source_ids(order), sum(sizes))]
        assert sorted(whole) == list(range(sum(sizes)))
        return
    for source, windows in seen.items():
        n = sizes[source]
        for epoch in range(0, len(windows), n):
            part = windows[epoch : epoch + n]
            assert len(set(part)) == len(part) and (len(part) < n or sorted(part) == list(range(n)))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(lambda w: sum(w) > 0.1), seeds)
def test_every_cycle_has_the_shares(weights, seed):
    counts = cycle_counts(weights)
    assert sum(counts) == CYCLE
    for count_, weight in zip(counts, weights, strict=True):
        assert (count_ == 0) == (weight == 0)
        assert abs(count_ - CYCLE * weight / sum(weights)) <= len(weights)
    windows = {str(i): 5000 for i in range(len(weights))}
    order = Order(seed, CYCLE, windows, dict(zip(windows, weights, strict=True)))
    for step in range(3):
        assert list(order.count_windows(step, step + 1).values()) == list(counts)


def test_places_left_over_go_to_the_largest_remainders():
    assert cycle_counts([5, 3, 2]) == (512, 307, 205)  # The exact shares are 512, 307.2, 204.8.
    assert cycle_counts([1, 1, 1, 0]) == (342, 341, 341, 0)
    assert cycle_counts([1e6, 1, 1]) == (1022, 1, 1)


def test_shares_hold_within_a_cycle_too():
    order = Order(0, 100, {"a": 10**6, "b": 10**6}, {"a": 3, "b": 1})
    shares = [order.count_windows(step, step + 1)["a"] for step in range(50)]
    assert np.mean(shares) == pytest.approx(75, abs=1) and np.std(shares) < 6  # By chance it would be 75 +- 4.3.


@given(orders(), st.integers(0, 20), st.integers(0, 20))
def test_counts_are_of_the_ids(order, start, steps):
    expected = Counter(source for step in range(start, start + steps) for source in sources_of(order, step))
    assert order.count_windows(start, start + steps) == {name: expected[i] for i, name in enumerate(order.windows)}


@pytest.mark.parametrize("weights", [None, {"a": 0.7, "b": 0, "c": 0.3}])
def test_counts_of_many_steps_list_few_ids(weights, monkeypatch):
    """A run that resumes counts from its first step on. Complete epochs and mixtures are counted without a list."""
    order, far, permuted = Order(3, 64, {"a": 501, "b": 33, "c": 77}, weights), 10**5, []
    monkeypatch.setattr(
        module, "permute_indices", lambda x, *args: permuted.append(len(x)) or permute_indices(x, *args)
    )
    before, after = order.count_windows(0, far), order.count_windows(0, far + 20)
    assert sum(permuted) < 4 * CYCLE
    assert sum(before.values()) == 64 * far
    read = Counter(source for step in range(far, far + 20) for source in sources_of(order, step))
    assert {name: after[name] - before[name] for name in after} == {name: read[i] for i, name in enumerate(after)}


def sources_of(order, step):
    return np.searchsorted(np.cumsum(list(order.windows.values())), order.window_ids(step), side="right").tolist()


@given(seeds, st.integers(1, 1000), st.integers(1, 8), st.integers(0, 100))
def test_without_weights_the_sources_are_one(seed, n, batch_size, step):
    order = Order(seed, batch_size, {"a": n, "b": 3})
    assert order.window_ids(step).tolist() == window_ids(seed, step, batch_size, n + 3).tolist()


def test_a_source_keeps_its_order_when_another_comes():
    """So two runs with different mixtures can be compared source by source."""
    two = Order(3, 8, {"a": 50, "b": 70}, {"a": 1, "b": 1})
    three = Order(3, 8, {"a": 50, "c": 9, "b": 70}, {"a": 1, "b": 2, "c": 1})
    b_of_two = [i for source, i in islice(source_ids(two), 4000) if source == 1]
    b_of_three = [i for source, i in islice(source_ids(three), 4000) if source == 2]
    assert b_of_two[:1500] == b_of_three[:1500] and len(b_of_three) > 1500


def test_weights_are_checked():
    windows = {"books": 5, "code": 0}
    for weights, message in [
        ({"books": 1}, "must name each source of the set, with 0 to exclude it: books, code"),
        ({"books": 1, "code": 0, "wiki": 1}, "must name each source"),
        ({"books": -1, "code": 0}, "0 or more"),
        ({"books": 0, "code": 0}, "one above 0"),
        (
            {"books": 1, "code": 1},
            r"weights\.code=1: this source has too few tokens for one window\. Set its weight to 0, or",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            Order(0, 8, windows, weights)
    Order(0, 8, windows, {"books": 1, "code": 0}).window_ids(0)


def test_a_mixture_has_at_most_a_place_for_each_source():
    windows = dict.fromkeys((f"s{i}" for i in range(CYCLE + 1)), 5)
    weights = dict.fromkeys(windows, 1.0)
    with pytest.raises(ValueError, match=r"1025 sources have one above 0, but a mixture has places for 1024"):
        Order(0, 8, windows, weights)
    counts = Order(0, 8, windows, weights | {"s0": 0.0}).count_windows(0, CYCLE // 8)
    assert counts == dict.fromkeys(windows, 1) | {"s0": 0}


def test_an_order_of_a_trillion_tokens_is_found_at_once():
    order = Order(1, 512, {"a": 4 * 10**8, "b": 10**8}, {"a": 0.7, "b": 0.3})
    ids = np.concatenate([order.window_ids(step) for step in range(2 * 10**6, 2 * 10**6 + 4)])
    assert len(np.unique(ids)) == len(ids) and ids.max() < 5 * 10**8


BOOKS_AND_CODE = {"books": 501, "code": 77}


@given(cut=st.integers(0, 20), batches=st.tuples(st.integers(1, 60), st.integers(1, 60)), weighted=st.booleans())
@settings(max_examples=10)
def test_an_order_that_is_continued_with_other_batches_reads_on(cut, batches, weighted):
    """The windows of both together are those of one order, read one by one."""
    weights = {"books": 3.0, "code": 1.0} if weighted else None
    first = Order(3, batches[0], BOOKS_AND_CODE, weights)
    second = first.continue_at(cut, batches[1], weights)
    ids = [first.window_ids(step) for step in range(cut)] + [second.window_ids(step) for step in range(cut, cut + 3)]
    one_by_one = Order(3, 1, BOOKS_AND_CODE, weights)
    flat = np.concatenate(ids).tolist()
    assert flat == [int(one_by_one.window_ids(i)[0]) for i in range(len(flat))]


@given(cuts=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 9))
@settings(max_examples=15)
def test_sources_go_on_where_they_were_when_the_weights_change(cuts, seed):
    """Whatever the weights were in between, the epochs of a source have each of its windows once."""
    order = Order(seed, 64, BOOKS_AND_CODE, {"books": 1.0, "code": 1.0})
    step = 0
    read = []
    for i, steps in enumerate([*cuts, 12]):
        read += [order.window_ids(n) for n in range(step, step + steps)]
        assert sum(order.count_windows(step, step + steps).values()) == 64 * steps
        step += steps
        order = order.continue_at(step, 64, {"books": 1.0 + i, "code": 2.0})
    flat = np.concatenate(read)
    for first, size in ((0, 501), (501, 77)):
        own = flat[(flat >= first) & (flat < first + size)]
        epochs = [own[i : i + size] for i in range(0, len(own), size)]
        assert all(len(set(epoch.tolist())) == len(epoch) for epoch in epochs)


def test_an_order_refuses_to_continue_with_weights_where_it_had_none():
    with pytest.raises(ValueError, match="An order without weights cannot continue"):
        Order(3, 8, BOOKS_AND_CODE).continue_at(2, 8, {"books": 1, "code": 1})
