import pytest
import torch

from glalm.config.strict import ConfigError
from glalm.model.config import ModelConfig


def layer_norm(x, w, name):
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def memsizer(w, x, config):
    """The paper's recurrence, in which each head reads the memory by itself before their results are averaged."""
    H, m = config.num_heads, config.memsizer.slots
    keys = layer_norm(x @ w["k_proj.weight"].T, w, "k_norm")
    values = layer_norm(x @ w["v_proj.weight"].T, w, "v_norm")
    queries = (x @ w["q_proj.weight"].T).view(-1, H, m)
    memory, outputs = x.new_zeros(m, x.shape[1]), []
    for t in range(len(x)):
        memory = memory + torch.outer(keys[t], values[t])
        heads = [queries[t, h].softmax(0) @ memory for h in range(H)]
        outputs.append(torch.stack(heads).mean(0) / (t + 1) ** 0.5)
    return torch.stack(outputs)


@pytest.mark.parametrize("slots, heads", [(32, 2), (5, 4), (1, 1)])
def test_is_the_papers_recurrence(slots, heads, assert_is, tiny):
    choice = {"mixer": "memsizer", "num_heads": heads, "memsizer": {"slots": slots}}
    if slots > 1:
        assert_is(memsizer, T=70, **choice)
        return
    # The softmax over one slot is 1 and LayerNorm of one number is its bias, so two projections have no gradient.
    model = tiny(**choice)
    mixer, x = model.model.layers[0].attn, torch.randn(70, 32, dtype=torch.float64)
    expected = memsizer(dict(mixer.named_parameters()), x, model.config)
    torch.testing.assert_close(mixer(x[None])[0][0], expected)


@torch.no_grad()
def test_half_precision_does_not_overflow_in_a_long_text(tiny):
    """The sum without its factor t^-1/2 would: 65504 is float16's largest number."""
    mixer = tiny(mixer="memsizer", hidden_size=32, memsizer={"slots": 1}).model.layers[0].attn
    mixer.k_norm.bias.fill_(40.0)
    mixer.v_norm.bias.fill_(4.0)
    x = torch.randn(1, 600, 32, dtype=torch.float64)
    exact, _ = mixer(x)
    assert 600**0.5 * exact[0, -1].max() > 65504
    found, _ = mixer.half()(x.half())
    assert (found.double() - exact).norm() < 0.01 * exact.norm()


@torch.no_grad()
def test_half_precision_reads_the_memory_beyond_its_largest_number_of_tokens(tiny):
    """Of a text of 70,000 tokens: in float16, t would be infinite and t^-1/2 zero."""
    mixer = tiny(mixer="memsizer", hidden_size=32).model.layers[0].attn
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    S = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    seen = torch.tensor([70_000])
    exact, _ = mixer(x, state=(S, seen))
    found, _ = mixer.half()(x.half(), state=(S.float(), seen))
    assert (found.double() - exact).norm() < 0.01 * exact.norm()


def test_a_memory_without_slots_is_refused():
    with pytest.raises(ConfigError, match=r"model\.memsizer\.slots must be positive"):
        ModelConfig(mixer="memsizer", vocab_size=8, memsizer={"slots": 0})
