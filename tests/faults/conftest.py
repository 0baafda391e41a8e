import pytest

from glalm.train.trainer import train


@pytest.fixture(scope="session")
def made():
    return {}


@pytest.fixture
def unbroken(run_config, change, made, tmp_path_factory):
    """Return the folder of a run that was never interrupted."""
    if not made:
        config = change(run_config, name="unbroken", runs_dir=str(tmp_path_factory.mktemp("unbroken")))
        assert train(config) == 0
        made["folder"] = config.folder
    return made["folder"]
