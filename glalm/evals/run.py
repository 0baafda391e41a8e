"""Runs the evaluators on a checkpoint of a run and writes what they find into the run's directory."""

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

import glalm
from glalm.config import EvalConfig, RunConfig
from glalm.data.loader import Windows
from glalm.data.shards import TokenSet
from glalm.data.tokenizer import Tokenizer
from glalm.evals.extrapolation import extrapolation, long_documents
from glalm.evals.generate import samples
from glalm.evals.perplexity import perplexity
from glalm.evals.plot import plot_extrapolation, plot_training
from glalm.evals.results import read_json, write_json
from glalm.model import GLALMConfig, GLALMForCausalLM
from glalm.strict import ConfigError, build, require
from glalm.train import checkpoint
from glalm.train.checkpoint import CheckpointError

Advance = Callable[[int], object]


@dataclass
class Job:
    """An evaluator with its inputs, opened and checked: what is left is to run the model."""

    settings: dict  # what the result depends on, for the record
    tokens: int  # that the model will read or write, for the progress bar
    run: Callable[[GLALMForCausalLM, Advance], dict | list]


def evaluate(config: EvalConfig) -> int:
    """Runs config.evals on a checkpoint of the run config.name; writes eval/*.json and plots/*.png, prints their
    paths and the sampled continuations, and returns 0.

    Raises ConfigError, before the model is loaded, when the run, its checkpoint or its data are missing, damaged or
    do not fit each other or the config.
    """
    run = open_run(config)
    jobs = {name: JOBS[name](config, run) for name in config.evals}
    path = find_checkpoint(config)
    device, autocast, precision = compute()
    model = load_model(path, run).to(device).eval()
    common = describe(config, path, model) | {"versions": versions()}
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{path}: {common['parameters'] / 1e6:.1f}M parameters, {device}, {precision}")
    for name, job in jobs.items():
        start = time.perf_counter()
        with progress(name, job.tokens) as advance, autocast:
            results = job.run(model, advance)
        result = {
            "evaluator": name,
            **common,
            "settings": job.settings | {"device": device_name(device), "precision": precision},
            "results": results,
            "seconds": time.perf_counter() - start,
        }
        write_json(config.folder / "eval" / f"{name}.json", result)
        show(console, name, results)
        console.print(f"wrote {config.folder / 'eval' / f'{name}.json'}")
    for plot in draw(config.folder, with_extrapolation="extrapolation" in jobs):
        console.print(f"wrote {plot}")
    return 0


# ------------------------------------------------------------------------------------------------------ the inputs


def open_run(config: EvalConfig) -> RunConfig:
    """The config that the run was trained with."""
    record = read_json(config.folder / "run.json")
    require(
        record is not None,
        f"{config.folder} holds no run (run.json is missing); make one with python train.py name={config.name}",
    )
    run = build(RunConfig, record["config"])
    if "extrapolation" in config.evals:
        config.check_lengths(run.data.seq_len)
    if config.data_path is None:
        check_data(open_split(config, run, "validation"), record)
    return run


def open_split(config: EvalConfig, run: RunConfig, split: str) -> TokenSet:
    """A split of the data to evaluate on, its vocabulary checked against the model's."""
    folder = config.data_path or run.data.path
    try:
        tokens = TokenSet(folder, split)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data_path={folder}: {error}") from error
    require(
        tokens.vocab_size <= run.model.vocab_size,
        f"data_path={folder} has a vocabulary of {tokens.vocab_size}, the model one of {run.model.vocab_size}; "
        "prepare it with the tokenizer that the run was trained with (scripts/prepare_data.py --tokenizer)",
    )
    return tokens


def check_data(tokens: TokenSet, record: dict) -> None:
    """The folder that a run names may have been prepared anew since, with another tokenizer even."""
    require(
        tokens.fingerprint == record["identity"]["data fingerprint"],
        f"{tokens.folder} is not the data that this run was trained on: it was prepared anew since; prepare the old "
        f"data again, or write data_path={tokens.folder} to evaluate on the new (its tokenizer must be the old one)",
    )


def find_checkpoint(config: EvalConfig) -> Path:
    """The checkpoint's folder, every file of it compared with its checksum."""
    try:
        path = checkpoint.find(config.folder / "checkpoints", config.checkpoint)
        checkpoint.verify(path)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint={config.checkpoint}: {error}") from error
    return path


