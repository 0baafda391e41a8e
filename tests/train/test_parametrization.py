"""optim.parametrization=mup: multipliers by shape, and activations that have one scale at all widths and depths."""

import dataclasses

import pytest
import torch
from choices import CHOICES, every_choice
from hypothesis import given, settings
from hypothesis import strategies as st
from injection import before_steps, send_signal
from torch import nn

from glalm.config.run import OptimConfig, RunConfig
from glalm.config.strict import ConfigError
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.model.layers import SumOver
from glalm.model.mixers import MIXERS
from glalm.model.mixers.gla import GatedLinearAttention
from glalm.train.init_weights import build_initial_model
from glalm.train.muon import Muon
from glalm.train.optim import build_optimizers, set_learning_rate
from glalm.train.parametrization import UNSCALED, Multipliers, find_multipliers, scale_parameter
from glalm.train.trainer import train

WIDTHS = (64, 128, 256, 512)
SHAPE = {"vocab_size": 256, "num_heads": 2}


def build_config(parametrization: str, width: int, depth: int = 2, optim: dict | None = None, **choice) -> RunConfig:
    shape = SHAPE | {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 2 * width} | choice
    base = {"base_width": 64, "base_depth": 2} if parametrization == "mup" else {}
    rates = {"lr": 1e-2, "min_lr": 1e-2} | (optim or {})
    return RunConfig(model=ModelConfig(**shape), optim=OptimConfig(parametrization=parametrization, **base, **rates))


def multipliers_of(width: int = 256, depth: int = 8, optim: dict | None = None, **choice) -> dict[str, Multipliers]:
    config = build_config("mup", width, depth, optim, **choice)
    return find_multipliers(config.model, config.optim)


def test_multipliers_of_gla():
    """A model 4 times as wide and 4 times as deep as its base, by the tables of Tensor Programs V and CompleteP."""
    found = multipliers_of()
    block = "model.layers.3"
    hidden = Multipliers(init=1 / 2, adam_lr=1 / 4, muon_lr=1 / 2, eps=1 / 16)
    assert found[f"{block}.attn.q_proj.weight"] == found[f"{block}.mlp.up_proj.weight"] == hidden
    # The last layers of branches have an output multiplier of 1/4.
    output = Multipliers(init=1 / 8, adam_lr=1 / 16, muon_lr=1 / 8, eps=1 / 4)
    assert found[f"{block}.attn.o_proj.weight"] == found[f"{block}.mlp.down_proj.weight"] == output
    # The gate's projections go to 16 channels and from there to all.
    assert found[f"{block}.attn.gk_proj.0.weight"] == Multipliers(init=1 / 4, adam_lr=1 / 4, muon_lr=1 / 4, eps=1 / 4)
    assert found[f"{block}.attn.gk_proj.1.weight"] == Multipliers(eps=1 / 16)
    assert found[f"{block}.attn.gk_proj.1.bias"].adam_lr == 1 and found[f"{block}.attn_norm.weight"].adam_lr == 1
    # Muon serves neither the embeddings nor the head.
    assert dataclasses.replace(found["model.embeddings.weight"], muon_lr=1.0) == Multipliers(eps=1 / 4)
    assert dataclasses.replace(found["lm_head.weight"], muon_lr=1.0) == Multipliers(init=1 / 4, adam_lr=1 / 4)
    assert found["model.norm.weight"].init == found["model.norm.weight"].adam_lr == 1


def test_queries_of_softmax_attention():
    """With heads 4 times as wide, products with the keys are divided by 4, of which D^-1/2 gives 2."""
    for mixer in ("attention", "transnormer_diag"):
        found = multipliers_of(depth=2, mixer=mixer, attention={"num_heads": 2})
        query = found["model.layers.0.attn.q_proj.weight"]
        key = found["model.layers.0.attn.k_proj.weight"]
        assert (query.init, query.adam_lr, query.muon_lr) == (key.init / 2, key.adam_lr / 2, key.muon_lr / 2)
    as_wide = multipliers_of(depth=2, mixer="attention")  # More heads, each of 64 channels.
    assert as_wide["model.layers.0.attn.q_proj.weight"] == as_wide["model.layers.0.attn.k_proj.weight"]


def test_heads_of_the_base_model():
    """Features of one head are summed over its channels, whose number is that of the base if there are more heads."""
    wider = multipliers_of(mixer="rpe_attention")["model.layers.0.attn.features"]
    more = multipliers_of(mixer="rpe_attention", num_heads=8, optim={"base_heads": 2})["model.layers.0.attn.features"]
    assert (wider.init, wider.adam_lr) == (1, 1 / 2)  # Normalized queries have entries half as large.
    assert (more.init, more.adam_lr) == (1, 1)


