import sys
import types

import pytest
import torch
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated


def theirs(model):
    """transformers' layer with the weights of the first mixer of `model`."""
    mixer, d = model.model.layers[0].attn, model.config.hidden_size
    if model.config.mixer == "mamba":
        config = MambaConfig(hidden_size=d, num_hidden_layers=1)
        layer = modeling_mamba.MambaMixer(config, layer_idx=0)
    else:
        o = model.config.mamba2
        config = Mamba2Config(
            hidden_size=d,
            num_hidden_layers=1,
            num_heads=o.expand * d // o.head_dim,
            head_dim=o.head_dim,
            state_size=o.state_size,
            n_groups=o.groups,
            chunk_size=16,
            layer_norm_epsilon=model.config.norm_eps,
        )
        layer = modeling_mamba2.Mamba2Mixer(config, layer_idx=0)
        if not hasattr(layer.norm, "group_size"):
            # Before 5.23 it normalised all groups as one, unlike the authors' mamba_ssm and transformers' Zamba-2.
            width = layer.intermediate_size
            layer.norm = Zamba2RMSNormGated(width, width // o.groups, eps=model.config.norm_eps)
    layer = layer.double()
    layer.load_state_dict(mixer.state_dict())
    return layer


CHOICES = [
    {"mixer": "mamba"},
    {"mixer": "mamba2", "mamba2": {"state_size": 16, "head_dim": 8}},
    {"mixer": "mamba2", "mamba2": {"state_size": 16, "head_dim": 8, "groups": 2}},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_is_transformers_layer(choice, tiny):
    model = tiny(**choice)
    ours, reference = model.model.layers[0].attn, theirs(model)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    grads = []
    for layer in (ours, reference):
        out = layer(x)
        y = out[0] if isinstance(out, tuple) else out
        (y * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append((y, {n: p.grad for n, p in layer.named_parameters()}))
    (y, got), (expected, wanted) = grads
    # They compute the decays in float32.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert (got[name] - wanted[name]).norm() / wanted[name].norm() < 1e-5, name


@pytest.mark.parametrize("choice", CHOICES[:2], ids=str)
def test_starts_as_transformers_does(choice, tiny):
    from glalm.hf import GLALMConfig, GLALMForCausalLM

    model = GLALMForCausalLM(GLALMConfig(**tiny(**choice).config.to_dict()))
    weights, reference = dict(model.model.layers[0].attn.named_parameters()), theirs(tiny(**choice))
    reference.init_mamba_weights() if choice["mixer"] == "mamba" else reference.init_mamba2_weights()
    torch.testing.assert_close(weights["A_log"].double(), reference.A_log, rtol=1e-6, atol=1e-7)
    assert torch.equal(weights["D"].double(), reference.D)
    step = torch.nn.functional.softplus(weights["dt_proj.bias" if choice["mixer"] == "mamba" else "dt_bias"])
    assert step.min() >= 1e-3 and step.max() <= 0.1001 and step.max() > 5 * step.min()


def test_the_mamba_ssm_kernel_is_given_the_same_problem(tiny, monkeypatch):
    """mamba_ssm's function, for which transformers' fallback of the same signature stands in."""
    from glalm.model.mixers import mamba

    layer, x = tiny(mixer="mamba").model.layers[0].attn, torch.randn(2, 20, 32, dtype=torch.float64)
    expected, states = layer(x, return_state=True)
    calls = []

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        calls.append(u.shape)
        names = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, "return_last_state": return_last_state}
        return modeling_mamba.mamba_selective_scan(u, delta, A, B, C, D=D, z=z, **names)

    interface = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    monkeypatch.setattr(mamba, "kernel_supports", lambda x, h, cu_seqlens: True)
    mamba.find_mamba_ssm_scan.cache_clear()
    found, fast_states = layer(x, return_state=True)
    mamba.find_mamba_ssm_scan.cache_clear()
    assert [tuple(shape) for shape in calls] == [(2, 64, 20)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast_states, states, rtol=1e-5, atol=1e-6, check_dtype=False)
