"""The container's and the cloud recipe's commands, run in a fresh environment instead of an image."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from glalm.cli import CONFIGS, compose_config
from glalm.evals.options import EvalConfig, TrainingRun

ROOT = Path(__file__).parents[2]
RECIPE = yaml.safe_load((ROOT / "examples/cloud/skypilot.yaml").read_text())


def run_lines(dockerfile: str) -> list[str]:
    """Return the commands of the RUN lines, of which none continues on the next line."""
    return re.findall(r"^RUN (.*[^\\])$", dockerfile, flags=re.MULTILINE)


@pytest.mark.slow
def test_image_builds(tmp_path):
    """The RUN lines in their order, in a copy of the clone, by the Python and pip of a new environment."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("glalm", "configs", "pyproject.toml", "constraints.txt", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    venv.create(tmp_path / "venv", with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    # As in the image, torch is there before. Here it is that of the environment of the tests.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    [site_packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "image.pth").write_text("\n".join(packages))
    commands = run_lines((ROOT / "Dockerfile").read_text())
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "8 x NVIDIA H200" in done.stdout and "GiB per process" in done.stdout


def test_recipe_runs_commands_that_exist():
    """Its training and evaluation arguments compose, and its extras are the package's."""
    script = RECIPE["run"].replace("\\\n", " ").replace("$EXPERIMENT", RECIPE["envs"]["EXPERIMENT"])
    words = shlex.split(script)
    train = words.index("train")
    evaluate = words.index("eval")
    compose_config(TrainingRun, "train", [words[train + 1]])
    compose_config(EvalConfig, "eval", words[evaluate + 1 :])
    assert (CONFIGS / "experiment" / f"{RECIPE['envs']['EXPERIMENT']}.yaml").is_file()
    extras = re.search(r"\.\[([\w,]+)\]", RECIPE["setup"])[1].split(",")
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
