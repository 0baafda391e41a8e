"""The sections of a golden recording: what is run, and what is kept of it.

Each section is a function of a `Workspace` that returns {case: JSON}. All paths are relative to the workspace, the
working directory, so that no recording contains the path of a machine.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from golden_commands import (
    CommandFailed,
    Outcome,
    describe_dataset,
    describe_model,
    describe_run,
    hash_checkpoint,
    read_evaluations,
    run_command,
    run_in_two_processes,
    translate,
)
from golden_inputs import write_inputs
from golden_interface import (
    ALL_CONTEXTS,
    CONCATENATED,
    EVALUATE_WHILE_TRAINING,
    MODELS,
    RESET,
    SEGMENT_LENGTH,
    compute_data_order,
    export_to_fla,
)

STEPS = 6
VOCABULARY = 320
TINY = (
    "runs_dir=runs",
    "data.path=data/words",
    "data.seq_len=32",
    f"model.vocab_size={VOCABULARY}",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    f"train.steps={STEPS}",
    "train.batch_size=4",
    f"train.eval_every={STEPS}",
    "train.eval_sequences=8",
    "train.log_every=1",
    f"train.checkpoint.every={STEPS}",
    "train.guard.hang_seconds=null",
    "optim.warmup_steps=2",
)
# The presets of these have a SwiGLU, whose width is set to that of a tiny model. Mamba's layers have none.
WITHOUT_SWIGLU = ("mamba_tiny", "mamba2_tiny")
# The hybrid preset has attention in every fourth layer. Two layers must contain both mixers.
HYBRID = ("model.layers=gla+attention", "model.attention.window=24")

OPTIMIZERS = {"AdamW": "optim=adamw_tiny", "Muon": "optim=muon"}
# The batch of 4 sequences, accumulated over 1 or 2 micro-batches by one process, and by each of two.
ACCUMULATION = {1: "train.micro_batch_size=4", 2: "train.micro_batch_size=2"}
SHARED_BY_TWO = {1: "train.micro_batch_size=2", 2: "train.micro_batch_size=1"}
SEGMENTS = f"{SEGMENT_LENGTH}=16"

# Options of the mixers and of training, each a case of its own.
OPTIONS = {
    "scalar gate": ["model.gla.gate=scalar"],
    "fixed gate": ["model.gla.gate=fixed"],
    "no gate": ["model.gla.gate=none"],
    "clamped gate": ["model.gla.min_log_gate=-0.1"],
    "no output gate": ["model.gla.output_gate=false"],
    "short convolution": ["model.gla.short_conv=4", RESET],
    "shared keys and values": ["model.gla.num_kv_heads=2"],
    "relu": ["model.gla.feature_map=relu"],
    "grouped-query attention": ["model=attention_tiny", "model.attention.num_kv_heads=2"],
    "attention in a window": ["model=attention_tiny", "model.attention.window=8", SEGMENTS],
    "linear, hedgehog": ["model=linear_tiny", "model.linear.feature_map=hedgehog"],
    "linear, not normalised": ["model=linear_tiny", "model.linear.normalise=false"],
    "regla, gate on values": ["model=regla_tiny", "model.regla.gate_axis=value"],
    "regla, no output norm": ["model=regla_tiny", "model.regla.output_norm=false"],
    "regla, plain gate": ["model=regla_tiny", "model.regla.refined_gate=false", "model.regla.variance_scale=false"],
    "mamba2, two groups": ["model=mamba2_tiny", "model.mamba2.groups=2"],
    "deltanet, no convolution": ["model=deltanet_tiny", "model.deltanet.short_conv=0"],
    "tied embeddings": ["model.tie_word_embeddings=true"],
    "no checkpointing of activations": ["train.activation_checkpointing=none"],
    "selective checkpointing of activations": ["train.activation_checkpointing=selective"],
    "full checkpointing of activations": ["train.activation_checkpointing=full"],
    "bf16": ["train.precision=bf16"],
    "z-loss": ["train.z_loss=0.01"],
    "warm-up, stable, decay": ["optim=wsd", "optim.decay_fraction=0.5"],
    "linear schedule, weight decay": ["optim.schedule=linear", "optim.weight_decay=0.1", "optim.grad_clip=0.1"],
    "another seed": ["seed=7"],
    "synchronous checkpoints": ["train.checkpoint.asynchronous=false"],
    "guard against spikes": ["train.guard.spike_factor=1.0", "train.guard.spike_window=2"],
    "two sources": ["data.path=data/mixture"],
    "two weighted sources": ["data.path=data/mixture", "data.weights={text: 0.3, python: 0.7}"],
    "batch and length in tokens": [
        "train.batch_size=null",
        "train.batch_tokens=128",
        "train.steps=null",
        f"train.tokens={128 * STEPS}",
    ],
    "evaluations while training": [
        f"{EVALUATE_WHILE_TRAINING}.evals=[extrapolation,needle]",
        f"{EVALUATE_WHILE_TRAINING}.every=3",
        f"{EVALUATE_WHILE_TRAINING}.extrapolation.max_length=128",
        f"{EVALUATE_WHILE_TRAINING}.needle.lengths=[256]",
        f"{EVALUATE_WHILE_TRAINING}.needle.samples=8",
        f"{EVALUATE_WHILE_TRAINING}.needle.candidates=2",
    ],
}

# Of a command that must fail: the names that its error must mention. Sentences may change, names may not.
WRONG_TRAINING = {
    "misspelt key": (["train.stpes=3"], ["train.stpes", "train.steps"]),
    "misspelt choice": (["parallel=ddq"], ["parallel=ddq", "ddp"]),
    "text for a number": (["train.steps=many"], ["train.steps"]),
    "negative steps": (["train.steps=-1"], ["train.steps"]),
    "steps and tokens": (["train.tokens=100"], ["train.steps", "train.tokens"]),
    "no such mixer": (["model.mixer=glaa"], ["model.mixer", "gla"]),
    "heads that do not divide": (["model.num_heads=3"], ["model.num_heads", "model.hidden_size"]),
    "small vocabulary": (["model.vocab_size=100"], ["model.vocab_size"]),
    "no such data": (["data.path=nowhere"], ["data.path", "nowhere"]),
    "windows longer than the data": (["data.seq_len=1000000"], ["data.path", "data/words"]),
    "weights of no source": (["data.weights={poems: 1}"], ["data.path", "weights", "poems"]),
    "segments that do not divide": ([f"{SEGMENT_LENGTH}=7"], [SEGMENT_LENGTH, "data.seq_len"]),
    "segments and reset": ([SEGMENTS, RESET], [SEGMENT_LENGTH, RESET.partition("=")[0]]),
    "segments of attention": (
        ["model=attention_tiny", SEGMENTS],
        [SEGMENT_LENGTH, "model.attention.window"],
    ),
    "long warm-up": (["optim.warmup_steps=99"], ["optim.warmup_steps", "train.steps"]),
    "rates the wrong way round": (["optim.lr=1e-5"], ["optim.lr", "optim.min_lr"]),
    "shards under DDP": (["parallel.shard=2"], ["parallel.shard", "hsdp"]),
    "profile the wrong way round": (["train.profile_steps=[3,2]"], ["train.profile_steps"]),
    "float8 in fp32": (["train.float8=true", "train.precision=fp32"], ["train.float8", "train.precision"]),
    "a name with a slash": (["name=a/b"], ["name"]),
    "misspelt evaluator while training": (
        [f"{EVALUATE_WHILE_TRAINING}.evals=[perplexitee]"],
        [f"{EVALUATE_WHILE_TRAINING}.evals", "perplexitee", "perplexity"],
    ),
    "missing weights": (["train.init_from=nowhere"], ["train.init_from", "nowhere"]),
    "missing checkpoint": (["train.resume_from=nowhere"], ["train.resume_from", "nowhere"]),
    "resumed with another rate": (["name=tiny", "optim.lr=1e-3"], ["optim.lr", "train.allow_changes"]),
}
WRONG_EVALUATION = {
    "no such run": (["name=nobody"], ["nobody"]),
    "no such checkpoint": (["checkpoint=step_99"], ["step_99"]),
    "misspelt evaluator": (["evals=[perplexitee]"], ["evals", "perplexitee", "perplexity"]),
    "misspelt key of an evaluator": (["needle.smaples=2"], ["needle.smaples", "needle.samples"]),
    "harness without tasks": (["evals=[zero_shot]"], ["evals", "harness.tasks"]),
    "shorter than training": (["extrapolation.max_length=16", "force=true"], ["extrapolation"]),
    "short needles": (["evals=[needle]", "needle.lengths=[8]"], ["needle"]),
}
WRONG_SCRIPTS = {
    "prepare, no such file": ("prepare_data.py", ["--out", "data/w1", "nowhere.txt"], ["nowhere.txt"]),
    "prepare, broken line": (
        "prepare_data.py",
        ["--out", "data/w2", "--tokenizer", "data/words/tokenizer.model", "inputs/broken"],
        ["part.jsonl:41", "--on-error"],
    ),
    "prepare, no such field": (
        "prepare_data.py",
        ["--out", "data/w3", "--text-field", "body", "inputs/jsonl"],
        ["part.jsonl:1", "body"],
    ),
    "prepare, other settings": (
        "prepare_data.py",
        ["--out", "data/words", "--vocab-size", "333", "inputs/text"],
        ["data/words", "tokenizer", "--add", "--overwrite"],
    ),
    "prepare, foreign files": ("prepare_data.py", ["--out", "inputs/text", "inputs/jsonl"], ["inputs/text"]),
    "prepare, two tokenizers": (
        "prepare_data.py",
        ["--out", "data/w4", "--tokenizer", "mistral-v1", "--vocab-size", "300", "inputs/text"],
        ["--tokenizer", "--vocab-size"],
    ),
    "export, folder exists": ("export_hf.py", ["runs/tiny", "--out", "data"], ["data", "--out"]),
    "export, no such run": ("export_hf.py", ["runs/nobody", "--out", "exported/nobody"], ["runs/nobody"]),
    "export, no such checkpoint": (
        "export_hf.py",
        ["runs/tiny", "--checkpoint", "step_99", "--out", "exported/nobody"],
        ["step_99"],
    ),
    "linearize, folder exists": ("linearize.py", ["llama", "data"], ["data"]),
    "recall, lengths without pairs": ("mqar.py", ["lengths=[64]", "pairs=[4,8]"], ["lengths", "pairs"]),
}


@dataclass
class Workspace:
    """An empty working directory, in which commands of one tree run. Inputs and runs are made when first needed."""

    tree: Path
    runs: dict[str, Path] = field(default_factory=dict)

    def run(self, script: str, *arguments: str) -> Outcome:
        return run_command(self.tree, script, *arguments)

    def run_or_raise(self, script: str, *arguments: str) -> Outcome:
        outcome = self.run(script, *arguments)
        outcome.require_success()
        return outcome

    def prepare(self, name: str, *arguments: str) -> Path:
        """Prepare the set data/NAME by one worker, unless it is there."""
        folder = Path("data", name)
        if not folder.exists():
            self.run_or_raise("scripts/prepare_data.py", "--out", str(folder), "--workers", "1", *arguments)
        return folder

    @cached_property
    def data(self) -> tuple[Path, Path]:
        """The sets that models are trained on: data/words of one source, data/mixture of two."""
        write_inputs(Path("inputs"))
        words = self.prepare("words", "--vocab-size", "300", "inputs/text")
        mixture = self.prepare("mixture", "--tokenizer", "data/words/tokenizer.model", "inputs/text", "inputs/python")
        return words, mixture

    def training_arguments(self, name: str, *overrides: str) -> list[str]:
        """Return the command line of a tiny run: later overrides of a key replace earlier ones."""
        assert self.data
        choices = [o for o in overrides if o.partition("=")[0] in ("model", "optim")]
        model = next((o.partition("=")[2] for o in choices if o.startswith("model=")), "gla_tiny")
        keys = list(TINY)
        if model not in WITHOUT_SWIGLU:
            keys.append("model.intermediate_size=48")
        if model == "hybrid_tiny":
            keys += HYBRID
        settings = {o.partition("=")[0]: o for o in [f"name={name}", *keys, *overrides]}
        return ["train.py", *settings.values()]

    def train(self, name: str, *overrides: str) -> Path:
        """Train the run `name`, unless it is there, and return its folder."""
        if name not in self.runs:
            self.run_or_raise(*self.training_arguments(name, *overrides))
            self.runs[name] = Path("runs", name)
        return self.runs[name]


def record_cases(cases: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Call each case. One that fails where it must not is recorded as {"failed": its error}; the others still run."""
    recorded = {}
    for name, case in cases.items():
        try:
            recorded[name] = translate(case())
        except Exception as error:
            recorded[name] = describe_failure(error)
    return recorded


