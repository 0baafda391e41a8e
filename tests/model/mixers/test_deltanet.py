import pytest
import torch
from torch.nn.functional import silu, softplus


def convolve(x, weight):
    taps = weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    return torch.stack([(padded[t : t + taps] * weight[:, 0].T).sum(0) for t in range(len(x))])


def deltanet(w, x, config):
    """What is written is the difference between v_t and what k_t reads: S += beta k (v - k S), after forgetting."""
    H, heads, T = config.num_heads, [], len(x)
    parts = torch.cat([x @ w[f"{n}_proj.weight"].T for n in "qkv"], 1)
    parts = silu(convolve(parts, w["conv.weight"]) if config.deltanet.short_conv else parts)
    q, k, v = parts.split([config.key_dim, config.key_dim, config.value_dim], 1)
    beta, gated = torch.sigmoid(x @ w["b_proj.weight"].T), "A_log" in w
    for h in range(H):
        qh, kh, vh = (m.chunk(H, 1)[h] for m in (q, k, v))
        qh, kh = (m / (m.square().sum(1, keepdim=True) + 1e-6).sqrt() for m in (qh, kh))
        S, o = x.new_zeros(qh.shape[1], vh.shape[1]), []
        for t in range(T):
            if gated:
                S = S * (-w["A_log"][h].exp() * softplus(x[t] @ w["a_proj.weight"][h] + w["dt_bias"][h])).exp()
            S = S + beta[t, h] * torch.outer(kh[t], vh[t] - kh[t] @ S)
            o.append(qh[t] @ S / qh.shape[1] ** 0.5)
        o = torch.stack(o)
        o = o / (o.square().mean(1, keepdim=True) + 1e-6).sqrt() * w["o_norm.weight"]
        heads.append(o * silu(x @ w["g_proj.weight"].T).chunk(H, 1)[h] if gated else o)
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("taps", [0, 4])
@pytest.mark.parametrize("mixer", ["deltanet", "gated_deltanet"])
def test_is_the_recurrence(mixer, taps, assert_is):
    assert_is(deltanet, T=70, mixer=mixer, expand_k=0.75, expand_v=1.5, deltanet={"short_conv": taps})
