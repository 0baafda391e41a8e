"""docs/mixers.md, "How to add one", followed to the letter."""

import ast
import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import test_mixers
import yaml

from glalm.config.strict import build_dataclass
from glalm.model.config import MIXERS, ModelConfig
from glalm.model.flops import cost

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(?:python|yaml)\n(.*?)```", (ROOT / "docs" / "mixers.md").read_text(), re.DOTALL)


@pytest.fixture
def followed(monkeypatch) -> dict:
    """Does steps 1 and 2; the other steps' contents by what they are."""
    mixer, line, config, parity, row = BLOCKS
    module = types.ModuleType("glalm.model.mixers.average")
    exec(mixer, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, path in ast.literal_eval("{" + line + "}").items():
        monkeypatch.setitem(MIXERS, name, path)
    return {"config": yaml.safe_load(config), "parity": parity, "choice": ast.literal_eval("{" + row + "}")["average"]}


def test_it_takes_less_than_60_lines():
    assert sum(len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS) < 60


def test_the_config_is_of_its_size(followed):
    gla = build_dataclass(ModelConfig, yaml.safe_load((ROOT / "configs/model/gla_tiny.yaml").read_text()))
    parameters = cost(build_dataclass(ModelConfig, followed["config"]), 256).parameters
    assert parameters == pytest.approx(cost(gla, 256).parameters, rel=0.01)


def test_the_parity_test_passes(followed, assert_is):
    namespace = {}
    exec(followed["parity"], namespace)
    namespace["test_is_the_average"](assert_is)


TESTS = [
    pytest.param(f, id=name, marks=[mark for mark in f.pytestmark if mark.name != "parametrize"])
    for name, f in vars(test_mixers).items()
    if name.startswith("test_") and "choice" in inspect.signature(f).parameters
]


@pytest.mark.parametrize("test", TESTS)
def test_it_does_what_every_mixer_does(test, followed, tiny, tokens, tmp_path):
    fixtures = {"choice": followed["choice"], "tiny": tiny, "tokens": tokens, "tmp_path": tmp_path}
    test(**{name: fixtures[name] for name in inspect.signature(test).parameters})
