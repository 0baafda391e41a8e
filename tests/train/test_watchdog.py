"""The clock of the watchdog, with the waits that a scheduler may make of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.train import watchdog
from glalm.train.watchdog import Watchdog


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
