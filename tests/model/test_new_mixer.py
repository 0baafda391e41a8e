"""The steps of "Add a mixer" in docs/mixers.md, followed to the letter in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from glalm.config.strict import build_dataclass
from glalm.model.config import ModelConfig
from glalm.model.decoder import model_cost

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "mixers.md").read_text().partition("## Add a mixer")[2].partition("\n### ")[0]
BLOCKS = re.findall(r"```(?:python|yaml)\n(.*?)```", SECTION, re.DOTALL)


def insert_after(path: Path, line: str, new: str) -> None:
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, line + new))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package and its mixers' tests, with the documented mixer added."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("glalm", "tests/model", "configs/model"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "conftest.py", root / "tests")
    shutil.copy(ROOT / "pyproject.toml", root)
    mixer, import_line, registry_line, config, parity, row = BLOCKS
    mixers = root / "glalm" / "model" / "mixers"
    (mixers / "average.py").write_text(mixer)
    insert_after(mixers / "__init__.py", "from glalm.model.mixers.attention import Attention\n", import_line)
    insert_after(mixers / "__init__.py", "MIXERS: dict[str, type[Mixer]] = {\n", registry_line)
    (root / "configs" / "model" / "average_tiny.yaml").write_text(config)
    (root / "tests" / "model" / "mixers" / "test_average.py").write_text(parity)
    insert_after(root / "tests" / "model" / "choices.py", "CHOICES = {\n", row)
    return root


def run_python(root: Path, *args: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *args], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_takes_less_than_60_lines():
    assert sum(len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS) < 60


@pytest.mark.slow
def test_the_config_is_of_its_size(copy):
    code = """
import yaml
from glalm.config.strict import build_dataclass
from glalm.model.config import ModelConfig
from glalm.model.decoder import model_cost
print(model_cost(build_dataclass(ModelConfig, yaml.safe_load(open("configs/model/average_tiny.yaml"))), 256).parameters)
"""
    gla = build_dataclass(ModelConfig, yaml.safe_load((ROOT / "configs/model/gla_tiny.yaml").read_text()))
    assert int(run_python(copy, "-c", code)) == pytest.approx(model_cost(gla, 256).parameters, rel=0.01)


@pytest.mark.slow
def test_its_option_is_a_key_of_the_model(copy):
    code = """
from glalm.config.strict import ConfigError, build_dataclass
from glalm.model.config import ModelConfig
assert build_dataclass(ModelConfig, {"average": {"max_forget": 3}}).average.max_forget == 3.0
for tree in ({"average": {"max_forgt": 3}}, {"average": {"max_forget": -1}}):
    try:
        build_dataclass(ModelConfig, tree)
    except ConfigError as error:
        print(error)
"""
    lines = run_python(copy, "-c", code).splitlines()
    assert lines == [
        "unknown key average.max_forgt; did you mean average.max_forget?",
        "model.average.max_forget must be positive and finite, not -1.0",
    ]


@pytest.mark.slow
def test_its_tests_pass(copy):
    """Its parity test, and what every mixer has to do."""
    files = ("tests/model/mixers/test_average.py", "tests/model/test_mixers.py")
    out = run_python(copy, "-m", "pytest", "-x", *files, "-k", "average or every_mixer")
    assert int(re.search(r"(\d+) passed", out)[1]) > 15
