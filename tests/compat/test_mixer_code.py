"""Exported models whose mixer is not glalm's: the folder names a package, or has a copy of the user's file."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from glalm.compat.export import export_run
from glalm.compat.mixer_code import (
    find_mixer_packages,
    find_package,
    is_own_file,
    list_imports,
    source_path,
    write_loader,
    write_mixer_code,
)
from glalm.config.strict import ConfigError, RunError
from glalm.evals.inputs import open_eval_model
from glalm.evals.options import EvalConfig
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.model.mixers import MIXERS, import_mixer, register_mixer
from glalm.train import checkpoint
from glalm.train.trainer import train

SOURCE = """\
from glalm.model.mixers.gla import GatedLinearAttention

class Doubled(GatedLinearAttention):
    def forward(self, x, **options):
        y, state = super().forward(x, **options)
        return 2 * y, state
"""
NAME = "my_mixers:Doubled"
LOAD = """\
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model(torch.arange(8)[None]).logits.double().sum().item())
if len(sys.argv) > 2: model.save_pretrained(sys.argv[2])
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch) -> Path:
    """The user's working folder, with their file my_mixers.py. Its mixers are unknown again after the test."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "my_mixers.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    builtin = dict(MIXERS)
    yield folder
    MIXERS.clear()
    MIXERS.update(builtin)
    sys.modules.pop("my_mixers", None)


@pytest.fixture
def package(own_code, tmp_path):
    """install(name, version, entry_points): install the file my_mixers.py as a package in a folder of packages."""
    site = tmp_path / "site-packages"
    site.mkdir()

    def install(name: str, version: str, entry_points: str = "") -> Path:
        shutil.copy("my_mixers.py", site)
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        write_metadata(info, "METADATA", name, version, entry_points)
        (info / "RECORD").write_text(f"my_mixers.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
        sys.path.insert(0, str(site))
        return info

    return install


def write_metadata(info: Path, file: str, name: str, version: str, entry_points: str = "") -> None:
    info.mkdir()
    (info / file).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("my_mixers\n")
    (info / "entry_points.txt").write_text(f"[glalm.mixers]\n{entry_points}\n")


@pytest.fixture
def built(own_code):
    """The metadata that `pip install .` leaves beside the code, which nobody else has, with a helper's name."""
    info = own_code / "someones_mixers.egg-info"
    write_metadata(info, "PKG-INFO", "someones-mixers", "1.2", f"doubled = {NAME}")
    (info / "SOURCES.txt").write_text("my_mixers.py\nhelper_of_mine.py\n")
    (info / "top_level.txt").write_text("my_mixers\nhelper_of_mine\n")


def train_and_export(config, out: Path, mixers: tuple[str, ...] = ()) -> GLALMForCausalLM:
    """Export a run. Return its model as it was trained."""
    assert train(config) == 0
    export_run(config.folder, "latest", out, mixers)
    trained = GLALMForCausalLM(GLALMConfig.from_model_config(config.model)).eval()
    checkpoint.load_model(config.folder / "checkpoints" / "step_6", trained)
    return trained


@pytest.mark.slow
def test_the_copy_of_a_file_of_ones_own_is_loaded_if_it_is_trusted(run_config, change, own_code, tmp_path):
    """A fresh process, which sees no file of the user's, computes the same and saves a folder that loads, too."""
    import_mixer(NAME)
    out = tmp_path / "out"
    trained = train_and_export(change(run_config, **{"model.mixer": NAME}), out)
    expected = trained(torch.arange(8)[None]).logits.double().sum().item()
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for folder, more in ((out, [tmp_path / "again"]), (tmp_path / "again", [])):
        command = [sys.executable, "-c", LOAD, str(folder), *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(expected, rel=1e-6)
        assert (folder / "my_mixers.py").read_text() == SOURCE
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    del MIXERS[NAME]
    with pytest.raises(ConfigError, match=r"^add 'mixers=.*if you trust that code, load the folder by"):
        GLALMForCausalLM.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert 'from_pretrained("PATH", trust_remote_code=True)' in card
    assert f"The code of the token mixer `{NAME}` is in this folder" in card


def test_a_folder_with_code_is_evaluated_once_its_mixer_is_named(own_code, tmp_path):
    import_mixer(NAME)
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 48}
    saved = GLALMForCausalLM(GLALMConfig(**shape, mixer=NAME)).eval()
    saved.save_pretrained(tmp_path / "out")
    write_mixer_code(tmp_path / "out", {NAME: None})
    config = EvalConfig(checkpoint=str(tmp_path / "out"), runs_dir=str(tmp_path))
    opened = open_eval_model(config, torch.device("cpu"))
    ids = torch.arange(8)[None]
    assert opened.is_ours and torch.equal(opened.causal_lm(ids).logits, saved(ids).logits)
    del MIXERS[NAME]
    with pytest.raises(ConfigError, match=rf"add 'mixers=\[{NAME}\]' to glalm eval"):
        open_eval_model(config, torch.device("cpu"))


def test_a_package_is_named_and_not_copied(run_config, change, package, tmp_path):
    package("someones-mixers", "1.2", f"doubled = {NAME}")
    out = tmp_path / "out"
    trained = train_and_export(change(run_config, **{"model.mixer": "doubled"}), out)
    assert type(trained.model.layers[0].attn).__name__ == "Doubled"
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    assert not list(out.glob("*.py"))
    assert json.loads((out / "config.json").read_text())["mixer_packages"] == {"doubled": "someones-mixers==1.2"}
    assert "`doubled` is in the Python package `someones-mixers==1.2`" in (out / "README.md").read_text()


