"""The clock of the watchdog, with the waits that a scheduler may make of it, and whom it names."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.train import watchdog
from glalm.train.watchdog import Status, Watchdog


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 1.0) | st.floats(10.0, 1e6), max_size=30))
def test_time_that_was_not_scheduled_does_not_count(waits):
    """A wait takes half a second or a bit more, or long because the process was stopped."""
    guard = Watchdog(hang_seconds=None)
    times = iter([0.0, *(sum(waits[: i + 1]) for i in range(len(waits)))])
    turns = iter([False] * len(waits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard._is_over, "wait", lambda _: next(turns, True))
        patch.setattr(watchdog.time, "monotonic", lambda: next(times))
        guard._count_seconds()
    assert guard._awake_seconds == pytest.approx(sum(wait if wait <= 1.0 else 2.5 for wait in waits))


@pytest.mark.parametrize(
    "phases, last_tick, named",
    [
        ((4, 4), 10, "rank 0 hangs: step 2 for 3 s (a); rank 1 hangs: step 2 for 3 s (b)"),
        ((5, 4), 10, "rank 1 hangs: step 2 for 3 s (b)"),
        # Its thread has not been silent for the limit of 3 seconds when its step has lasted that long.
        ((5, 4), 2, "rank 1 has died or hangs: no sign of life for 2 s (b, step 2); rank 1 hangs: step 2 for 3 s (b)"),
        # It was stopped after its part of a collective for which the other waits.
        ((4, 5), 2, "rank 1 has died or hangs: no sign of life for 2 s (b, step 2); rank 0 hangs: step 2 for 3 s (a)"),
    ],
)
def test_process_for_which_the_others_wait_is_named(phases, last_tick, named):
    """Neither process advances after the start, and the thread of rank 1 reports until its tick `last_tick`."""
    guard = Watchdog(hang_seconds=3.0)
    diagnoses = []
    for tick in range(11):
        guard._awake_seconds = 0.31 * tick
        guard._observe(0, Status("a", tick, phases[0], phase="step 2"))
        guard._observe(1, Status("b", min(tick, last_tick), phases[1], phase="step 2"))
        diagnoses.append(guard._diagnose())
    assert diagnoses == [""] * 10 + [named]
