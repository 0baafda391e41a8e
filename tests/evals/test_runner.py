import atexit
import dataclasses
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glalm.config.run import CheckpointConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from glalm.config.strict import ConfigError, RunError
from glalm.data.loader import Windows
from glalm.data.shards import TokenSet
from glalm.evals.evaluator import EvalContext, Evaluator
from glalm.evals.inputs import load_run_tokenizer, open_eval_model
from glalm.evals.options import EVALUATORS, EvalConfig, ExtrapolationConfig, GenerateConfig
from glalm.evals.runner import evaluate, start_processes
from glalm.hf import GLALMForCausalLM
from glalm.model.config import ModelConfig
from glalm.prepare.pipeline import prepare_data
from glalm.train import checkpoint
from glalm.train.parallel import leave_process_group
from glalm.train.run_lock import lock_run_dir
from glalm.train.trainer import train

ROOT = Path(__file__).parent.parent.parent
MODEL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    source, folder = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data")
    words = random.Random(0)
    for i in range(24):
        text = " ".join(words.choice(("alpha", "beta", "gamma", "delta")) for _ in range(60 if i % 2 else 300))
        (source / f"{i}.txt").write_text(text)
    held_out = {"validation": 0.3, "test": 0.4}
    prepare_data([source], folder, vocab_size=300, held_out=held_out, progress=False)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> RunConfig:
    config = RunConfig(
        name="tiny",
        runs_dir=str(tmp_path_factory.mktemp("runs")),
        model=ModelConfig(**MODEL),
        data=DataConfig(str(data), 16),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        train=TrainConfig(steps=4, batch_size=2, checkpoint=CheckpointConfig(every=2)),
    )
    train(config)
    return config


@pytest.fixture
def run(trained, tmp_path) -> RunConfig:
    """A run of four steps with two checkpoints, T = 16, to do with as a test likes."""
    shutil.copytree(trained.folder, tmp_path / "runs" / trained.name)
    return dataclasses.replace(trained, runs_dir=str(tmp_path / "runs"))


def wanted(run: RunConfig, **changes) -> EvalConfig:
    settings = {
        "name": run.name,
        "runs_dir": run.runs_dir,
        "batch_size": 3,
        "extrapolation": ExtrapolationConfig(max_length=160, documents=2),
        "generate": GenerateConfig(tokens=5, prompts=["alpha ", "[bold]beta"]),
    }
    return EvalConfig(**settings | changes)


@torch.no_grad()
def true_perplexity(run: RunConfig, step: int) -> float:
    model = GLALMForCausalLM.from_pretrained(run.folder / "checkpoints" / f"step_{step}").eval()
    windows = Windows(TokenSet(run.data.path, "validation"), 16)
    rows = torch.from_numpy(np.stack([windows[i] for i in range(len(windows))]).astype(np.int64))
    return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).exp().item()


def test_every_evaluator_leaves_its_record(run, capsys):
    evaluate(wanted(run))
    assert {p.name for p in (run.folder / "eval").iterdir()} == {
        "extrapolation.json",
        "perplexity.json",
        "generate.json",
    }
    figures = {path.name for path in (run.folder / "plots").iterdir()}
    assert {"extrapolation.png", "extrapolation_gain.png", "training.png"} <= figures
    results = {name: record(run, name) for name in wanted(run).evals}
    weights = (run.folder / "checkpoints/step_4/model.safetensors").read_bytes()
    for name, result in results.items():
        assert (result["evaluator"], result["run"], result["checkpoint"]) == (name, "tiny", "step_4")
        assert result["checksum"] == hashlib.sha256(weights).hexdigest()
        assert result["seconds"] > 0
        assert {"glalm", "torch", "transformers", "python"} <= result["versions"].keys()
        assert result["settings"]["precision"] == ("bf16" if torch.cuda.is_available() else "fp32")

    tolerance = 1e-2 if torch.cuda.is_available() else 1e-4
    assert results["perplexity"]["results"]["perplexity"] == pytest.approx(true_perplexity(run, 4), rel=tolerance)
    assert results["perplexity"]["settings"]["split"] == "validation"
    out = capsys.readouterr().out
    for sample, prompt in zip(results["generate"]["results"], ("alpha ", "[bold]beta"), strict=True):
        assert sample["prompt"] == prompt
        assert prompt + sample["continuation"] in out
    for path in [*(run.folder / "eval").iterdir(), *(run.folder / "plots").iterdir()]:
        assert f"wrote {path}" in out


