"""What is installed is the package alone: commands say so, and what needs no configs works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path):
    """installed(*args): python with the package where no configs are beside it, as pip puts it from a wheel."""
    shutil.copytree(ROOT / "glalm", tmp_path / "glalm", ignore=shutil.ignore_patterns("__pycache__"))

    def run(*args: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100
        )

    return run


@pytest.mark.parametrize("script", ["mqar", "ladder"])
def test_a_command_beside_an_installed_package_says_how_to_install(installed, tmp_path, script):
    done = installed(str(ROOT / f"scripts/{script}.py"), "--help")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and f"{tmp_path / 'configs'} is missing" in last and "pip install -e ." in last


def test_the_installed_package_has_models_and_operators(installed, tmp_path):
    done = installed("-c", "import glalm.hf, glalm.kernels, glalm.model, glalm.evals.runner; print(glalm.__file__)")
    assert done.stdout == f"{tmp_path / 'glalm' / '__init__.py'}\n", done.stderr
