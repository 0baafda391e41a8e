"""Locking a run's directory, resuming a run, and what a resumed run may change."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaTokenizer

from glalm.config.run import CheckpointConfig
from glalm.config.strict import ConfigError
from glalm.data.files import read_jsonl
from glalm.hf import GLALMForCausalLM
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.prepare.pipeline import prepare_data
from glalm.train import checkpoint
from glalm.train.checkpoint import CheckpointError, CheckpointSaver, latest_checkpoint
from glalm.train.run_dir import (
    check_filesystem,
    find_checkpoint,
    lock_run_dir,
    newest_valid_checkpoint,
    remove_leftovers,
    resume_run,
    set_aside,
)
from glalm.train.state import TrainState
from glalm.train.trainer import train


def save(folder, step: int, **metadata):
    """Save a tiny model and return the checkpoint."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 8}
    state = TrainState(CausalLM(ModelConfig(vocab_size=30, **shape)), [], step=step, tokens=9)
    with CheckpointSaver(folder, CheckpointConfig(asynchronous=False, keep_last=100)) as saver:
        saver.save(state, metadata)
    return folder / f"step_{step}"


def names(config) -> set[str]:
    return {p.name for p in (config.folder / "checkpoints").iterdir()}


def last_weights(config) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(config.folder / "checkpoints") / "model.safetensors")


def steps(config) -> list[int]:
    return [row["step"] for row in read_jsonl(config.folder / "metrics.jsonl")]


def forget_checkpoints(config) -> None:
    """Leave the run as if it had been stopped before its first checkpoint."""
    for path in (config.folder / "checkpoints").iterdir():
        shutil.rmtree(path)
    record = json.loads((config.folder / "run.json").read_text())
    (config.folder / "run.json").write_text(json.dumps(record | {"saved": None}))


@pytest.fixture
def trained(run_config, change):
    config = change(run_config, **{"train.checkpoint.keep_last": 9})
    assert train(config) == 0
    return config


def test_resume_from_forks_once(trained, change, capfd):
    source = trained.folder / "checkpoints" / "step_4"
    fork = change(trained, name="fork", **{"train.resume_from": str(source)})
    assert train(fork) == 0
    assert "resuming after step 4" in capfd.readouterr().err
    assert names(fork) == {"step_6"} and steps(fork) == [5, 6]
    assert all(torch.equal(t, last_weights(fork)[n]) for n, t in last_weights(trained).items())
    (fork.folder / "checkpoints" / "step_6").rename(
        fork.folder / "checkpoints" / "step_5"
    )  # as if it had been stopped earlier
    assert train(fork) == 0
    assert "set aside" not in capfd.readouterr().err


def test_resume_from_own_checkpoint_sets_newer_ones_aside(trained, change, capfd):
    before, source = last_weights(trained), trained.folder / "checkpoints" / "step_2"
    back = change(trained, **{"train.resume_from": str(source)})
    assert train(back) == 0
    printed = capfd.readouterr().err
    assert "resuming after step 2" in printed and "step_6 is set aside as step_6.superseded" in printed
    assert names(back) == {"step_2", "step_4", "step_6", "step_4.superseded", "step_6.superseded"}
    assert steps(back) == list(range(7)) and all(torch.equal(t, last_weights(back)[n]) for n, t in before.items())
    assert train(back) == 0  # A requeued job resumes from the newest checkpoint.
    assert "resuming after step 6" in capfd.readouterr().err


def test_copied_checkpoint_must_match_the_config(trained, change):
    """A checkpoint may be copied to a place without run.json, or beside the run.json of another run."""
    copy, wrong = change(trained, name="copy"), {"optim.lr": 0.02, "seed": 5}
    for _ in range(2):
        shutil.copytree(trained.folder / "checkpoints" / "step_4", copy.folder / "checkpoints" / "step_4")
        with pytest.raises(
            ConfigError, match=r"step_4 holds a run with another config:\n  optim.lr: 0.01 -> 0.02\n  seed"
        ):
            train(change(copy, **wrong))
        assert not (copy.folder / "run.json").exists()
        assert train(change(copy, **wrong, **{"train.allow_changes": ["optim.lr", "seed"]})) == 0
        assert steps(copy) == [5, 6]
        shutil.rmtree(copy.folder)
    assert train(change(copy, **wrong)) == 0
    shutil.rmtree(copy.folder / "checkpoints")
    shutil.copytree(trained.folder / "checkpoints" / "step_4", copy.folder / "checkpoints" / "step_4")
    with pytest.raises(ConfigError, match=r"step_4 holds a run with another config"):
        train(change(copy, **wrong))


