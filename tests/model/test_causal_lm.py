"""The model by transformers' class: its equations, losses, caches and errors."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.cache import StateCache
from glalm.model.config import ModelConfig


def gla_by_hand(weights: dict, config: GLALMConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] of one sequence [T] by the paper's equations, a token at a time, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    d, H = config.hidden_size, config.num_heads
    K, V = d // 2 // H, d // H

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    states = [torch.zeros(H, K, V, dtype=torch.float64) for _ in range(config.num_hidden_layers)]
    logits = []
    for token in input_ids:
        x = w["model.embeddings.weight"][token]
        for i in range(config.num_hidden_layers):
            layer = {n.removeprefix(f"model.layers.{i}."): t for n, t in w.items()}
            h = norm(x, layer["attn_norm.weight"])
            q, k = (layer[f"attn.{n}_proj.weight"] @ h for n in "qk")
            v, r = (layer[f"attn.{n}_proj.weight"] @ h for n in "vg")
            logit = layer["attn.gk_proj.1.weight"] @ (layer["attn.gk_proj.0.weight"] @ h) + layer["attn.gk_proj.1.bias"]
            alpha = torch.sigmoid(logit) ** (1 / 16)
            q, k, alpha, v = q.view(H, K), k.view(H, K), alpha.view(H, K), v.view(H, V)
            states[i] = alpha[:, :, None] * states[i] + k[:, :, None] * v[:, None, :]
            o = torch.einsum("hk,hkv->hv", q * K**-0.5, states[i])
            y = norm(o, layer["attn.g_norm_swish_gate.weight"]).flatten() * (r * torch.sigmoid(r))
            x = x + layer["attn.o_proj.weight"] @ y
            h = norm(x, layer["mlp_norm.weight"])
            gate = layer["mlp.gate_proj.weight"] @ h
            x = x + layer["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (layer["mlp.up_proj.weight"] @ h))
        logits.append(w["lm_head.weight"] @ norm(x, w["model.norm.weight"]))
    return torch.stack(logits)


def test_logits_are_the_papers_equations(tiny, tokens):
    model, ids = tiny(), tokens(70)
    expected = gla_by_hand(model.state_dict(), model.config, ids)
    torch.testing.assert_close(model(ids[None]).logits[0], expected)


@pytest.mark.parametrize(
    "shape, tied, millions",
    [
        ({"hidden_size": 1024}, False, 374.5),
        ({"hidden_size": 1024}, True, 341.7),
        ({"hidden_size": 2048, "intermediate_size": 5632}, False, 1365.5),
    ],
)
def test_preset_sizes(shape, tied, millions):
    with torch.device("meta"):
        model = GLALMForCausalLM(GLALMConfig(**shape, tie_word_embeddings=tied))
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_parameter_names_are_the_published_ones(tiny):
    d, key, value = 32, 16, 32
    block = {
        "attn_norm.weight": (d,),
        "mlp_norm.weight": (d,),
        "attn.q_proj.weight": (key, d),
        "attn.k_proj.weight": (key, d),
        "attn.v_proj.weight": (value, d),
        "attn.g_proj.weight": (value, d),
        "attn.o_proj.weight": (d, value),
        "attn.gk_proj.0.weight": (16, d),
        "attn.gk_proj.1.weight": (key, 16),
        "attn.gk_proj.1.bias": (key,),
        "attn.g_norm_swish_gate.weight": (value // 2,),
        "mlp.gate_proj.weight": (48, d),
        "mlp.up_proj.weight": (48, d),
        "mlp.down_proj.weight": (d, 48),
    }
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {"model.embeddings.weight": (50, d), "model.norm.weight": (d,), "lm_head.weight": (50, d)}
    assert {name: tuple(t.shape) for name, t in tiny().state_dict().items()} == expected


def test_initial_weights():
    model = GLALMForCausalLM(GLALMConfig(hidden_size=256, num_hidden_layers=1, vocab_size=1000))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name


def test_loss_is_the_cross_entropy_of_the_logits_in_both_label_conventions(tiny, tokens):
    model, ids = tiny(), tokens(3, 20)
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 50), ids[:, 1:].reshape(-1))
    out = model.train()(ids, labels=ids)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected.float())
    out = model.eval()(ids[:, :-1], shift_labels=ids[:, 1:])
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected.float())
    out = model(ids, labels=ids)
    torch.testing.assert_close((out.loss, out.logits), (expected.float(), logits))


def test_a_batch_without_labels_adds_nothing(tiny, tokens):
    model, ids = tiny(), tokens(2, 12)
    model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(0)).loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("mixer", ["gla", "attention", "mamba2"])
def test_any_mask_value_but_zero_is_one(mixer, tiny, tokens):
    """transformers accepts masks that number segments, and float masks."""
    model, ids = tiny(mixer=mixer, mamba2={"state_size": 16, "head_dim": 8}), tokens(2, 12)
    mask = torch.tensor([[0] * 3 + [1] * 9, [0] * 5 + [1] * 7])
    expected = model(ids, attention_mask=mask).logits
    for other in (3 * mask, -mask, mask * torch.arange(1, 13), mask.float() / 2):
        assert torch.equal(model(ids, attention_mask=other).logits, expected)


def test_a_head_that_is_not_a_plain_linear_layer_is_called(tiny, tokens):
    """peft puts an adapter in its place. Losses and scores then come from the logits."""
    model, ids = tiny(), tokens(2, 12)
    weight, targets = model.lm_head.weight, ids.roll(-1, 1)
    model.lm_head = nn.Sequential(model.lm_head, nn.Identity())
    model.lm_head[1].forward = lambda logits: logits + 0.1 * (logits @ torch.eye(50, dtype=torch.float64).roll(1, 0))
    logits, z = model(ids).logits, 0.3
    out = model.train()(ids, shift_labels=targets, z_loss=z)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + z * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert weight.grad.norm() > 0
    losses, _ = model.score(ids, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits.mT, targets, reduction="none"))


def test_a_cache_is_returned_where_it_is_used(tiny, tokens):
    """As in transformers: by default in eval mode, in training only when asked for."""
    model, ids = tiny(), tokens(2, 9)
    assert model(ids).past_key_values.seen == 9 and model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None and model(ids, use_cache=True).past_key_values.seen == 9


def test_scores_carry_the_state(tiny, tokens):
    model, ids = tiny(), tokens(2, 65)
    logits = model(ids[:, :-1]).logits
    expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").float()
    cache, losses = None, []
    for a in range(0, 64, 16):
        loss, cache = model.score(ids[:, a : a + 16], ids[:, a + 1 : a + 17], cache)
        losses.append(loss)
    torch.testing.assert_close(torch.cat(losses, 1), expected)


def generate_greedily(model: GLALMForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_generation_from_the_state_equals_generation_from_all_tokens(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    expected = generate_greedily(model, ids, 12)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)


def test_generation_continues_a_cache(tiny, tokens):
    model, ids = tiny(), tokens(1, 30)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    cache = model(ids[:, :25], use_cache=True).past_key_values
    expected = generate_greedily(model, ids, 8)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)


def test_beam_search_reorders_states(tiny, tokens):
    model, ids = tiny(), tokens(2, 6)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with_state = model.generate(ids, **settings)
    assert torch.equal(with_state, model.generate(ids, use_cache=False, **settings))
    cache = StateCache([torch.arange(3.0)[:, None]], 5)
    assert cache.reorder_cache(torch.tensor([2, 0, 0])).states[0][:, 0].tolist() == [2, 0, 0]


def test_saved_and_loaded(tiny, tokens, tmp_path):
    model, ids = tiny(tie_word_embeddings=True), tokens(1, 10)
    model.save_pretrained(tmp_path)
    loaded = GLALMForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight


def test_defaults_equal_those_of_model_config():
    # Only a run, which knows its data, may leave the vocabulary open.
    expected, config = ModelConfig(vocab_size=32000), GLALMConfig()
    for f in dataclasses.fields(ModelConfig):
        assert getattr(config, f.name) == getattr(expected, f.name), f.name


IDS = torch.ones(2, 5, dtype=torch.int64)


def build_cache(tiny) -> StateCache:
    return tiny()(IDS[:1], use_cache=True).past_key_values


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda tiny: GLALMConfig(num_heads=3, hidden_size=64), "model.num_heads=3 does not divide"),
        (lambda tiny: tiny(mixer="glaa"), "model.mixer='glaa' is none of the mixers: gla"),
        (lambda tiny: tiny()(), "give either input_ids or inputs_embeds"),
        (lambda tiny: tiny()(torch.ones(5).long()), r"expected input_ids \[B, T\] or inputs_embeds.*got \[5\]"),
        (
            lambda tiny: tiny()(torch.ones(2, 5).long(), attention_mask=torch.ones(2, 4)),
            r"attention_mask: expected \[B, T\] with B = 2 and T >= 5, as the input is, got \[2, 4\]",
        ),
        (lambda tiny: tiny()(IDS, labels=IDS.view(5, 2)), r"^labels: expected \[2, 5\], as the input is, got \[5, 2\]"),
        (lambda tiny: tiny()(IDS, shift_labels=IDS[:, :4]), r"^shift_labels: expected \[2, 5\]"),
        (lambda tiny: tiny()(IDS, position_ids=IDS[:, :4]), r"position_ids: expected a tensor of 5 .*, got \[2, 4\]"),
        (lambda tiny: tiny()(IDS[:1], cu_seqlens=[0, 2, 5]), "cu_seqlens: expected a tensor, got a list"),
        (lambda tiny: tiny()(IDS, logits_to_keep=-2), "logits_to_keep: expected .*, got -2"),
        (lambda tiny: tiny()(IDS, past_key_values=build_cache(tiny)), "states of 1 sequences, and the input 2"),
        (
            lambda tiny: tiny(num_hidden_layers=3)(IDS[:1], past_key_values=build_cache(tiny)),
            "states of 2 layers, and the model 3 layers",
        ),
        (
            lambda tiny: tiny(gla={"short_conv": 4})(IDS[:1], past_key_values=build_cache(tiny)),
            r"the state is of a mixer with other options: .* is another model's",
        ),
    ],
)
def test_bad_input(call, message, tiny):
    with pytest.raises(ValueError, match=message):
        call(tiny)
