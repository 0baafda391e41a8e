"""What every mixer must do, for every row of CHOICES, in float64, where equal results agree to 7 digits."""

import dataclasses
import statistics

import pytest
import torch
import torch.nn.functional as F
from choices import CHOICES, EXACT, every_choice
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.hf import GLALMForCausalLM
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.model.mixers import MIXERS
from glalm.model.mixers.base import mix_tokens


def test_every_mixer_is_here():
    named = {c.get("mixer", "gla") for c in CHOICES.values() if "layers" not in c}
    assert named == set(MIXERS)


@every_choice
@torch.no_grad()
def test_segments_and_steps_with_carried_state_equal_one_pass(choice, tiny, tokens):
    model, ids = tiny(**choice), tokens(2, 75)
    whole = model(ids).logits
    cache, parts = None, []
    for a, b in [(0, 37), (37, 38), (38, 70), *((t, t + 1) for t in range(70, 75))]:
        before = cache and torch.utils._pytree.tree_map(torch.clone, cache.states)
        out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
        if cache is not None:  # A forward pass does not change its cache.
            torch.testing.assert_close(cache.states, before, rtol=0, atol=0)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    assert cache.seen == 75
    with torch.enable_grad():  # With gradients the chunkwise operator runs instead of the recurrent one.
        step = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(model(torch.cat([ids, ids[:, -1:]], 1)).logits[:, -1:], step, **EXACT)


@every_choice
@torch.no_grad()
def test_a_state_holds_no_more_memory_than_its_numbers(choice, tiny, tokens):
    cache = tiny(**choice)(tokens(2, 70), use_cache=True).past_key_values
    for x in torch.utils._pytree.tree_leaves(cache.states):
        assert x.untyped_storage().nbytes() <= x.nbytes, x.shape


@every_choice
@torch.no_grad()
def test_an_empty_input_does_not_change_the_state(choice, tiny, tokens):
    model, ids, bounds = tiny(**choice), tokens(2, 9), torch.zeros(3, dtype=torch.int64)
    filled = model(ids, use_cache=True).past_key_values
    for past, expected in ((None, model(ids).logits), (filled, model(ids, past_key_values=filled).logits)):
        for empty in ({"input_ids": ids[:, :0]}, {"input_ids": ids[:1, :0], "cu_seqlens": bounds}):
            out = model(**empty, past_key_values=past, use_cache=True)
            assert out.logits.shape == (*empty["input_ids"].shape, 50)
            torch.testing.assert_close(model(ids, past_key_values=out.past_key_values).logits, expected, **EXACT)


@every_choice
@torch.no_grad()
def test_a_state_may_have_another_dtype_than_the_weights(choice, tiny, tokens):
    model, ids = tiny(**choice).float(), tokens(2, 40)
    exact = model(ids).logits[:, 30:]
    cache = model(ids[:, :30], use_cache=True).past_key_values
    logits = model.bfloat16()(ids[:, 30:], past_key_values=cache).logits.float()
    assert (logits - exact).square().mean().sqrt() < 0.1 * exact.std()


@every_choice
def test_no_token_sees_the_future(choice, tiny, tokens):
    model, ids = tiny(**choice), tokens(1, 70)
    changed = torch.cat([ids[:, :40], tokens(1, 30, seed=5)], 1)
    torch.testing.assert_close(model(changed).logits[:, :40], model(ids).logits[:, :40], **EXACT)


