"""What is written of a changed model: it loads and computes the same, or is refused with what to do."""

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings, strategies
from torch import nn
from torch.nn.utils import parametrizations, prune

from glalm.compat.fla import export_checkpoint
from glalm.hf import GLALMConfig, GLALMForCausalLM, GLALMModel
from glalm.model.written_weights import collect_weights, explain_misfit

IDS = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(1))


def build(**config) -> GLALMForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2} | config
    return GLALMForCausalLM(GLALMConfig(**config)).eval()


def compile_model(model):
    return torch.compile(model, backend="eager")


def compile_blocks(model):
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


def prune_head(model):
    prune.random_unstructured(model.lm_head, "weight", amount=0.5)
    return model


def normalise_weight(model):
    parametrizations.weight_norm(model.model.layers[-1].attn.q_proj)
    return model


def adapt(model):
    """Put peft's names on a projection with an adapter."""
    layer = nn.Module()
    layer.base_layer = model.model.layers[0].attn.q_proj
    layer.lora_A = nn.Linear(32, 4, bias=False)
    layer.forward = lambda x: layer.base_layer(x) + layer.lora_A(x).sum()
    model.model.layers[0].attn.q_proj = layer
    return model


def add_head_bias(model):
    bias = torch.arange(50.0)
    model.lm_head = nn.Linear(32, 50)
    model.lm_head.bias.data.copy_(bias)
    return model


def offload(model):
    cpu_offload(model, torch.device("cpu"))
    return model


def replace_head(model):
    """Untie the head of a model whose config ties it."""
    model.lm_head.weight = nn.Parameter(torch.randn(50, 32))
    return model


def share_head(model):
    """Tie the head of a model whose config does not."""
    model.lm_head.weight = model.model.embeddings.weight
    return model


def repeat_layer(model):
    model.model.layers[-1] = model.model.layers[0]
    return model


def drop_layer(model):
    model.model.layers = model.model.layers[:-1]
    return model


def add_layer(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    return model


def widen_vocabulary(model):
    model.lm_head = nn.Linear(32, 60, bias=False)
    return model


def quantise(model):
    weight = torch.randint(-8, 8, model.lm_head.weight.shape, dtype=torch.int8)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    model.lm_head.forward = lambda x: x @ weight.float().T
    return model


SERVED = (compile_model, compile_blocks, offload, share_head, repeat_layer)
REFUSED = {
    prune_head: r"lm_head.weight_mask.*prune.remove",
    normalise_weight: r"parametrizations.weight.original0.*remove_parametrizations",
    adapt: r"q_proj.base_layer.weight.*merge_and_unload",
    add_head_bias: r"lm_head.bias. Change model.config",
    drop_layer: r"lacks model.layers.1.*and \d+ more",
    add_layer: r"no place for: model.layers.2",
    widen_vocabulary: r"lm_head.weight is \[60, 32\], in a model of its config \[50, 32\]",
}


@pytest.mark.parametrize("change", SERVED)
def test_changed_model_is_written_as_it_computes(change, tmp_path):
    model = change(build())
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(IDS).logits
        export_checkpoint(model, tmp_path / "exported")
        model.save_pretrained(tmp_path / "saved")
        for folder in ("exported", "saved"):
            loaded = GLALMForCausalLM.from_pretrained(tmp_path / folder).eval()
            torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("change", REFUSED)
def test_model_unlike_its_config_is_refused(change, tmp_path):
    model = change(build())
    for write in (lambda: export_checkpoint(model, tmp_path / "exported"), model.to_core):
        with pytest.raises(ValueError, match=REFUSED[change]):
            write()
    assert not (tmp_path / "exported").exists()
    with pytest.warns(UserWarning, match=REFUSED[change]):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no place for|lacks|another shape"):
        GLALMForCausalLM.from_pretrained(tmp_path / "saved")


def make_sparse(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to_sparse_csr(), requires_grad=False)
    return model


@pytest.mark.parametrize("change", [quantise, make_sparse])
def test_quantised_and_sparse_weights_are_refused(change, tmp_path):
    model = change(build())
    for write in (lambda: export_checkpoint(model, tmp_path / "out"), lambda: model.save_pretrained(tmp_path / "out")):
        with pytest.raises(ValueError, match=r"lm_head.weight is not a plain floating-point tensor .*quantised"):
            write()
    assert not (tmp_path / "out").exists()


def test_head_that_only_the_config_ties_is_not_dropped(tmp_path):
    model = replace_head(build(tie_word_embeddings=True))
    for write in (lambda: export_checkpoint(model, tmp_path / "exported"), model.to_core):
        with pytest.raises(ValueError, match=r"config ties the two\. Set model\.config\.tie_word"):
            write()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.save_pretrained(tmp_path / "saved")
    model.config.tie_word_embeddings = False
    export_checkpoint(model, tmp_path / "exported")
    for folder in ("exported", "saved"):
        loaded = GLALMForCausalLM.from_pretrained(tmp_path / folder).eval()
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_tied_head_of_another_shape_is_named(tmp_path):
    model = widen_vocabulary(build(tie_word_embeddings=True))
    with pytest.warns(UserWarning, match="lm_head.weight is"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a head \(lm_head.weight\) of another shape than the embeddings"):
        GLALMForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_every_part_of_a_model_fits_its_config(tied):
    model = build(tie_word_embeddings=tied)
    for part in (model, model.model, model.to_core()):
        assert not explain_misfit(part.state_dict(), type(part)(model.config))
    assert collect_weights(model).keys() == model.state_dict().keys()


def test_base_model_is_loaded_without_the_head(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    base = GLALMModel.from_pretrained(tmp_path)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(GLALMModel.from_pretrained(tmp_path / "base").embeddings.weight, model.model.embeddings.weight)


@settings(max_examples=12, deadline=None)
@given(
    changes=strategies.lists(strategies.sampled_from([*SERVED[2:], *REFUSED, replace_head]), max_size=2, unique=True),
    mixer=strategies.sampled_from(["gla", "retention", "gla+attention"]),
    tied=strategies.booleans(),
    exports=strategies.booleans(),
)
def test_nothing_is_lost_in_silence(changes, mixer, tied, exports, tmp_path_factory):
    """Whatever was changed, either writing or loading raises ValueError, or the loaded model computes the same."""
    model = build(tie_word_embeddings=tied, **({"layers": mixer} if "+" in mixer else {"mixer": mixer}))
    folder = tmp_path_factory.mktemp("out")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for change in changes:
                model = change(model)
            expected = model(IDS).logits
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return  # The second change cannot be made to what the first one left.
        try:
            export_checkpoint(model, folder) if exports else model.save_pretrained(folder)
            loaded = GLALMForCausalLM.from_pretrained(folder).eval()
        except ValueError:
            assert changes
            return
        torch.testing.assert_close(loaded(IDS).logits, expected)