def record(run: RunConfig, name: str) -> dict:
    return json.loads((run.folder / f"eval/{name}.json").read_text())


def test_a_part_of_an_older_checkpoint(run):
    evaluate(wanted(run, checkpoint="step_2", evals=["perplexity"]))
    assert [p.name for p in (run.folder / "eval").iterdir()] == ["perplexity.json"]
    result = record(run, "perplexity")
    assert result["checkpoint"] == "step_2"
    assert result["results"]["perplexity"] == pytest.approx(true_perplexity(run, 2), rel=1e-2)
    assert result["results"]["perplexity"] != pytest.approx(true_perplexity(run, 4), rel=3e-2)


def test_a_checkpoint_by_its_folder_is_that_of_its_run_also_from_elsewhere(run, tmp_path):
    by_name, by_path = (
        run.folder / "eval" / "perplexity.json",
        tmp_path / "runs" / "moved" / "eval" / "perplexity.json",
    )
    evaluate(wanted(run, evals=["perplexity"]))
    expected = json.loads(by_name.read_text())
    step = run.folder / "checkpoints" / "step_4"
    evaluate(wanted(run, name="unused", checkpoint=str(step), evals=["perplexity"], force=True))
    assert json.loads(by_name.read_text())["results"] == expected["results"]
    shutil.copytree(step, tmp_path / "moved")
    changes = {"checkpoint": str(tmp_path / "moved"), "data_path": run.data.path}
    evaluate(wanted(run, evals=["perplexity"], **changes))
    moved = json.loads(by_path.read_text())
    assert (moved["run"], moved["checksum"], moved["results"]) == (None, expected["checksum"], expected["results"])


def test_a_checkpoint_that_was_copied_into_another_run_keeps_its_own_settings(run, tmp_path):
    steps = TrainConfig(steps=2, batch_size=2, checkpoint=CheckpointConfig(every=2))
    other = dataclasses.replace(
        run, name="other", data=DataConfig(run.data.path, 16, document_boundaries="reset_state"), train=steps, seed=1
    )
    train(other)
    evaluate(wanted(other, evals=["perplexity"]))
    expected, only = record(other, "perplexity"), {"evals": ["perplexity"], "data_path": run.data.path}
    assert expected["settings"]["document_boundaries"] == "reset_state"
    copy = shutil.copytree(other.folder / "checkpoints" / "step_2", run.folder / "backup" / "step_2")
    evaluate(wanted(run, checkpoint=str(copy), **only))
    copied = json.loads((tmp_path / "runs" / "step_2" / "eval" / "perplexity.json").read_text())
    assert (copied["model"], copied["run"]) == ("step_2", None)
    assert (copied["settings"], copied["results"]) == (expected["settings"], expected["results"])
    assert not (run.folder / "eval").exists()
    copy = shutil.copytree(copy, tmp_path / run.name)  # whose results would be those of the run of that name
    with pytest.raises(ConfigError, match="tiny holds a run of that name; write out=FOLDER"):
        evaluate(wanted(run, checkpoint=str(copy), **only))


