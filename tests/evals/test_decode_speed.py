import json

import pytest
import torch
from tiny import llama

from glalm.config.strict import ConfigError
from glalm.evals import decode_speed
from glalm.evals.eval_model import EvalModel, count_state_bytes
from glalm.evals.evaluator import EvalContext
from glalm.evals.options import DecodeSpeedConfig, EvalConfig
from glalm.hf import GLALMConfig, GLALMForCausalLM

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}


def rows(mixer: str) -> list[dict]:
    torch.manual_seed(0)
    eval_model = EvalModel(GLALMForCausalLM(GLALMConfig(**SHAPE, mixer=mixer)).eval(), train_length=8)
    config = EvalConfig(batch_size=3, decode_speed=DecodeSpeedConfig(lengths=[40, 8], steps=2, repeats=3))
    results = decode_speed.DecodeSpeedEvaluator(eval_model, config).run(EvalContext())
    json.dumps(results, allow_nan=False)
    return results["lengths"]


def test_a_recurrent_state_has_one_size_and_attentions_grows():
    gla, attention = rows("gla"), rows("attention")
    heads, K, V = 2, 8, 16
    assert [r["state_bytes"] for r in gla] == [2 * 3 * heads * K * V * 4] * 2  # 2 layers, 3 sequences, float32
    at_8, at_40 = (r["state_bytes"] for r in attention)
    keys_and_values = 2 * 2 * 3 * 32 * 4
    positions = 2 * 3 * 8
    assert at_8 == 8 * (keys_and_values + positions) + positions
    assert at_40 == 40 * (keys_and_values + positions) + positions
    for r in gla + attention:
        assert r["slowest"] <= r["tokens_per_second"] <= r["fastest"] and r["batch_size"] == 3
    assert [r["length"] for r in gla] == [8, 40]


def test_bf16_steps_with_weights_of_bf16(model, monkeypatch):
    """And no autocast, which would cast float32 ones at every step."""
    decoding, make_greedy_step = [], decode_speed.make_greedy_step

    def seen(eval_model, state):
        decoding.append((eval_model.causal_lm.dtype, torch.is_autocast_enabled("cpu")))
        return make_greedy_step(eval_model, state)

    monkeypatch.setattr(decode_speed, "make_greedy_step", seen)
    config = EvalConfig(batch_size=3, decode_speed=DecodeSpeedConfig(lengths=[8], steps=2, repeats=1))
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        eval_model = EvalModel(model, train_length=8, precision=precision)
        with eval_model.autocast():
            decode_speed.DecodeSpeedEvaluator(eval_model, config).run(EvalContext())
        assert decoding.pop() == (dtype, False)
        assert model.dtype == torch.float32


def test_a_transformers_cache_is_counted():
    eval_model = EvalModel(llama())
    _, state = eval_model.forward_features(torch.zeros(3, 10, dtype=torch.int64), return_state=True)
    assert count_state_bytes(state) == 2 * 2 * 3 * 2 * 10 * 8 * 4  # layers, keys and values, B, heads, T, D


@torch.no_grad()
@pytest.mark.parametrize("make", [None, lambda: llama(vocab_size=64)], ids=["ours", "transformers'"])
def test_every_step_goes_on_from_the_one_before(model, make):
    model = make() if make else model
    eval_model = EvalModel(model)
    text = torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(0))
    _, state = eval_model.forward_features(text[:, :-1], return_state=True)
    last = decode_speed.decode_tokens(decode_speed.make_greedy_step(eval_model, state), text[:, -1:], 5)
    ids = text
    for _ in range(5):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(last, ids[:, -1:])


def test_progress_is_that_of_the_only_process_that_works(model):
    config = EvalConfig(batch_size=2, decode_speed=DecodeSpeedConfig(lengths=[8, 12], steps=1, repeats=1))
    evaluator = decode_speed.DecodeSpeedEvaluator(EvalModel(model), config)
    context, done = EvalContext(), []
    context.world_size = 2
    context.advance = lambda units: done.append(units * context.groups)  # as the progress bar counts
    evaluator.run(context)
    assert sum(done) == evaluator.total_units


def test_settings_that_cannot_be(model):
    with pytest.raises(ConfigError, match=r"decode_speed\.lengths must be positive"):
        DecodeSpeedConfig(lengths=[0])
    with pytest.raises(ConfigError, match="learned positions for 50"):
        decode_speed.DecodeSpeedEvaluator(EvalModel(model, train_length=8, max_length=50), EvalConfig())
