"""CudaGraphGenerator against transformers' generation loop, in float64: the same tokens. On GPUs: with graphs."""

import weakref

import accelerate
import pytest
import torch
from choices import every_choice
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import GREEDY, SAMPLED, left_padded
from torch import nn

from glalm.generation import cuda_graph
from glalm.generation.captured import describe_value
from glalm.generation.cuda_graph import CudaGraphGenerator
from glalm.hf import GLALMConfig, GLALMForCausalLM


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


class LoRA(nn.Module):
    """A layer with two adapters, of which one is in use, or none."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.active = "a"
        self.scaling = {"a": 1.0, "b": 1.0}
        self.delta = nn.ModuleDict({name: nn.Linear(base.in_features, base.out_features) for name in "ab"})

    def forward(self, x):
        return self.base(x) + (self.scaling[self.active] * self.delta[self.active](x) if self.active else 0)


def adapted(tiny, **config) -> nn.Module:
    model = tiny(**config).float()
    attention = model.model.layers[0].attn
    attention.o_proj = LoRA(attention.o_proj)
    return model


def adapter(model) -> LoRA:
    return next(module for module in model.modules() if isinstance(module, LoRA))


def replace_forward(model):
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: -forward(x)


def replace_head(model):
    head = model.lm_head
    model.lm_head = nn.Linear(head.in_features, head.out_features).to(head.weight)


def change_epsilon(model):
    model.model.layers[1].mlp_norm.eps = 0.5


def swap_layers(model):
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def share_layer(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


MODEL_CHANGES = {
    "forward hook": lambda model: model.model.norm.register_forward_hook(lambda module, args, output: -output),
    "forward pre-hook": lambda model: model.model.norm.register_forward_pre_hook(lambda module, args: (-args[0],)),
    "forward": replace_forward,
    "adapter off": lambda model: setattr(adapter(model), "active", None),
    "other adapter": lambda model: setattr(adapter(model), "active", "b"),
    "adapter scaled": lambda model: adapter(model).scaling.update(a=-2.0),
    "head with a bias": replace_head,
    "attribute": change_epsilon,
    "order of layers": swap_layers,
    "shared layer": share_layer,
    "training": lambda model: model.train(),
    "training of a layer": lambda model: model.model.layers[1].train(),
}
every_change = pytest.mark.parametrize("change", MODEL_CHANGES)


@every_change
def test_a_step_is_made_again_after_a_change_of_the_model(change, tiny, tokens):
    model, ids = adapted(tiny), tokens(2, 9)
    decoder = CudaGraphGenerator(model)
    model.generate(ids, custom_generate=decoder, **GREEDY)
    first = decoder.step
    model.generate(ids, custom_generate=decoder, **GREEDY)
    assert decoder.step is first
    MODEL_CHANGES[change](model)
    found = model.generate(ids, custom_generate=decoder, **GREEDY)
    assert decoder.step is not first
    assert torch.equal(found, model.generate(ids, **GREEDY))


@settings(max_examples=5)
@given(changes=st.lists(st.sampled_from(["none", *MODEL_CHANGES]), min_size=1, max_size=5))
def test_a_step_is_reused_only_if_the_logits_are_the_same(changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 24}
    model = GLALMForCausalLM(GLALMConfig(**shape, initializer_range=0.3)).eval()
    model.model.layers[0].attn.o_proj = LoRA(model.model.layers[0].attn.o_proj)
    model = model.double()
    ids = torch.arange(8).view(2, 4)
    decoder = CudaGraphGenerator(model)
    options = GREEDY | {"max_new_tokens": 3}
    model.generate(ids, custom_generate=decoder, **options)
    for change in changes:
        step = decoder.step
        before = model(ids).logits
        if change != "none":
            MODEL_CHANGES[change](model)
        found = model.generate(ids, custom_generate=decoder, **options)
        assert torch.equal(found, model.generate(ids, **options))
        assert decoder.step is not step or torch.equal(model(ids).logits, before)
        assert decoder.step is step or change != "none"


def test_a_step_follows_the_adapters_of_peft(tiny, tokens):
    peft = pytest.importorskip("peft")
    model, ids = tiny().float(), tokens(2, 9)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=4, init_lora_weights=False)
    adapters = peft.get_peft_model(model, config, adapter_name="a")
    adapters.add_adapter("b", config)
    decoder = CudaGraphGenerator(model)
    steps = []

    def generate() -> torch.Tensor:
        found = model.generate(ids, custom_generate=decoder, **GREEDY)
        assert torch.equal(found, model.generate(ids, **GREEDY))
        steps.append(decoder.step)
        return found

    generate()
    adapters.set_adapter("b")
    generate()
    with adapters.disable_adapter():
        generate()
    adapters.merge_adapter()
    generate()
    assert len(set(map(id, steps))) == len(steps)
    generate()
    assert steps[-1] is steps[-2]


def test_a_graph_is_captured_only_without_hooks_and_on_one_device(tiny):
    model, cpu = tiny(), torch.device("cpu")
    assert cuda_graph.is_capturable(model, cpu)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert not cuda_graph.is_capturable(model, cpu)
    handle.remove()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *args: None)
    assert not cuda_graph.is_capturable(model, cpu)
    handle.remove()
    assert cuda_graph.is_capturable(model, cpu)
    model.model.layers[0].register_buffer("elsewhere", torch.zeros(1, device="meta"))
    assert not cuda_graph.is_capturable(model, cpu)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model_generates(kind, tiny, tokens, tmp_path):
    """Its weights are on the meta device between its calls."""
    model, ids, cpu = tiny(), tokens(2, 9), torch.device("cpu")
    expected = model.generate(ids, **GREEDY)
    model = accelerate.cpu_offload(model, cpu) if kind == "cpu" else accelerate.disk_offload(model, tmp_path, cpu)
    decoder = CudaGraphGenerator(model)
    assert model.lm_head.weight.is_meta
    for _ in range(2):
        assert torch.equal(model.generate(ids, custom_generate=decoder, **GREEDY), expected)


def test_an_offloaded_models_loss_and_scores_are_those_of_its_logits(tiny, tokens):
    model, ids = tiny(), tokens(2, 9)
    expected = model(ids, labels=ids).loss
    each, _ = model.score(ids[:, :-1], ids[:, 1:])
    accelerate.cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(model(ids, labels=ids).loss, expected.detach(), check_dtype=False)
    torch.testing.assert_close(model.score(ids[:, :-1], ids[:, 1:])[0], each, check_dtype=False)


@pytest.mark.gpu
@every_change
def test_a_captured_step_follows_the_model(change, tiny, tokens):
    model, ids = adapted(tiny, hidden_size=128).cuda(), tokens(1, 9).cuda()
    decoder = CudaGraphGenerator(model)
    assert torch.equal(model.generate(ids, custom_generate=decoder, **GREEDY), model.generate(ids, **GREEDY))
    assert decoder.step.graph is not None
    MODEL_CHANGES[change](model)
    for _ in range(2):
        assert torch.equal(model.generate(ids, custom_generate=decoder, **GREEDY), model.generate(ids, **GREEDY))
    assert (decoder.step.graph is None) == ("hook" in change or change == "forward")


@pytest.mark.gpu
def test_a_captured_step_follows_hooks_and_a_new_head(tiny, tokens):
    """The fused step serves the model at first, and again once it is as it was."""
    model, ids = tiny(hidden_size=128).float().cuda(), tokens(1, 9).cuda()
    decoder = CudaGraphGenerator(model)

    def compare(fused: bool) -> None:
        assert torch.equal(model.generate(ids, custom_generate=decoder, **GREEDY), model.generate(ids, **GREEDY))
        assert decoder.step.fused == fused

    compare(True)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: (output[0] * -3, *output[1:]))
    compare(False)
    handle.remove()
    compare(True)
    head = model.lm_head
    replace_head(model)
    compare(False)
    model.lm_head = head
    compare(True)


@pytest.mark.gpu
def test_a_model_offloaded_from_a_gpu_generates(tiny, tokens):
    model, ids = tiny(hidden_size=128).float().cuda(), tokens(2, 9).cuda()
    expected = model.generate(ids, **GREEDY)
    model = accelerate.cpu_offload(model.cpu(), ids.device)
    decoder = CudaGraphGenerator(model)
    assert torch.equal(model.generate(ids, custom_generate=decoder, **GREEDY), expected)
    assert decoder.step.graph is None


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_generates(tiny, tokens):
    model, ids = tiny(hidden_size=128).float().cuda(), tokens(2, 9).cuda()
    expected = model.generate(ids, **GREEDY)
    places = {"model.embeddings": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    model = accelerate.dispatch_model(model, places)
    assert torch.equal(model.generate(ids, custom_generate=CudaGraphGenerator(model), **GREEDY), expected)


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


def test_an_attribute_of_the_model_is_told_from_an_equal_one():
    """The description keeps it alive: an object in its place in memory would be taken for it."""

    class Equal:
        def __eq__(self, other):
            return True

    value = Equal()
    description = describe_value([value])
    assert description == describe_value([value]) != describe_value([Equal()])
    gone = weakref.ref(value)
    del value
    assert gone() is not None
