import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Build the wheel, and install it without its dependencies in a fresh environment, which sees ours.

    `installed(cwd, *command)` runs one of the environment's programs, and returns what it printed.
    """
    folder = tmp_path_factory.mktemp("wheel")
    # Without PYTHONPATH, which names the clone in some environments, so that only the wheel has glalm.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(cwd: Path, *command: str | Path) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    # setuptools writes build/ beside what it builds, so it gets a copy.
    (folder / "source").mkdir()
    for name in ("glalm", "configs", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "./source"]
    run(folder, sys.executable, "-m", "pip", *build)
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    run(folder, programs / "pip", "install", "-q", "--no-deps", "--no-index", *(folder / "dist").glob("*.whl"))
    [site_packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    # Dependencies are found in this environment. Its own glalm, an editable install, comes after the wheel's.
    (site_packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    return lambda cwd, program, *arguments: run(cwd, programs / program, *arguments)
