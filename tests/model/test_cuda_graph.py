"""CudaGraphGenerator against transformers' generation loop, in float64: the same tokens. On GPUs: with graphs."""

import pytest
import torch
from choices import every_choice
from prompts import GREEDY, SAMPLED, left_padded

from glalm.generation import cuda_graph
from glalm.generation.cuda_graph import CudaGraphGenerator


@every_choice
def test_continues_as_transformers_does(choice, tiny, tokens):
    model = tiny(**choice)
    decoder = CudaGraphGenerator(model, prefill_chunk=10)
    for lengths in ((9, 9), (3, 12), (7,)):  # The second call reuses the states of the first.
        inputs = left_padded(*(tokens(n, seed=n) for n in lengths))
        expected = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, custom_generate=decoder, **GREEDY), expected)


def test_draws_the_same(tiny, tokens):
    model, inputs = tiny(), left_padded(tokens(5), tokens(9))
    found = []
    for options in ({}, {"custom_generate": CudaGraphGenerator(model)}):
        torch.manual_seed(0)
        found.append(model.generate(**inputs, repetition_penalty=1.3, **options, **SAMPLED))
    assert torch.equal(*found)


def test_logits_processors_see_the_generated_tokens(tiny, tokens):
    model, inputs = tiny(), left_padded(tokens(5), tokens(9))
    settings = GREEDY | {"max_new_tokens": 30}
    free, expected = (model.generate(**inputs, **settings, no_repeat_ngram_size=n)[:, 9:] for n in (0, 1))
    assert any(len(row.unique()) < 30 for row in free) and all(len(row.unique()) == 30 for row in expected)
    found = model.generate(**inputs, **settings, no_repeat_ngram_size=1, custom_generate=CudaGraphGenerator(model))
    assert torch.equal(found[:, 9:], expected)


def test_a_cache_is_continued_and_not_changed(tiny, tokens):
    model, ids = tiny(), tokens(2, 20)
    cache = model(ids[:, :19], use_cache=True).past_key_values
    before = [S.clone() for S in cache.states]
    found = model.generate(ids, past_key_values=cache, custom_generate=CudaGraphGenerator(model), **GREEDY)
    assert torch.equal(found, model.generate(ids, **GREEDY))
    assert all(torch.equal(a, b) for a, b in zip(before, cache.states, strict=True))
    with pytest.raises(ValueError, match="past_key_values has seen 19 tokens"):
        model.generate(ids[:, :19], past_key_values=cache, custom_generate=CudaGraphGenerator(model), **GREEDY)


@pytest.mark.parametrize("check", [1, 3, 16])
def test_rows_that_ended_are_padded_and_cut(tiny, tokens, monkeypatch, check):
    monkeypatch.setattr(cuda_graph, "STOP_CHECK_INTERVAL", check)
    model, ids = tiny(), tokens(3, 9)
    free = model.generate(ids, **GREEDY)[:, 9:]
    ends = free[[0, 1, 2], [0, 2, 4]].tolist()
    settings = GREEDY | {"eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 12}
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **settings)
    assert expected.shape[1] < 21 and expected[0, 10:].tolist() == [0] * (expected.shape[1] - 10)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, custom_generate=CudaGraphGenerator(model), **settings), expected
    )


def test_a_recurrent_step_keeps_its_buffers(tiny, tokens):
    model = tiny(gla={"short_conv": 4})
    decoder = CudaGraphGenerator(model)
    model.generate(tokens(2, 9), custom_generate=decoder, **GREEDY)
    addresses = [x.data_ptr() for state in decoder.step.states for x in state]
    model.generate(tokens(2, 30), custom_generate=decoder, **GREEDY)
    assert [x.data_ptr() for state in decoder.step.states for x in state] == addresses
    assert not decoder.step.state_grows


def test_a_step_is_captured_again_if_a_fixed_value_changed(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    decoder = CudaGraphGenerator(model)

    def step():
        model.generate(ids, custom_generate=decoder, **GREEDY)
        return decoder.step

    first = step()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert step() is first
    with torch.autocast("cpu", torch.bfloat16):
        cast = step()
        assert cast is not first and step() is cast
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert step() is not cast


def test_a_step_from_inference_mode_works_outside(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    decoder = CudaGraphGenerator(model)
    with torch.inference_mode():
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, custom_generate=decoder, **GREEDY), expected)
    assert torch.equal(model.generate(ids, custom_generate=decoder, **GREEDY), expected)


def test_steps_cache_no_cast_copies_of_the_weights(tiny, tokens):
    """A graph captured with the copies of autocast's cache would read freed memory once autocast ends."""
    model, ids = tiny().float(), tokens(1, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = cuda_graph.prefill_prompt(model, ids, None, None, 99)[1]
        before = CudaGraphGenerator(model).start_step(cache)(ids[:, :1])
        model.lm_head.weight.mul_(2)
        assert torch.equal(CudaGraphGenerator(model).start_step(cache)(ids[:, :1]), 2 * before)


def test_unsupported_settings_are_refused(tiny, tokens):
    model, ids = tiny(), tokens(1, 9)
    for option in ({"num_beams": 2}, {"return_dict_in_generate": True}, {"use_cache": False}):
        with pytest.raises(ValueError, match=next(iter(option))):
            model.generate(ids, custom_generate=CudaGraphGenerator(model), **GREEDY | option)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(
            inputs_embeds=torch.zeros(1, 9, 32).double(), custom_generate=CudaGraphGenerator(model), **GREEDY
        )
    with pytest.raises(ValueError, match="cu_seqlens: CudaGraphGenerator reads whole sequences"):
        model.generate(ids, cu_seqlens=torch.tensor([0, 4, 9]), custom_generate=CudaGraphGenerator(model), **GREEDY)
    with pytest.raises(ValueError, match="made for another model"):
        model.generate(ids, custom_generate=CudaGraphGenerator(tiny(seed=1)), **GREEDY)
    with pytest.raises(ValueError, match="prefill_chunk"):
        CudaGraphGenerator(model, prefill_chunk=0)


@pytest.mark.gpu
@every_choice
def test_captured_steps_compute_what_plain_ones_do(choice, tiny, tokens):
    """Logits of every step, bf16 weights; and float32, where the tokens have to be the same too."""
    model = tiny(**({"hidden_size": 128} | choice)).float().cuda()
    decoder, inputs = CudaGraphGenerator(model), {n: x.cuda() for n, x in left_padded(tokens(70), tokens(40)).items()}
    settings = GREEDY | {"max_new_tokens": 20}
    expected = model.generate(**inputs, **settings)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, custom_generate=decoder, **settings), expected)
    assert (decoder.step.graph is None) == decoder.step.state_grows
    model.bfloat16()
    _, cache = cuda_graph.prefill_prompt(model, inputs["input_ids"], None, None, 64)
    step = CudaGraphGenerator(model).start_step(cache)
    for t in range(5):
        out = model(tokens(2, 1, seed=t).cuda(), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(step(tokens(2, 1, seed=t).cuda()), out.logits[:, -1], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_process_captures_on_one_gpu_after_another(tiny, tokens):
    for device in ("cuda:1", "cuda:0"):
        model, ids = tiny(hidden_size=128).float().to(device), tokens(2, 9).to(device)
        decoder = CudaGraphGenerator(model)
        found = model.generate(ids, custom_generate=decoder, **GREEDY)
        assert torch.equal(found, model.generate(ids, **GREEDY)) and decoder.step.graph is not None
