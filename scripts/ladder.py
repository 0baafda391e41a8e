"""Train and evaluate many models at one size and token budget: python scripts/ladder.py [NAME ...] [KEY=VALUE ...]

NAME: the presets NAME_SIZE of configs/model (all mixers and the hybrid, unless some are named), or the GLA paper's
ablations: gla_scalar_gate, gla_fixed_gate, gla_no_gate, gla_1_head, gla_8_heads, and gla_12_segments, which reads
windows of twelve training lengths by truncated backpropagation. KEY=VALUE: as for train.py, for every run; the rest is
configs/experiment/ladder_SIZE.yaml. For example, everything twice on all GPUs, three models on each at a time:

    python scripts/ladder.py --size small --seeds 2 --at-once 3 data.path=data/mine

Each run is train.py and then eval.py, in processes of their own; its folder is FOLDER/NAME-SEED, and what they print
FOLDER/NAME-SEED.log. The same command again leaves out what is done and resumes what was interrupted.
FOLDER/ladder.json is the table of all that is done; FOLDER/loss.png and .svg show the validation loss against tokens,
FOLDER/positions.png and .svg the perplexity against position, both of the first seed.
"""

import argparse
import json
import math
import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from glalm.cli import CONFIGS, compose_config
from glalm.config.strict import ConfigError, check_overrides, require
from glalm.evals.options import EvalConfig, TrainingRun
from glalm.evals.plot import plot_extrapolation, plot_losses
from glalm.evals.result_files import read_json, read_metrics, training_speed, write_json
from glalm.model.flops import model_cost
from glalm.model.mixers import MIXERS

ABLATIONS = {
    "gla_scalar_gate": ["model.gla.gate=scalar"],
    "gla_fixed_gate": ["model.gla.gate=fixed"],  # RetNet's decay
    "gla_no_gate": ["model.gla.gate=none"],
    "gla_1_head": ["model.num_heads=1"],  # the paper's model has 4
    "gla_8_heads": ["model.num_heads=8"],
    "gla_12_segments": [
        "train.tbptt_length={length}",
        "data.seq_len={window}",
        "train.batch_size=null",
        "train.batch_tokens={tokens}",
    ],
}


@dataclass(frozen=True)
class Run:
    choice: str
    config: TrainingRun
    train: list[str]  # arguments of train.py
    evaluate: list[str]  # and of eval.py

    def results(self, evaluator: str) -> dict | None:
        return read_json(self.config.folder / "eval" / f"{evaluator}.json")

    @property
    def mark(self) -> dict:
        """What is written down after both commands: the config, whichever files and arguments it comes from."""
        return json.loads(json.dumps({"train": asdict(self.config), "evaluate": self.evaluate}))

    @property
    def done(self) -> bool:
        return read_json(self.config.folder / "ladder.json") == self.mark


@dataclass
class Processes:
    """Those that run now, so that all can be told to stop."""

    running: set[subprocess.Popen] = field(default_factory=set)
    stopping: bool = False

    def run(self, command: list[str], log: Path, environment: dict[str, str]) -> int:
        """Its exit code. In a session of its own: Ctrl-C stops this script, which stops each process once."""
        with log.open("a") as file:
            output = {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, env=environment, start_new_session=True, **output)
            self.running.add(process)
            if self.stopping:
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        return code

    def stop(self) -> None:
        self.stopping = True
        for process in list(self.running):
            process.terminate()


