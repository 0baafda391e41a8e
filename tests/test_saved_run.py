"""Commands that continue a run by its name or folder alone."""

import json
import os
import re
import shlex
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.cli import CONFIGS, build_config, store_defaults
from glalm.commands.train_and_eval import find_run
from glalm.config.run import run_identity
from glalm.config.saved_run import complete_from_run, describe_missing_run, refuse_unknown_name
from glalm.config.strict import ConfigError, default_tree
from glalm.data.files import read_jsonl
from glalm.evals.options import TrainingRun
from glalm.train.checkpoint import CheckpointError, UnreadableCheckpoint
from glalm.train.run_dir import find_checkpoint
from glalm.train.trainer import train

SIZES = ["model=gla_10m", "model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=32"]
STEPS = ["data.seq_len=16", "train.batch_size=2", "train.eval_sequences=4", "optim.warmup_steps=1"]


def config_of(*overrides: str) -> TrainingRun:
    """Return the config that `glalm train` makes of a command line."""
    store_defaults(TrainingRun)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        tree = compose("train", list(overrides))
    return build_config(TrainingRun, tree, partial(complete_from_run, overrides=overrides))


@pytest.fixture
def first(token_folder, tmp_path):
    """The config of a run that has trained two steps with its own data, sizes and rates."""
    config = config_of(
        "name=mine",
        f"runs_dir={tmp_path}",
        f"data.path={token_folder}",
        *SIZES,
        *STEPS,
        "train.steps=2",
        "optim.lr=0.02",
    )
    assert train(config) == 0
    return config


def test_the_name_alone_continues_the_run(first, token_folder, tmp_path, capsys):
    capsys.readouterr()
    config = config_of("name=mine", f"runs_dir={tmp_path}")
    assert run_identity(config) == run_identity(first)
    assert (config.data.path, config.optim.lr, config.train.steps) == (str(token_folder), 0.02, 2)
    message = capsys.readouterr().out
    assert message.startswith(f"mine is continued with these values of {tmp_path / 'mine' / 'run.json'}: ")
    assert f"data.path={token_folder}" in message and "optim.lr=0.02" in message and "seed" not in message
    assert train(config) == 0 and [row["step"] for row in read_jsonl(config.folder / "metrics.jsonl")] == [0, 2]


def test_vocabulary_is_that_of_the_data(first):
    assert config_of(*SIZES, *STEPS).model.vocab_size is None
    record = json.loads((first.folder / "run.json").read_text())
    assert record["config"]["model"]["vocab_size"] == record["identity"]["model.vocab_size"] == 300
    model_config = json.loads((first.folder / "checkpoints" / "step_2" / "config.json").read_text())
    assert model_config["vocab_size"] == 300


