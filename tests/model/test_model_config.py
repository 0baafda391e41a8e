"""The model's config: a mixer for each layer, the errors of its keys, and mixers of the user's own code."""

import math
import re
import subprocess
import sys

import pytest

from glalm.cli import compose_config
from glalm.config.strict import ConfigError, build_dataclass
from glalm.evals.options import EvalConfig
from glalm.hf import GLALMConfig
from glalm.model.config import ModelConfig
from glalm.model.mixers import MIXERS, import_mixer, import_user_mixers


@pytest.mark.parametrize(
    "layers, expected",
    [
        (None, "gla gla gla gla gla"),
        ("3*gla+attention", "gla gla gla attention gla"),
        ("regla + attention", "regla attention regla attention regla"),
        ("2*regla+8*attention", "regla regla attention attention attention"),
        (["gla", "2*attention"], "gla attention attention gla attention"),
    ],
)
def test_the_pattern_is_repeated_to_the_depth(layers, expected):
    config = build_dataclass(ModelConfig, {"layers": layers, "num_hidden_layers": 5})
    assert config.layer_mixers() == expected.split()


def test_every_layer_has_its_mixer(tiny):
    model = tiny(layers="gla+attention", num_hidden_layers=4)
    names = [type(layer.attn).__name__ for layer in model.model.layers]
    assert names == ["GatedLinearAttention", "Attention"] * 2


@pytest.mark.parametrize("d, expand, width", [(1600, 0.55, 880), (2880, 0.7, 2016), (100, 1.1, 110)])
def test_a_width_that_floats_cannot_write_is_the_whole_number_that_is_meant(d, expand, width):
    config = ModelConfig(hidden_size=d, num_heads=2, expand_k=expand, expand_v=expand)
    assert (config.key_dim, config.value_dim) == (width, width)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"mixer": "glaa"}, "model.mixer='glaa' is none of the mixers: gla, attention, linear,"),
        ({"mixer": "retnetion"}, "did you mean retention?"),
        ({"mixer": "glaa", "layers": "gla+attention"}, "model.mixer='glaa' is none of the mixers"),
        ({"layers": "3*gla+atention"}, "model.layers='atention' is none of the mixers"),
        ({"layers": "3*gla+atention"}, "did you mean attention?"),
        ({"layers": "x*gla"}, "model.layers: 'x*gla' must be a mixer or a number of layers times one"),
        ({"layers": "0*gla"}, "model.layers: '0*gla' must be"),
        ({"layers": []}, "model.layers is empty"),
        ({"layers": 3}, "layers=3 must be text"),
        ({"layers": "²*gla"}, "model.layers: '²*gla' must be a mixer or a number of layers times one"),
        ({"layers": ["gla", 3]}, "layers[1]=3 must be text"),
        ({"gla": {"gate": "vectr"}}, "gla.gate=vectr must be one of vector, scalar, fixed, none; did you mean vector?"),
        ({"gla": {"num_kv_heads": 3}}, "model.gla.num_kv_heads=3 does not divide model.num_heads=4"),
        ({"gla": {"short_conv": 1}}, "model.gla.short_conv must be 0 or 2 taps or more, not 1"),
        ({"gla": {"min_log_gate": 1.0}}, "model.gla.min_log_gate must be null or at most 0"),
        ({"gla": {"initial_half_lives": [64, 8]}}, "must be null or [shortest, longest] in tokens, not [64.0, 8.0]"),
        ({"gla": {"initial_half_lives": [1, math.inf]}}, "[shortest, longest] in tokens, not [1.0, inf]"),
        ({"gla": {"gate": "fixed", "initial_half_lives": [8, 64]}}, "not for model.gla.gate=fixed"),
        ({"mixer": "mamba2", "mamba2": {"head_dim": 100}}, "model.mamba2.head_dim=100 does not cut the 2048 channels"),
        ({"regla": {"gate_axis": "value", "output_norm": False}}, "model.regla.output_norm=false divides by the sum"),
        (
            {"mixer": "retention", "hidden_size": 48, "num_heads": 8},
            "model.num_heads=8 does not cut the width model.hidden_size * model.expand_k = 24 into heads of an even",
        ),
        ({"hidden_size": 100, "expand_k": 0.333, "num_heads": 1}, "model.hidden_size * model.expand_k = 33.3"),
        ({"intermediate_size": -1}, "model.intermediate_size must be positive, or 0"),
    ],
)
def test_what_is_wrong_is_named(tree, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_dataclass(ModelConfig, tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tree, message",
    [
        ({"num_head": 3}, "unknown key model.num_head; did you mean model.num_heads?"),
        (
            {"mamba2": {"state_sizes": 16}},
            "unknown key model.mamba2.state_sizes; did you mean model.mamba2.state_size?",
        ),
    ],
)
def test_misspelt_keys_are_refused_without_transformers(tree, message):
    code = f"""
import sys
from glalm.cli import compose_config
from glalm.config.strict import ConfigError, build_dataclass
from glalm.evals.options import EvalConfig
from glalm.model.config import ModelConfig
try:
    build_dataclass(ModelConfig, {tree}, "model")
except ConfigError as error:
    print(error)
assert not {{"transformers", "accelerate"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == (message, 0), done.stderr


@pytest.fixture
def user_module(tmp_path, monkeypatch) -> str:
    """The name of an importable module with the mixer `Mine`, and things that are no mixers."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "users_code.py").write_text(
        "from dataclasses import dataclass\n"
        "from glalm.model.mixers.gla import GatedLinearAttention\n"
        "class Mine(GatedLinearAttention): pass\n"
        "@dataclass\n"
        "class Options: size: int = 1\n"
        "class WithOptions(GatedLinearAttention): options_name, Options = 'mine', Options\n"
        "def function(): pass\n"
    )
    yield "users_code"
    for name in [name for name in MIXERS if ":" in name]:
        del MIXERS[name]
    sys.modules.pop("users_code", None)


