"""Train and evaluate every mixer at one tiny size and token budget: python scripts/ladder.py [NAME ...] [KEY=VALUE ...]

NAME: presets NAME_tiny of configs/model (all mixers and the hybrid, unless some are named). KEY=VALUE: as for train.py,
for every run. The runs are FOLDER/NAME; FOLDER/ladder.json is the table (operations of a forward pass; validation
perplexity, and on long documents that at 2, 4 and 10 training lengths over that at one), FOLDER/loss.png and .svg the
validation loss against tokens, FOLDER/positions.png and .svg the perplexity against position. The same command again
resumes what was interrupted.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from glalm.cli import CONFIGS
from glalm.config import MIXERS, EvalConfig, ExtrapolationConfig, RunConfig
from glalm.evals.plot import plot_extrapolation, plot_losses
from glalm.evals.results import read_json, read_metrics, write_json
from glalm.evals.run import evaluate
from glalm.model.flops import cost
from glalm.strict import ConfigError, build, check_overrides, require
from glalm.train.loop import train

# About a quarter of a million tokens: minutes a mixer on two CPU cores.
BUDGET = ["data.seq_len=128", "train.steps=240", "train.batch_size=8", "train.micro_batch_size=null"]
BUDGET += ["train.eval_every=30", "train.checkpoint.every=240"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="where the runs go (runs/ladder)")
    parser.add_argument("arguments", nargs="*", metavar="NAME | KEY=VALUE")
    args = parser.parse_args()
    overrides = [a for a in args.arguments if "=" in a]
    names = [a for a in args.arguments if "=" not in a] or [*MIXERS, "hybrid"]
    try:
        configs = [run_config(name, args.folder, overrides) for name in names]
        for config in configs:
            if signum := train(config):
                return 128 + signum
            evaluate(eval_config(config))
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    rows = [result(config) for config in configs]
    write_json(args.folder / "ladder.json", {"overrides": BUDGET + overrides, "rows": rows})
    show(rows)
    losses = {config.name: config.folder / "metrics.jsonl" for config in configs}
    positions = [evaluated(config, "extrapolation") | {"model": config.name} for config in configs]
    for plot in (
        *plot_losses(losses, args.folder / "loss.png"),
        *plot_extrapolation(positions, args.folder / "positions.png"),
    ):
        print(f"wrote {plot}")
    return 0


def run_config(name: str, folder: Path, overrides: list[str]) -> RunConfig:
    presets = sorted(p.stem.removesuffix("_tiny") for p in (CONFIGS / "model").glob("*_tiny.yaml"))
    require(name in presets, f"{name} is none of the presets: {', '.join(presets)}")
    check_overrides(overrides, RunConfig, [p.name for p in CONFIGS.iterdir() if p.is_dir()])
    where = [f"name={name}", f'runs_dir="{folder}"', f"model={name}_tiny"]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        tree = compose("train", [*where, *BUDGET, *overrides])
    return build(RunConfig, OmegaConf.to_container(tree, resolve=True))


def eval_config(config: RunConfig) -> EvalConfig:
    return EvalConfig(
        name=config.name,
        runs_dir=config.runs_dir,
        evals=["perplexity", "extrapolation"],
        extrapolation=ExtrapolationConfig(max_length=10 * config.data.seq_len, contexts=["carried"]),
    )


def result(config: RunConfig) -> dict:
    """A row of the table, from the run's files."""
    perplexity, extrapolation = (evaluated(config, name) for name in ("perplexity", "extrapolation"))
    speeds = [row["tokens_per_second"] for row in read_metrics(config.folder / "metrics.jsonl") if "loss" in row]
    ratios = extrapolation["results"]["contexts"]["carried"]["ratios"]
    return {
        "mixer": config.name,
        "parameters": perplexity["parameters"],
        "MFLOP/token": cost(config.model, config.data.seq_len).forward / 1e6,
        "tokens/s": median(speeds),
        "perplexity": perplexity["results"]["perplexity"],
        **{f"{n}x / 1x": ratios[n]["ratio"] for n in ("2", "4", "10")},
    }


def evaluated(config: RunConfig, evaluator: str) -> dict:
    return read_json(config.folder / "eval" / f"{evaluator}.json")


def show(rows: list[dict]) -> None:
    table = Table(title="one size, one token budget")
    for key in rows[0]:
        table.add_column(key, justify="left" if key == "mixer" else "right")
    for row in sorted(rows, key=lambda r: r["perplexity"]):
        whole = ("parameters", "tokens/s")
        cells = [v if k == "mixer" else f"{v:,.0f}" if k in whole else f"{v:.3f}" for k, v in row.items()]
        table.add_row(*cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
