from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glalm.data.order import permute, rank_slice, round_keys, window_ids

seeds = st.integers(-(2**70), 2**70)


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
    ids = permute(places, n, round_keys(seed, 0))
    assert ids.min() >= 0 and ids.max() < n
    assert len(np.unique(ids)) == len(places)


def test_seeds_and_epochs_have_orders_of_their_own():
    n = 1000
    orders = [window_ids(seed, epoch, n, n) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, order in enumerate(orders):
        assert (order == np.arange(n)).sum() < 10
        for other in orders[:i]:
            assert (order == other).sum() < 10  # 1 is expected of unrelated permutations


def test_neighbours_are_scattered():
    n = 10_000
    order = window_ids(3, 0, n, n)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 0.02


@pytest.mark.parametrize("n", [2, 3, 5, 12, 30])
def test_each_window_comes_first_equally_often(n):
    epochs = 200 * n
    first = Counter(int(permute(np.array([0]), n, round_keys(7, e))[0]) for e in range(epochs))
    chi_square = sum((first[i] - 200) ** 2 / 200 for i in range(n))
    assert chi_square < n - 1 + 5 * (2 * (n - 1)) ** 0.5  # five standard deviations


def test_the_order_of_a_run_never_changes():
    # Computed by a scalar transcription of the definition in Python's integers.
    small = window_ids(seed=0, step=0, batch_size=8, num_windows=1000)
    assert small.tolist() == [929, 233, 303, 411, 480, 955, 789, 865]
    large = window_ids(seed=5, step=2 * 10**8, batch_size=4, num_windows=306_152_344)  # in its third epoch
    assert large.tolist() == [195660243, 55580278, 140287535, 280144968]


def test_arguments_are_checked():
    for name, arguments in [
        ("step", (0, -1, 8, 10)),
        ("batch_size", (0, 0, 0, 10)),
        ("num_windows", (0, 0, 8, 0)),
    ]:
        with pytest.raises(ValueError, match=f"{name}=.*at least"):
            window_ids(*arguments)
    with pytest.raises(ValueError, match="batch_size=10 is not a multiple of world=4"):
        rank_slice(np.arange(10), 0, 4)
    with pytest.raises(ValueError, match="rank=4 is not one of world=4"):
        rank_slice(np.arange(8), 4, 4)
