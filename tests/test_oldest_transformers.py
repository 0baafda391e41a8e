import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ["test_plain.py", "test_fused_decode.py", "test_cuda_graph.py", "test_hf.py", "test_hf_generation.py"]


@pytest.mark.slow
def test_models_work_with_the_oldest_transformers(tmp_path):
    """The tests of the models' seam to transformers, with the oldest version that pyproject.toml allows.

    constraints.txt has a newer one. Versions differ in what they wrap around the layers of a model, for instance.
    """
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [oldest] = re.findall(r"transformers>=([\d.]+)", " ".join(dependencies))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    def run(*command: str) -> str:
        arguments = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run([sys.executable, *command], **arguments)
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    packages = [f"transformers=={oldest}", "huggingface_hub<2"]
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *packages)
    assert run("-c", "import transformers; print(transformers.__version__)").startswith(oldest)
    run("-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *(f"tests/model/{name}" for name in TESTS))
