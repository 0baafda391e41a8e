import pytest
import torch
from torch.nn.functional import logsigmoid, silu

from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def convolve(x, weight):
    """Causal, by the definition: y_t = silu(sum_i w_i x_{t - taps + 1 + i})."""
    taps = weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    return silu(torch.stack([(padded[t : t + taps] * weight[:, 0].T).sum(0) for t in range(len(x))]))


def gla(w, x, config):
    """The recurrence of the paper with each of its options, a token and a head at a time."""
    options, H = config.gla, config.num_heads
    shared = H // (options.num_kv_heads or H)
    q, k, v = (x @ w[f"{n}_proj.weight"].T for n in "qkv")
    if options.short_conv:
        parts = torch.cat([q, k, v], 1)
        q, k, v = convolve(parts, w["conv.weight"]).split([q.shape[1], k.shape[1], v.shape[1]], 1)
    if options.feature_map == "relu":
        q, k = q.clamp(min=0), k.clamp(min=0)
    K, V, T = q.shape[1] // H, v.shape[1] * shared // H, len(x)
    log_gate = x.new_zeros(T, H // shared, 1)
    if options.gate == "vector":
        logits = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
        log_gate = logsigmoid(logits).view(T, -1, K) / config.gate_logit_normalizer
    elif options.gate == "scalar":
        logits = x @ w["gk_proj.weight"].T + w["gk_proj.bias"]
        log_gate = logsigmoid(logits).view(T, -1, 1) / config.gate_logit_normalizer
    elif options.gate == "fixed":
        log_gate = (1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype))).log().view(1, H, 1).expand(T, H, 1)
    if options.min_log_gate is not None:
        log_gate = log_gate.maximum(torch.tensor(options.min_log_gate, dtype=x.dtype))
    heads = []
    for h in range(H):
        kv, S, o = h // shared, x.new_zeros(K, V), []
        for t in range(T):
            S = log_gate[t, kv].exp()[:, None] * S + torch.outer(k.view(T, -1, K)[t, kv], v.view(T, -1, V)[t, kv])
            o.append(q.view(T, H, K)[t, h] @ S / K**0.5)
        o = norm(torch.stack(o), w["g_norm_swish_gate.weight" if options.output_gate else "g_norm.weight"])
        heads.append(o)
    y = torch.cat(heads, 1)
    if options.output_gate:
        y = y * silu(x @ w["g_proj.weight"].T)
    return y @ w["o_proj.weight"].T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate_low_rank_dim": 4, "gate_logit_normalizer": 3.0},
        {"gla": {"gate": "scalar"}},
        {"gla": {"gate": "fixed"}},
        {"gla": {"gate": "none", "output_gate": False}},
        {"gla": {"short_conv": 4}},
        {"gla": {"short_conv": 4, "feature_map": "relu"}},
        {"gla": {"min_log_gate": -0.05}},
        {"num_heads": 4, "gla": {"num_kv_heads": 2, "gate": "scalar", "short_conv": 3}},
        {"num_heads": 4, "gla": {"num_kv_heads": 1}},
        {"num_heads": 4, "gla": {"num_kv_heads": 2, "gate": "fixed"}},
    ],
    ids=str,
)
def test_is_the_papers_equations(changes, assert_is):
    assert_is(gla, **changes)


@pytest.mark.parametrize("gate, num_kv_heads, layer", [("vector", 2, "gk_proj.1"), ("scalar", None, "gk_proj")])
def test_gates_begin_with_their_half_lives(gate, num_kv_heads, layer):
    options = {"gate": gate, "num_kv_heads": num_kv_heads, "initial_half_lives": [4, 256]}
    config = ModelConfig(
        vocab_size=16, hidden_size=56, num_hidden_layers=1, num_heads=4, intermediate_size=8, gla=options
    )
    model = CausalLM(config)
    bias = model.get_parameter(f"model.layers.0.attn.{layer}.bias").detach().double()
    gates = bias.sigmoid() ** (1 / config.gate_logit_normalizer)
    # 4, 8, ..., 256 in each head of 7 channels; with a gate for each head, the 4 heads have four half-lives.
    expected = [2.0**i for i in range(2, 9)] * 2 if gate == "vector" else [4, 16, 64, 256]
    torch.testing.assert_close(gates ** torch.tensor(expected), torch.full_like(gates, 0.5), rtol=1e-5, atol=0)


def test_gates_begin_at_a_logit_of_zero():
    model = CausalLM(ModelConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_heads=2, intermediate_size=8))
    assert not model.get_parameter("model.layers.0.attn.gk_proj.1.bias").any()
