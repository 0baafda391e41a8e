"""Train GLA with glalm and flash-linear-attention from the same weights on the same batches, and compare the losses.

    python benchmarks/same_training.py --json same.json --set experiment=gla_340m data=local data.path=data/books \
        train.tokens=39321600 train.batch_tokens=131072 optim.warmup_tokens=1310720
    python benchmarks/same_training.py --json same.json --figure same.png      draw it, and train nothing
    python benchmarks/same_training.py --json demo.json --models glalm transformers --set train.steps=20   on a CPU

--set takes what `glalm train` takes. All models are trained by the recipe of that config: its learning rates, weight
decay, clipping, batches and their order.

    glalm          the product: glalm's training step
    fla            flash-linear-attention's GLAForCausalLM in a plain loop of PyTorch, as its users write one
    transformers   glalm's own model in that loop, which runs on a CPU, too

Two runs of one program drift apart by rounding alone, so one run of each program proves nothing. Every model is trained
several times, from weights that differ by a relative 1e-6, and the difference between the models is compared with what
separates the runs of one model. Each run has a process of its own, on a GPU of its own if there are several. The file
has the runs that are complete; the same command trains the others.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice, product
from pathlib import Path
from queue import Queue
from statistics import fmean, stdev

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glalm import IGNORE_INDEX
from glalm.cli import compose_config
from glalm.compat.fla import export_checkpoint
from glalm.config.run import RunConfig
from glalm.config.strict import require
from glalm.data.files import write_json
from glalm.data.loader import Batch, training_batches
from glalm.evals.options import TrainingRun
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.launcher import visible_gpus
from glalm.train import optim, parallel, run_dir
from glalm.train.environment import describe_environment
from glalm.train.init_weights import build_initial_model
from glalm.train.state import BatchPlan, plan_batches
from glalm.train.trainer import Trainer, split_batch

NUDGE = 1e-6  # relative to each weight: about eight units in the last place of float32
SMOOTHED = 10  # updates over which the figure's difference is averaged
LAST = 0.1  # share of the updates over which the final losses are averaged


# ---------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def nudge_weights(model: nn.Module, run: int) -> None:
    """Multiply every weight by 1 + NUDGE x, with x from a standard normal distribution that `run` seeds."""
    generator = torch.Generator().manual_seed(run)
    for parameter in model.parameters():
        parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))


def write_initial_weights(config: RunConfig, run: int, folder: Path) -> None:
    """Write the initial weights of a run in flash-linear-attention's form, which all models read."""
    core = build_initial_model(config, from_scratch=True)
    nudge_weights(core, run)
    model = GLALMForCausalLM(GLALMConfig.from_model_config(config.model))
    model.load_state_dict(core.state_dict())
    export_checkpoint(model, folder)


