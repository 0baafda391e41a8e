import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hydra.core.plugins import Plugins
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from glalm.config.strict import ConfigError, RunError
from glalm.evals import plot
from glalm.evals.identity import group_comparable
from glalm.evals.result_files import current_results
from glalm.model.mixers import MIXERS, import_mixer
from glalm.model.mixers.gla import GLAOptions
from glalm.studies import mqar, mqar_sweep
from glalm.studies.mqar import Examples, Job, MQARConfig, RecallModel, draw_associative_recall, draw_examples
from glalm.train.run_lock import lock_run_dir

ROOT = Path(__file__).parents[2]


@st.composite
def recall_tasks(draw) -> tuple[int, int, int]:
    """Draw length, pairs and vocab_size of associative recall."""
    pairs = draw(st.integers(1, 12))
    return 2 * draw(st.integers(2 * pairs, 40)), pairs, draw(st.integers(2 * pairs + 2, 60))


def draw(count: int = 300, length: int = 64, pairs: int = 8, seed: int = 0, **task) -> Examples:
    return draw_examples(count, length, pairs, torch.Generator().manual_seed(seed), **{"vocab_size": 256} | task)


@pytest.mark.parametrize("filler", ["zero", "random"])
def test_a_solver_that_looks_keys_up_is_always_right(filler):
    task = draw(filler=filler)
    for row, queries, values in zip(task.inputs.tolist(), task.queries.tolist(), task.values.tolist(), strict=True):
        known = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert [known[row[q]] for q in queries] == values
        assert sorted(row[q] for q in queries) == sorted(known)  # each key once


def test_keys_and_values_are_of_their_halves_and_different():
    task = draw()
    keys, values = task.inputs[:, 0:16:2], task.inputs[:, 1:16:2]
    assert keys.min() >= 1 and keys.max() < 128 <= values.min() and values.max() < 256
    for x in (keys, values, task.queries):
        assert all(len(set(row)) == 8 for row in x.tolist())
    assert keys.unique().numel() == 127 and values.unique().numel() == 128  # all of them are used


def test_queries_lie_at_the_beginning_of_the_slots_that_follow_and_all_else_is_filler():
    task = draw()
    assert (task.queries >= 16).all() and (task.queries < 64).all() and (task.queries % 2 == 0).all()
    rest = torch.ones_like(task.inputs, dtype=torch.bool).scatter(1, task.queries, False)
    rest[:, :16] = False
    assert (task.inputs[rest] == 0).all()
    assert (draw(filler="random").inputs[rest] == 0).float().mean() < 0.05


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_follow_the_power_law(power):
    task = draw(count=20_000, length=18, pairs=1, power=power)
    slots = (task.queries[:, 0] - 2) // 2
    p = torch.arange(1, 9).double() ** (power - 1)
    torch.testing.assert_close(slots.bincount(minlength=8) / 20_000, (p / p.sum()).float(), atol=0.012, rtol=0)


