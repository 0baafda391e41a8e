"""The core model, which training uses, against the transformers class of the same modules."""

import subprocess
import sys

import pytest
import torch
from choices import EXACT, every_choice

from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.cache import StateCache
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}


def test_the_core_is_imported_without_transformers():
    code = "import sys, glalm.model.decoder; sys.exit(bool({'transformers', 'accelerate'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@every_choice
@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_and_random_state_equal_transformers(choice, tied):
    config = ModelConfig(**SHAPE | choice, tie_word_embeddings=tied)
    models, draws = [], []
    for build in (CausalLM, lambda config: GLALMForCausalLM(GLALMConfig.from_model_config(config))):
        torch.manual_seed(0)
        models.append(build(config).state_dict())
        draws.append(torch.rand(1))
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)
    assert torch.equal(*draws)


@every_choice
def test_computes_what_the_transformers_class_computes(choice, tiny, tokens):
    model, ids, labels = tiny(**choice), tokens(2, 20), tokens(2, 20, seed=2)
    core = model.to_core().eval()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"attention_mask": mask, "use_cache": True}
    expected = model(ids, **inputs)
    found = core(ids, padding=mask[..., None], return_cache=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(found.cache.states, expected.past_key_values.states, rtol=0, atol=0)
    more = tokens(2, 5, seed=3)
    expected = model(more, past_key_values=expected.past_key_values, shift_labels=labels[:, :5], z_loss=0.1)
    continued = core(more, cache=found.cache, shift_labels=labels[:, :5], z_loss=0.1)
    assert torch.equal(continued.loss, expected.loss) and continued.logits is None and continued.cache is None
    bounds = torch.tensor([0, 7, 7, 20])
    torch.testing.assert_close(
        core(ids[:1], cu_seqlens=bounds).logits, model(ids[:1], cu_seqlens=bounds).logits, **EXACT
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_core_of_a_model_shares_its_parameters(tied, tiny):
    model = tiny(tie_word_embeddings=tied)
    core = model.to_core()
    assert type(core.config) is ModelConfig and core.config == model.config.to_model_config()
    for (name, p), q in zip(core.named_parameters(), model.parameters(), strict=True):
        assert p.data_ptr() == q.data_ptr(), name
    assert (core.lm_head.weight is core.model.embeddings.weight) == tied


def test_wrong_input_is_named(tokens):
    core = CausalLM(ModelConfig(**SHAPE))
    with pytest.raises(ValueError, match=r"expected input_ids \[B, T\] .* got \[5\]"):
        core(tokens(5))
    with pytest.raises(ValueError, match="states of 3 layers, and the model 2 layers"):
        core(tokens(2, 5), cache=StateCache([torch.zeros(2, 1)] * 3, 1))
