"""Locking a run's directory, resuming a run, and what a resumed run may change."""

import dataclasses
import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from injection import before_steps, fail
from safetensors.torch import load_file
from transformers import LlamaTokenizer

from glalm.config.run import CheckpointConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from glalm.config.strict import ConfigError, RunError
from glalm.data.files import read_jsonl, try_lock
from glalm.hf import GLALMForCausalLM
from glalm.model.config import ModelConfig
from glalm.model.decoder import CausalLM
from glalm.prepare.pipeline import prepare_data
from glalm.train import checkpoint, run_lock
from glalm.train.checkpoint import CheckpointError, CheckpointSaver, latest_checkpoint, list_checkpoints
from glalm.train.metrics import read_metrics
from glalm.train.run_dir import (
    check_filesystem,
    find_checkpoint,
    newest_valid_checkpoint,
    remove_leftovers,
    resume_run,
    set_aside,
)
from glalm.train.run_lock import RunLock, lock_run_dir
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
        with pytest.raises(ConfigError, match=r"step_4 is of another config:\n  optim.lr: 0.01 -> 0.02\n  seed"):
            train(change(copy, **wrong))
        assert not (copy.folder / "run.json").exists()
        assert train(change(copy, **wrong, **{"train.allow_changes": ["optim.lr", "seed"]})) == 0
        assert steps(copy) == [5, 6]
        shutil.rmtree(copy.folder)
    assert train(change(copy, **wrong)) == 0
    shutil.rmtree(copy.folder / "checkpoints")
    shutil.copytree(trained.folder / "checkpoints" / "step_4", copy.folder / "checkpoints" / "step_4")
    with pytest.raises(ConfigError, match=r"step_4 is of another config"):
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
    with pytest.raises(ConfigError, match=r"step_4 is of another config:\n  optim.lr: 0.01 -> 0.02\n"):
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


@pytest.mark.parametrize(
    "warmup",
    [{"warmup_steps": None, "warmup_tokens": 100}, {"warmup_steps": 3}, {"warmup_steps": None, "warmup_tokens": 300}],
    ids=str,
)
def test_interruptions_after_a_change_of_the_batch_change_no_bit(run_config, change, warmup):
    """The learning rate depends on how many tokens the warm-up had, in batches of 4 and then of 8 sequences."""
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, **warmup)
    by_tokens = dataclasses.replace(run_config.train, steps=None, tokens=800)
    checkpoints = {"train.checkpoint.every": 1, "train.checkpoint.keep_last": 99}
    small = change(run_config, name="small", optim=optim, train=by_tokens, **checkpoints)
    assert train(small) == 0
    resume = {"train.batch_size": 8, "train.resume_from": str(small.folder / "checkpoints" / "step_4")}
    large = change(small, name="large", **resume, **{"train.allow_changes": ["train.batch_size"]})
    assert train(large) == 0
    cut = change(large, name="cut")
    for _ in range(2):
        with before_steps({2: fail}), pytest.raises(RuntimeError):
            train(cut)
    assert train(cut) == 0
    rates = [[(row["step"], row["lr"]) for row in read_jsonl(c.folder / "metrics.jsonl")] for c in (large, cut)]
    assert rates[0] == rates[1] and rates[0][-1][0] == 9
    assert all(torch.equal(weight, last_weights(cut)[name]) for name, weight in last_weights(large).items())


def test_a_parameter_that_another_optimizer_takes_over_starts_with_empty_moments(trained, change):
    """AdamW for 6 steps, then Muon for 1, then AdamW for 2."""

    def read_moments(config) -> tuple[set[str], float, float | None]:
        stored = load_file(latest_checkpoint(config.folder / "checkpoints") / "training.safetensors")
        matrix = "model.layers.0.mlp.up_proj.weight"
        keys = {name.split(".")[1] for name in stored if name.endswith(matrix)}
        counts = [stored.get(f"optim.step.{name}") for name in ("model.embeddings.weight", matrix)]
        return keys, *(count if count is None else count.item() for count in counts)

    allowed = {"train.allow_changes": ["optim", "train.steps"]}
    muon = change(trained, **allowed, **{"train.steps": 7, "optim.name": "muon"})
    assert train(muon) == 0
    assert read_moments(muon) == ({"momentum_buffer"}, 7, None)
    assert train(change(muon, **{"train.steps": 9, "optim.name": "adamw"})) == 0
    assert read_moments(muon) == ({"step", "exp_avg", "exp_avg_sq"}, 9, 2)


