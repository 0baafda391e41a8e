import pytest
import torch
from torch.nn.functional import silu, softplus

from glalm.config.strict import ConfigError
from glalm.model.mixers.kda import KDAOptions


def convolve(x, weight):
    taps = weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    return torch.stack([(padded[t : t + taps] * weight[:, 0].T).sum(0) for t in range(len(x))])


def log_gates(w, x, h, H):
    """Return the log gates of head h for all tokens: one per head, or one per key channel in KDA."""
    if "f_proj.0.weight" in w:
        logits = (x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]).chunk(H, 1)[h]
    else:
        logits = (x @ w["a_proj.weight"][h] + w["dt_bias"][h])[:, None]
    return -w["A_log"][h].exp() * softplus(logits)


def output_gate(w, x):
    if "f_proj.0.weight" in w:
        return torch.sigmoid(x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"])
    return silu(x @ w["g_proj.weight"].T)


def deltanet(w, x, config):
    """What is written is the difference between v_t and what k_t reads: S += beta k (v - k S), after forgetting."""
    H, heads, T = config.num_heads, [], len(x)
    parts = torch.cat([x @ w[f"{n}_proj.weight"].T for n in "qkv"], 1)
    parts = silu(convolve(parts, w["conv.weight"]) if "conv.weight" in w else parts)
    q, k, v = parts.split([config.key_dim, config.key_dim, config.value_dim], 1)
    beta, gated = torch.sigmoid(x @ w["b_proj.weight"].T), "A_log" in w
    for h in range(H):
        qh, kh, vh = (m.chunk(H, 1)[h] for m in (q, k, v))
        qh, kh = (m / (m.square().sum(1, keepdim=True) + 1e-6).sqrt() for m in (qh, kh))
        S, o = x.new_zeros(qh.shape[1], vh.shape[1]), []
        decay = log_gates(w, x, h, H).exp() if gated else torch.ones(T, 1)
        for t in range(T):
            S = decay[t][:, None] * S
            S = S + beta[t, h] * torch.outer(kh[t], vh[t] - kh[t] @ S)
            o.append(qh[t] @ S / qh.shape[1] ** 0.5)
        o = torch.stack(o)
        o = o / (o.square().mean(1, keepdim=True) + 1e-6).sqrt() * w["o_norm.weight"]
        heads.append(o * output_gate(w, x).chunk(H, 1)[h] if gated else o)
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("taps", [0, 4])
@pytest.mark.parametrize("mixer", ["deltanet", "gated_deltanet"])
def test_is_the_recurrence(mixer, taps, assert_is):
    assert_is(deltanet, T=70, mixer=mixer, expand_k=0.75, expand_v=1.5, deltanet={"short_conv": taps})


@pytest.mark.parametrize("options", [{"short_conv": 0}, {"gate_rank": 3}], ids=str)
def test_kda_is_the_recurrence(options, assert_is):
    assert_is(deltanet, T=40, mixer="kda", expand_k=0.75, expand_v=1.5, kda=options)


def test_kda_options_are_checked():
    with pytest.raises(ConfigError, match=r"model\.kda\.short_conv must be 0 or 2 taps or more, not 1"):
        KDAOptions(short_conv=1)
    with pytest.raises(ConfigError, match=r"model\.kda\.gate_rank must be null or at least 1, not 0"):
        KDAOptions(gate_rank=0)