def describe_failure(error: Exception) -> dict[str, str]:
    if isinstance(error, CommandFailed):
        return {"failed": str(error)}
    return {"failed": "".join(traceback.format_exception(error, limit=-2))}


def record_shards(workspace: Workspace) -> dict[str, Any]:
    """Every file of sets that are prepared from each kind of source."""
    assert workspace.data
    tokenizer = ("--tokenizer", "data/words/tokenizer.model")
    commands = {
        "text files, new tokenizer": ("words",),
        "two sources": ("mixture",),
        "jsonl": ("jsonl", *tokenizer, "inputs/jsonl"),
        "jsonl, sources by a field": ("by-field", *tokenizer, "--source-field", "meta.set", "inputs/jsonl"),
        "jsonl.gz, many shards": ("gz", *tokenizer, "--shard-tokens", "1000", "inputs/gz"),
        "jsonl.zst, no test split": ("zst", *tokenizer, "--test", "0", "named=inputs/zst"),
        "parquet": ("parquet", *tokenizer, "inputs/parquet"),
        "arrow": ("arrow", *tokenizer, "inputs/arrow"),
        "python files": ("python", *tokenizer, "inputs/python"),
        "a dataset of the hub, local": ("hub", *tokenizer, "hub=hf:inputs/hub"),
        "broken documents, skipped": ("broken", *tokenizer, "--on-error", "skip", "inputs/broken"),
    }

    def prepare(arguments: tuple[str, ...]) -> dict:
        return describe_dataset(workspace.prepare(*arguments))

    def add() -> dict:
        workspace.prepare("added", *tokenizer, "inputs/jsonl")
        workspace.run_or_raise("scripts/prepare_data.py", "--out", "data/added", "--add", "inputs/arrow")
        return describe_dataset(Path("data/added"))

    cases = {name: lambda arguments=arguments: prepare(arguments) for name, arguments in commands.items()}
    return record_cases({**cases, "text added later": add})