def load_model(path: Path, run: RunConfig) -> GLALMForCausalLM:
    model = GLALMForCausalLM(GLALMConfig(**dataclasses.asdict(run.model)))
    checkpoint.load(path, model, verified=True)
    return model


def compute() -> tuple[torch.device, torch.autocast | nullcontext, str]:
    """The device, the context to run the model in, and its precision: bf16 where a GPU computes in it, else fp32."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), nullcontext(), "fp32"
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return device, torch.autocast("cuda", torch.bfloat16), "bf16"
    return device, nullcontext(), "fp32"


# -------------------------------------------------------------------------------------------------- the evaluators


def perplexity_job(config: EvalConfig, run: RunConfig) -> Job:
    tokens = open_split(config, run, "validation")
    try:
        windows = Windows(tokens, run.data.seq_len)
    except ValueError as error:
        raise ConfigError(f"evals=[perplexity]: {error}") from error
    return Job(
        settings={**source(tokens), "seq_len": windows.length, "batch_size": config.batch_size},
        tokens=len(windows) * windows.length,
        run=lambda model, advance: perplexity(model, windows, config.batch_size, advance),
    )


def extrapolation_job(config: EvalConfig, run: RunConfig) -> Job:
    tokens = open_split(config, run, config.extrapolation.split)
    train_length, max_length = run.data.seq_len, config.extrapolation.max_length
    documents = long_documents(tokens, max_length, config.extrapolation.documents)
    return Job(
        settings={**source(tokens), "max_length": max_length, "batch_size": config.batch_size},
        tokens=2 * len(documents) * max_length,  # with the state carried, and with it reset
        run=lambda model, advance: extrapolation(
            model, documents, train_length, max_length, config.batch_size, advance
        ),
    )


def samples_job(config: EvalConfig, run: RunConfig) -> Job:
    tokenizer = Tokenizer(open_split(config, run, "validation").tokenizer_path)
    return Job(
        settings={**dataclasses.asdict(config.samples), "seed": config.seed},
        tokens=len(config.samples.prompts) * config.samples.tokens,
        run=lambda model, advance: samples(model, tokenizer, config.samples, config.seed, advance),
    )


JOBS = {"perplexity": perplexity_job, "extrapolation": extrapolation_job, "samples": samples_job}


# ------------------------------------------------------------------------------------------------------ the record


def source(tokens: TokenSet) -> dict:
    return {"data": str(tokens.folder), "data_fingerprint": tokens.fingerprint, "split": tokens.split}


def describe(config: EvalConfig, path: Path, model: GLALMForCausalLM) -> dict:
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    return {
        "run": config.name,
        "checkpoint": path.name,
        "checkpoint_sha256": manifest["files"][checkpoint.MODEL]["sha256"],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def versions() -> dict[str, str]:
    modules = {m.__name__: m.__version__ for m in (glalm, torch, transformers)}
    return modules | {"python": platform.python_version()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def draw(folder: Path, with_extrapolation: bool) -> list[Path]:
    """The plots, made from the files in the run's folder: their paths."""
    plots = []
    if (folder / "metrics.jsonl").is_file():
        plots.append(plot_training(folder / "metrics.jsonl", folder / "plots" / "training.png"))
    if with_extrapolation:
        result = folder / "eval" / "extrapolation.json"
        plots.append(plot_extrapolation([result], folder / "plots" / "extrapolation.png"))
    return plots


# ------------------------------------------------------------------------------------------------------ the console


def show(console: Console, name: str, results: dict | list) -> None:
    if name == "perplexity":
        console.print(f"validation perplexity {results['perplexity']:.3f} over {results['tokens']:,} tokens")
    elif name == "extrapolation":
        for what, key in (("at the training length", "ratios"), ("with the state reset", "carried_over_reset")):
            ratios = ", ".join(f"{ratio:.3f} at {n}x" for n, ratio in results[key].items())
            console.print(f"perplexity relative to that {what}: {ratios or 'nothing beyond it'}")
    else:
        for sample in results:
            console.rule("sample", style="dim")
            console.print(Text(sample["prompt"], style="bold") + Text(sample["continuation"]))
        console.rule(style="dim")


@contextmanager
def progress(name: str, tokens: int) -> Iterator[Advance]:
    """A bar on stderr, when that is a terminal; yields what to call with each number of tokens done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), Rate(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("left"), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=tokens)
        yield lambda done: bar.advance(task, done)


class Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,} tokens  {task.finished_speed or task.speed or 0:,.0f} tokens/s")