def test_spelling_of_resume_from_does_not_matter(trained, change, capfd, monkeypatch):
    source = trained.folder / "checkpoints" / "step_2"
    monkeypatch.chdir(trained.folder)
    (trained.folder / "link").symlink_to(trained.folder.parent)
    for spelled in ("checkpoints/step_2", f"{source}/", f"{source}", "link/tiny/checkpoints/../checkpoints/step_2"):
        assert train(change(trained, **{"train.resume_from": spelled})) == 0
    printed = capfd.readouterr().err
    assert printed.count("resuming after step 2") == 1 and printed.count("resuming after step 6") == 3
    assert not (trained.folder / "checkpoints" / "step_6.superseded2").exists()


def test_fork_into_another_run_is_refused(trained, change):
    other, source = change(trained, name="other"), trained.folder / "checkpoints" / "step_4"
    assert train(other) == 0
    fork = change(other, **{"train.resume_from": str(source)})
    with pytest.raises(
        ConfigError, match=r"other holds a run that does not come from train.resume_from=.*name=\.\.\. "
    ):
        train(fork)
    assert names(other) == {"step_2", "step_4", "step_6"} and steps(other) == list(range(7))
    forget_checkpoints(other)
    assert train(fork) == 0
    assert steps(other) == [5, 6]


