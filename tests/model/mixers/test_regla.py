import math

import pytest
import torch
from torch.nn.functional import elu, relu

from glalm.hf import GLALMConfig, GLALMForCausalLM


def regla(w, x, config):
    """The paper's equations, with its one maximum over all keys of the sequence, which the normalisers cancel."""
    options, H, T = config.regla, config.num_heads, len(x)
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).view(T, H, -1) for n in "qkv")

    def gate(name):
        logits = x @ w[f"{name}.0.weight"].T @ w[f"{name}.1.weight"].T + w[f"{name}.1.bias"]
        return torch.sigmoid(logits).view(T, H, -1)

    forget = gate("forget_proj")
    if options.refined_gate:
        refine = gate("refine_proj")
        forget = (1 - refine) * forget**2 + refine * (1 - (1 - forget) ** 2)
    K = q.shape[2]
    scale = K**-0.5
    if options.feature_map == "exp":
        q, k = (q - q.amax(-1, keepdim=True)).exp(), (k - k.amax((0, 2), keepdim=True)).exp()
        scale = 1 / (math.e * math.sqrt(K * (math.e**2 - 1))) if options.variance_scale else 1
    else:
        phi = {"elu1": lambda m: elu(m) + 1, "relu": relu, "identity": lambda m: m}[options.feature_map]
        q, k = phi(q), phi(k)
    S, z, outputs = x.new_zeros(H, K, v.shape[2]), x.new_zeros(H, K), []
    for t in range(T):
        decay = forget[t][:, :, None] if options.gate_axis == "key" else forget[t][:, None, :]
        S = S * decay + k[t][:, :, None] * v[t][:, None, :]
        o = torch.einsum("hk,hkv->hv", q[t], S)
        if options.output_norm:
            o = o * scale
            o = o / (o.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w["o_norm.weight"]
        else:
            z = z * forget[t] + k[t]
            o = o / (q[t] * z).sum(-1, keepdim=True)
        outputs.append(o.flatten())
    return torch.stack(outputs) @ w["o_proj.weight"].T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refined_gate": False},
        {"gate_axis": "value"},
        {"variance_scale": False},
        {"output_norm": False},
        {"feature_map": "elu1"},
        {"feature_map": "relu", "gate_axis": "value"},
        {"feature_map": "identity", "refined_gate": False},
    ],
    ids=str,
)
def test_is_the_papers_equations(options, assert_is):
    # With the maximum over all time instead of the running one, only the norm's epsilon tells the scale.
    assert_is(regla, mixer="regla", regla=options, norm_eps=1e-20)


@pytest.mark.parametrize("K", [1, 8])
def test_the_scale_makes_a_scores_variance_1(K, tiny):
    """Of the sum over K features of exp(x + y), x and y unit normals: by the trapezium rule over z = x + y."""
    model = tiny(mixer="regla", hidden_size=2 * K, num_heads=2, expand_k=1.0)
    z = torch.linspace(-20, 30, 100_001, dtype=torch.float64)
    density = (-(z**2) / 4).exp() / (4 * math.pi) ** 0.5
    mean, square = (torch.trapezoid((n * z).exp() * density, z).item() for n in (1, 2))
    assert K * (square - mean**2) * model.model.layers[0].attn.scale ** 2 == pytest.approx(1)


@pytest.mark.parametrize("refined", [True, False])
def test_the_gate_starts_where_it_is_told(refined):
    config = GLALMConfig(
        vocab_size=20,
        hidden_size=64,
        num_hidden_layers=1,
        mixer="regla",
        regla={"initial_forget": 0.9, "refined_gate": refined},
    )
    mixer = GLALMForCausalLM(config).model.layers[0].attn
    gate = mixer.compute_log_gate(torch.randn(1, 50, 64)).exp()
    torch.testing.assert_close(gate, torch.full_like(gate, 0.9), rtol=0.01, atol=0)


def test_keys_far_beyond_the_range_of_exp():
    """exp(200) is no float32 number; a key 200 above the ones before replaces the state, as in exact arithmetic."""
    from glalm.model.mixers.regla import ReGLA

    torch.manual_seed(0)
    mixer = ReGLA(GLALMConfig(vocab_size=20, hidden_size=16, num_heads=2, mixer="regla", norm_eps=1e-30))
    x = torch.randn(1, 30, 16)
    x[:, 20:] *= 300
    found, exact = mixer(x)[0], mixer.double()(x.double())[0]
    assert (mixer.k_proj(x.double())).amax() > 200
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-3)


def test_padding_sets_no_maximum():
    """Keys whose logits are all -300 are as good as any; a padded token's logit is 0."""
    from glalm.model.mixers.regla import ReGLA

    torch.manual_seed(0)
    mixer = ReGLA(GLALMConfig(vocab_size=20, hidden_size=16, num_heads=2, mixer="regla", norm_eps=1e-30)).double()
    with torch.no_grad():
        mixer.k_proj.weight.fill_(-300 / 16)
    x = 1 + 0.01 * torch.randn(1, 9, 16, dtype=torch.float64)
    padded = torch.cat([torch.zeros(1, 4, 16, dtype=torch.float64), x], 1)
    found, _ = mixer(padded, padding=(padded != 0).any(-1, keepdim=True).double())
    torch.testing.assert_close(found[:, 4:], mixer(x)[0])
