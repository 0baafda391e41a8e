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
    layer.load_state_dict(joined_weights(mixer.state_dict(), model.config.mixer))
    return layer


def joined_weights(weights, mixer):
    """Return weights or gradients by transformers' names: its one matrix `in_proj` computes all inputs of the scan."""
    names = ["in_proj", "z_proj"] if mixer == "mamba" else ["z_proj", "in_proj", "dt_proj"]
    parts = [f"{name}.weight" for name in names]
    joined = {name: weight for name, weight in weights.items() if name not in parts}
    return joined | {"in_proj.weight": torch.cat([weights[part] for part in parts])}


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
    got = joined_weights(got, choice["mixer"])
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