def test_a_command_line_may_name_a_mixer_of_the_users_code(user_module, tiny):
    path = f"{user_module}:Mine"
    import_user_mixers({"mixer": "gla", "layers": f"attention + 2*{path}"})
    assert build_dataclass(ModelConfig, {"mixer": path, "num_hidden_layers": 2}).layer_mixers() == [path] * 2
    assert type(tiny(mixer=path).model.layers[0].attn).__name__ == "Mine"
    assert GLALMConfig.from_dict(GLALMConfig(mixer=path).to_dict()).mixer == path


def test_a_list_of_mixers_may_name_one_in_a_pattern(user_module):
    path = f"{user_module}:Mine"
    import_user_mixers({}, ["gla", f"gla+{path}"])  # as of glalm mqar
    assert MIXERS[path].__name__ == "Mine"


def test_an_evaluation_may_name_the_mixers_of_a_checkpoint(user_module):
    path = f"{user_module}:Mine"
    assert compose_config(EvalConfig, "eval", [f"mixers=['{path}']"]).mixers == [path]
    assert MIXERS[path].__name__ == "Mine"


@pytest.mark.parametrize(
    "override, message",
    [
        ("mixers=users_code:Mine", r"mixers='users_code:Mine' must be a list: 'mixers=\[users_code:Mine\]'"),
        ("mixers=[users_code.Mine]", r"users_code.Mine cannot be imported \(.*\). Write package.module:Class"),
    ],
)
def test_mixers_in_another_form_are_refused(user_module, override, message):
    with pytest.raises(ConfigError, match=message):
        compose_config(EvalConfig, "eval", [override])


def test_a_config_json_imports_nothing(user_module):
    with pytest.raises(ConfigError, match=r"^add 'mixers=\[users_code:Mine\]' to .* call .*import_mixer"):
        GLALMConfig.from_dict({"mixer": f"{user_module}:Mine"})
    assert user_module not in sys.modules


@pytest.mark.parametrize(
    "path, message",
    [
        (":Mine", "model.mixer=:Mine cannot be imported (the module's name is empty or relative)"),
        (".users_code:Mine", ".users_code:Mine cannot be imported (the module's name is empty or relative)"),
        ("no_such_module:Mine", "no_such_module:Mine cannot be imported (No module named 'no_such_module')"),
        ("users_code:Yours", "users_code:Yours cannot be imported (module 'users_code' has no attribute 'Yours')"),
        ("users_code:function", "users_code:function is not a subclass of glalm.model.mixers.base.Mixer"),
        ("users_code:WithOptions", "has options of its own (model.mine)"),
    ],
)
def test_what_is_no_mixer_is_named(path, message, user_module):
    with pytest.raises(ConfigError, match=re.escape(message)):
        import_mixer(path)