@every_choice
def test_packed_sequences_equal_separate_ones(choice, tiny, tokens):
    model, ids = tiny(**choice), tokens(1, 60)
    bounds, pieces = torch.tensor([0, 1, 24, 24, 60]), [(0, 1), (1, 24), (24, 60)]
    packed = model(ids, cu_seqlens=bounds, use_cache=False).logits[0]
    apart = [model(ids[:, a:b], use_cache=True) for a, b in pieces]
    torch.testing.assert_close(packed, torch.cat([out.logits[0] for out in apart]), **EXACT)
    as_int32 = model(ids, cu_seqlens=bounds.int(), use_cache=False).logits[0]
    torch.testing.assert_close(as_int32, packed, **EXACT)

    states = model(ids, cu_seqlens=bounds, use_cache=True).past_key_values
    bounds, pieces = torch.tensor([0, 9, 10, 15, 30]).int(), [(0, 9), (9, 10), (10, 15), (15, 30)]
    more = tokens(1, 30, seed=3)
    packed = model(more, cu_seqlens=bounds, past_key_values=states, use_cache=True).logits[0]
    first, second, fourth = (out.past_key_values for out in apart)
    each = [
        model(more[:, a:b], past_key_values=cache).logits[0]
        for cache, (a, b) in zip([first, second, None, fourth], pieces, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(each), **EXACT)


@every_choice
def test_padding_on_the_left_is_ignored(choice, tiny, tokens):
    model, short, long = tiny(**choice), tokens(5), tokens(12, seed=2)
    batch = torch.stack([F.pad(short, (7, 0), value=3), long])
    mask = torch.tensor([[0] * 7 + [1] * 5, [1] * 12])
    out = model(batch, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(out.logits[0, 7:], model(short[None]).logits[0], **EXACT)
    torch.testing.assert_close(out.logits[1], model(long[None]).logits[0], **EXACT)
    out.logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        step = model(tokens(2, 1), past_key_values=out.past_key_values, use_cache=True).logits[0]
    torch.testing.assert_close(step, model(torch.cat([short, tokens(2, 1)[0]])[None]).logits[0, -1:], **EXACT)


@every_choice
@torch.no_grad()
def test_padding_between_a_state_and_its_tokens_is_ignored(choice, tiny, tokens):
    """Rows of a batch are continued by different numbers of tokens, or by none."""
    model, past, more, last = tiny(**choice), tokens(3, 9), tokens(3, 5, seed=2), tokens(3, 2, seed=3)
    before = model(past, use_cache=True).past_key_values
    for T, counts in ((5, [2, 5, 0]), (1, [1, 0, 1])):
        mask = torch.arange(T) >= T - torch.tensor(counts)[:, None]
        out = model(more[:, :T], attention_mask=mask, past_key_values=before, use_cache=True)
        after = model(last, past_key_values=out.past_key_values).logits
        for row, count in enumerate(counts):
            text = torch.cat([past[row], more[row, T - count : T], last[row]])
            expected = model(text[None]).logits[0]
            torch.testing.assert_close(out.logits[row, T - count :], expected[9 : 9 + count], **EXACT)
            torch.testing.assert_close(after[row], expected[-2:], **EXACT)


@settings(max_examples=12)
@given(data=st.data(), is_packed=st.booleans())
@torch.no_grad()
def test_only_tokens_continue_a_state(data, is_packed):
    """Padding may be anywhere, in a batch or in packed sequences."""
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=12, max_size=12), "mask")).view(3, 4)
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    config = ModelConfig(mixer="mamba2", hidden_size=16, mamba2={"state_size": 4, "head_dim": 8}, vocab_size=8)
    mixer = CausalLM(config).double().model.layers[0].attn
    _, state = mixer(torch.randn(3, 6, 16, dtype=torch.float64), return_state=True)
    rows, bounds = (x.view(1, 12, 16), torch.tensor([0, 4, 8, 12])) if is_packed else (x, None)
    padding = mask.view(*rows.shape[:2], 1)
    y, after = mix_tokens(mixer, rows, padding, state=state, return_state=True, cu_seqlens=bounds)
    for i in range(3):
        past = torch.utils._pytree.tree_map(lambda old, i=i: old[i : i + 1], state)
        expected, end = mixer(x[i, mask[i]][None], state=past, return_state=True)
        torch.testing.assert_close(y.view(3, 4, 16)[i, mask[i]], expected[0])
        torch.testing.assert_close(torch.utils._pytree.tree_map(lambda new, i=i: new[i : i + 1], after), end)


@every_choice
def test_generation_and_beams_from_the_state_equal_those_from_all_tokens(choice, tiny, tokens):
    model = tiny(**choice)
    for ids, beams in ((tokens(2, 9), 1), (tokens(1, 6), 3)):
        settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        expected = model.generate(ids, use_cache=False, **settings)
        assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.slow
@every_choice
def test_compiled_without_a_graph_break(choice, tiny, tokens):
    torch._dynamo.reset()
    block, x = tiny(**choice).model.layers[-1], torch.randn(2, 20, 32, dtype=torch.float64, requires_grad=True)
    expected, _ = block(x)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x)[0], expected, **EXACT)
    grads = [
        torch.autograd.grad((f(x)[0] ** 2).sum(), x)[0] for f in (block, torch.compile(block, backend="aot_eager"))
    ]
    torch.testing.assert_close(*grads, **EXACT)


@every_choice
def test_shapes_are_known_without_values(choice, tiny, tokens):
    model, ids = tiny(**choice).to("meta"), tokens(2, 9).to("meta")
    out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert out.logits.shape == (2, 9, 50) and all(p.grad.shape == p.shape for p in model.parameters())
    with torch.no_grad():
        out = model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert out.logits.shape == (2, 1, 50) and out.past_key_values.seen == 10


