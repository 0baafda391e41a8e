"""Statistics of layers: their values against direct computations, and training that they do not change."""

import math

import pytest
import torch
from torch import nn

from glalm.data.files import read_jsonl
from glalm.model.decoder import CausalLM
from glalm.model.mixers import MIXERS
from glalm.train.layer_statistics import (
    describe_gates,
    gradient_norms,
    observe_layers,
    parameter_group,
    root_mean_square,
    state_norms,
)
from glalm.train.trainer import train


@pytest.fixture
def model(run_config):
    torch.manual_seed(0)
    return CausalLM(run_config.model)


def test_gates_of_known_half_lives():
    """Channels that lose half of the state in 1, 10 and 1000 tokens, and one that never loses anything."""
    half_lives = torch.tensor([1.0, 10.0, 1000.0, math.inf])
    log_gates = (-math.log(2) / half_lives).expand(2, 7, 1, 4)
    described = describe_gates(log_gates)
    assert described["half_life"].item() == pytest.approx(10.0)
    assert described["retention"].item() == pytest.approx(sum(0.5 ** (1 / n) for n in half_lives.tolist()) / 4)
    assert described["saturated"].item() == 0.5


def test_closed_gates_are_saturated():
    described = describe_gates(torch.tensor([-math.inf, -8.0, -1.0, -1e-5]).view(1, 4, 1))
    assert described["saturated"].item() == 0.75 and described["half_life"].item() == 0.0


def test_layers_are_observed_as_they_are(model):
    """Each value is computed again from the layers' inputs, weights and outputs."""
    ids = torch.randint(model.config.vocab_size, (2, 9))
    with torch.no_grad(), observe_layers(model) as found:
        cache = model(ids, return_cache=True).cache
    found |= state_norms(cache)
    x = model.model.embeddings(ids)
    for layer, block in enumerate(model.model.layers):
        h = block.attn_norm(x)
        logits = block.attn.gk_proj(h).float()
        gates = torch.sigmoid(logits) ** (1 / model.config.gate_logit_normalizer)
        torch.testing.assert_close(found[f"layers/{layer}/retention"], gates.mean())
        torch.testing.assert_close(found[f"layers/{layer}/k_rms"], root_mean_square(block.attn.k_proj(h)))
        x, state = block(x, return_state=True)
        torch.testing.assert_close(found[f"layers/{layer}/output_rms"], x.square().mean().sqrt())
        torch.testing.assert_close(found[f"layers/{layer}/state_rms"], state.square().mean().sqrt())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_can_be_observed(run_config, change, mixer):
    model = CausalLM(change(run_config, **{"model.mixer": mixer}).model)
    with torch.no_grad(), observe_layers(model) as found:
        cache = model(torch.randint(model.config.vocab_size, (1, 5)), return_cache=True).cache
    found |= state_norms(cache)
    assert {"layers/0/output_rms", "layers/1/output_rms"} <= set(found)
    assert ("layers/0/half_life" in found) == (mixer in ("gla", "regla", "gated_deltanet", "kda"))
    assert all(value.isfinite() and value >= 0 for value in found.values())


def test_gradient_norms_of_groups_make_up_the_whole(model):
    inputs, labels = torch.randint(model.config.vocab_size, (2, 2, 9))
    model(inputs, labels).loss.backward()
    norms = gradient_norms(model)
    assert set(norms) == {f"grad_norm/{group}" for group in ("embeddings", "head", "mixers", "mlps", "norms")}
    whole = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(torch.stack([*norms.values()]).norm(), whole)


def test_groups():
    names = ["model.embeddings.weight", "model.layers.0.attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    names += ["model.layers.0.attn.g_norm_swish_gate.weight", "model.norm.weight", "lm_head.weight"]
    assert [*map(parameter_group, names)] == ["embeddings", "mixers", "mlps", "norms", "norms", "head"]


@pytest.mark.parametrize("settings", [{}, {"data.document_boundaries": "reset_state"}, {"train.tbptt_length": 8}])
def test_training_does_not_depend_on_them(run_config, change, settings):
    """The weights are the same bit for bit, and only the rows of the chosen steps have statistics."""
    losses = []
    for every in (None, 4):
        config = change(run_config, name=f"every {every}", **{"train.log_every": 2, "train.statistics_every": every})
        config = change(config, **settings)
        assert train(config) == 0
        rows = read_jsonl(config.folder / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1]
    with_statistics = [row["step"] for row in rows if "layers/0/retention" in row]
    assert with_statistics == [step for step in range(4, config.steps + 1, 4)]