def test_a_package_without_an_entry_point_is_named(run_config, change, package, tmp_path, caplog):
    package("someones-mixers", "1.2")
    import_mixer(NAME)
    caplog.set_level("INFO", "glalm")
    train_and_export(change(run_config, **{"model.mixer": NAME}), tmp_path / "out")
    assert f"the mixer {NAME} is in the package someones-mixers==1.2; its code was not copied" in caplog.text
    assert not list((tmp_path / "out").glob("*.py"))
    assert f'import_mixer("{NAME}")' in (tmp_path / "out" / "README.md").read_text()
    del MIXERS[NAME]
    with pytest.raises(ConfigError, match=r"Install the Python package someones-mixers==1\.2, which has"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", [NAME, "doubled"])
def test_code_of_a_folder_in_which_a_package_was_built_is_copied(name, built, own_code, tmp_path):
    import_mixer(NAME)
    register_mixer(name, MIXERS[NAME])
    assert find_mixer_packages(GLALMConfig(mixer=name).to_model_config()) == {name: None}
    (tmp_path / "out").mkdir()
    write_loader(tmp_path / "out", {name: None})
    assert (tmp_path / "out" / "my_mixers.py").read_text() == SOURCE
    (own_code / "helper_of_mine.py").write_text("")
    (own_code / "my_mixers.py").write_text("import helper_of_mine\n" + SOURCE)
    with pytest.raises(RunError, match=r"my_mixers\.py imports helper_of_mine"):
        source_path(name)


def test_the_file_beside_a_package_of_its_name_is_copied(package, own_code):
    """The class is of the current folder's file, which may differ from the installed one."""
    sys.path.insert(0, str(own_code))
    import_mixer(NAME)
    package("someones-mixers", "1.2")
    assert Path(inspect.getfile(MIXERS[NAME])).parent == own_code
    assert find_package(NAME) is None


def test_an_editable_install_has_the_files_of_its_folder(package, own_code, tmp_path):
    sys.path.insert(0, str(own_code))
    import_mixer(NAME)
    info = package("someones-mixers", "1.2")
    (info / "RECORD").write_text("__editable__.someones_mixers.pth,,\n")
    for folder, expected in ((own_code, "someones-mixers==1.2"), (tmp_path / "site-packages", None)):
        origin = {"url": folder.as_uri(), "dir_info": {"editable": True}}
        (info / "direct_url.json").write_text(json.dumps(origin))
        assert find_package(NAME) == expected


def test_only_files_of_no_package_are_ones_own(own_code):
    (own_code / "helper_of_mine.py").write_text("")
    sys.path.append(str(own_code))
    assert is_own_file("helper_of_mine")
    assert not any(map(is_own_file, ("torch.nn", "numpy", "json", "glalm.kernels", "no_such_module")))


def test_two_packages_with_one_name_are_refused(package):
    package("a-mixers", "1", f"doubled = {NAME}")
    package("b-mixers", "1", f"doubled = {NAME}")
    with pytest.raises(ConfigError, match="the packages a-mixers and b-mixers each have a mixer 'doubled'"):
        GLALMConfig(mixer="doubled")


def test_an_entry_point_that_cannot_be_imported_names_its_package(package):
    package("a-mixers", "1", "doubled = my_mixers:Tripled")
    with pytest.raises(ConfigError, match=r"'doubled' of the package a-mixers cannot be imported .*'Tripled'"):
        GLALMConfig(mixer="doubled")


def test_a_misspelt_entry_point_is_corrected(package):
    package("a-mixers", "1", f"doubled = {NAME}")
    with pytest.raises(ConfigError, match="did you mean doubled"):
        GLALMConfig(mixer="doublet")


def test_a_file_that_needs_another_is_not_exported(run_config, change, own_code, tmp_path):
    (own_code / "helper_of_mine.py").write_text("")
    (own_code / "my_mixers.py").write_text("import helper_of_mine\n" + SOURCE)
    import_mixer(NAME)
    with pytest.raises(RunError, match=r"my_mixers\.py imports helper_of_mine"):
        train_and_export(change(run_config, **{"model.mixer": NAME}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_imports_are_found_anywhere(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("import a.b, c\ndef f():\n    from .d import e\n    from g.h import i\nfrom . import j\n")
    assert sorted(list_imports(path)) == [".", ".d", "a.b", "c", "g.h"]


def test_a_name_serves_copies_of_one_source_and_refuses_another(own_code, tmp_path):
    import_mixer(NAME)
    first = MIXERS[NAME]
    for number, source in enumerate((SOURCE, SOURCE.replace("2 * y", "3 * y"))):
        namespace = {"__name__": f"copy_{number}"}
        path = tmp_path / f"copy_{number}.py"
        path.write_text(source)
        exec(compile(source, path, "exec"), namespace)
        module = type(sys)(f"copy_{number}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module
        if number == 0:
            register_mixer(NAME, namespace["Doubled"])
        else:
            with pytest.raises(ConfigError, match="is taken by another class"):
                register_mixer(NAME, namespace["Doubled"])
        del sys.modules[module.__name__]
    assert MIXERS[NAME] is first