@every_choice
def test_decreasing_or_incomplete_bounds_are_refused(choice, tiny, tokens):
    model, ids = tiny(**choice), tokens(1, 30)
    for bounds in ([0, 10], [0, 20, 10, 30], [5, 30]):
        with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing bounds from 0 to T = 30"):
            model(ids, cu_seqlens=torch.tensor(bounds), use_cache=False)


@every_choice
def test_packed_sequences_compile_too(choice, tiny):
    torch._dynamo.reset()
    block, x = tiny(**choice).model.layers[-1], torch.randn(1, 20, 32, dtype=torch.float64)
    bounds = torch.tensor([0, 1, 7, 7, 20])
    compiled, _ = torch.compile(block, backend="eager", fullgraph=True)(x, cu_seqlens=bounds)
    torch.testing.assert_close(compiled, block(x, cu_seqlens=bounds)[0], **EXACT)


@every_choice
def test_every_parameter_learns(choice, tiny, tokens):
    model, ids = tiny(**choice).train(), tokens(2, 30)
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@every_choice
@pytest.mark.parametrize("T", range(4))
def test_the_shortest_inputs_give_every_parameter_a_gradient(choice, T, tiny, tokens):
    """In float32 as in float64, in a batch and packed; without tokens, the gradients are 0."""
    model, ids = tiny(**choice), tokens(2, T)

    def gradient(model: GLALMForCausalLM) -> torch.Tensor:
        model.zero_grad()
        batch = model(ids).logits
        packed = model(ids.view(1, -1), cu_seqlens=torch.tensor([0, T, 2 * T]), use_cache=False).logits
        (batch.square().sum() + packed.sin().sum()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    exact = gradient(model)
    assert exact.norm() == 0 if T == 0 else exact.norm() > 0
    assert (gradient(model.float()) - exact).norm() <= 1e-3 * exact.norm()


@every_choice
def test_saved_and_loaded(choice, tiny, tokens, tmp_path):
    model, ids = tiny(**choice), tokens(1, 10)
    model.save_pretrained(tmp_path)
    loaded = GLALMForCausalLM.from_pretrained(tmp_path).eval()
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    assert [getattr(loaded.config, f) for f in fields] == [getattr(model.config, f) for f in fields]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@every_choice
def test_half_precision_weights(choice, tiny, tokens):
    """With bf16 weights, and under autocast, the logits are near those in float64."""
    model, ids = tiny(**choice), tokens(2, 40)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.float()(ids).logits
    for logits in (autocast, model.bfloat16()(ids).logits):
        error = (logits.double() - exact).square().mean().sqrt() / exact.std()
        assert error < 0.1


@pytest.mark.gpu
@every_choice
def test_the_gpu_computes_what_the_cpu_does(choice, tiny, tokens):
    """Compare logits, batched and packed, and gradients, in float32 and under bf16 autocast with flash attention.

    A norm divides by outputs that may nearly cancel, and the gradient of a bias is a sum that may. In such a text the
    last bit of an embedding can change a gradient by more than its size. A wrong kernel is wrong in every text, so
    errors in bf16 are medians over texts.
    """
    model = tiny(**({"hidden_size": 128} | choice)).float()
    texts = [tokens(1, 200, seed=seed) for seed in range(1, 8)]
    bounds = torch.tensor([0, 1, 60, 60, 200])

    def results(device: str, autocast: bool, ids: torch.Tensor) -> list[torch.Tensor]:
        model.to(device).zero_grad()
        x, packing = ids.to(device), bounds.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            whole, packed = model(x).logits, model(x, cu_seqlens=packing, use_cache=False).logits
            (whole.float().square().mean() + packed.float().square().mean()).backward()
        return [y.detach().double().cpu() for y in (whole, packed, *(p.grad for p in model.parameters()))]

    exact = [results("cpu", False, ids) for ids in texts]

    def median_errors(device: str) -> list[float]:
        found = [relative_errors(results(device, True, ids), truth) for ids, truth in zip(texts, exact, strict=True)]
        return [statistics.median(errors) for errors in zip(*found, strict=True)]

    assert max(relative_errors(results("cuda", False, texts[0]), exact[0])) < 1e-2
    for error, rounding in zip(median_errors("cuda"), median_errors("cpu"), strict=True):
        assert error < 2 * rounding + 0.02


def relative_errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((x - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)]