def test_later_slots_are_drawn_from_those_that_are_left():
    task = draw(count=20_000, length=8, pairs=2, power=0.01)  # two slots for two keys: the other one is left
    first, second = ((task.queries - 4) // 2).T
    assert (first + second == 1).all()
    assert (first == 0).double().mean() == pytest.approx(1 / (1 + 2**-0.99), abs=0.012)


def test_the_generator_decides():
    assert torch.equal(draw().inputs, draw().inputs)
    assert not torch.equal(draw().inputs, draw(seed=1).inputs)


@given(shape=recall_tasks(), seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_reader_of_associative_recall_knows_every_repeated_key(shape, seed):
    """Read each sequence token by token, knowing only that the vocabulary's lower half are keys."""
    length, pairs, vocab_size = shape
    task = draw_associative_recall(8, length, pairs, torch.Generator().manual_seed(seed), vocab_size)
    for row, queries, answers in zip(task.inputs.tolist(), task.queries.tolist(), task.values.tolist(), strict=True):
        asked = {position: answer for position, answer in zip(queries, answers, strict=True)}
        known = {}
        for position, token in enumerate(row):
            assert 0 <= token < vocab_size
            if position == length - 2:
                assert token == 0 and position not in asked
            elif token < vocab_size // 2:
                assert token > 0
                following = row[position + 1] if position < length - 1 else known[token]
                assert asked.pop(position) == following == known.setdefault(token, following) >= vocab_size // 2
            else:
                assert position not in asked
        assert not asked and 1 <= len(known) <= pairs


def test_associative_recall_draws_keys_values_and_the_query_evenly():
    task = draw_associative_recall(4000, 34, 4, torch.Generator().manual_seed(0), 10)  # keys 1 to 4, values 5 to 9
    keys = task.inputs.gather(1, task.queries)
    for token_ids, expected in ((keys[:, 0], 1000), (keys[:, -1], 1000), (task.values[:, 0], 800)):
        counts = [count for count in token_ids.bincount().tolist() if count]
        assert len(counts) == 4000 / expected
        assert counts == pytest.approx([expected] * len(counts), abs=130)  # about five standard deviations
    pairs_of_first_keys = keys[:, 0] * 10 + task.values[:, 0]
    assert pairs_of_first_keys.unique().numel() == 4 * 5  # each sequence has a dictionary of its own


def test_associative_recall_is_tested_at_the_last_key_alone():
    shape = {"lengths": [32], "pairs": [4], "vocab_size": 10}
    config = MQARConfig(task="associative_recall", **shape, train_examples=5, test_examples=3)
    job = Job("gla", 32, 4, 16, 1e-3)
    training, test = mqar.draw_sets(config, job, torch.Generator().manual_seed(1))
    assert training.queries.tolist() == [[*range(0, 30, 2), 31]] * 5 and training.values.shape == (5, 16)
    assert test.queries.tolist() == [[31]] * 3 and test.values.shape == (3, 1)
    again = mqar.draw_sets(config, job, torch.Generator().manual_seed(1))
    assert torch.equal(test.inputs, again[1].inputs) and not torch.equal(training.inputs[:3], test.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["hyena", "gla", "attention"])
def test_mixers_learn_associative_recall(mixer):
    torch.set_num_threads(1)
    task = {"task": "associative_recall", "lengths": [64], "pairs": [4], "vocab_size": 10}
    config = MQARConfig(**task, train_examples=2000, test_examples=300, epochs=12, batch_size=32)
    result = mqar.train(config, Job(mixer, 64, 4, 64, 1e-3), torch.device("cpu"))
    assert result["accuracy"] >= 0.99  # 0.25 for a guess among the values that occurred


SMALL = MQARConfig(
    lengths=[16],
    pairs=[2],
    vocab_size=32,
    train_examples=4000,
    test_examples=200,
    epochs=12,
    batch_size=64,
    weight_decay=0.0,
    stop_at=0.9,
    model=RecallModel(num_hidden_layers=1, gla=GLAOptions(short_conv=2)),
)


def test_the_task_is_learnt():
    torch.set_num_threads(1)
    before = torch.random.get_rng_state()
    result = mqar.train(SMALL, Job("gla", 16, 2, 32, 1e-2), torch.device("cpu"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert result["accuracy"] >= 0.9  # chance is 1/16
    assert result["epochs"] == len(result["history"]) < 12  # it ended early
    assert result["history"][-1] == result["accuracy"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_interrupted_model_goes_on_as_if_it_had_not_been(device, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, train_examples=320, epochs=4, stop_at=2.0)
    job, partial = (Job("gla", 16, 2, 32, 1e-2), torch.device(device)), tmp_path / "partial/x.safetensors"
    models, build_model = [], mqar.build_model
    monkeypatch.setattr(mqar, "build_model", lambda *given: models.append(build_model(*given)) or models[-1])
    whole, measured, accuracy = mqar.train(config, *job), [], mqar.measure_accuracy

    def killed_in_the_third_epoch(*given):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(accuracy(*given))
        return measured[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mqar, "measure_accuracy", killed_in_the_third_epoch)
        mqar.train(config, *job, partial)
    monkeypatch.setattr(mqar, "measure_accuracy", lambda *given: measured.append(0) or accuracy(*given))
    resumed = mqar.train(config, *job, partial)
    assert measured[2:] == [0, 0]  # two epochs, not more
    measured = measured[:2]
    assert measured == resumed["history"][:2] and len(resumed["history"]) == 4
    models.append(build_model(config, *job))
    trained, _, went_on, first = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    if device == "cpu":
        assert torch.equal(trained, went_on) and resumed["history"] == whole["history"]
    assert (trained - went_on).norm() < 0.1 * (trained - first).norm()  # a GPU's gathers add up in any order


def test_a_partial_model_is_gone_on_from_only_by_its_own_arguments(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, train_examples=64, epochs=2, stop_at=2.0)
    job, cpu, partial = Job("gla", 16, 2, 32, 1e-2), torch.device("cpu"), tmp_path / "partial/x.safetensors"
    first = mqar.train(config, job, cpu, partial)
    monkeypatch.setattr(mqar, "measure_accuracy", lambda *_: 0.5)  # so that an epoch more can be told
    assert mqar.train(config, job, cpu, partial)["history"] == first["history"]  # complete: nothing is trained
    for other, changed in (
        ({"seed": 2}, job),
        ({"epochs": 1}, job),
        ({}, dataclasses.replace(job, lr=1e-3)),
        ({}, dataclasses.replace(job, mixer="linear")),
    ):
        copy = tmp_path / "copy.safetensors"
        copy.write_bytes(partial.read_bytes())
        assert 0.5 in mqar.train(dataclasses.replace(config, **other), changed, cpu, copy)["history"]
    solved = mqar.train(dataclasses.replace(config, stop_at=0.5), job, cpu, tmp_path / "solved.safetensors")
    assert solved["history"] == [0.5]
    monkeypatch.setattr(mqar, "measure_accuracy", lambda *_: pytest.fail("it was solved"))
    assert mqar.train(dataclasses.replace(config, stop_at=0.5), job, cpu, tmp_path / "solved.safetensors")[
        "history"
    ] == [0.5]
    partial.write_bytes(partial.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged; remove it"):
        mqar.train(config, job, cpu, partial)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mixer", ["attention", "linear", "gla", "gla+attention", "regla", "retention", "mamba", "mamba2", "deltanet"]
)
def test_captured_steps_train_the_same_model(mixer, monkeypatch):
    """250 examples are three batches of 64 and one of 58: eager, captured and eager steps in turn."""
    config = dataclasses.replace(SMALL, train_examples=250, epochs=5, stop_at=2.0, model=RecallModel())
    models, build_model, device = [], mqar.build_model, torch.device("cuda")
    monkeypatch.setattr(mqar, "build_model", lambda *given: models.append(build_model(*given)) or models[-1])
    for graph in (True, False):
        mqar.train(dataclasses.replace(config, cuda_graph=graph), Job(mixer, 16, 2, 64, 1e-3), device)
    models.append(build_model(config, Job(mixer, 16, 2, 64, 1e-3), device))
    captured, eager, first = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    assert (captured - eager).norm() < 0.1 * (eager - first).norm()  # gathers' gradients add up in any order


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_process_captures_on_one_gpu_after_another():
    config = dataclasses.replace(SMALL, train_examples=250, epochs=2, stop_at=2.0, model=RecallModel())
    first, second = (mqar.train(config, Job("gla", 16, 2, 64, 1e-3), torch.device("cuda", i)) for i in (1, 0))
    assert first["history"] == pytest.approx(second["history"], abs=0.05)


def test_a_long_training_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(mqar, "SECONDS_BETWEEN_MESSAGES", 0)
    config = dataclasses.replace(SMALL, train_examples=16, test_examples=8, epochs=2, stop_at=2.0)
    result = mqar.train(config, Job("gla", 16, 2, 32, 1e-3), torch.device("cpu"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"gla_16x2_d32_lr0.001: accuracy {result['history'][0]:.3f} after 1 of at most 2 epochs, ")
    assert "after 2 of at most 2 epochs" in second


def test_a_model_without_memory_of_its_keys_stays_at_chance():
    config = MQARConfig(**vars(SMALL) | {"epochs": 1, "model": RecallModel()})
    config.model.attention.window = 1  # a token sees itself alone
    result = mqar.train(config, Job("attention", 16, 2, 32, 1e-2), torch.device("cpu"))
    assert result["accuracy"] < 0.2


def test_accuracy_counts_queries():
    model = mqar.build_model(SMALL, Job("gla", 16, 2, 32, 1e-2), torch.device("cpu"))
    task = draw(count=50, length=16, pairs=2, vocab_size=32)
    with torch.no_grad():
        predicted = model(task.inputs).logits.argmax(-1).gather(1, task.queries)
    assert mqar.measure_accuracy(model, Examples(task.inputs, task.queries, predicted), 7) == 1
    wrong = predicted.clone()
    wrong[:5, 0] = (wrong[:5, 0] + 1) % 32
    assert mqar.measure_accuracy(model, Examples(task.inputs, task.queries, wrong), 7) == pytest.approx(0.95)


def test_the_sweep_writes_a_file_a_model_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(
        SMALL, folder=str(tmp_path), mixers=["gla"], widths=[16, 32], learning_rates=[1e-2], train_examples=64, epochs=1
    )
    assert mqar_sweep.main(config) == 0
    files = sorted((tmp_path / "eval").iterdir())
    assert [f.name for f in files] == ["gla_16x2_d16_lr0.01.json", "gla_16x2_d32_lr0.01.json"]
    result = json.loads(files[0].read_text())["results"]
    assert (result["mixer"], result["length"], result["pairs"], result["width"]) == ("gla", 16, 2, 16)
    assert (tmp_path / "plots/mqar.svg").is_file()
    assert not any((tmp_path / "partial").iterdir())
    files[1].unlink()
    mqar_sweep.main(config)
    assert "1 models are trained, at most 1 remain" in capsys.readouterr().out
    assert json.loads(files[1].read_text())["results"]["width"] == 32
    monkeypatch.setattr(mqar_sweep, "train_job", lambda *_: 1 / 0)
    with pytest.raises(RunError, match="2 models were not trained: gla_16x2_d32"):
        mqar_sweep.main(dataclasses.replace(config, seed=2))


def test_sweeps_of_other_settings_share_a_folder(tmp_path, monkeypatch):
    """Neither replaces the other's results, and both are complete afterwards."""
    trained = []

    def train_job(config, job):
        trained.append(config.seed)
        return {"accuracy": config.seed / 10, "epochs": 1, "seconds": 0.0, "parameters": 1, "history": []}

    monkeypatch.setattr(mqar_sweep, "train_job", train_job)
    config = dataclasses.replace(SMALL, folder=str(tmp_path), mixers=["gla"], widths=[16], learning_rates=[1e-2])
    for seed in (1, 2, 1, 2):
        mqar_sweep.main(dataclasses.replace(config, seed=seed))
    assert trained == [1, 2]
    results = [json.loads(path.read_text())["results"]["accuracy"] for path in (tmp_path / "eval").iterdir()]
    assert sorted(results) == [0.1, 0.2]


def test_an_edited_mixer_is_trained_again(tmp_path, monkeypatch):
    """What the user's own file held is part of what a result depends on, and the figure keeps its versions apart."""
    trained = []

    def train_job(config, job):
        trained.append(MIXERS["users_recall:Mine"].version)
        return {"accuracy": trained[-1] / 10, "epochs": 1, "seconds": 0.0, "parameters": 1, "history": []}

    monkeypatch.setattr(mqar_sweep, "train_job", train_job)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code = "from glalm.model.mixers.gla import GatedLinearAttention\nclass Mine(GatedLinearAttention): version = "
    settings = {"folder": str(tmp_path), "widths": [16], "learning_rates": [1e-2]}
    for version in (1, 1, 2, 1):
        (tmp_path / "users_recall.py").write_text(f"{code}{version}\n")
        import_mixer("users_recall:Mine")
        mqar_sweep.main(dataclasses.replace(SMALL, **settings, mixers=["gla+users_recall:Mine"]))
        del MIXERS["users_recall:Mine"], sys.modules["users_recall"]
    assert trained == [1, 2]
    records = current_results(tmp_path)
    assert len(group_comparable(records)) == 1
    labels = []
    monkeypatch.setattr(plot, "_add_legend", lambda ax: labels.extend(line.get_label() for line in ax.lines))
    plot.plot_mqar(records, tmp_path / "x.png")
    assert len(labels) == 2 and all(label.startswith("gla+users_recall:Mine (") for label in labels)


def test_what_one_learning_rate_solves_is_not_trained_at_the_others(tmp_path, monkeypatch):
    tried = []

    def train_job(config, job):
        tried.append((job.width, job.lr))
        accuracy = 0.95 if (job.width, job.lr) in ((64, 1e-2), (32, 1e-3)) else 0.5
        return {"accuracy": accuracy, "epochs": 1, "seconds": 0.0, "parameters": 1, "history": [accuracy]}

    monkeypatch.setattr(mqar_sweep, "train_job", train_job)
    rates = [1e-2, 1e-3, 1e-4]
    config = dataclasses.replace(SMALL, folder=str(tmp_path), mixers=["gla"], widths=[16, 32, 64], learning_rates=rates)
    mqar_sweep.main(config)
    assert tried == [(64, 1e-2), (32, 1e-2), (16, 1e-2), (32, 1e-3), (16, 1e-3), (16, 1e-4)]
    tried.clear()
    (tmp_path / "eval/gla_16x2_d64_lr0.01.json").unlink()
    (tmp_path / "eval/gla_16x2_d32_lr0.01.json").unlink()
    mqar_sweep.main(config)
    assert tried == [(64, 1e-2)]  # 32 is solved, at another rate


def test_a_worker_that_is_killed_is_reported_for_every_model(tmp_path, monkeypatch):
    class BrokenLauncher:
        def launch(self, jobs, initial_job_idx):
            raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_: BrokenLauncher())
    config = dataclasses.replace(SMALL, folder=str(tmp_path), mixers=["gla"], widths=[16, 32], learning_rates=[1e-2])
    with pytest.raises(RunError, match=r"2 models were not trained: .*d32.*terminated abruptly; .*d16"):
        mqar_sweep.main(config)


@pytest.mark.parametrize("part", ["", "eval", "partial", "plots"])
def test_a_folder_that_cannot_be_written_is_named_before_training(part, tmp_path, monkeypatch):
    monkeypatch.setattr(mqar_sweep, "train_job", lambda *_: pytest.fail("models are trained"))
    (tmp_path / "out" / part).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / part).touch()  # no folder
    with pytest.raises(ConfigError, match=r"folder=.*/out: nothing can be written there"):
        mqar_sweep.main(MQARConfig(folder=str(tmp_path / "out")))


@pytest.mark.skipif(os.geteuid() == 0, reason="no permission binds root")
def test_so_is_one_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(mqar_sweep, "train_job", lambda *_: pytest.fail("models are trained"))
    for part in ("eval", "plots"):
        (tmp_path / part).mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"folder=.*Permission denied"):
        mqar_sweep.main(MQARConfig(folder=str(tmp_path)))


def test_a_mixer_for_each_layer():
    for mixer, layers in (("gla+attention", ["gla", "attention"]), ("mamba2", ["mamba2", "mamba2"])):
        model = mqar.build_model(MQARConfig(), Job(mixer, 64, 4, 64, 1e-2), torch.device("cpu"))
        assert model.config.layer_mixers() == layers


def test_both_tasks_share_a_folder(tmp_path):
    shared = {"folder": str(tmp_path), "mixers": ["hyena"], "widths": [16], "learning_rates": [1e-2]}
    config = dataclasses.replace(SMALL, **shared, train_examples=64, epochs=1)
    for task in ("mqar", "associative_recall", "mqar"):
        assert mqar_sweep.main(dataclasses.replace(config, task=task)) == 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "eval").iterdir()]
    assert sorted(record["settings"]["task"] for record in records) == ["associative_recall", "mqar"]


@pytest.mark.parametrize("length", [16, 64])
def test_the_filter_of_hyena_is_as_long_as_the_sequences(length, monkeypatch):
    models = []
    build_model = mqar.build_model
    monkeypatch.setattr(mqar, "build_model", lambda *given: models.append(build_model(*given)) or models[-1])
    config = dataclasses.replace(SMALL, train_examples=4, test_examples=2, epochs=1)
    mqar.train(config, Job("hyena", length, 2, 16, 1e-3), torch.device("cpu"))
    assert [model.model.layers[0].attn.filter.filter_length for model in models] == [length]


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="at least four for each of 20 pairs"):
        MQARConfig(lengths=[64], pairs=[20])
    with pytest.raises(ConfigError, match="must have the same number of entries"):
        MQARConfig(lengths=[64, 128], pairs=[4])
    with pytest.raises(ConfigError, match="power and filler describe task=mqar; remove them"):
        MQARConfig(task="associative_recall", filler="random")
    with pytest.raises(ConfigError, match="mixers='rwkv' is none of the mixers: gla"):
        MQARConfig(mixers=["rwkv"])
    with pytest.raises(ConfigError, match="mixers='rwkv' is none of the mixers: gla"):
        MQARConfig(mixers=["gla+rwkv"])
    with pytest.raises(ConfigError, match="lengths, pairs is empty"):
        MQARConfig(lengths=[], pairs=[])
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="learning_rates must be positive and finite"):
            MQARConfig(learning_rates=[1e-3, rate])
    with pytest.raises(ConfigError, match="weight_decay must not be negative"):
        MQARConfig(weight_decay=-0.1)