@every_choice
def test_base_model_itself_is_not_scaled(choice):
    assert set(multipliers_of(64, 2, **choice).values()) == {UNSCALED}


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(CHOICES)), st.sampled_from([1, 2, 3, 5]), st.integers(1, 4))
def test_every_parameter_is_classified(name, factor, depth):
    config = build_config("mup", 64 * factor, depth, **CHOICES[name])
    found = find_multipliers(config.model, config.optim)
    with torch.device("meta"):
        model = CausalLM(config.model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for parameter, multipliers in found.items():
        assert 0 < multipliers.init <= max(1, 2 / depth) and 0 < multipliers.adam_lr <= max(1, 2 / depth), parameter


class UnknownMixer(GatedLinearAttention):
    """GLA with a parameter of which nothing is said."""

    def __init__(self, config):
        super().__init__(config)
        self.mystery = nn.Parameter(torch.zeros(config.hidden_size))


class MixerWithoutOutput(GatedLinearAttention):
    output_layer = "out"


@every_choice
def test_a_base_model_that_is_larger_has_the_inverse_multipliers(choice):
    small = SHAPE | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128} | choice
    large = small | {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512}

    def multipliers(model: dict, base: dict) -> dict[str, Multipliers]:
        sizes = {"base_width": base["hidden_size"], "base_depth": base["num_hidden_layers"]}
        return find_multipliers(ModelConfig(**model), OptimConfig(parametrization="mup", **sizes))

    up = multipliers(large, small)
    for name, down in multipliers(small, large).items():
        inverse = {field: 1 / value for field, value in dataclasses.asdict(down).items()}
        assert dataclasses.asdict(up[name]) == pytest.approx(inverse), name


def test_refuses_what_it_does_not_know(monkeypatch):
    monkeypatch.setitem(MIXERS, "unknown", UnknownMixer)
    monkeypatch.setitem(MIXERS, "no_output", MixerWithoutOutput)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.attn\.mystery is used.*sums_over of the class UnknownM"):
        multipliers_of(mixer="unknown")
    with pytest.raises(ConfigError, match="MixerWithoutOutput has no layer 'out'"):
        multipliers_of(mixer="no_output")
    assert multipliers_of(depth=2, mixer="no_output")  # Nothing depends on it in a model as deep as the base.


@pytest.mark.parametrize(
    "optim, model, message",
    [
        ({"parametrization": "mup"}, {}, "set optim.base_width to the"),
        ({"base_depth": 4}, {}, "optim.base_depth=4 is an option of optim.parametrization=mup"),
        ({"parametrization": "mup", "base_width": 64}, {"tie_word_embeddings": True}, "set model.tie_word_embeddings"),
        ({"parametrization": "mup", "base_width": 66}, {}, "base model of optim.base_width=66 with 4 heads is refused"),
    ],
)
def test_wrong_configs(optim, model, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(model=ModelConfig(hidden_size=128, **model), optim=OptimConfig(**optim))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_and_initial_weights_are_scaled(name):
    """Weight decay times learning rate is the same for all matrices, and a step's rate follows the schedule."""
    optim = {"name": name, "weight_decay": 0.1, "eps": 1e-6}
    config = build_config("mup", 256, 8, optim)
    model = build_initial_model(config, from_scratch=True)
    torch.manual_seed(config.seed)
    standard = dict(CausalLM(config.model).named_parameters())
    multipliers = find_multipliers(config.model, config.optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = build_optimizers(model, config.optim)
    set_learning_rate(made, 1e-3)
    for optimizer in made:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                scale = multipliers[names.pop(id(parameter))]
                is_muon = type(optimizer).__name__ == "Muon"
                assert group["lr"] == 1e-3 * (scale.muon_lr if is_muon else scale.adam_lr)
                assert group["weight_decay"] * group["lr"] in (0, pytest.approx(1e-4))
                assert is_muon or group["eps"] == 1e-6 * scale.eps
    assert not names
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, standard[key] * multipliers[key].init, msg=key)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Muon])
def test_output_multiplier_is_the_same_as_one_of_weight_and_rate(kind):
    """y = c W x, trained explicitly, and y = W x with initial weights and settings that are scaled as for a depth."""
    depth = 4
    shape = torch.Size([3, 5])
    scale = scale_parameter(shape, shape, SumOver(1), is_drawn=True, depth=depth, output=1 / depth)
    lr_multiplier = scale.adam_lr if kind is torch.optim.AdamW else scale.muon_lr
    explicit = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    absorbed = nn.Parameter(scale.init * explicit.detach())
    settings = {"eps": 1e-3} if kind is torch.optim.AdamW else {"momentum": 0.9}
    # CompleteP divides eps in blocks by the depth, because gradients of explicitly scaled branches are as much smaller.
    explicit_settings = {key: value / depth if key == "eps" else value for key, value in settings.items()}
    settings = {key: value * scale.eps if key == "eps" else value for key, value in settings.items()}
    first = kind([explicit], lr=0.01, weight_decay=0.1, **explicit_settings)
    second = kind([absorbed], lr=0.01 * lr_multiplier, weight_decay=0.1 / lr_multiplier, **settings)
    for _ in range(5):
        x = torch.randn(5, dtype=torch.float64)
        for weight, factor, optimizer in ((explicit, 1 / depth, first), (absorbed, 1.0, second)):
            optimizer.zero_grad()
            (factor * weight @ x).sin().sum().backward()
            optimizer.step()
        torch.testing.assert_close(absorbed.detach(), explicit.detach() / depth)


