from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from glalm.hf import GLALMConfig
from glalm.model.mixers.attention import can_use_flash_attention


def as_llama(weights: dict) -> dict:
    """The same weights under transformers' names."""
    renames = {
        "model.embeddings": "model.embed_tokens",
        ".attn.": ".self_attn.",
        ".attn_norm": ".input_layernorm",
        ".mlp_norm": ".post_attention_layernorm",
    }

    def renamed(name: str) -> str:
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        return name

    return {renamed(name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("kv_heads, window", [(4, None), (2, None), (2, 5)])
def test_logits_and_gradients_are_those_of_transformers(kv_heads, window, tiny, tokens):
    options = {"num_heads": 4, "num_kv_heads": kv_heads, "window": window}
    model, ids = tiny(mixer="attention", attention=options), tokens(2, 33)
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "attn_implementation": "eager",
    }
    theirs = (
        LlamaForCausalLM(LlamaConfig(**shape))
        if window is None
        else MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
    )
    theirs = theirs.double().eval()
    theirs.load_state_dict(as_llama(model.state_dict()))
    expected = theirs(ids).logits
    # Their angles are float32 whatever the weights are.
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
    for logits in (model(ids).logits, expected):
        logits.square().sum().backward()
    grads = as_llama({n: p.grad for n, p in model.named_parameters()})
    for name, p in theirs.named_parameters():
        error = (grads[name] - p.grad).norm() / p.grad.norm()
        assert error < 1e-5, name


def test_a_window_is_all_that_is_kept(tiny, tokens):
    model = tiny(mixer="attention", attention={"window": 7})
    keys, values, at, seen = model(tokens(2, 30), use_cache=True).past_key_values.states[0]
    assert keys.shape[1] == values.shape[1] == 6 and at[0].tolist() == [*range(24, 30)] and seen.tolist() == [30, 30]


@torch.no_grad()
def test_a_window_sees_its_keys_behind_segments_of_unequal_length(tiny, tokens):
    """The shorter segment is padded behind the keys of the state, which must not push these out."""
    model, ids = tiny(mixer="attention", attention={"window": 6}), tokens(2, 20)
    whole, past, parts = model(ids).logits, None, [[], []]
    for (a, b), (c, d) in (((0, 8), (0, 8)), ((8, 9), (8, 15)), ((9, 20), (15, 16)), ((20, 20), (16, 20))):
        segment, bounds = torch.cat([ids[0, a:b], ids[1, c:d]])[None], torch.tensor([0, b - a, b - a + d - c])
        out = model(segment, cu_seqlens=bounds, past_key_values=past, use_cache=True)
        past = out.past_key_values
        for part, logits in zip(parts, out.logits[0].split([b - a, d - c]), strict=True):
            part.append(logits)
    torch.testing.assert_close(torch.stack([torch.cat(part) for part in parts]), whole)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "model.attention.num_heads=3 does not cut model.hidden_size=32"),
        ({"num_heads": 32}, "heads of an even number"),
        ({"num_heads": 4, "num_kv_heads": 3}, "model.attention.num_kv_heads=3 does not divide the 4 query heads"),
        ({"num_heads": 4, "num_kv_heads": 0}, "model.attention.num_kv_heads must be positive and finite, not 0"),
        ({"window": 0}, "model.attention.window must be positive or null, not 0"),
        ({"windw": 4}, "unknown key model.attention.windw; did you mean model.attention.window?"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GLALMConfig(hidden_size=32, num_heads=2, mixer="attention", attention=options)


@pytest.mark.parametrize("choice", [{"mixer": "attention"}, {"layers": "gla+attention"}], ids=str)
def test_padding_within_packed_sequences_is_not_seen_with_a_cache_either(choice, tiny, tokens):
    model, ids, bounds = tiny(**choice), tokens(1, 10), torch.tensor([0, 4, 10])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    alone = model(ids[:, 6:]).logits
    for use_cache in (False, True):
        packed = model(ids, attention_mask=mask, cu_seqlens=bounds, use_cache=use_cache).logits[:, 6:]
        torch.testing.assert_close(packed, alone)


def test_decoding_leaves_cudnn_out(tiny, tokens, monkeypatch):
    """It would plan every new length of the cache anew."""
    enabled = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(*args, **kwargs):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    model = tiny(mixer="attention", num_hidden_layers=1)
    ids = tokens(2, 9)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    model(ids[:, 8:], past_key_values=cache, use_cache=True)
    assert enabled == [True, False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    "width, dtype, expected",
    [
        (64, torch.bfloat16, True),
        (72, torch.float16, True),
        (256, torch.bfloat16, True),
        (20, torch.bfloat16, False),
        (260, torch.bfloat16, False),
        (320, torch.bfloat16, False),
        (64, torch.float32, False),
    ],
)
def test_flash_attention_gets_the_heads_that_its_kernel_has(width, dtype, expected):
    """Torch's variable-length kernel refuses heads above 256 channels, or not of a multiple of 8."""
    q = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(2, 5, 4, width))
    assert can_use_flash_attention(q) == expected
