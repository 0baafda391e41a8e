import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glalm.config.strict import ConfigError
from glalm.model.mixers import rpe_attention as rpe_attention_module
from glalm.model.mixers.rpe_attention import RPEAttentionOptions


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Let a few tokens take several blocks."""
    monkeypatch.setattr(rpe_attention_module, "DENSE_BLOCK", 64)


def dense_attention(q, k, v, bias):
    """Return the outputs [T, V] of one head from the matrix of weights. q and k are features, bias is [window]."""
    T = len(q)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    is_seen = (distance >= 0) & (distance < len(bias))
    weights = (q @ k.T) * torch.where(is_seen, bias[distance.clamp(0, len(bias) - 1)].exp(), 0)
    return weights @ v / weights.sum(1, keepdim=True)


def rpe_attention(w, x, config):
    heads = []
    for h in range(config.num_heads):
        q, k, v = (m.chunk(config.num_heads, 1)[h] for m in (x @ w[f"{n}_proj.weight"].T for n in "qkv"))
        q, k = ((m / m.norm(dim=1, keepdim=True) @ w["features"][h].T).exp() for m in (q, k))
        heads.append(dense_attention(q, k, v, w["position_bias"][:, h]))
    return torch.cat(heads, 1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("T, window", [(30, 40), (150, 150), (150, 70), (150, 9)])
def test_is_the_dense_form(T, window, assert_is):
    """In one block, and in several, with windows over several blocks, over two and within one."""
    options = {"features": 5, "window": window}
    assert_is(rpe_attention, T=T, mixer="rpe_attention", expand_k=0.75, rpe_attention=options)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5),
    window=st.sampled_from([5, 64, 200]),
    seed=st.integers(0, 99),
)
def test_packed_sequences_of_many_blocks_equal_separate_ones(lengths, window, seed, tiny):
    mixer = tiny(seed, mixer="rpe_attention", rpe_attention={"features": 3, "window": window}).model.layers[0].attn
    x = torch.randn(1, sum(lengths), 32, dtype=torch.float64)
    packed, _ = mixer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    apart = [mixer(rows)[0] for rows in x.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-8, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=["float64", "float32"]
)
def test_is_the_dense_form_to_its_last_digits(dtype, tolerance, tiny):
    """For all tokens, and as in decoding for the last one alone, with biases that differ by many nats."""
    T, window = 300, 200
    mixer = tiny(mixer="rpe_attention", rpe_attention={"window": window}).to(dtype).model.layers[0].attn
    mixer.position_bias.copy_(2 * torch.randn(window, 2))
    q, k = torch.randn(2, 1, T, 2, 7, dtype=dtype).exp()
    v = torch.randn(1, T, 2, 5, dtype=dtype)
    each = zip(*(m[0].double().unbind(1) for m in (q, k, v)), mixer.position_bias.double().unbind(1), strict=True)
    expected = torch.stack([dense_attention(*head) for head in each], 1)[None]
    found = mixer.attend(q, k, v, None)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    last = mixer.attend(q[:, -1:], k[:, -window:], v[:, -window:], None)
    torch.testing.assert_close(last.double(), expected[:, -1:], rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_large_biases_do_not_overflow(tiny, tokens):
    """What all distances have in common cancels."""
    model = tiny(mixer="rpe_attention").float()
    expected = model(tokens(2, 30)).logits
    for layer in model.model.layers:
        layer.attn.position_bias += 200
    torch.testing.assert_close(model(tokens(2, 30)).logits, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_state_ends_at_the_window(tiny, tokens):
    model = tiny(mixer="rpe_attention", rpe_attention={"features": 3, "window": 11})
    k, v = model(tokens(2, 30), use_cache=True).past_key_values.states[0]
    assert k.shape == (2, 10, 2, 3) and v.shape == (2, 10, 2, 16)


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"model\.rpe_attention\.features must be positive"):
        RPEAttentionOptions(features=0)


@torch.no_grad()
def test_a_window_of_one_token_has_an_empty_state(tiny, tokens):
    model, ids = tiny(mixer="rpe_attention", rpe_attention={"window": 1}), tokens(2, 12)
    cache = None
    for start, end in ((0, 4), (4, 5), (5, 12)):
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    torch.testing.assert_close(out.logits, model(ids).logits[:, 5:])
    assert all(x.shape[1] == 0 for x in cache.states[0])