def test_the_runs_tracker_receives_texts_and_figures(run, capsys):
    """Unless the run trains at the time, when its tracker is in use."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = run.folder / "run.json"
    content = json.loads(record.read_text())
    content["config"]["track"]["tracker"] = "tensorboard"
    record.write_text(json.dumps(content))
    config = wanted(run, evals=["generate", "extrapolation"])
    with lock_run_dir(run.folder):
        evaluate(config)
    assert "because the run is training now" in capsys.readouterr().out
    assert not (run.folder / "tensorboard").exists()
    evaluate(config)
    found = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    [text] = found.Tensors("generate/text_summary")
    [sample, _] = json.loads((run.folder / "eval" / "generate.json").read_text())["results"]
    assert text.step == 4 and text.tensor_proto.string_val[0].decode().startswith(f"--- {sample['prompt']}")
    assert [image.step for image in found.Images("extrapolation")] == [4]


def test_what_is_finished_is_not_run_again(run, capsys, monkeypatch):
    config = wanted(run, evals=["perplexity"])
    evaluate(config)
    first = record(run, "perplexity")
    capsys.readouterr()
    ran = []
    count = "glalm.evals.perplexity.compute_perplexity"
    from glalm.evals.perplexity import compute_perplexity

    monkeypatch.setattr(count, lambda *a: ran.append(1) or compute_perplexity(*a))
    evaluate(config)
    out = capsys.readouterr().out
    assert not ran and record(run, "perplexity") == first
    assert "perplexity.json is up to date; to evaluate again, add force=true" in out
    assert f"validation perplexity {first['results']['perplexity']:.3f}" in out
    evaluate(dataclasses.replace(config, batch_size=5))  # which changes no result
    assert not ran
    for i, changes in enumerate([{"force": True}, {"train_length": 8}, {"checkpoint": "step_2"}], start=1):
        evaluate(dataclasses.replace(config, **changes))
        assert len(ran) == i
    evaluate(dataclasses.replace(config, checkpoint="step_2"))
    assert len(ran) == 3
    other = load_run_tokenizer(config, run)
    other.fingerprint = "another"
    monkeypatch.setattr("glalm.evals.inputs.load_run_tokenizer", lambda *_: other)
    evaluate(dataclasses.replace(config, checkpoint="step_2"))
    assert len(ran) == 4


def test_a_copied_checkpoint_has_the_tokenizer_beside_it(run, data, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(run.folder / "checkpoints" / "step_4", copy)
    config = wanted(run, checkpoint=str(copy))
    monkeypatch.chdir(data)  # The folder of the shell says nothing about the model.
    assert open_eval_model(config, torch.device("cpu")).tokenizer is None
    shutil.copy(data / "tokenizer.model", copy)
    assert open_eval_model(config, torch.device("cpu")).tokenizer is not None


def test_other_text_has_results_of_its_own(run, data, tmp_path, capsys):
    """Neither do they replace those of the run's own text, nor does a set that has grown keep its old ones."""
    words = ["alpha beta gamma", "delta alpha", "beta"]
    for name, count in (("first", 20), ("more", 30)):
        lines = (json.dumps({"text": " ".join(words[(i + k) % 3] for k in range(20 + i))}) for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    other = tmp_path / "other"
    tokenizer = str(data / "tokenizer.model")
    prepare_data(
        [tmp_path / "first.jsonl"], other, tokenizer=tokenizer, held_out={"validation": 0.5, "test": 0}, progress=False
    )
    only = {"evals": ["perplexity"]}

    def evaluated(**changes) -> dict:
        """Evaluate, and return {the tokens that were scored: own_text} of all results."""
        evaluate(wanted(run, **only, **changes))
        records = [json.loads(path.read_text()) for path in (run.folder / "eval").iterdir()]
        return {record["results"]["tokens"]: record["own_text"] for record in records}

    def scored(folder: Path) -> int:
        return 16 * len(Windows(TokenSet(folder, "validation"), 16))

    assert evaluated(data_path=str(other)) == {scored(other): False}
    assert record(run, "perplexity")["own_text"] is False  # for want of another
    assert evaluated() == {scored(other): False, scored(data): True}
    before = scored(other)
    prepare_data([tmp_path / "more.jsonl"], other, add=True, progress=False)
    assert scored(other) > before
    assert evaluated(data_path=str(other)) == {before: False, scored(other): False, scored(data): True}
    assert record(run, "perplexity")["own_text"] is True
    capsys.readouterr()
    moved = shutil.copytree(other, tmp_path / "moved")
    for changes in ({}, {"data_path": str(other)}, {"data_path": str(moved)}, {"data_path": str(data)}):
        assert len(evaluated(**changes)) == 3
        assert "is up to date" in capsys.readouterr().out


def test_models_of_one_name_do_not_share_a_folder_of_results(run, tmp_path):
    for name, step in (("x", 2), ("y", 4)):
        shutil.copytree(run.folder / "checkpoints" / f"step_{step}", tmp_path / name / "model")
    asked = {"evals": ["perplexity"], "data_path": run.data.path}
    evaluate(wanted(run, checkpoint=str(tmp_path / "x/model"), **asked))
    path = tmp_path / "runs/model/eval/perplexity.json"
    first = path.read_text()
    with pytest.raises(ConfigError, match=r"is a result of another model of that name .* write out=FOLDER"):
        evaluate(wanted(run, checkpoint=str(tmp_path / "y/model"), **asked))
    with pytest.raises(ConfigError, match=r"write out=FOLDER"):
        evaluate(wanted(run, out=str(tmp_path / "runs/model"), evals=["generate"]))
    assert path.read_text() == first
    evaluate(wanted(run, checkpoint=str(tmp_path / "y/model"), out=str(tmp_path / "y"), **asked))


def test_one_that_fails_leaves_the_others(run, capsys, monkeypatch):
    def broken(eval_model, config):
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("glalm.evals.perplexity.PerplexityEvaluator", broken)
    too_long = ExtrapolationConfig(max_length=16)
    with pytest.raises(RunError, match=r"2 of 3 evaluators failed \(see above\): perplexity, extrapolation"):
        changes = {"extrapolation": dataclasses.replace(too_long, max_length=8)}
        evaluate(wanted(run, evals=["perplexity", "extrapolation", "generate"], **changes))
    assert [p.name for p in (run.folder / "eval").glob("*.json")] == ["generate.json"]
    shown = capsys.readouterr()
    assert "perplexity failed: ZeroDivisionError: by design" in shown.out
    assert "extrapolation failed: ConfigError: extrapolation.max_length=8 is under" in shown.out
    assert "in broken" in shown.err  # where it happened


def test_results_that_cannot_be_written_are_not_computed(run, capsys, monkeypatch):
    (run.folder / "eval").write_text("")
    monkeypatch.setattr("glalm.evals.perplexity.compute_perplexity", lambda *_: pytest.fail("computed"))
    with pytest.raises(RunError, match="1 of 1 evaluators failed"):
        evaluate(wanted(run, evals=["perplexity"]))
    shown = capsys.readouterr()
    assert "eval cannot be a folder of results" in shown.out and "Traceback" not in shown.err


def test_a_tokenizer_that_the_model_was_not_trained_with_is_refused(run, capsys):
    data = json.loads((run.folder / "data.json").read_text())
    data["tokenizer"]["fingerprint"] = "another"
    (run.folder / "data.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match="generate"):
        evaluate(wanted(run, evals=["generate"]))
    assert "tiny/step_4 was trained with another tokenizer than the data has now" in capsys.readouterr().out


def test_one_that_fails_leaves_its_memory(run, monkeypatch):
    class Large:
        pass

    held, kept = [], []
    # Once a run of wandb was open, the hook is its own, and it keeps the last error.
    monkeypatch.setattr(sys, "excepthook", lambda *error: kept.append(error))

    def broken(eval_model, config):
        large = Large()
        held.append(weakref.ref(large))
        raise MemoryError("no room")

    def after(eval_model, config):
        held.append(held[0]())
        raise ConfigError("enough")

    monkeypatch.setattr("glalm.evals.perplexity.PerplexityEvaluator", broken)
    monkeypatch.setattr("glalm.evals.generate.GenerateEvaluator", after)
    with pytest.raises(RunError, match="perplexity, generate"):
        evaluate(wanted(run, evals=["perplexity", "generate"]))
    assert held[1] is None


def test_what_is_missing_is_told_and_tried_again(run, capsys, monkeypatch):
    there, ran = {}, []

    class Partial(Evaluator):
        settings, total_units = {}, 1

        def __init__(self, model, config):
            pass

        def run(self, context):
            found = {k: context.load_or_compute(k, lambda k=k: ran.append(k) or 1) for k in ("a", *there)}
            return {"found": found, "missing": {} if there else {"b": "put it there"}}

        def summarize(self, results):
            return [f"found {len(results['found'])}"]

    monkeypatch.setattr("glalm.evals.perplexity.PerplexityEvaluator", Partial)
    with pytest.raises(RunError, match=r"1 of 1 evaluators failed \(see above\): perplexity"):
        evaluate(wanted(run, evals=["perplexity"]))
    assert record(run, "perplexity")["results"]["found"] == {"a": 1}
    assert "perplexity failed: RunError: these tasks were not evaluated: b" in capsys.readouterr().out
    there["b"] = True
    evaluate(wanted(run, evals=["perplexity"]))
    assert ran == ["a", "b"]
    assert not [*(run.folder / "eval").glob(".*")]


@pytest.mark.slow
def test_two_processes_share_the_work(run, tmp_path):
    """As torchrun starts them: one result, that of one process; and an error of one is an error of both."""
    evaluate(wanted(run, evals=["perplexity", "generate"], out=str(tmp_path / "one")))
    port = str(10_000 + os.getpid() % 50_000)
    common = ["eval.py", f"name={run.name}", f"runs_dir={run.runs_dir}", "batch_size=3", f"out={tmp_path / 'two'}"]
    evals = ["evals=[perplexity,generate]", "generate.tokens=5", "generate.prompts=[alpha\\ ,'[bold]beta']"]
    started = []
    for rank in range(2):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        started.append(
            subprocess.Popen([sys.executable, *common, *evals], cwd=ROOT, env=os.environ | env, stdout=-1, stderr=-2)
        )
    said = [process.communicate(timeout=120)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert said[1].strip() == ""
    for name in ("perplexity", "generate"):
        one, two = (json.loads((tmp_path / n / "eval" / f"{name}.json").read_text()) for n in ("one", "two"))
        assert (one["processes"], two["processes"]) == (1, 2)
        if name == "perplexity":
            assert two["results"] == pytest.approx(one["results"], rel=1e-6)
        else:
            assert two["results"] == one["results"]


def test_a_group_that_was_joined_is_left_before_the_process_ends(monkeypatch):
    """Else gloo's threads abort one process in six: exit code 134 behind results that are all there."""
    joined, at_exit = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # whatever tests were before this one
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(atexit, "register", at_exit.append)
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    start_processes()
    assert (joined, at_exit) == (["gloo"], [leave_process_group])


def test_an_error_of_one_process_reaches_the_others(monkeypatch):
    """Two ranks as two threads: one raises while the other waits for it."""
    raised: list = []
    current = threading.local()
    board, barrier = [None, None], threading.Barrier(2, timeout=20)

    def all_gather_object(gathered: list, content: tuple, group=None) -> None:
        board[current.rank] = content
        barrier.wait()
        gathered[:] = list(board)
        barrier.wait()

    def process(rank: int) -> None:
        current.rank = rank
        context = EvalContext()
        try:
            with context.raise_on_all_ranks():
                assert context.gather([rank, rank + 2]) == [0, 1, 2, 3]
                assert context.run_on_rank_0(lambda: "of the first") == "of the first"
                if rank == 1:
                    raise ValueError("on one only")
                context.gather([0])
        except Exception as error:
            raised.append(f"{rank}: {type(error).__name__}: {error}")

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    for module in ("glalm.train.collectives", "glalm.evals.evaluator"):
        monkeypatch.setattr(f"{module}.rank_and_world_size", lambda: (current.rank, 2))
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(raised) == ["0: RunError: rank 1: ValueError: on one only", "1: ValueError: on one only"]


@pytest.mark.parametrize("content", ["", '{"step": 0, "lo', '{"step": 1}\n'])
def test_metrics_that_cannot_be_drawn_end_no_evaluation(content, run, capsys):
    (run.folder / "metrics.jsonl").write_text(content)
    evaluate(wanted(run, evals=["generate"]))
    assert record(run, "generate")["results"]
    assert "training.png was not drawn: " in capsys.readouterr().out


def test_brackets_in_names_are_no_markup(run, tmp_path, capsys):
    folder = tmp_path / "[a[/b]"
    evaluate(wanted(run, evals=["generate"], out=str(folder)))
    assert f"wrote {folder}/eval/generate.json" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_goes_on_when_nobody_reads_what_it_prints(run):
    command = f"{sys.executable} eval.py name={run.name} runs_dir={run.runs_dir} generate.tokens=2 | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert re.fullmatch(r"(\w+( started|: \d+%.*)\n)+", done.stderr)
    assert {p.name for p in (run.folder / "eval").iterdir()} == {f"{name}.json" for name in EvalConfig().evals}


def test_an_evaluator_that_does_not_exist():
    with pytest.raises(ConfigError, match="no evaluator is called perplexitty; did you mean perplexity"):
        EvalConfig(evals=["perplexitty"])
    with pytest.raises(ConfigError, match=r"evals=\[zero_shot\] needs harness\.tasks"):
        EvalConfig(evals=["zero_shot"])


def test_every_evaluator_can_be_had():
    for name, where in EVALUATORS.items():
        module, _, function = where.partition(":")
        if module.endswith(".harness"):
            pytest.importorskip("lm_eval")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_a_run_that_does_not_exist(run):
    with pytest.raises(ConfigError, match=r"run\.json is missing.*glalm train name=other"):
        evaluate(wanted(run, name="other"))
    with pytest.raises(ConfigError, match=rf"run\.json is missing\)\. Did you mean name={run.name}\? To train"):
        evaluate(wanted(run, name=f"{run.name}x"))
    with pytest.raises(ConfigError, match=rf"is the folder of a run\. Remove it and write name={run.name}$"):
        evaluate(wanted(run, checkpoint=str(run.folder)))


def test_a_checkpoint_that_does_not_exist(run):
    with pytest.raises(ConfigError, match=r"no checkpoint step_7 .*Existing checkpoints: step_2, step_4"):
        evaluate(wanted(run, checkpoint="step_7"))


def test_a_damaged_checkpoint(run):
    file = run.folder / "checkpoints/step_4/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"step_4/model\.safetensors is damaged"):
        evaluate(wanted(run))
    assert not (run.folder / "eval").exists()


def test_a_checkpoint_without_its_manifest(run):
    """It is not loaded without verification, as a model of transformers would be."""
    (run.folder / "checkpoints/step_4" / checkpoint.MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"checkpoint=step_4: .*step_4"):
        evaluate(wanted(run, checkpoint="step_4"))


def failure(config: EvalConfig, capsys) -> str:
    with pytest.raises(RunError):
        evaluate(config)
    return capsys.readouterr().out


def test_data_that_is_missing_or_is_not_the_runs(run, data, tmp_path, capsys):
    only = {"evals": ["perplexity"]}
    with pytest.raises(ConfigError, match=r"data_path=.*nowhere: .*manifest\.json is missing"):
        evaluate(wanted(run, data_path=str(tmp_path / "nowhere")))
    assert not (run.folder / "eval").exists()

    saved = json.loads((run.folder / "run.json").read_text())
    saved["identity"]["data fingerprint"] = "other"
    (run.folder / "run.json").write_text(json.dumps(saved))
    assert "prepared anew since" in failure(wanted(run, **only), capsys)
    evaluate(wanted(run, data_path=str(data), **only))  # asked for by name

    pinned = json.loads((run.folder / "data.json").read_text())
    pinned["tokenizer"]["fingerprint"] = "another"
    (run.folder / "data.json").write_text(json.dumps(pinned))
    with pytest.raises(ConfigError, match="was prepared with another tokenizer than tiny/step_4 has"):
        evaluate(wanted(run, data_path=str(data), force=True))
    assert "failed" not in capsys.readouterr().out