def test_a_width_that_a_mixer_cannot_have_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(mqar_sweep, "launch_jobs", None)
    config = dataclasses.replace(SMALL, folder=str(tmp_path), widths=[16, 33])
    with pytest.raises(ConfigError, match=r"num_heads=2 does not divide the width .* = 16\.5"):
        mqar_sweep.main(config)


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with lock_run_dir(tmp_path), pytest.raises(ConfigError, match="is in use by another run"):
        mqar_sweep.main(dataclasses.replace(SMALL, folder=str(tmp_path)))


SWEEP = ["mixers=[gla]", "lengths=[16]", "pairs=[2]", "widths=[16]", "learning_rates=[1e-3]", "vocab_size=64"]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_an_interrupted_sweep_leaves_no_process_and_what_was_trained(signum, code, tmp_path):
    command = [sys.executable, "scripts/mqar.py", f"folder={tmp_path}", *SWEEP, "train_examples=640", "epochs=9999"]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not any(tmp_path.glob("partial/*.safetensors")) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signum)
        try:
            said = process.communicate(timeout=30)[1]  # which ends when no process has it open
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers that were left behind
        assert process.returncode == code and "Traceback" not in said
    with safe_open(next(tmp_path.glob("partial/*.safetensors")), "pt") as file:
        assert json.loads(file.metadata()["record"])["history"]


@pytest.mark.slow
def test_a_sweep_in_processes(tmp_path):
    command = [sys.executable, "-m", "glalm", "mqar", f"folder={tmp_path}", *SWEEP, "widths=[16,32]"]
    command += ["train_examples=64", "epochs=1", "hydra/launcher=processes", "hydra.launcher.at_once=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text())["results"] for path in (tmp_path / "eval").iterdir()]
    assert sorted(result["width"] for result in results) == [16, 32]


@pytest.mark.parametrize(
    "twice", [{"widths": [64, 64]}, {"learning_rates": [1e-3, 1.0000001e-3]}, {"mixers": ["gla", "gla"]}]
)
def test_no_two_models_have_one_file(twice):
    with pytest.raises(ConfigError, match=f"{next(iter(twice))}: .* has a value twice"):
        MQARConfig(**twice)
