import os
import signal

import pytest
import torch

from glalm.config.run import GuardConfig
from glalm.data.order import Order
from glalm.train.guards import STOP_SIGNALS, BadSteps, StopSignal, UpdateGuard


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_repeated_signal_counts_once(signum, capfd):
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    with StopSignal() as stop:
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signum
    assert {s: signal.getsignal(s) for s in STOP_SIGNALS} == before
    assert "A second signal stops at once" in capfd.readouterr().err


def take_steps(norms: list[float], fused: bool = True, saved=None, **config) -> tuple[UpdateGuard, list[bool]]:
    """Return a guard after steps with these gradient norms, and which of the steps moved the weights.

    The guard loads the tensors of `saved` that have the same shape, as a resumed run does.
    """
    guard = UpdateGuard(GuardConfig(**config), torch.device("cpu"))
    for name, t in guard.state_dict().items():
        if saved and saved[name].shape == t.shape:
            t.copy_(saved[name])
    w, moved = torch.nn.Parameter(torch.ones(3)), []
    optimizer = torch.optim.AdamW([w], lr=0.1, fused=fused)
    for step, norm in enumerate(norms, 1):
        w.grad, before = torch.full((3,), norm), w.detach().clone()
        moments = {k: t.clone() for k, t in optimizer.state[w].items()}
        guard.step([optimizer], step, torch.tensor(1.0), torch.tensor(norm))
        moved.append(not torch.equal(w, before))
        if not moved[-1]:
            assert all(torch.equal(t, optimizer.state[w][k]) for k, t in moments.items())
    return guard, moved


@pytest.mark.parametrize("fused", [True, False])
def test_non_finite_updates_are_skipped(fused):
    nan, inf = float("nan"), float("inf")
    _, moved = take_steps([1.0, nan, 1.0, inf, 100.0, 1.0], fused)
    assert moved == [True, False, True, False, True, True]


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Muon"])
def test_gradients_are_clipped(name):
    """Compare with clipping by torch before the step. The guard divides a fused step's gradients, or clips in place."""
    options = {} if name == "Muon" else {"fused": True}
    gradient, steps = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), []
    for largest in (0.5, 100.0):
        for guarded in (True, False):
            w = torch.nn.Parameter(torch.ones(3, 5))
            optimizer = getattr(torch.optim, name)([w], lr=0.1, **options)
            w.grad = gradient.clone()
            norm = torch.nn.utils.get_total_norm([w.grad])
            if guarded:
                UpdateGuard(GuardConfig(), w.device).step([optimizer], 1, torch.tensor(1.0), norm, largest)
            else:
                torch.nn.utils.clip_grads_with_norm_([w], largest, norm)
                optimizer.step()
            moment = optimizer.state[w].get("exp_avg", optimizer.state[w].get("momentum_buffer"))
            steps.append(torch.stack([w.detach(), w.detach() if moment is None else moment]))
    torch.testing.assert_close(steps[0], steps[1])
    torch.testing.assert_close(steps[2], steps[3])
    assert not torch.allclose(steps[0], steps[2])


def test_spikes_are_compared_with_the_window_before_them():
    """With mean 1 and deviation 0.1, 1.5 is within 6 deviations and 1.7 is not. A skipped norm is not in the window."""
    window = [0.9, 1.1, 0.9, 1.1]
    assert take_steps([*window, 1.7, 1.7, 1.0], spike_factor=6.0, spike_window=4)[1] == [
        *[True] * 4,
        False,
        False,
        True,
    ]
    assert take_steps([*window, 1.5], spike_factor=6.0, spike_window=4)[1][-1]
    assert take_steps([1.0, 50.0, 1.0], spike_factor=6.0, spike_window=4)[1] == [True] * 3  # too few to judge by
    assert take_steps([*window, 50.0])[1][-1]  # off by default


def test_window_of_another_size_starts_empty():
    """A resumed run with another spike_window loads the counters but not the norms."""
    before, _ = take_steps([1.0, 1.1] * 4, spike_factor=6.0, spike_window=8)
    steps = [1.0, 1.1, 1.0, 50.0, 1.0]
    after, moved = take_steps(steps, saved=before.state_dict(), spike_factor=6.0, spike_window=3)
    assert moved == [True, True, True, False, True] and int(after.accepted) == 12


def test_after_too_many_skips_nothing_moves_until_check_raises(tmp_path):
    nan = float("nan")
    guard, moved = take_steps([1.0, nan, 1.0, nan, nan, nan, 1.0, 1.0], bad_steps=3)
    assert moved == [True, False, True, False, False, False, False, False]
    with pytest.raises(BadSteps, match=r"updates, steps 4 to 6.* 'train.allow_changes=\[optim.lr\]', or"):
        guard.check(Order(0, 2, {"a": 10}).window_ids, tmp_path)
    assert (tmp_path / "bad_steps_4.json").exists()
    with pytest.raises(BadSteps):  # of several processes one writes
        guard.check(Order(0, 2, {"a": 10}).window_ids, tmp_path / "elsewhere", is_main_process=False)
    assert take_steps([nan, nan, 1.0], bad_steps=3)[0].check(Order(0, 2, {"a": 10}).window_ids, tmp_path) == {
        "skipped_steps": 2
    }