def test_the_folder_alone_continues_the_run(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for resume in ("mine", "mine/", "./mine", str(tmp_path / "mine"), "mine/checkpoints/.."):
        config = config_of(f"resume={resume}")
        assert (config.name, config.folder.resolve(), config.resume) == ("mine", tmp_path / "mine", None)
        assert run_identity(config) == run_identity(first)
    monkeypatch.chdir(tmp_path / "mine")
    assert config_of("resume=.").folder == tmp_path / "mine"


def test_a_run_in_a_moved_folder_continues_there(first, tmp_path):
    (tmp_path / "mine").rename(tmp_path / "other name")
    config = config_of(f"resume='{tmp_path}/other name'")
    assert config.name == "other name" and train(config) == 0 and not (tmp_path / "mine").exists()


def test_given_keys_may_change_or_must_agree(first, tmp_path):
    where = ["name=mine", f"runs_dir={tmp_path}"]
    config = config_of(*where, "train.log_every=7", "track.project=x", "optim.lr=0.02")
    assert (config.train.log_every, config.track.project) == (7, "x") and train(config) == 0
    with pytest.raises(ConfigError, match=r"is of another config:\n  optim.lr: 0.02 -> 0.01\nTo resume"):
        train(config_of(*where, "optim.lr=0.01"))
    with pytest.raises(ConfigError, match=r"model.hidden_size: 32 -> 128\n(.|\n)*model.vocab_size: 300 -> 2048"):
        train(config_of(*where, "model=gla_tiny"))  # a choice gives every key of its group
    assert train(config_of(*where, "train.steps=3", "train.allow_changes=[train.steps]")) == 0
    with pytest.raises(ConfigError, match=r"train.steps: 3 -> 4"):
        train(config_of(*where, "train.steps=4"))  # what one command allowed is not allowed for ever


def test_a_new_name_and_an_experiment_are_as_without_runs(first, tmp_path, capsys):
    capsys.readouterr()
    assert config_of("name=other", f"runs_dir={tmp_path}").model.hidden_size == 128
    experiment = config_of("experiment=gla_340m", "name=mine", f"runs_dir={tmp_path}")
    assert (experiment.model.hidden_size, experiment.steps) == (1024, 28611)
    assert capsys.readouterr().out == ""


def test_resume_needs_a_run_and_no_name(first, tmp_path):
    with pytest.raises(ConfigError, match=r"resume=nowhere is not the folder of a run, because it has no run.json"):
        config_of("resume=nowhere")
    with pytest.raises(ConfigError, match=r"names the run. Remove name=... and runs_dir=..."):
        config_of(f"resume={tmp_path}/mine", "name=mine", "runs_dir=x")


def test_what_was_refused_at_step_0_does_not_return(first, tmp_path):
    def refuse(*_):
        raise ConfigError("no room for a needle")

    command = ["name=other", f"runs_dir={tmp_path}", f"data.path={first.data.path}", *SIZES, *STEPS, "train.steps=2"]
    for seed in ("seed=3", "seed=4"):
        with pytest.raises(ConfigError, match="no room for a needle"):
            train(config_of(*command, seed), refuse)
        assert config_of(*command).seed == 1 and not (tmp_path / "other" / "data.json").exists()
    # The records of a start that was interrupted at step 0 remain.
    with pytest.raises(KeyboardInterrupt):
        train(config_of(*command, "seed=5"), Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(ConfigError, match="no room for a needle"):
        train(config_of(*command, "seed=6"), refuse)
    config = config_of("name=other", f"runs_dir={tmp_path}")
    assert (config.seed, train(config)) == (5, 0)


def test_a_checkpoint_or_a_misspelt_name_in_place_of_a_run(first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("mine/checkpoints/step_2")
    with pytest.raises(ConfigError, match=r"no run.json. It is a checkpoint of one: write resume=mine. To start a run"):
        config_of(f"resume={checkpoint}")
    for folder, hint in ((checkpoint, "It is a checkpoint of one: write mine."), (Path("./mien"), "")):
        with pytest.raises(CheckpointError, match=f"^{folder} is not the folder of a run, .* no run.json. ?{hint}$"):
            find_checkpoint(folder / "checkpoints", "latest")
    missing = f"{tmp_path}/mien is not the folder of a run, because it has no run.json. Did you mean {tmp_path}/mine?"
    assert describe_missing_run(tmp_path / "mien") == missing
    assert describe_missing_run(Path("mien"), runs_dir=tmp_path).endswith(f" Did you mean {tmp_path}/mine?")


def test_the_folder_of_a_run_in_place_of_a_checkpoint(first, tmp_path):
    command = ["name=fork", f"runs_dir={tmp_path}", f"data.path={first.data.path}", *SIZES, *STEPS, "train.steps=2"]
    for key in ("train.init_from", "train.resume_from"):
        message = f"{key}={first.folder} is the folder of a run. Write one of its checkpoints, such as .*/step_2"
        with pytest.raises(ConfigError, match=message):
            train(config_of(*command, f"{key}={first.folder}"))


def test_the_name_of_no_run_is_refused_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"name": "mien", "runs_dir": "runs", "data": {"path": "data/demo"}}
    with pytest.raises(ConfigError, match=r"^runs/mien holds no run to continue, because it has no run.json. To start"):
        refuse_unknown_name(tree, ["name=mien"])
    (tmp_path / "data" / "demo").mkdir(parents=True)
    refuse_unknown_name(tree, ["name=mien"])
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").touch()
    with pytest.raises(ConfigError, match=r"has no run.json. Did you mean name=mine\? To start a run of this name"):
        refuse_unknown_name(tree, ["name=mien", "runs_dir=runs"])
    for overrides in ([], ["name=mien", "data.path=data/demo"], ["runs_dir=runs"]):
        refuse_unknown_name(tree, overrides)
    refuse_unknown_name(tree | {"name": "mine"}, ["name=mine"])
    for resume, meant in (("mine", "runs/mine"), ("runs/mien", "runs/mine"), ("./mine", "runs/mine")):
        with pytest.raises(ConfigError, match=rf"has no run.json. Did you mean resume={meant}\?"):
            complete_from_run(tree | {"resume": resume}, [f"resume={resume}"])


def test_what_to_type_is_quoted_where_a_shell_needs_it(tmp_path):
    run = tmp_path / "my runs" / "mine"
    (run / "checkpoints" / "step_2").mkdir(parents=True)
    (run / "run.json").touch()
    message = describe_missing_run(run / "checkpoints" / "step_2", "resume=")
    assert shlex.split(message.partition(": write ")[2]) == [f"resume={run}."]
    tree = {"name": "other", "runs_dir": str(tmp_path), "data": {"path": "my data"}}
    with pytest.raises(ConfigError) as error:
        refuse_unknown_name(tree, ["name=other"])
    assert shlex.split(str(error.value).partition("such as: ")[2])[-1] == "data.path=my data"
    checkpoint = run / "checkpoints" / "step_2"
    command = str(UnreadableCheckpoint(checkpoint, "it is locked")).partition("run: ")[2]
    assert shlex.split(command) == ["mv", str(checkpoint), f"{checkpoint}.damaged"]


@pytest.mark.parametrize(
    "override, message",
    [
        ("name=2024", "name=2024 must be text, not an integer. To type it as text, quote it twice: '\"2024\"'"),
        ("name=true", "name=True must be text, not true or false."),
        ("name=null", "name=None must be text, not null"),
        ("runs_dir=5", "runs_dir=5 must be text, not an integer."),
        ("resume=1.5", "resume=1.5 must be text, not a number."),
    ],
)
def test_a_number_does_not_name_a_run(override, message):
    store_defaults(TrainingRun)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        tree = compose("train", [override])
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        build_config(TrainingRun, tree, partial(find_run, overrides=[override], swept=[]))


def test_digits_in_two_kinds_of_quotes_name_a_run():
    assert config_of('name="2024"').name == "2024"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", pytest.param("[" * 9999, id="too deep"), '{"config": 3}', '{"config": {}}', '{"id": "x"}'],
)
def test_damaged_record_gives_nothing(tmp_path, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text(content)
    assert config_of("name=mine", f"runs_dir={tmp_path}").model.hidden_size == 128


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path):
    (tmp_path / "mine").mkdir()
    os.mkfifo(tmp_path / "mine" / "run.json")
    assert config_of("name=mine", f"runs_dir={tmp_path}").model.hidden_size == 128


def test_a_mixer_of_the_users_code_is_not_imported_from_the_record(first, tmp_path, monkeypatch):
    """Importing runs code, and a run's folder may come from elsewhere."""
    path = tmp_path / "mine" / "run.json"
    record = json.loads(path.read_text())
    record["config"]["model"]["mixer"] = "no_such_module:Mixer"
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"^add 'model.mixer=no_such_module:Mixer' to the command"):
        config_of("name=mine", f"runs_dir={tmp_path}")
    record["config"]["model"] |= {"mixer": "gla", "layers": ["gla", "no_such_module:Mixer"]}
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"^add 'model.layers=\[gla,no_such_module:Mixer\]' to the command"):
        config_of("name=mine", f"runs_dir={tmp_path}")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_each_key_is_given_or_saved(tmp_path_factory, data):
    """Whatever keys are given: those have the command's values, and all others the run's."""
    folder = tmp_path_factory.mktemp("runs")
    saved = default_tree(TrainingRun) | {"name": "r", "runs_dir": str(folder)}
    choices = {"seed": 5, "optim.lr": 0.5, "train.steps": 9, "data.seq_len": 3, "data.weights": {"a": 1}}
    in_record = data.draw(st.dictionaries(st.sampled_from(sorted(choices)), st.integers(10, 20)))
    given_keys = data.draw(st.lists(st.sampled_from(sorted(choices)), unique=True))
    composed = json.loads(json.dumps(saved))
    for tree, values in ((saved, in_record), (composed, choices)):
        for key, value in values.items():
            *parents, last = key.split(".")
            (tree[parents[0]] if parents else tree)[last] = value
    (folder / "r").mkdir()
    (Path(folder) / "r" / "run.json").write_text(json.dumps({"config": saved, "saved": 3}))
    merged = complete_from_run(composed, [f"{key}=..." for key in given_keys])
    for key in choices:
        *parents, last = key.split(".")
        expected = composed if key in given_keys else saved
        where = merged[parents[0]] if parents else merged
        assert where[last] == (expected[parents[0]] if parents else expected)[last]
