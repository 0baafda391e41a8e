import math

import pytest
import torch

from glalm.config.strict import ConfigError
from glalm.model.mixers.hyena import HyenaOptions


def filter_taps(w, options, d):
    """Compute the taps [L, d] position by position, with complex exponentials as the authors do."""
    L = options.filter_length
    bands = (options.filter_features - 1) // 2
    frequencies = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    rates = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, d, dtype=torch.float64).abs()
    taps = []
    for i in range(L):
        waves = torch.exp(-2j * math.pi * i / L * frequencies)
        z = torch.cat([torch.tensor([i / (L - 1)], dtype=torch.float64), waves.real, waves.imag])
        for weight, bias in ((w["W_in"], 0), (w["W_hidden"][0], 1), (w["W_hidden"][1], 2)):
            z = (w["w"] * (weight.T @ z + w["b"][bias])).sin()
        taps.append((w["W_out"].T @ z) * (-rates * i / (L - 1)).exp())
    return torch.stack(taps)


def hyena(w, x, config):
    """Sum the long convolution by its definition, over all tokens up to each one."""
    T, d = x.shape
    options = config.hyena
    z = x @ w["in_proj.weight"].T + w["in_proj.bias"]
    rows = []
    for t in range(T):
        past = range(min(options.short_conv, t + 1))
        rows.append(w["short_bias"] + sum(w["short_filter"][i] * z[t - i] for i in past))
    q, k, v = torch.stack(rows).chunk(3, 1)
    u = k * v
    h = filter_taps({n.removeprefix("filter."): p for n, p in w.items()}, options, d)
    o = []
    for t in range(T):
        reached = min(options.filter_length, t + 1)
        o.append(w["D"] * u[t] + sum(h[i] * u[t - i] for i in range(reached)))
    return (q * torch.stack(o)) @ w["out_proj.weight"].T + w["out_proj.bias"]


@pytest.mark.parametrize("length, short_conv", [(30, 3), (12, 1), (40, 4)])
def test_is_the_papers_equation(length, short_conv, assert_is):
    """With filters as long as the text, shorter and longer."""
    options = {"filter_length": length, "filter_width": 6, "filter_features": 7, "short_conv": short_conv}
    assert_is(hyena, T=30, mixer="hyena", hyena=options)


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"model\.hyena\.filter_features must be odd and at least 3, not 4"):
        HyenaOptions(filter_features=4)
    with pytest.raises(ConfigError, match=r"model\.hyena\.filter_length must be positive"):
        HyenaOptions(filter_length=0)


@torch.no_grad()
def test_taps_are_float32_under_autocast(tiny):
    network = tiny(mixer="hyena").model.layers[0].attn.filter.float()
    expected = network(64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(64), expected) and expected.dtype == torch.float32


@torch.no_grad()
def test_the_state_ends_at_the_filters_length(tiny, tokens):
    model = tiny(mixer="hyena", hyena={"filter_length": 11})
    z, u = model(tokens(2, 30), use_cache=True).past_key_values.states[0]
    assert z.shape == (2, 2, 96) and u.shape == (2, 10, 32)


@torch.no_grad()
def test_filters_of_one_tap_have_empty_states(tiny, tokens):
    model, ids = tiny(mixer="hyena", hyena={"filter_length": 1, "short_conv": 1}), tokens(2, 12)
    cache = None
    for start, end in ((0, 4), (4, 5), (5, 12)):
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    torch.testing.assert_close(out.logits, model(ids).logits[:, 5:])
    assert all(x.shape[1] == 0 for x in cache.states[0])