def measure_scales(config: RunConfig, steps: int = 10) -> dict[str, float]:
    """Return the root mean squares of activations after `steps` steps on one batch of random tokens."""
    model = build_initial_model(config, from_scratch=True)
    optimizers = build_optimizers(model, config.optim)
    set_learning_rate(optimizers, config.optim.lr)
    ids = torch.randint(SHAPE["vocab_size"], (4, 33), generator=torch.Generator().manual_seed(7))
    for _ in range(steps):
        model(ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    scales = {}

    def observe(name: str, module: nn.Module) -> None:
        def record(_, __, y) -> None:
            scales[name] = (y[0] if isinstance(y, tuple) else y).square().mean().sqrt().item()

        module.register_forward_hook(record)

    observe("logits", model.lm_head)
    observe("first block", model.model.layers[0])
    observe("last block", model.model.layers[-1])
    if hasattr(model.model.layers[1].attn, "gk_proj"):
        observe("gates", model.model.layers[1].attn.gk_proj)
    with torch.no_grad():
        model(ids[:, :-1])
    return scales


def fit_growth(configs: dict[int, RunConfig]) -> dict[str, float]:
    """Return the exponents by which activations grow with the size that is the key of the models, by least squares."""
    scales = [measure_scales(config) for config in configs.values()]
    x = torch.tensor([*configs], dtype=torch.float64).log()
    x = x - x.mean()
    logs = {name: torch.tensor([found[name] for found in scales], dtype=torch.float64).log() for name in scales[0]}
    return {name: ((x * y).sum() / x.square().sum()).item() for name, y in logs.items()}


def check_widths(optim: dict | None = None, **choice) -> tuple[dict[str, float], dict[str, float]]:
    """Check that blocks and logits have one scale at all widths with mup, and not without it. Return both growths."""
    found = fit_growth({width: build_config("mup", width, optim=optim, **choice) for width in WIDTHS})
    standard = fit_growth({width: build_config("standard", width, optim=optim, **choice) for width in WIDTHS[:3]})
    assert all(abs(found[name]) < 0.4 for name in ("first block", "last block", "logits")), found
    assert standard["last block"] > 0.9, standard
    return found, standard


def test_activations_of_gla_have_one_scale_at_all_widths():
    """Gates start as width^-1/2, as logits do, because their projection goes to few channels, and learn more slowly."""
    found, standard = check_widths()
    assert -0.45 < found["gates"] < 0.3 < standard["gates"], (found, standard)
    assert abs(found["last block"]) < 0.1 and abs(found["logits"]) < 0.1, found


@pytest.mark.slow
@every_choice
def test_activations_have_one_scale_at_all_widths(choice):
    check_widths(**choice)


@pytest.mark.slow
@pytest.mark.parametrize("neuron_beta", [None, 0.95])
def test_activations_have_one_scale_at_all_widths_with_muon(neuron_beta):
    check_widths(optim={"name": "muon", "neuron_beta": neuron_beta})


@pytest.mark.slow
@every_choice
def test_activations_do_not_grow_with_depth(choice):
    """They may shrink by L^-1/2, as the sum of L independent branches of size 1 / L does, or by a bit more."""
    depths = (2, 4, 8, 16)
    found = fit_growth({depth: build_config("mup", 64, depth, **choice) for depth in depths})
    standard = fit_growth({depth: build_config("standard", 64, depth, **choice) for depth in depths})
    assert -1 < found["last block"] < 0.5 and abs(found["logits"]) < 0.5, found
    assert standard["last block"] > found["last block"] + 0.3, (found, standard)


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one(run_config, change):
    """Bit for bit. Checkpoints hold no multipliers, because they follow from the config."""
    mup = {"parametrization": "mup", "base_width": 16, "base_depth": 1, "weight_decay": 0.1}
    whole = change(run_config, name="whole", optim=dataclasses.replace(run_config.optim, **mup))
    parts = change(whole, name="parts")
    assert train(whole) == 0
    with before_steps({3: send_signal}):
        assert train(parts) != 0
    assert train(parts) == 0
    last = "checkpoints/step_6/model.safetensors"
    assert (parts.folder / last).read_bytes() == (whole.folder / last).read_bytes()
    with pytest.raises(ConfigError, match=r"optim\.base_width: 16 -> 32"):
        train(change(whole, **{"optim.base_width": 32}))


def test_a_parameter_that_is_one_number_learns_as_in_the_base_model():
    scale = scale_parameter(torch.Size([]), torch.Size([]), None, is_drawn=False, depth=1.0, output=1.0)
    assert scale == Multipliers()
