"""Generation through transformers, for every mixer, in float64, where equal results give the same tokens."""

import pytest
import torch
import transformers
from choices import every_choice
from prompts import GREEDY, SAMPLED, left_padded
from safetensors.torch import save_file
from transformers.generation.streamers import BaseStreamer

from glalm.generation.cuda_graph import CudaGraphGenerator
from glalm.model.cache import StateCache


def sample(model, seed: int = 0, **inputs) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(**inputs, **SAMPLED)


@every_choice
def test_batched_prompts_of_unequal_length_continue_as_alone(choice, tiny, tokens):
    model, prompts = tiny(**choice), [tokens(n, seed=n) for n in (3, 12, 6)]
    batch = model.generate(**left_padded(*prompts), **GREEDY)[:, 12:]
    alone = torch.cat([model.generate(p[None], **GREEDY)[:, len(p) :] for p in prompts])
    assert torch.equal(batch, alone)
    # The test would prove nothing if all prompts had the same continuation.
    assert len({tuple(row.tolist()) for row in alone}) == 3


@every_choice
def test_a_saved_state_is_loaded_and_continued(choice, tiny, tokens, tmp_path):
    model, ids = tiny(**choice), tokens(2, 20)
    expected = model.generate(ids, **GREEDY)
    cache = model(ids[:, :15], use_cache=True).past_key_values
    cache.save(tmp_path / "state.safetensors")
    loaded = StateCache.load(tmp_path / "state.safetensors")
    assert loaded.seen == 15
    torch.testing.assert_close(loaded.states, cache.states, rtol=0, atol=0)
    assert torch.equal(model.generate(ids, past_key_values=loaded, **GREEDY), expected)


@every_choice
def test_a_prefix_is_read_once_for_many_continuations(choice, tiny, tokens):
    model, prefix = tiny(**choice), tokens(1, 30)
    cache = model(prefix, use_cache=True).past_key_values
    for seed in range(2):
        ids = torch.cat([prefix, tokens(1, 4, seed=seed)], 1)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))
    assert cache.seen == 30


def test_a_prompt_may_be_embeddings(tiny, tokens):
    model, inputs = tiny(layers="gla+attention"), left_padded(tokens(9), tokens(5, seed=2))
    ids, mask = inputs.values()
    given = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    for beams in (1, 3):
        settings = GREEDY | {"pad_token_id": 0, "num_beams": beams}
        assert torch.equal(model.generate(**given, **settings), model.generate(**inputs, **settings)[:, 9:])


def test_hidden_states_come_with_every_token(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    out = model.generate(ids, return_dict_in_generate=True, output_hidden_states=True, **GREEDY)
    last = model(out.sequences[:, :-1]).logits[:, 8:]
    found = torch.cat([step[-1][:, -1:] for step in out.hidden_states], 1)
    torch.testing.assert_close(model.lm_head(found), last)
    with pytest.raises(TypeError, match="gives no attention weights"):
        model.generate(ids, return_dict_in_generate=True, output_attentions=True, **GREEDY)


def test_learned_prompts(tiny, tokens):
    peft = pytest.importorskip("peft")
    model, ids = tiny(layers="gla+attention").float(), tokens(2, 9)
    config = {"num_virtual_tokens": 4, "token_dim": 32, "num_layers": 2, "num_attention_heads": 2}
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", **config)).eval()
    expected = ids
    for _ in range(5):
        x = torch.cat([tuned.get_prompt(2), model.get_input_embeddings()(expected)], 1)
        expected = torch.cat([expected, model(inputs_embeds=x).logits[:, -1:].argmax(-1)], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    found = tuned.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found[1], expected[1])


@every_choice
def test_sampling_draws_the_same_from_the_state_as_from_all_tokens(choice, tiny, tokens):
    model, ids = tiny(**choice), tokens(3, 9)
    with_state = sample(model, input_ids=ids)
    torch.manual_seed(0)
    assert torch.equal(with_state, model.generate(ids, use_cache=False, **SAMPLED))
    assert not torch.equal(with_state, sample(model, seed=1, input_ids=ids))


def test_the_prompt_may_be_read_in_chunks(tiny, tokens):
    model, ids = tiny(layers="gla+attention"), tokens(2, 21)
    cache = model(ids[:, :2], use_cache=True).past_key_values
    try:
        chunked = model.generate(ids, past_key_values=cache, prefill_chunk_size=8, **GREEDY)
    except ValueError as error:
        assert "Update transformers" in str(error) and transformers.__version__ < "5.23"
    else:
        assert torch.equal(chunked, model.generate(ids, **GREEDY))


def test_a_padded_prompt_is_read_in_chunks_from_its_start(tiny, tokens):
    model, prompts = tiny(layers="gla+attention", gla={"short_conv": 4}), left_padded(tokens(13), tokens(2, seed=2))
    for settings in (GREEDY, GREEDY | {"num_beams": 2}):
        whole = model.generate(**prompts, **settings)
        for size in (1, 5, 20):
            assert torch.equal(model.generate(**prompts, prefill_chunk_size=size, **settings), whole)


def test_a_state_that_has_seen_everything_is_refused(tiny, tokens):
    model, ids = tiny(), tokens(1, 9)
    cache = model(ids, use_cache=True).past_key_values
    for T in (9, 6):
        with pytest.raises(ValueError, match=f"past_key_values has seen 9 tokens and input_ids, .* has {T}, so"):
            model.generate(ids[:, :T], past_key_values=cache, **GREEDY)


def test_an_empty_cache_changes_nothing(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    for decoder in ({}, {"custom_generate": CudaGraphGenerator(model)}):
        assert torch.equal(
            model.generate(ids, past_key_values=StateCache(), **GREEDY, **decoder), model.generate(ids, **GREEDY)
        )


def test_a_generated_state_is_continued(tiny, tokens):
    model, ids = tiny(), tokens(1, 9)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, model.generate(ids, **GREEDY | {"max_new_tokens": 10}))


def test_a_row_that_ended_is_padded(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    free = model.generate(ids, **GREEDY)[:, 9:]
    eos = int(free[0, 2])
    end = free[0].tolist().index(eos) + 1
    ended = model.generate(ids, **GREEDY | {"eos_token_id": eos, "pad_token_id": 0})[0, 9:]
    assert torch.equal(ended[:end], free[0, :end]) and ended[end:].eq(0).all()


def test_several_sequences_of_one_prompt(tiny, tokens):
    model, ids = tiny(), tokens(1, 9)
    several = sample(model, input_ids=ids.repeat(3, 1))
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, num_return_sequences=3, **SAMPLED), several)


class CollectingStreamer(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def test_streaming(tiny, tokens):
    model, ids, streamer = tiny(), tokens(1, 9), CollectingStreamer()
    whole = model.generate(ids, streamer=streamer, **GREEDY)
    assert streamer.tokens == [*whole[0].tolist(), "end"]


def test_assisted_generation_is_refused(tiny, tokens):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        tiny().generate(tokens(1, 9), assistant_model=tiny(seed=1), **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        tiny().generate(tokens(1, 9), prompt_lookup_num_tokens=2, **GREEDY)


def test_a_file_that_is_no_saved_state_is_named(tiny, tokens, tmp_path):
    tiny()(tokens(1, 9), use_cache=True).past_key_values.save(tmp_path / "state")
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:-50])
    with pytest.raises(ValueError, match="cut: damaged"):
        StateCache.load(tmp_path / "cut")
    save_file({"0": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other: not a state that"):
        StateCache.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        StateCache.load(tmp_path / "missing")