@pytest.mark.parametrize("batch_size, last_step", [(8, 7), (2, 10), (3, 9)])
def test_a_total_of_tokens_holds_for_another_batch(trained, change, batch_size, last_step):
    """Half of the tokens were read in batches of 4. The others take more or fewer steps, rounded up."""
    total = dataclasses.replace(trained.train, steps=None, tokens=512)
    config = change(trained, name="tokens", train=total)
    assert train(config) == 0
    assert steps(config)[-1] == 8
    origin = str(config.folder / "checkpoints" / "step_6")
    keys = {"train.batch_size": batch_size, "train.micro_batch_size": 1, "train.allow_changes": ["train.batch_size"]}
    fork = change(config, name="fork", **keys, **{"train.resume_from": origin})
    assert train(fork) == 0
    rows = read_jsonl(fork.folder / "metrics.jsonl")
    assert rows[-1]["step"] == last_step and 512 <= rows[-1]["tokens"] < 512 + 16 * batch_size
    assert rows[-1]["lr"] == pytest.approx(1e-3) and "val_loss" in rows[-1]
    shorter = change(fork, **{"train.tokens": 300, "train.allow_changes": ["train.tokens"]})
    with pytest.raises(ConfigError, match=r"is beyond the run's last step, \d\. Choose a larger train\.tokens"):
        train(shorter)


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


@pytest.mark.parametrize("removed", [".lock", "folder"])
def test_a_lock_that_was_removed_is_renewed(tmp_path, removed):
    folder = tmp_path / "run"
    folder.mkdir()
    with lock_run_dir(folder) as lock:
        assert not lock.renew()
        shutil.rmtree(folder) if removed == "folder" else (folder / ".lock").unlink()
        assert lock.renew() and not lock.renew()
        with pytest.raises(ConfigError, match="in use by another run"), lock_run_dir(folder):
            pass
    with lock_run_dir(folder):
        pass


def test_a_lock_whose_folder_was_copied_back_is_renewed(tmp_path):
    """A backup of the folder has the text of this run's lock. A lock file that is empty belongs to nobody."""
    with lock_run_dir(tmp_path) as lock:
        for content in ((tmp_path / ".lock").read_text(), ""):
            (tmp_path / ".lock").unlink()
            (tmp_path / ".lock").write_text(content)
            assert lock.renew() and not lock.renew()