def test_config_refused_at_step_0_may_be_corrected(trained, change, tmp_path):
    """Correct both the config and the path of the data, of which no batch was read yet."""

    def refuse(*_):
        raise ConfigError("no room for a needle")

    prepare_data([trained.data.path + "/../words.jsonl"], tmp_path / "other", vocab_size=280, progress=False)
    first = change(trained, name="first", **{"train.eval_every": 1})
    with pytest.raises(ConfigError, match="no room for a needle"):
        train(first, refuse)
    corrected = change(first, **{"data.seq_len": 32, "data.path": str(tmp_path / "other")})
    assert train(corrected) == 0
    assert json.loads(corrected.data_record.read_text())["tokenizer"]["vocab_size"] == 280
    forget_checkpoints(corrected)  # The metrics of one step are enough for a run to have started.
    (corrected.folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 2.5}\n{"st')
    with pytest.raises(ConfigError, match=r"data.seq_len: 32 -> 16"):
        train(change(corrected, **{"data.seq_len": 16}))


def test_resume_from_must_exist_and_match(trained, change):
    missing = str(trained.folder / "checkpoints" / "step_5")
    message = r"resume_from=.*/step_5: There is no checkpoint step_5 .*checkpoints: step_2, step_4"
    with pytest.raises(ConfigError, match=message):
        train(change(trained, name="fork", **{"train.resume_from": missing}))
    source = {"train.resume_from": str(trained.folder / "checkpoints" / "step_4")}
    with pytest.raises(ConfigError, match=r"step_4 holds a run with another config:\n  optim.lr: 0.01 -> 0.02\n"):
        train(change(trained, name="other", **source, **{"optim.lr": 0.02}))
    allowed = {"optim.lr": 0.02, "train.allow_changes": ["optim.lr"]}
    assert train(change(trained, name="third", **source, **allowed)) == 0


def test_resume_from_latest(trained, change, capfd):
    fork = change(trained, name="fork", **{"train.resume_from": str(trained.folder / "checkpoints" / "latest")})
    assert train(change(fork, **{"train.steps": 8, "train.allow_changes": ["train.steps"]})) == 0
    assert "resuming after step 6" in capfd.readouterr().err and steps(fork) == [7, 8]


def test_allow_changes_allows_only_what_it_names(trained, change):
    longer = change(trained, **{"train.steps": 8})
    with pytest.raises(ConfigError, match=r"train.steps: 6 -> 8\n(.|\n)*write 'train.allow_changes=\[train.steps\]'"):
        train(longer)
    with pytest.raises(ConfigError, match=r"train.allow_changes: unknown key train.step; did you mean train.steps\?"):
        train(change(longer, **{"train.allow_changes": ["train.step"]}))
    with pytest.raises(ConfigError, match=r"optim.lr: 0.01 -> 0.02"):
        train(change(longer, **{"train.allow_changes": ["train.steps"], "optim.lr": 0.02}))
    assert train(change(longer, **{"train.allow_changes": ["train.steps"]})) == 0
    assert steps(trained) == list(range(9))
    assert train(longer) == 0  # The new value is now part of the run's config.


def test_checkpoint_beyond_the_last_step_is_refused(trained, change):
    shorter = change(trained, **{"train.steps": 4, "train.allow_changes": ["train.steps"]})
    with pytest.raises(ConfigError, match=r"step_6 is beyond the run's last step, 4\. Choose a larger train\.steps"):
        train(shorter)
    assert names(trained) == {"step_2", "step_4", "step_6"}
    assert train(trained) == 0  # The refused start left no trace.


def test_restart_without_a_checkpoint_uses_init_from_again(trained, change):
    source = {"train.init_from": str(trained.folder / "checkpoints" / "step_6")}
    tuned = change(trained, name="tuned", **source, **{"train.steps": 2})
    assert train(tuned) == 0
    before = last_weights(tuned)
    (tuned.folder / "checkpoints" / "step_2" / "model.safetensors").unlink()
    assert train(tuned) == 0
    assert names(tuned) == {"step_2", "step_2.damaged"}
    first, last = (read_jsonl(c.folder / "metrics.jsonl")[i]["val_loss"] for c, i in ((tuned, 0), (trained, -1)))
    assert first == pytest.approx(last, rel=1e-5)
    assert all(torch.equal(t, last_weights(tuned)[n]) for n, t in before.items())


@pytest.mark.parametrize("folder", ["a checkpoint", "an export", "transformers", "bare"])
def test_init_from_with_another_tokenizer_is_refused(folder, trained, change, token_folder, tmp_path):
    source = trained.folder / "checkpoints" / "step_6"
    if folder != "a checkpoint":
        source = shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    if folder == "an export":
        shutil.copy(token_folder / "tokenizer.model", source)
    if folder == "transformers":
        LlamaTokenizer.from_pretrained(token_folder).save_pretrained(source)
    prepare_data([token_folder.parent / "words.jsonl"], tmp_path / "other", vocab_size=280, progress=False)
    same = change(trained, name="same", **{"train.init_from": str(source)})
    other = change(same, name="other", **{"data.path": str(tmp_path / "other")})
    if folder == "bare":  # The folder does not say which tokenizer the model was trained with.
        assert train(other) == 0
        return
    with pytest.raises(ConfigError, match=r"was trained with another tokenizer than data\.path="):
        train(other)
    if folder != "transformers":
        assert train(same) == 0


def test_checkpoint_metadata(trained):
    state = json.loads((trained.folder / "checkpoints" / "step_6" / "state.json").read_text())
    record = json.loads((trained.folder / "run.json").read_text())
    assert (state["step"], state["tokens"], state["processes"]) == (6, 6 * 64, 1)
    assert state["run"] == record["id"] and state["identity"] == record["identity"]
    assert state["versions"]["torch"] == torch.__version__
    assert state["val_loss"] == read_jsonl(trained.folder / "metrics.jsonl")[-1]["val_loss"]


def test_resume_restores_random_states_and_unwritten_rows(tmp_path):
    path = save(tmp_path, 4, run="its id", unwritten=[{"step": 3}])
    drawn = torch.rand(3)
    state = TrainState(GLALMForCausalLM.from_pretrained(path), [])
    assert resume_run(path, state, 1, "its id") == [{"step": 3}]
    assert (state.step, state.tokens) == (4, 9)
    assert torch.equal(torch.rand(3), drawn)  # The generators are in the saved state again.
    assert resume_run(path, state, 1, "a fork's id") == []


def test_non_finite_validation_loss_is_not_logged(run_config, change, monkeypatch):
    """metrics.jsonl leaves out NaN, which is not JSON, and the checkpoint with that loss is never the best."""
    from glalm.train import trainer

    losses = iter([9.0, math.nan, 3.0, 4.0])
    monkeypatch.setattr(trainer.Trainer, "validate", lambda *a, **k: {"val_loss": next(losses), "val_perplexity": 1.0})
    keep = {"train.eval_every": 2, "train.checkpoint.keep_last": 1, "train.checkpoint.keep_best": 1}
    config = change(run_config, **keep)
    assert train(config) == 0
    assert names(config) == {"step_4", "step_6"}
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row.get("val_loss") for row in found] == [9.0, None, None, None, 3.0, None, 4.0]
    assert found[2]["val_perplexity"] == 1.0


