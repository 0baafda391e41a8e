"""The blocks of docs/journey_own_mixer.md, as typed, with the wheel installed, in an empty folder."""

import ast
import asyncio
import json
import re
import shlex
import stat
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "journey_own_mixer.md"
OFFLINE = "pip install --no-index --no-deps --no-build-isolation"


@pytest.mark.slow
def test_own_mixer(installed, tmp_path):
    """The corpus is a part of the standard library, to be quick. Nothing is downloaded to build the package."""
    printed = {}
    # The environment then has the setuptools of this one, which can build a wheel.
    installed(tmp_path, "pip", "uninstall", "-q", "-y", "setuptools")
    for title, code in re.findall(r'^```\w+(?: title="(.*?)")?\n(.*?)^```', PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if title:
            (tmp_path / title).write_text(code)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            typed = line.replace("pip install", OFFLINE).replace("stdlib", str(Path(asyncio.__file__).parent))
            printed[line] = installed(tmp_path, *shlex.split(typed))
    installed(tmp_path, "pip", "uninstall", "-q", "-y", "glalm-average")
    # What building the package left here is not an installed package.
    assert list(tmp_path.glob("*.egg-info"))
    again = "glalm export runs/average --mixer=average:MovingAverage --out exported-again"
    installed(tmp_path, *again.split())

    runs = tmp_path / "runs"
    assert [path.name for path in sorted((runs / "average" / "checkpoints").iterdir())][-1] == "step_50"
    assert {path.stem for path in (runs / "average" / "eval").glob("*.json")} >= {"perplexity", "generate"}
    assert json.loads((runs / "packaged" / "run.json").read_text())["config"]["model"]["mixer"] == "average"
    source = (tmp_path / "average.py").read_text()
    for folder in ("exported", "exported-again", "finetuned"):
        assert (tmp_path / folder / "average.py").read_text() == source
    assert ast.literal_eval(printed["python load.py"])[0].startswith("def main(")
    packaged = tmp_path / "exported-packaged"
    assert not list(packaged.glob("*.py"))
    assert json.loads((packaged / "config.json").read_text())["mixer_packages"] == {"average": "glalm-average==1.0"}
    new = tmp_path / "new"
    new.touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "exported").iterdir()}
    assert modes == {stat.S_IMODE(new.stat().st_mode)}
