import pytest
import torch
from torch.nn.functional import elu, relu


def linear(w, x, config):
    """Attention weights phi(q_t) . phi(k_s), s <= t, divided by their sum, as a matrix: no state at all."""
    H, heads = config.num_heads, []
    options = config.linear
    for h in range(H):
        q, k, v = (m.chunk(H, 1)[h] for m in (x @ w[f"{n}_proj.weight"].T for n in "qkv"))
        K = q.shape[1]
        if options.feature_map == "hedgehog":
            q, k = (m @ w[f"{n}_map.weight"][h].T for n, m in (("q", q), ("k", k)))
            q, k = (torch.cat([m, -m], 1).exp() for m in (q, k))
            q, k = (m / m.sum(1, keepdim=True) for m in (q, k))
        else:
            phi = {"elu1": lambda m: elu(m) + 1, "relu": relu, "identity": lambda m: m}[options.feature_map]
            q, k = phi(q), phi(k)
        scores = (q @ k.T).tril()
        if options.normalise:
            heads.append(scores @ v / scores.sum(1, keepdim=True).clamp(min=1e-6))
        else:
            o = scores @ v / K**0.5
            heads.append(o / (o.square().mean(1, keepdim=True) + 1e-6).sqrt() * w["o_norm.weight"])
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("feature_map", ["elu1", "relu", "identity", "hedgehog"])
@pytest.mark.parametrize("normalise", [True, False])
def test_is_the_papers_equation(feature_map, normalise, assert_is):
    if feature_map == "identity" and normalise:
        with pytest.raises(ValueError, match=r"write model\.linear\.normalise=false"):
            assert_is(linear, mixer="linear", linear={"feature_map": feature_map})
        return
    options = {"feature_map": feature_map, "normalise": normalise}
    assert_is(linear, T=70, mixer="linear", expand_k=1.0, linear=options)


@pytest.mark.parametrize(
    "choice",
    [{"mixer": "linear"}, {"mixer": "regla", "regla": {"feature_map": "elu1", "output_norm": False}}],
    ids=["linear", "regla"],
)
def test_the_sum_of_the_weights_may_leave_float16(choice, tiny):
    """65504 is the largest number there."""
    model = tiny(hidden_size=32, expand_k=1.0, **choice)
    mixer, x = model.model.layers[0].attn, torch.randn(1, 600, 32, dtype=torch.float64)
    for name in ("q_proj", "k_proj"):
        getattr(mixer, name).weight.data *= 12
    if hasattr(mixer, "forget_proj"):
        mixer.forget_proj[1].bias.data.fill_(12.0)  # keeps all
    exact, _ = mixer(x)
    found, _ = mixer.half()(x.half())
    assert found.dtype == torch.float16 and (found.double() - exact).norm() < 0.02 * exact.norm()


def test_hedgehog_starts_as_the_identity(tiny):
    from glalm.hf import GLALMConfig, GLALMForCausalLM

    config = GLALMConfig(**tiny().config.to_dict() | {"mixer": "linear", "linear": {"feature_map": "hedgehog"}})
    weight = GLALMForCausalLM(config).model.layers[0].attn.k_map.weight
    assert torch.equal(weight, torch.eye(weight.shape[1]).expand_as(weight))
