import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from glalm.compat import linearize
from glalm.compat.linearize import LinearizeOptions, distil_mixers, linearize_checkpoint
from glalm.compat.llama import NEW_PARAMETERS, convert_llama, load_llama
from glalm.config.strict import ConfigError
from glalm.data.tokenizer import Tokenizer


@pytest.fixture
def llama():
    def build(**changes) -> LlamaForCausalLM:
        torch.manual_seed(0)
        shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5}
        model = LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return model

    return build


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_model_with_softmax_layers_only_computes_the_same(llama, random_tokens, tied, theta):
    original, ids = (
        llama(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": theta}),
        random_tokens(2, 40),
    )
    model = convert_llama(original, softmax_layers=[0, 1, 2])
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-5)
    assert (model.lm_head.weight is model.model.embeddings.weight) == tied


@pytest.mark.parametrize("saved_with_bias, problem", [(True, "unknown weights"), (False, "no weights named")])
def test_llama_unlike_its_config_is_refused(llama, saved_with_bias, problem, tmp_path):
    model = llama(attention_bias=saved_with_bias)
    model.save_pretrained(tmp_path)
    model.config.attention_bias = not saved_with_bias
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"{problem} model.layers.0.self_attn.k_proj.bias.* and 8 more"):
        load_llama(tmp_path)


def test_generation_config_is_copied(llama):
    original = llama()
    original.generation_config = GenerationConfig(eos_token_id=[7, 8], do_sample=True, temperature=0.6)
    settings = convert_llama(original).generation_config
    assert settings.to_dict() == original.generation_config.to_dict() and settings is not original.generation_config


@pytest.mark.parametrize("mixer", ["gla", "regla"])
def test_only_gates_and_head_norms_are_new(llama, random_tokens, mixer):
    original = llama()
    model = convert_llama(original, mixer, softmax_layers=[1])
    assert [type(b.attn).__name__ == "Attention" for b in model.model.layers] == [False, True, False]
    theirs, old = original.state_dict(), 0
    for name, x in model.state_dict().items():
        if any(part in name for part in NEW_PARAMETERS):
            continue
        old += 1
        name = name.replace(".attn.", ".self_attn.").replace("attn_norm", "input_layernorm")
        source = theirs[name.replace("mlp_norm", "post_attention_layernorm").replace("embeddings", "embed_tokens")]
        if source.shape != x.shape:  # keys or values of two groups of two heads
            source = torch.cat([part for half in source.chunk(2) for part in (half, half)])
        assert torch.equal(x, source), name
    assert old == len(theirs)
    logits = model(random_tokens(1, 30)).logits
    assert logits.isfinite().all() and not torch.equal(logits, original(random_tokens(1, 30)).logits)


def test_heads_read_keys_and_values_of_their_group(llama, random_tokens):
    """ReGLA's copies and GLA's shared heads agree with softmax attention's grouping: one group's values at 0 silence
    the same heads."""
    original = llama()
    for layer in original.model.layers:
        layer.self_attn.v_proj.weight.data[8:] = 0  # the second of two groups
    for mixer in ("gla", "regla"):
        attention, heads = convert_llama(original, mixer).model.layers[0].attn, []
        attention.o_proj.register_forward_pre_hook(lambda module, args, heads=heads: heads.append(args[0]))
        attention(torch.randn(1, 5, 32))
        norms = heads[0].unflatten(-1, (4, 8)).square().sum((0, 1, 3))
        assert (norms[:2] > 0.1).all() and (norms[2:] == 0).all(), mixer


@pytest.mark.parametrize("mixer", ["gla", "regla"])
def test_distillation_fits_outputs_of_attention(llama, random_tokens, mixer):
    original = llama()
    model = convert_llama(original, mixer, softmax_layers=[2])
    before = {n: p.clone() for n, p in model.named_parameters()}
    losses = list(distil_mixers(model, original, [random_tokens(8, 24, seed=s % 4) for s in range(60)], lr=1e-2))
    assert losses[0] < 2.5  # outputs of the right size but unrelated would give 2
    assert losses[-1] < 0.5 * losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".attn." in n and ".layers.2." not in n}
    assert not original.model.layers[0].self_attn._forward_hooks


@pytest.mark.parametrize(
    "options, message",
    [
        ({"softmax_layers": [3]}, r"the model has no layers \[3\], only 0 to 2"),
        ({"mixer": "mamba"}, "mixer='mamba' is unknown. Choose one of: gla, regla"),
        ({"llama": {"attention_bias": True}}, "attention_bias is True, but only False"),
        ({"llama": {"head_dim": 16}}, r"num_attention_heads \* head_dim is 64, but only 32"),
        (
            {
                "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
                "softmax_layers": [0],
            },
            "rope_type is 'linear'",
        ),
    ],
)
def test_unsupported_property_is_an_error(llama, options, message):
    original = llama(**options.pop("llama", {}))
    with pytest.raises(ConfigError, match=message):
        convert_llama(original, **options)


def test_another_architecture_is_an_error():
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ConfigError, match=r"model_type is 'mistral', but only 'llama' can be converted"):
        convert_llama(MistralForCausalLM(MistralConfig(**shape, intermediate_size=48)))


def test_a_tokenizer_beside_a_gguf_file_is_taken_as_it_is(llama, hugging_face, monkeypatch, tmp_path):
    monkeypatch.setattr(linearize, "load_llama", lambda folder, gguf: llama())
    monkeypatch.setattr(LlamaConfig, "from_pretrained", lambda folder, **options: llama().config)
    linearize_checkpoint(LinearizeOptions(hugging_face, tmp_path / "out", gguf="model.gguf"))
    assert Tokenizer(tmp_path / "out").eos_ids == Tokenizer(hugging_face).eos_ids