def iterate_batches(config: RunConfig, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of the run in order, on the device.

    The last token of a window has no target: models of transformers find targets in their input, which ends there.
    """
    training, _ = run_dir.open_data(config)
    [reading] = training.phases
    for _, batch in islice(training_batches(reading.windows, reading.order), config.steps):
        batch["labels"][:, -1] = IGNORE_INDEX
        yield {name: x.to(device) for name, x in batch.items()}


def train_glalm(
    folder: Path, config: RunConfig, accelerator: Accelerator, batches: Iterable[Batch]
) -> Iterator[Tensor]:
    """Train as `glalm train` does, from the weights in `folder`, and yield the loss of every update."""
    config.train.init_from = str(folder)
    trainer = Trainer(config, plan_batches(config, 1), accelerator)
    for batch in batches:
        yield trainer.step(batch).loss


def train_fla(folder: Path, config: RunConfig, accelerator: Accelerator, batches: Iterable[Batch]) -> Iterator[Tensor]:
    from fla.models import GLAForCausalLM

    model = GLAForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return train_plainly(model, config, accelerator, batches)


def train_transformers(
    folder: Path, config: RunConfig, accelerator: Accelerator, batches: Iterable[Batch]
) -> Iterator[Tensor]:
    model = GLALMForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return train_plainly(model, config, accelerator, batches)


def train_plainly(
    model: nn.Module, config: RunConfig, accelerator: Accelerator, batches: Iterable[Batch]
) -> Iterator[Tensor]:
    """Train a causal language model of transformers by a plain loop, and yield the loss of every update."""
    model = model.to(accelerator.device).train()
    optimizers = optim.build_optimizers(model, config.optim)
    micro_batch = BatchPlan.from_config(config, 1).micro_batch
    for step, batch in enumerate(batches, 1):
        micro_batches = split_batch(batch, micro_batch, dim=0)
        total = torch.zeros((), device=accelerator.device)
        for each in micro_batches:
            with accelerator.autocast():
                loss = model(input_ids=each["input_ids"], labels=each["input_ids"], use_cache=False).loss
            (loss / len(micro_batches)).backward()
            total += loss.detach() / len(micro_batches)
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optim.set_learning_rate(optimizers, optim.learning_rate(step, config))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield total


MODELS = {"glalm": train_glalm, "fla": train_fla, "transformers": train_transformers}


def compose_run_config(changes: list[str]) -> RunConfig:
    """Return the config of all runs. Raise ConfigError if the plain loop would do something else than it says."""
    config = compose_config(TrainingRun, "train", changes)
    require(
        config.model.mixer == "gla" and config.train.stages is None,
        "flash-linear-attention's GLA is compared with model.mixer=gla, in a run without train.stages",
    )
    for key, value, wanted in (
        ("data.document_boundaries", config.data.document_boundaries, "ignore"),
        ("train.tbptt_length", config.train.tbptt_length, None),
        ("train.z_loss", config.train.z_loss, 0),
    ):
        require(value == wanted, f"{key}={value} is nothing that the plain loop does. Leave it at its default")
    return config


def train_run(name: str, run: int, config: RunConfig) -> dict:
    """Train one run, and return its losses in nats per token and its seconds of training after the first update."""
    accelerator = parallel.start_processes(config)
    batches = iterate_batches(config, accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        write_initial_weights(config, run, Path(folder))
        losses = MODELS[name](Path(folder), config, accelerator, batches)
        first = next(losses).item()  # It loads the weights, and compiles.
    start = time.perf_counter()
    rest = torch.stack([*losses]).tolist()
    return {"model": name, "run": run, "seconds": time.perf_counter() - start, "losses": [first, *rest]}


# -------------------------------------------------------------------------------------------------------------- runs


def train_missing(options: argparse.Namespace, record: dict, path: Path) -> None:
    """Train the runs that `record` lacks, each in a process, as many at once as there are GPUs, and save each."""
    done = [(each["model"], each["run"]) for each in record["runs"]]
    missing = [each for each in product(options.models, range(1, options.runs + 1)) if each not in done]
    gpus = visible_gpus() or [""]
    free: Queue[str] = Queue()
    for gpu in gpus:
        free.put(gpu)

    def train(name: str, run: int) -> dict:
        gpu = free.get()
        command = [sys.executable, __file__, "--one", name, str(run), "--set", *options.set]
        process = subprocess.run(
            command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}, capture_output=True, text=True
        )
        free.put(gpu)
        if process.returncode:
            raise RuntimeError(f"{name}, run {run}: {process.stderr.strip()[-2000:]}")
        return json.loads(process.stdout.splitlines()[-1])

    with ThreadPoolExecutor(len(gpus)) as pool:
        for future in as_completed([pool.submit(train, *each) for each in missing]):
            result = future.result()
            record["runs"].append(result)
            write_json(path, record)
            print(f"{result['model']}, run {result['run']}: {result['seconds']:.0f} s", flush=True)


# ----------------------------------------------------------------------------------------------------------- results


def losses_of(record: dict) -> dict[str, list[list[float]]]:
    """Return {model: the losses of each of its runs}."""
    losses: dict[str, list[list[float]]] = {}
    for each in sorted(record["runs"], key=lambda each: each["run"]):
        losses.setdefault(each["model"], []).append(each["losses"])
    return losses


def summarize(losses: dict[str, list[list[float]]]) -> dict[str, dict]:
    """Return for each model the mean loss of each of its runs over the last updates, their `mean` and their `spread`.

    Returns:
        `spread` is the standard deviation of one run. After the first model, `difference` is the mean minus that of
        the first, and `error` its standard error.
    """
    summary: dict[str, dict] = {}
    for name, runs in losses.items():
        last = max(1, round(LAST * len(runs[0])))
        ends = [fmean(run[-last:]) for run in runs]
        summary[name] = {"runs": ends, "mean": fmean(ends), "spread": stdev(ends) if len(ends) > 1 else math.nan}
    first = next(iter(summary.values()))
    for each in [*summary.values()][1:]:
        each["difference"] = each["mean"] - first["mean"]
        each["error"] = math.hypot(*(x["spread"] / math.sqrt(len(x["runs"])) for x in (first, each)))
    return summary


def print_summary(losses: dict[str, list[list[float]]]) -> None:
    updates = len(next(iter(losses.values()))[0])
    print(f"| {updates} updates | loss of the last tenth, each run | mean | spread of a run | minus the first model |")
    print("|-|-|-|-|-|")
    for name, each in summarize(losses).items():
        runs = ", ".join(f"{loss:.4f}" for loss in each["runs"])
        difference = f"{each['difference']:+.4f} ± {each['error']:.4f}" if "difference" in each else ""
        print(f"| {name} | {runs} | {each['mean']:.4f} | {each['spread']:.4f} | {difference} |")


def draw_figure(losses: dict[str, list[list[float]]], path: Path) -> None:
    """Draw the loss of each model with a band over its runs, and how far its runs are from the first model's mean."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    arrays = {name: np.array(runs) for name, runs in losses.items()}
    first = next(iter(arrays.values())).mean(0)
    kernel = np.ones(min(SMOOTHED, len(first))) / min(SMOOTHED, len(first))
    updates = np.arange(1, len(first) + 1)
    for (name, runs), color in zip(arrays.items(), ("#0072B2", "#D55E00", "#009E73"), strict=False):
        curves.plot(updates, runs.mean(0), color=color, label=f"{name}, {len(runs)} runs", linewidth=1)
        curves.fill_between(updates, runs.min(0), runs.max(0), color=color, alpha=0.3, linewidth=0)
        for run in runs:
            smooth = np.convolve(run - first, kernel, "valid")
            differences.plot(updates[len(kernel) - 1 :], smooth, color=color, linewidth=0.8)
    curves.set(xlabel="update", ylabel="training loss")
    differences.set(xlabel="update", ylabel=f"each run minus the mean of {next(iter(losses))}")
    curves.legend()
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------- command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the runs are, or will be")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["glalm", "fla"], help="default: glalm fla")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config, as for glalm train")
    parser.add_argument("--runs", type=int, default=3, help="of each model (default: %(default)s)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the runs of --json, and train nothing")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json is None and options.one is None:
        parser.error("write --json FILE")
    return options


def main() -> None:
    options = parse_arguments()
    if options.one:
        name, run = options.one
        print(json.dumps(train_run(name, int(run), compose_run_config(options.set))))
        return
    record = json.loads(options.json.read_text()) if options.json.exists() else {}
    if not options.figure:
        if record and record["changes"] != options.set:
            raise SystemExit(f"error: {options.json} has runs of {' '.join(record['changes'])}. Write another --json")
        compose_run_config(options.set)
        record = record or {"environment": describe_environment(), "changes": options.set, "runs": []}
        train_missing(options, record, options.json)
    losses = losses_of(record)
    print_summary(losses)
    if options.figure:
        draw_figure(losses, options.figure)


if __name__ == "__main__":
    main()