def record_order(workspace: Workspace) -> dict[str, Any]:
    """The first 1,000 ids of the data order."""
    mixed = {"a": 0.5, "b": 0.2, "c": 0.3}
    settings = [(1, 1, None), (1, 2, None), (7, 1, mixed), (7, 4, mixed), (2**40, 2, {"a": 1.0, "b": 0.0, "c": 0.01})]
    windows = {"a": 700, "b": 37, "c": 150}
    return record_cases(
        {
            f"seed {seed}, {world} processes, weights {weights}": lambda seed=seed, world=world, weights=weights: (
                compute_data_order(seed, batch_size=8, windows=windows, weights=weights, steps=125, world=world)
            )
            for seed, world, weights in settings
        }
    )


def record_training(workspace: Workspace) -> dict[str, Any]:
    """Both optimizers, concatenated and reset documents, segments, accumulation: all of GLA, some of every mixer."""
    documents = {"concatenated": CONCATENATED, "reset": RESET, "segments": SEGMENTS}
    choices = [("AdamW", "concatenated", 1), ("Muon", "reset", 2), ("AdamW", "segments", 2)]
    cases = {}
    for model in MODELS:
        of_model = list(itertools.product(OPTIMIZERS, documents, ACCUMULATION)) if model == "gla_tiny" else choices
        for optimizer, kind, accumulation in of_model:
            if model == "attention_tiny" and kind == "segments":
                continue  # attention without a window has no state to carry
            name = f"{model}, {optimizer}, {kind}, accumulation {accumulation}"
            overrides = [f"model={model}", OPTIMIZERS[optimizer], documents[kind], ACCUMULATION[accumulation]]
            cases[name] = lambda name=name, overrides=overrides: describe_training(workspace, name, overrides)
    return record_cases(cases)


