import math

import numpy as np
import pytest
import torch

from glalm.data.loader import Windows
from glalm.evals.perplexity import perplexity, summarise


def test_of_all_windows_each_from_a_fresh_state(model, true_losses, stream):
    windows = Windows(stream(7 * 12 + 5), 12)  # 7 windows, the last batch of 3 is smaller
    done = []
    result = perplexity(model, windows, batch_size=3, advance=done.append)

    means = np.array([true_losses(windows[i]).mean() for i in range(7)])
    assert result["nats_per_token"] == pytest.approx(means.mean(), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(means.mean()), rel=1e-5)
    error = means.std(ddof=1) / math.sqrt(7)
    assert result["standard_error"] == pytest.approx(error, rel=1e-3)
    assert result["perplexity_low"] == pytest.approx(math.exp(means.mean() - error), rel=1e-4)
    assert result["perplexity_high"] == pytest.approx(math.exp(means.mean() + error), rel=1e-4)
    assert (result["windows"], result["tokens"]) == (7, 84)
    assert done == [36, 36, 12]


def test_one_window_has_no_standard_error(model, stream):
    result = perplexity(model, Windows(stream(13), 12), batch_size=4)
    assert result["standard_error"] is result["perplexity_low"] is result["perplexity_high"] is None


def test_a_diverged_model_still_has_a_finite_perplexity():
    assert math.isfinite(summarise(torch.tensor([1e4, 2e4]))["perplexity_high"])