def main() -> int:
    args = arguments()
    overrides = [a for a in args.arguments if "=" in a]
    names = [a for a in args.arguments if "=" not in a] or [*MIXERS, "hybrid"]
    try:
        refuse(overrides, {"name": "NAME", "runs_dir": "--folder", "seed": "--seeds"})
        refuse(args.eval, dict.fromkeys(("name", "runs_dir", "out", "checkpoint"), "the run that is evaluated"))
        check_overrides(args.eval, EvalConfig, [p.name for p in CONFIGS.iterdir() if p.is_dir()])
        runs = [plan(name, seed, args, overrides) for seed in range(1, args.seeds + 1) for name in names]
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = run_all(runs, args.at_once)
    if done := [run for run in runs if run.done]:
        write(done, args)
    for name, why in failed.items():
        print(f"{name}: {why}, see {args.folder / name}.log", file=sys.stderr)
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = sorted(p.stem.removeprefix("ladder_") for p in (CONFIGS / "experiment").glob("ladder_*.yaml"))
    parser.add_argument("--size", choices=sizes, default="tiny", help="of the presets and the budget (%(default)s)")
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="runs of each, with the seeds 1 to N (1)"
    )
    parser.add_argument("--at-once", type=positive, default=1, metavar="N", help="runs on each visible GPU, or CPU (1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="where the runs go (%(default)s)")
    parser.add_argument("--eval", action="append", default=[], metavar="KEY=VALUE", help="as for eval.py; repeatable")
    parser.add_argument("arguments", nargs="*", metavar="NAME | KEY=VALUE")
    return parser.parse_intermixed_args()


def refuse(overrides: list[str], set_by: dict[str, str]) -> None:
    """ConfigError where one of them is the ladder's own to set: its table would be of other runs than it says."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        require(key not in set_by, f"{key}=... is set for each run, by {set_by.get(key)}")


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def plan(choice: str, seed: int, args: argparse.Namespace, overrides: list[str]) -> Run:
    """What is to be run, checked. Raises ConfigError."""
    presets = sorted(p.stem.removesuffix(f"_{args.size}") for p in (CONFIGS / "model").glob(f"*_{args.size}.yaml"))
    require(
        choice in presets or choice in ABLATIONS,
        f"{choice} is none of the presets: {', '.join(presets)}; nor of the ablations: {', '.join(ABLATIONS)}",
    )
    check_overrides(overrides, TrainingRun, [p.name for p in CONFIGS.iterdir() if p.is_dir()])
    preset = f"model={'gla' if choice in ABLATIONS else choice}_{args.size}"
    where = [f'name="{choice}-{seed}"', f'runs_dir="{args.folder}"', f"seed={seed}"]
    train = [f"experiment=ladder_{args.size}", preset, *where, *overrides]
    config = compose_config(TrainingRun, "train", train)
    sizes = {"length": config.data.seq_len, "window": 12 * config.data.seq_len, "tokens": config.tokens_per_step}
    train += [override.format(**sizes) for override in ABLATIONS.get(choice, [])]
    config = compose_config(TrainingRun, "train", train)
    length = config.train.tbptt_length or config.data.seq_len
    evaluate = [*where[:2], "evals=[perplexity,extrapolation]", f"train_length={length}"]
    evaluate += [f"extrapolation.max_length={10 * length}", "extrapolation.contexts=[stateful]", *args.eval]
    return Run(choice, config, train, evaluate)


# --------------------------------------------------------------------------------------------------------- running


def run_all(runs: list[Run], at_once: int) -> dict[str, str]:
    """Those that are not done, at_once on each GPU. Returns what went wrong, by the run's name."""
    missing, failed, processes = [run for run in runs if not run.done], {}, Processes()
    slots = queue.SimpleQueue()
    places = [gpu for _ in range(at_once) for gpu in gpus() or [None]]
    for gpu in places:
        slots.put(gpu)
    print(f"{len(runs)} runs, {len(missing)} to do, {len(places)} at once", flush=True)
    signal.signal(signal.SIGTERM, interrupt)
    with ThreadPoolExecutor(len(places)) as pool:
        futures = {pool.submit(run_one, run, slots, len(places), processes): run for run in missing}
        try:
            for n, future in enumerate(as_completed(futures), 1):
                run, why = futures[future], future.result()
                if why:
                    failed[run.config.name] = why
                print(f"{n}/{len(missing)} {run.config.name}: {why or score(run)}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()  # train.py saves first
            failed = {run.config.name: "stopped" for run in missing if not run.done}
    return failed


def interrupt(*_) -> None:
    """SIGTERM is Ctrl-C, once: GNU timeout sends it twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_one(run: Run, slots: queue.SimpleQueue, places: int, processes: Processes) -> str | None:
    """Trains and evaluates on the first GPU that is free; what failed, or None."""
    gpu = slots.get()
    threads = str(max(1, (os.cpu_count() or 1) // places))  # each process's share of the cores
    environment = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}
    environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    log = run.config.folder.with_name(f"{run.config.name}.log")
    try:
        for script, args in (("train.py", run.train), ("eval.py", run.evaluate)):
            if code := processes.run([sys.executable, str(CONFIGS.parent / script), *args], log, environment):
                return f"{script} ended with exit code {code}"
        write_json(run.config.folder / "ladder.json", run.mark)
        return None
    finally:
        slots.put(gpu)


def gpus() -> list[str]:
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def score(run: Run) -> str:
    return f"perplexity {run.results('perplexity')['results']['perplexity']:.2f}"


# --------------------------------------------------------------------------------------------------------- the table


def write(runs: list[Run], args: argparse.Namespace) -> None:
    """ladder.json, the table and the two figures, of what is done."""
    choices = list(dict.fromkeys(run.choice for run in runs))
    rows = [row(choice, [run for run in runs if run.choice == choice]) for choice in choices]
    first = [next(run for run in runs if run.choice == choice) for choice in choices]
    evaluated = first[0].results("perplexity")
    about = {"size": args.size, "arguments": args.arguments, "eval": args.eval, "at_once": args.at_once}
    about |= {"device": evaluated["device"], "gpus": len(gpus()), "versions": evaluated["versions"]}
    write_json(args.folder / "ladder.json", {**about, "rows": rows})
    show(rows)
    # A validation in longer windows has another loss.
    usual = min(run.config.data.seq_len for run in first)
    losses = {r.choice: r.config.folder / "metrics.jsonl" for r in first if r.config.data.seq_len == usual}
    positions = [run.results("extrapolation") | {"model": run.choice} for run in first]
    for plot in (
        *plot_losses(losses, args.folder / "loss.png"),
        *plot_extrapolation(positions, args.folder / "positions.png"),
    ):
        print(f"wrote {plot}")


def row(choice: str, runs: list[Run]) -> dict:
    """Means over the seeds, of a ratio its logarithm's. tokens/s is of a run among its neighbours."""
    config, found = runs[0].config, [run.results("perplexity") for run in runs]
    metrics = [read_metrics(run.config.folder / "metrics.jsonl") for run in runs]
    ratios = [next(iter(run.results("extrapolation")["results"]["contexts"].values()))["ratios"] for run in runs]
    reached = [n for n in ratios[0] if n in ("2", "4", "10") and ratios[0][n]["documents"]]
    return {
        "model": choice,
        "parameters": found[0]["parameters"],
        "MFLOP/token": model_cost(config.model, config.data.seq_len).forward / 1e6,
        "tokens": config.steps * config.tokens_per_step,
        "tokens/s": training_speed(chain.from_iterable(metrics)),
        "perplexity": math.exp(fmean(f["results"]["nats_per_token"] for f in found)),
        "seeds": {str(run.config.seed): f["results"]["perplexity"] for run, f in zip(runs, found, strict=True)},
        **{f"{n}x / 1x": math.exp(fmean(math.log(r[n]["ratio"]) for r in ratios)) for n in reached},
    }


def show(rows: list[dict]) -> None:
    table = Table(title="one size, one token budget", box=box.MARKDOWN)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for key in columns:
        table.add_column(key, justify="left" if key == "model" else "right")
    for found in sorted(rows, key=lambda r: r["perplexity"]):
        table.add_row(*(cell(key, found.get(key)) for key in columns))
    Console(width=130).print(table)


def cell(key: str, value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{v:.2f}" for v in value.values())
    if key in ("model", "parameters", "tokens", "tokens/s"):
        return value if isinstance(value, str) else f"{value:,.0f}"
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
