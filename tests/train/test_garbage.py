import gc
import weakref

import pytest

from glalm.train import trainer
from glalm.train.throughput import collect_between_steps


@pytest.fixture(autouse=True)
def unfrozen():
    """Let collections visit every object again, as in a process other than that of the tests."""
    gc.unfreeze()
    yield
    gc.freeze()


class Node:
    """An object that only a collection of garbage can free."""

    def __init__(self):
        self.itself = self


def make_garbage(nodes: int) -> None:
    """Make and drop objects in waves that outlive a young generation, so that Python would soon collect all of them."""
    for _ in range(30):
        alive = [Node() for _ in range(nodes // 30)]
        gc.collect(1)
        del alive


def test_full_collections_happen_only_when_asked_for():
    full = []

    def record(phase, info):
        if phase == "start" and info["generation"] == 2:
            full.append(1)

    before = gc.get_threshold()
    gc.callbacks.append(record)
    try:
        with collect_between_steps() as collect:
            make_garbage(300_000)
            assert not full
            old = Node()
            gone = weakref.ref(old)
            gc.collect(1)
            del old
            assert gone() is not None
            collect()
            assert gone() is None and len(full) == 1
        assert gc.get_threshold() == before
    finally:
        gc.callbacks.remove(record)


def test_only_the_first_collection_exempts_objects_and_only_within_the_context():
    early = Node()
    early_gone = weakref.ref(early)
    with collect_between_steps() as collect:
        collect()
        assert gc.get_freeze_count() > 10_000
        late = Node()
        late_gone = weakref.ref(late)
        collect()
        del early, late
        collect()
        assert early_gone() is not None and late_gone() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert early_gone() is None


def test_an_exemption_of_the_process_is_left_alone():
    early = Node()
    early_gone = weakref.ref(early)
    gc.freeze()
    late = Node()
    late_gone = weakref.ref(late)
    with collect_between_steps() as collect:
        collect()
        del early, late
        collect()
        assert early_gone() is not None and late_gone() is None
    gc.collect()
    assert early_gone() is not None
    gc.unfreeze()
    gc.collect()
    assert early_gone() is None


def test_a_run_collects_after_its_first_step_and_at_checkpoints(run_config, monkeypatch):
    steps = []
    original = trainer.TrainingLoop._step

    def step(self, batch):
        result = original(self, batch)
        make_garbage(60_000)
        current.append(self.state.step)
        return result

    current = [0]
    monkeypatch.setattr(trainer.TrainingLoop, "_step", step)

    def record(phase, info):
        if phase == "start" and info["generation"] == 2:
            steps.append(current[-1])

    gc.callbacks.append(record)
    try:
        assert trainer.train(run_config) == 0
    finally:
        gc.callbacks.remove(record)
    assert [n for n in steps if n > 0] == [1, 2, 4, 6]