@pytest.mark.parametrize("other_is_running", [True, False])
def test_a_run_whose_lock_another_took_stops(tmp_path, other_is_running):
    """After another run has written to the folder, what this one would write does not belong there."""
    with lock_run_dir(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        other = RunLock(tmp_path)
        other._holder = "process 1 on another machine"
        other.acquire()
        if not other_is_running:
            other.release()
        with pytest.raises(RunError, match=r"used by another run: process 1 on another machine\. This run stops"):
            lock.renew()


FOLDER_EVENTS = ["remove the lock", "remove the folder", "empty the lock", "copy the folder", "start another run"]


@given(events=st.lists(st.sampled_from(FOLDER_EVENTS), max_size=6), order=st.permutations([0, 1, 2, 3, 4, 5, 6]))
@settings(max_examples=60)
def test_at_most_one_run_keeps_a_folder(tmp_path_factory, events, order):
    """Whatever happens to the folder, once every run has checked its lock, at most one of them still may write."""
    folder = tmp_path_factory.mktemp("locks") / "run"
    runs = []

    def start_run() -> None:
        folder.mkdir(exist_ok=True)
        lock = RunLock(folder)
        lock._holder = f"process {len(runs)} on this machine"
        with suppress(ConfigError):
            lock.acquire()
            runs.append(lock)

    start_run()
    for event in events:
        path = folder / ".lock"
        content = path.read_text() if path.exists() else ""
        if event == "remove the folder":
            shutil.rmtree(folder, ignore_errors=True)
        elif event == "start another run":
            start_run()
        elif path.exists():
            path.unlink()
            if event != "remove the lock":
                path.write_text(content if event == "copy the folder" else "")
    remaining = []
    for i in order:
        if i < len(runs):
            with suppress(RunError):
                runs[i].renew()
                remaining.append(runs[i])
    for _ in range(2):
        for lock in [*remaining]:
            try:
                assert not lock.renew()
            except RunError:
                remaining.remove(lock)
    for lock in runs:
        lock.release()
    assert len(remaining) <= 1


def test_a_name_that_goes_while_it_is_locked_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    """The name is removed between opening the file and locking it."""
    removals = iter([True, False])

    def lock_slowly(file):
        if next(removals, False):
            (tmp_path / ".lock").unlink()
        return try_lock(file)

    monkeypatch.setattr(run_lock, "try_lock", lock_slowly)
    with lock_run_dir(tmp_path) as lock:
        assert not lock.renew()


@pytest.mark.parametrize("removed", [".lock", "content", "folder"])
def test_a_folder_that_is_removed_during_the_run_is_restored(run_config, change, capfd, removed):
    """The run says so, and saves at once, so that it can be resumed and evaluated."""
    config = change(run_config, **{"train.checkpoint.every": 6})

    def remove():
        (config.folder / ".lock").unlink()
        if removed != ".lock":
            shutil.rmtree(config.folder)
        if removed == "content":
            config.folder.mkdir()

    with before_steps({3: remove}):
        assert train(config) == 0
    printed = capfd.readouterr().err
    if removed == ".lock":
        assert "warning: " in printed and ".lock was removed while the run was training. It is locked again" in printed
        assert names(config) == {"step_6"} and steps(config) == list(range(7))
    else:
        assert f"warning: {config.folder} was removed or emptied while the run was training" in printed
        assert names(config) == {"step_3", "step_6"} and steps(config) == [3, 4, 5, 6]
    assert train(config) == 0
    assert "resuming after step 6" in capfd.readouterr().err


def test_a_run_whose_lock_was_taken_writes_nothing_more(run_config, capfd):
    other = RunLock(run_config.folder)
    other._holder = "process 1 on another machine"

    def take():
        (run_config.folder / ".lock").unlink()
        other.acquire()

    with before_steps({4: take}), pytest.raises(RunError, match="used by another run: process 1 on another machine"):
        train(run_config)
    other.release()
    assert names(run_config) == {"step_2"} and steps(run_config) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ Missing checkpoints


def take_away(config, how: str) -> None:
    """Make the checkpoints invisible, as a disk does that is not mounted."""
    folder = config.folder / "checkpoints"
    away = folder.rename(config.folder.parent / "away")
    if how == "dangling link":
        folder.symlink_to(away / "not mounted")
    elif how == "empty folder":
        folder.mkdir()
    elif how == "file":
        folder.touch()
    elif how == "folder and run.json":
        (config.folder / "run.json").unlink()


@pytest.mark.parametrize("how", ["folder", "dangling link", "empty folder", "file", "folder and run.json"])
def test_a_run_whose_checkpoints_are_away_is_refused(trained, how):
    before = (trained.folder / "metrics.jsonl").read_bytes()
    take_away(trained, how)
    with pytest.raises(
        ConfigError, match=r"checkpoints.* bring them back, then run the same command.*name=\.\.\. or remove"
    ):
        train(trained)
    assert (trained.folder / "metrics.jsonl").read_bytes() == before
    if (trained.folder / "checkpoints").is_symlink() or (trained.folder / "checkpoints").is_file():
        (trained.folder / "checkpoints").unlink()
    (trained.folder.parent / "away").rename(trained.folder / "checkpoints")
    assert train(trained) == 0
    assert (trained.folder / "metrics.jsonl").read_bytes() == before


def test_a_fork_whose_checkpoints_are_away_does_not_start_again(trained, change):
    """A requeued job names the checkpoint from which it began, and must not begin there again."""
    fork = change(trained, name="fork", **{"train.resume_from": str(trained.folder / "checkpoints" / "step_2")})
    assert train(fork) == 0
    take_away(fork, "empty folder")
    with pytest.raises(ConfigError, match=r"records that step 6 was saved, but .*checkpoints has no checkpoint"):
        train(fork)
    assert steps(fork) == [3, 4, 5, 6]


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(run_config, change):
    config = change(run_config, **{"train.checkpoint.every": 5})
    with before_steps({4: fail}), pytest.raises(RuntimeError, match="injected"):
        train(config)
    assert steps(config) == [0, 1, 2, 3]
    assert train(config) == 0
    assert steps(config) == list(range(7))
    superseded = read_jsonl(config.folder / "metrics.superseded.jsonl")
    assert [row["step"] for row in superseded] == [1, 2, 3]


def test_a_newest_checkpoint_that_is_gone_is_reported(trained, capfd):
    (trained.folder / "checkpoints" / "step_60.superseded").mkdir()  # It is of another step.
    (trained.folder / "checkpoints" / "step_6").rename(trained.folder / "step_6")
    assert train(trained) == 0
    printed = capfd.readouterr().err
    assert "step_6 was saved but is not there any more. The run resumes from step_4" in printed
    assert [row["step"] for row in read_jsonl(trained.folder / "metrics.superseded.jsonl")] == [5, 6]


# -------------------------------------------------------------------------------------------------------- Odd entries


def test_checkpoints_that_cannot_be_a_folder_are_refused(run_config):
    run_config.folder.mkdir(parents=True)
    (run_config.folder / "checkpoints").touch()
    with pytest.raises(ConfigError, match=r"checkpoints cannot be a folder of checkpoints .*Move it away"):
        train(run_config)


def refuse_to_read(monkeypatch, function: str, name: str) -> None:
    """Let a function of `os`, or Path.open, refuse paths that end with `name`, as without permission."""
    owner = Path if function == "open" else os
    original = getattr(owner, function)

    def refuse(path, *args, **options):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(owner, function, refuse)


@pytest.mark.parametrize(
    "function, name, message",
    [
        (
            "open",
            "metrics.jsonl",
            r"metrics\.jsonl cannot be read: Permission denied\. Make it readable",
        ),
        ("listdir", "checkpoints", r"The checkpoints in .* cannot be listed: Permission denied"),
        ("open", "step_6/manifest.json", r"cannot be read: Permission denied\. .*step_6 may be undamaged"),
        ("open", "words/manifest.json", r"data\.path=.*manifest\.json cannot be read: Permission denied"),
    ],
)
def test_what_cannot_be_read_is_not_taken_for_missing(trained, monkeypatch, function, name, message):
    before = (trained.folder / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        refuse_to_read(patch, function, name)
        with pytest.raises((ConfigError, RunError), match=message):
            train(trained)
    assert (trained.folder / "metrics.jsonl").read_bytes() == before
    assert names(trained) == {"step_2", "step_4", "step_6"}
    assert train(trained) == 0


def test_set_aside_does_not_replace_a_link(tmp_path):
    path = save(tmp_path, 5)
    (tmp_path / "step_5.damaged").symlink_to(tmp_path / "away")
    assert set_aside(path, "damaged").name == "step_5.damaged2"


def test_a_damaged_record_is_read_from_the_newest_checkpoint(trained, capfd):
    before = json.loads((trained.folder / "run.json").read_text())
    (trained.folder / "run.json").write_text("")
    assert train(trained) == 0
    assert "run.json is damaged: it is empty" in capfd.readouterr().err
    after = json.loads((trained.folder / "run.json").read_text())
    assert (after["id"], after["identity"], after["saved"]) == (before["id"], before["identity"], 6)


def test_a_damaged_record_does_not_hide_another_config(trained, change):
    (trained.folder / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is of another config:\n  optim\.lr: 0\.01 -> 0\.02"):
        train(change(trained, **{"optim.lr": 0.02}))
    forget = [path for path in (trained.folder / "checkpoints").iterdir()]
    for path in forget:
        shutil.rmtree(path)
    with pytest.raises(ConfigError, match=r"run\.json is damaged: .*no checkpoint in .* has a copy of it\. .*remove "):
        train(trained)


RUN_FILES = ["run.json", "data.json", "metrics.jsonl", "checkpoints", ".lock"]
CHECKPOINT_FILES = ["manifest.json", "state.json", "config.json", "model.safetensors", "training.safetensors"]
DAMAGED_PATHS = [
    *RUN_FILES,
    "checkpoints/.step_6.tmp",
    *(f"checkpoints/step_{step}{name}" for step in (4, 6) for name in ("", *(f"/{file}" for file in CHECKPOINT_FILES))),
]
CONTENTS = [b"", b"{}", b"[1, 2]", b'{"files": {}}', b"\xff\xfe", b"[" * 9999, b"null", b"3", bytes(50)]


def damage(path, kind: str, content: bytes) -> None:
    """Remove, cut or replace what has this name."""
    before = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    if kind == "cut":
        path.write_bytes(before[: len(before) // 2])
    elif kind == "content":
        path.write_bytes(content)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("away")
    elif kind == "pipe":
        os.mkfifo(path)


@pytest.fixture(scope="module")
def finished_run(token_folder, tmp_path_factory):
    """The folder of a finished run, of which tests damage copies."""
    config = RunConfig(
        name="tiny",
        runs_dir=str(tmp_path_factory.mktemp("finished")),
        model=ModelConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_heads=1, intermediate_size=16),
        data=DataConfig(path=str(token_folder), seq_len=16),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(
            steps=6, batch_size=2, eval_every=6, eval_sequences=2, log_every=1, checkpoint=CheckpointConfig(every=2)
        ),
    )
    assert train(config) == 0
    return config


def check_damaged_run(config: RunConfig, damages: list[tuple[str, str, bytes]], folder) -> None:
    """Damage a copy of a run and start it: it trains to the end, or ends with an error that names a damaged path."""
    copy = dataclasses.replace(config, runs_dir=str(folder))
    shutil.copytree(config.folder, copy.folder)
    before = {row["step"] for row in read_metrics(copy.folder / "metrics.jsonl")[0]}
    for name, kind, content in damages:
        if (copy.folder / name).parent.is_dir():
            damage(copy.folder / name, kind, content)
    is_metrics_damaged = any(name == "metrics.jsonl" for name, _, _ in damages)
    try:
        assert train(copy) == 0
        assert max(list_checkpoints(copy.folder / "checkpoints")) == 6
        after = {row["step"] for row in read_jsonl(copy.folder / "metrics.jsonl")}
    except (ConfigError, RunError) as error:
        names = [name.rpartition("/")[2] for name, _, _ in damages]
        if (copy.folder / "checkpoints").is_dir() and not list_checkpoints(copy.folder / "checkpoints"):
            names.append("checkpoints")  # The error names none of the checkpoints, because all are away.
        assert any(name in str(error) for name in names), error
        after = before if is_metrics_damaged else {row["step"] for row in read_jsonl(copy.folder / "metrics.jsonl")}
    assert after >= before or is_metrics_damaged


DAMAGES = st.tuples(
    st.sampled_from(DAMAGED_PATHS),
    st.sampled_from(["remove", "cut", "content", "folder", "dangling link", "pipe"]),
    st.sampled_from(CONTENTS),
)


@given(damages=st.lists(DAMAGES, min_size=1, max_size=2, unique_by=lambda item: item[0]))
@example(damages=[(f"checkpoints/step_{step}", "remove", b"") for step in (4, 6)])
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
def test_a_damaged_run_goes_on_or_names_the_damage(finished_run, tmp_path_factory, damages):
    check_damaged_run(finished_run, damages, tmp_path_factory.mktemp("damaged"))


@pytest.mark.slow
@given(damages=st.lists(DAMAGES, min_size=1, max_size=4, unique_by=lambda item: item[0]))
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_many_damaged_runs_go_on_or_name_the_damage(finished_run, tmp_path_factory, damages):
    check_damaged_run(finished_run, damages, tmp_path_factory.mktemp("damaged"))
