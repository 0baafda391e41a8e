"""What `--help` says of keys, and what flags that are keys are corrected to."""

import dataclasses
import re

import pytest

from glalm.cli import check_command_line, check_flags, describe_command
from glalm.config.key_help import describe_keys, find_keys
from glalm.config.strict import ConfigError, check_overrides, flatten_tree
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.studies.mqar import MQARConfig


@pytest.mark.parametrize("cls", [TrainingRun, EvalConfig])
def test_every_key_has_a_meaning(cls):
    meanings = describe_keys(cls)
    assert [key for key, meaning in meanings.items() if not meaning] == []
    keys = flatten_tree(dataclasses.asdict(cls()))
    assert set(keys) <= meanings.keys()


def test_meanings_are_the_comments():
    meanings = describe_keys(TrainingRun)
    assert meanings["train.steps"] == "optimizer steps"
    assert meanings["optim.lr"] == "peak learning rate"
    assert meanings["train.checkpoint.every"] == "steps"
    assert meanings["data.document_boundaries"].startswith("ignore: the state runs on from one document into the next")
    assert meanings["data.document_boundaries"].endswith("the token before it has no target.")
    assert meanings["train.guard"] == "What protects a run from bad updates and hangs; see docs/reliability.md."


@dataclasses.dataclass
class Inner:
    size: int = 3  # of the inner


@dataclasses.dataclass
class Outer:
    """A config."""

    # Two lines that
    # belong together.
    first: int = 1
    second: int = 2
    third: dict[str, int] = dataclasses.field(default_factory=dict)  # after several lines, with a # inside
    text: str = "# no comment"
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_comments_of_all_forms():
    assert describe_keys(Outer) == {
        "first": "Two lines that belong together.",
        "second": "",
        "third": "after several lines, with a # inside",
        "text": "",
        "inner": "",
        "inner.size": "of the inner",
    }


def test_help_of_the_command_has_values_and_meanings():
    text = describe_command(TrainingRun, "train", ["--help", "train.steps=7", "model=gla_10m"])
    assert text.startswith("glalm train [GROUP=CHOICE ...] [KEY=VALUE ...]")
    assert re.search(r"^  steps: 7 +# optimizer steps$", text, re.M)
    assert re.search(r"^  hidden_size: 256 +# d, the width of the residual stream$", text, re.M)
    assert "  model: attention_1b3, " in text and "$" not in text


def test_help_of_a_key():
    assert describe_command(TrainingRun, "train", ["--help", "train.steps", "train.steps=7"]) == (
        "train.steps=7\n  optimizer steps"
    )
    text = describe_command(EvalConfig, "eval", ["--help", "needle"])
    assert text.startswith("needle:  A number, stated once in a long text") and "\n  depths: [0.0, 0.25, " in text
    assert "optim.lr=" in describe_command(TrainingRun, "train", ["-h", "lr"])
    with pytest.raises(ConfigError, match=r"unknown key learning_rate; did you mean optim.lr\?"):
        describe_command(TrainingRun, "train", ["--help", "learning_rate"])


@pytest.mark.parametrize("key", ["optim", "optim.", "train", "data", "model", "extrapolation", "parallel", "track"])
def test_help_of_a_key_whose_name_is_that_of_a_group_of_configs(key):
    check_command_line(["--help", key], TrainingRun)
    lines = describe_command(TrainingRun, "train", ["--help", key]).splitlines()
    assert lines[0].startswith(("train_evals.extrapolation:  ", f"{key.rstrip('.')}:  ")) and len(lines) > 2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--steps", "5"], "--steps is no flag. Write train.steps=5"),
        (["--learning-rate=1e-3"], "--learning-rate=1e-3 is no flag. Write optim.lr=1e-3"),
        (["--seq-len", "64"], "--seq-len is no flag. Write data.seq_len=64"),
        (["--zzz"], "--zzz is no flag. Write KEY=VALUE"),
    ],
)
def test_flags_that_are_keys_are_corrected(args, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_flags(args, TrainingRun)


def test_flags_of_hydra_pass():
    check_flags(["--help", "--multirun", "--cfg", "job", "--config-dir", "x", "-m", "--info=all"], TrainingRun)


def test_a_top_level_key_comes_before_nested_ones():
    with pytest.raises(ConfigError, match=r"unknown key mixer; did you mean mixers or model.mixer\?"):
        check_overrides(["mixer=[gla]"], MQARConfig, [])
    assert find_keys("mixer", describe_keys(TrainingRun)) == ["model.mixer"]