def record_options(workspace: Workspace) -> dict[str, Any]:
    """One run for each option of the mixers and of training."""
    return record_cases(
        {
            name: lambda name=name, overrides=overrides: describe_training(workspace, name, overrides)
            for name, overrides in OPTIONS.items()
        }
    )


def describe_training(workspace: Workspace, name: str, overrides: list[str]) -> dict:
    return describe_run(workspace.train(name_folder(name), *overrides), STEPS)


def name_folder(case: str) -> str:
    """Return a name for a run's folder that no command line has to quote."""
    return "".join(character if character.isalnum() else "_" for character in case)


def record_resume(workspace: Workspace) -> dict[str, Any]:
    """Runs that are killed after step 3 or stopped by a signal, resumed, continued elsewhere, or given weights."""
    overrides = [ACCUMULATION[2], "train.checkpoint.every=3", "train.eval_every=3"]

    def resume_after_kill() -> dict:
        workspace.train("killed", *overrides)
        shutil.rmtree("runs/killed/checkpoints/step_6")  # as if the process had been killed before it wrote this
        workspace.run_or_raise(*workspace.training_arguments("killed", *overrides))
        return describe_run(Path("runs/killed"), STEPS)

    def resume_after_damage() -> dict:
        workspace.train("damaged", *overrides)
        newest = Path("runs/damaged/checkpoints/step_6/training.safetensors")
        newest.write_bytes(newest.read_bytes()[:-1])
        workspace.run_or_raise(*workspace.training_arguments("damaged", *overrides))
        checkpoints = sorted(path.name for path in Path("runs/damaged/checkpoints").iterdir())
        return {"checkpoints": checkpoints, **describe_run(Path("runs/damaged"), STEPS)}

    def resume_after_signal() -> dict:
        arguments = workspace.training_arguments("stopped", *overrides, "train.steps=40", "train.checkpoint.every=40")
        stopped = run_until_signal(workspace, arguments)
        workspace.run_or_raise(*arguments)
        checkpoint = Path("runs/stopped/checkpoints/step_40")
        return {"exit code": stopped.code, **hash_checkpoint(checkpoint)}

    def continue_elsewhere() -> dict:
        origin = workspace.train("origin", *overrides) / "checkpoints/step_3"
        return describe_run(workspace.train("elsewhere", *overrides, f"train.resume_from={origin}"), STEPS)

    def continue_with_changes() -> dict:
        origin = workspace.train("origin", *overrides) / "checkpoints/step_3"
        changes = [f"train.resume_from={origin}", "optim.lr=1e-3", "train.allow_changes=[optim.lr]"]
        return describe_run(workspace.train("changed", *overrides, *changes), STEPS)

    def start_from_weights() -> dict:
        origin = workspace.train("origin", *overrides) / "checkpoints/step_6"
        return describe_run(workspace.train("initialised", *overrides, f"train.init_from={origin}"), STEPS)

    def prune_checkpoints() -> list[str]:
        keys = ["train.checkpoint.every=1", "train.checkpoint.keep_last=1", "train.checkpoint.keep_every=4"]
        run = workspace.train("pruned", *overrides, *keys, "train.checkpoint.keep_best=1", "train.eval_every=1")
        return sorted(path.name for path in (run / "checkpoints").iterdir())

    return record_cases(
        {
            "killed and resumed": resume_after_kill,
            "damaged and resumed": resume_after_damage,
            "stopped by a signal and resumed": resume_after_signal,
            "continued under another name": continue_elsewhere,
            "continued with another rate": continue_with_changes,
            "started from weights": start_from_weights,
            "checkpoints that are kept": prune_checkpoints,
        }
    )