def test_best_checkpoint_is_kept(trained, change, monkeypatch):
    from glalm.train import trainer

    losses = iter([9.0, 5.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(trainer.Trainer, "validate", lambda *a, **k: {"val_loss": next(losses)})
    keep = {"train.eval_every": 2, "train.checkpoint.keep_last": 1, "train.checkpoint.keep_best": 1, "train.steps": 8}
    config = change(trained, name="best", **keep)
    assert train(config) == 0
    assert names(config) == {"step_4", "step_8"}
    with pytest.raises(ConfigError, match=r"multiple of train\.eval_every=3"):
        change(config, **{"train.eval_every": 3})


def test_fork_reads_the_data_that_its_origin_read(trained, change, tmp_path):
    folder = shutil.copytree(trained.data.path, tmp_path / "set")
    config = change(trained, name="first", **{"data.path": str(folder)})
    assert train(config) == 0
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps({"text": "alpha omega " * n}) + "\n" for n in range(40, 90))
    )
    prepare_data([f"more={tmp_path / 'more.jsonl'}"], folder, add=True, progress=False)
    origin = config.folder / "checkpoints" / "step_4"
    fork = change(config, name="fork", **{"train.resume_from": str(origin)})
    assert train(fork) == 0
    assert all(torch.equal(t, last_weights(fork)[n]) for n, t in last_weights(config).items())

    link = config.folder.parent / "link"
    link.symlink_to(origin.resolve())
    assert train(change(fork, name="linked", **{"train.resume_from": str(link)})) == 0

    (config.folder / "data.json").unlink()  # as if the checkpoint had been moved away from its run
    with pytest.raises(ConfigError, match=r"data tokens: [\d]+ -> [\d]+"):
        train(change(fork, name="another"))
    allowed = {"train.allow_changes": ["data tokens"]}
    assert train(change(fork, name="grown", **allowed)) == 0
    assert any(not torch.equal(t, last_weights(change(fork, name="grown"))[n]) for n, t in last_weights(config).items())


def test_origin_is_remembered_by_starts_without_resume_from(trained, change, capfd):
    source = {"train.resume_from": str(trained.folder / "checkpoints" / "step_4")}
    fork = change(trained, name="fork", **{"train.checkpoint.every": 1, "train.allow_changes": ["train.steps"]})
    assert train(change(fork, **source)) == 0
    assert train(change(fork, **{"train.steps": 8})) == 0
    assert train(change(fork, **source, **{"train.steps": 9})) == 0
    assert "resuming after step 8" in capfd.readouterr().err and steps(fork) == [5, 6, 7, 8, 9]


def test_tokens_count_what_was_trained_on(trained, change):
    keys = ["train.steps", "train.batch_size"]
    more = change(trained, **{"train.steps": 8, "train.batch_size": 8, "train.allow_changes": keys})
    assert train(more) == 0
    found = {row["step"]: row["tokens"] for row in read_jsonl(more.folder / "metrics.jsonl") if "tokens" in row}
    assert (found[6], found[7], found[8]) == (6 * 64, 6 * 64 + 128, 6 * 64 + 256)
    assert train(change(more, **{"train.steps": 9})) == 0  # The count also survives a resume.
    assert read_jsonl(more.folder / "metrics.jsonl")[-1]["tokens"] == 6 * 64 + 3 * 128


def test_set_aside_again_keeps_what_was_set_aside_before(tmp_path):
    asides = [set_aside(save(tmp_path, 5, n=n), "damaged") for n in (1, 2, 3)]
    assert [path.name for path in asides] == ["step_5.damaged", "step_5.damaged2", "step_5.damaged3"]
    assert [checkpoint.read_metadata(path)["n"] for path in asides] == [1, 2, 3]
    assert latest_checkpoint(tmp_path) is None


def test_checkpoints_are_found_by_name(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (2, 10, 9):
        save(tmp_path, step)
    for name in (".step_11.tmp", "step_12.damaged"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path).name == newest_valid_checkpoint(tmp_path).name == "step_10"
    assert find_checkpoint(tmp_path, "step_9").name == "step_9"
    with pytest.raises(CheckpointError, match=r"no checkpoint step_3 .*checkpoints: step_2, step_9, step_10"):
        find_checkpoint(tmp_path, "step_3")
    for elsewhere in ("../" + tmp_path.name + "/step_9", "..", "."):
        with pytest.raises(CheckpointError, match=r"no checkpoint .* in"):
            find_checkpoint(tmp_path, elsewhere)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_12.damaged", "step_2", "step_9"]


def test_lock_is_released_when_the_context_ends(tmp_path):
    with (
        lock_run_dir(tmp_path),
        pytest.raises(ConfigError, match=rf"in use by another run: process {os.getpid()} on "),
        lock_run_dir(tmp_path),
    ):
        pass
    with lock_run_dir(tmp_path):
        check_filesystem(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