def run_until_signal(workspace: Workspace, arguments: list[str]) -> Outcome:
    """Run train.py, and send SIGTERM to this process when the run has logged its first row."""
    metrics = Path("runs/stopped/metrics.jsonl").absolute()

    def stop() -> None:
        for _ in range(60_000):
            if metrics.exists() and metrics.stat().st_size > 0:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # if the run ends early, the signal must not end us
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        return workspace.run(*arguments)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)


def record_distributed(workspace: Workspace) -> dict[str, Any]:
    """Two processes: every mixer by DDP and FSDP2, HSDP, bf16, resuming on other processes, evaluation, an error."""
    muon = OPTIMIZERS["Muon"]
    overrides = {}
    for i, model in enumerate(MODELS):
        for j, mode in enumerate(("ddp", "fsdp2")):
            optimizer = ("AdamW", "Muon")[(i + j) % 2]
            accumulation = 1 + (i // 2) % 2
            keys = [f"model={model}", f"parallel={mode}", OPTIMIZERS[optimizer], SHARED_BY_TWO[accumulation]]
            overrides[f"{model}, {mode}, {optimizer}, accumulation {accumulation}"] = keys
    overrides |= {
        "ddp, reset, accumulation 2": [RESET, SHARED_BY_TWO[2]],
        "fsdp2, reset, Muon, accumulation 2": ["parallel=fsdp2", muon, RESET, SHARED_BY_TWO[2]],
        "ddp, segments": [SEGMENTS],
        "fsdp2, segments": ["parallel=fsdp2", SEGMENTS],
        "ddp, sums in bf16": ["parallel.reduce_dtype=bf16"],
        "fsdp2, bf16": ["parallel=fsdp2", "train.precision=bf16"],
        "fsdp2, weights kept": ["parallel=fsdp2", "parallel.reshard=false"],
        "fsdp2, continued": ["parallel=fsdp2", muon, "train.checkpoint.every=3"],
        "hsdp, two copies": ["parallel=hsdp", "parallel.shard=1"],
    }
    commands = {name: workspace.training_arguments(name_folder(name), *keys) for name, keys in overrides.items()}
    sharded = Path("runs", name_folder("fsdp2, continued"))
    origin = f"train.resume_from={sharded / 'checkpoints/step_3'}"
    commands["ddp, from fsdp2"] = workspace.training_arguments(name_folder("ddp, from fsdp2"), muon, origin)
    runs = list(commands)
    evaluation = ["eval.py", "runs_dir=runs", f"name={sharded.name}", "evals=[perplexity,extrapolation]"]
    commands["evaluation"] = [*evaluation, "extrapolation.max_length=128", "out=two_evaluated"]
    # This ends the process group, so it comes last.
    commands["batch that does not divide"] = workspace.training_arguments("two_wrong", "train.batch_size=3")

    outcomes = run_in_two_processes(workspace.tree, commands)

    def describe(name: str) -> dict:
        outcomes[name].require_success()
        return describe_run(Path("runs", name_folder(name)), STEPS)

    def describe_evaluation() -> dict:
        outcomes["evaluation"].require_success()
        return read_evaluations(Path("two_evaluated"))

    def continue_alone() -> dict:
        return describe_run(workspace.train("one_continued", muon, origin), STEPS)

    def export() -> dict:
        workspace.run_or_raise("scripts/export_hf.py", str(sharded), "--out", "exported/sharded")
        return describe_model(Path("exported/sharded"))

    cases = {name: lambda name=name: describe(name) for name in runs}
    return record_cases(
        {
            **cases,
            "one process, from fsdp2": continue_alone,
            "evaluation": describe_evaluation,
            "export of a sharded checkpoint": export,
            "batch that does not divide": lambda: describe_error(
                outcomes["batch that does not divide"], ["train.batch_size"]
            ),
        }
    )


def record_evaluations(workspace: Workspace) -> dict[str, Any]:
    """The evaluations of the demo, the needle, and other settings, of runs, checkpoints and exported models."""
    # An untrained model's answers are all wrong, so only the mean rank tells: among many candidates it is fine enough.
    needle = ["needle.lengths=[256]", "needle.samples=4", "needle.candidates=100", "needle.depths=[0.0,0.5]"]
    demo = ["evals=[perplexity,extrapolation,generate,needle]", "extrapolation.max_length=128", "generate.tokens=8"]
    stream = ["evals=[extrapolation]", "extrapolation.text=stream", "extrapolation.bucket=16"]
    contexts = [ALL_CONTEXTS, "extrapolation.max_length=128"]

    def evaluate(run: str, out: str, model: str, *overrides: str) -> dict:
        documents = RESET if run == "eval_reset" else CONCATENATED
        workspace.train(run, f"model={model}", documents, "train.checkpoint.every=3")
        where = ["runs_dir=runs", f"name={run}", f"out=evaluated/{out}"]
        workspace.run_or_raise("eval.py", *where, *overrides)
        return read_evaluations(Path("evaluated", out))

    def evaluate_export() -> dict:
        run = workspace.train("eval_gla_tiny", "model=gla_tiny", CONCATENATED, "train.checkpoint.every=3")
        workspace.run_or_raise("scripts/export_hf.py", str(run), "--out", "exported/evaluated")
        where = ["checkpoint=exported/evaluated", "data_path=data/words", "out=evaluated/export"]
        workspace.run_or_raise("eval.py", *where, *demo, *needle)
        return read_evaluations(Path("evaluated/export"))

    cases = {
        f"{model}, demo and needle": lambda model=model: evaluate(f"eval_{model}", model, model, *demo, *needle)
        for model in MODELS
    }
    cases |= {
        "documents reset": lambda: evaluate("eval_reset", "reset", "gla_tiny", *demo, *needle),
        "stream, all contexts": lambda: evaluate("eval_gla_tiny", "stream", "gla_tiny", *stream, *contexts),
        "another checkpoint, bf16": lambda: evaluate(
            "eval_gla_tiny", "step_3", "gla_tiny", "checkpoint=step_3", "evals=[perplexity]", "precision=bf16"
        ),
        "exported model": evaluate_export,
    }
    return record_cases(cases)


def record_exports(workspace: Workspace) -> dict[str, Any]:
    """Models as transformers and flash-linear-attention read them, and a linearized LLaMA."""

    def export(model: str) -> dict:
        run = workspace.train(f"export_{model}", f"model={model}")
        workspace.run_or_raise("scripts/export_hf.py", str(run), "--out", f"exported/{model}")
        return describe_model(Path("exported", model))

    def export_fla(model: str) -> dict:
        run = workspace.train(f"export_{model}", f"model={model}")
        export_to_fla(run / "checkpoints/step_6", Path("fla", model))
        return describe_model(Path("fla", model))

    def linearize(mixer: str) -> dict:
        assert workspace.data
        write_llama(Path("llama"))
        distil = ["--distil", "2", "--data", "data/words", "--seq-len", "32", "--batch-size", "2"]
        layers = ["--softmax-layers", "1"]
        workspace.run_or_raise("scripts/linearize.py", "llama", f"llama_{mixer}", "--mixer", mixer, *layers, *distil)
        return describe_model(Path(f"llama_{mixer}"))

    cases = {f"transformers, {model}": lambda model=model: export(model) for model in MODELS}
    for model in ("gla_tiny", "retention_tiny", "attention_tiny", "hybrid_tiny"):
        cases[f"flash-linear-attention, {model}"] = lambda model=model: export_fla(model)
    for mixer in ("gla", "regla"):
        cases[f"linearized, {mixer}"] = lambda mixer=mixer: linearize(mixer)
    return record_cases(cases)


def write_llama(folder: Path) -> None:
    """Write a tiny LLaMA with the same random weights at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def record_errors(workspace: Workspace) -> dict[str, Any]:
    """Wrong commands: the exit code, and which of the names that matter the error mentions."""
    workspace.train("tiny")

    def fail(script: str, arguments: list[str], names: list[str]) -> dict:
        return describe_error(workspace.run(script, *arguments), names)

    cases = {}
    for name, (overrides, names) in WRONG_TRAINING.items():
        arguments = workspace.training_arguments("wrong", *overrides)[1:]
        cases[f"train.py: {name}"] = lambda arguments=arguments, names=names: fail("train.py", arguments, names)
    for name, (overrides, names) in WRONG_EVALUATION.items():
        arguments = list({o.partition("=")[0]: o for o in ["runs_dir=runs", "name=tiny", *overrides]}.values())
        cases[f"eval.py: {name}"] = lambda arguments=arguments, names=names: fail("eval.py", arguments, names)
    for name, (script, arguments, names) in WRONG_SCRIPTS.items():
        cases[f"scripts/{name}"] = lambda script=script, arguments=arguments, names=names: fail(
            f"scripts/{script}", arguments, names
        )
    return record_cases(cases)


def describe_error(outcome: Outcome, names: list[str]) -> dict:
    return {"exit code": outcome.code, "names": {name: name in outcome.error for name in names}}


# The sections that take longest come first, so that two processes share them evenly.
SECTIONS: dict[str, Callable[[Workspace], dict[str, Any]]] = {
    "distributed": record_distributed,
    "training": record_training,
    "evaluations": record_evaluations,
    "options": record_options,
    "errors": record_errors,
    "exports": record_exports,
    "resume": record_resume,
    "shards": record_shards,
    "order": record_order,
}


def record_section(name: str, tree: Path) -> dict[str, Any]:
    """Run one section in an empty working directory of its own, and return {case: what it gave} as JSON has it.

    The directory is in memory where the system has such a file system: training waits until the disk has a checkpoint.
    Figures are not drawn: they are not compared, and take longer than the evaluations.
    """
    import matplotlib.figure

    matplotlib.figure.Figure.savefig = lambda *args, **kwargs: None
    start, wall, cpu = Path.cwd(), time.monotonic(), sum(os.times()[:4])
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="golden-", dir=memory if memory.is_dir() else None) as folder:
        os.chdir(folder)
        try:
            recorded = SECTIONS[name](Workspace(tree))
        except Exception as error:  # what all cases of the section need has failed
            recorded = {"all cases": describe_failure(error)}
        finally:
            os.chdir(start)
    wall, cpu = time.monotonic() - wall, sum(os.times()[:4]) - cpu  # of this process and those that it has started
    print(f"{name}: {len(recorded)} cases in {wall:.0f} s ({cpu:.0f} s of CPU)", file=sys.stderr, flush=True)
    return json.loads(json.dumps(recorded))
