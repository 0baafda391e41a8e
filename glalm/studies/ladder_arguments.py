"""The command line of `glalm ladder`: its options, and the models that it names. This does not import torch."""

import argparse
import difflib
import math
from pathlib import Path

from glalm.cli import CONFIGS
from glalm.config.strict import require

# Overrides of the GLA preset. {length}, {window} and {tokens} are the run's training length, twelve times it, and its
# tokens a step.
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


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the command line's options, which are added to `parser`. Wrong ones, and --help, exit."""
    sizes = sorted(p.stem.removeprefix("ladder_") for p in (CONFIGS / "experiment").glob("ladder_*.yaml"))
    parser.add_argument("--size", choices=sizes, default="tiny", help="of the presets and the budget (%(default)s)")
    parser.add_argument("--seeds", type=parse_positive, default=1, metavar="N", help="use the seeds 1 to N (1)")
    parser.add_argument("--lrs", type=parse_rates, default=[None], metavar="LR,LR", help="train at each learning rate")
    parser.add_argument(
        "--at-once", type=parse_positive, default=1, metavar="N", help="runs on each visible GPU, or on the CPU (1)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="where the runs go (%(default)s)")
    parser.add_argument("--eval", action="append", default=[], metavar="KEY=VALUE", help="for glalm eval; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="check all, print what all runs would cost, and exit")
    parser.add_argument("arguments", nargs="*", metavar="NAME | KEY=VALUE")
    return parser.parse_intermixed_args()


def parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(0 < rate < math.inf for rate in rates) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of learning rates: write positive numbers, each once, with commas and without "
            "spaces, such as 1e-3,3e-3"
        )
    return rates


def check_models(args: argparse.Namespace) -> None:
    """Raise ConfigError for a name that is given twice, or is no preset of the command line's size and no ablation.

    Mixers of the user's own code are checked where they are imported.
    """
    presets = sorted(p.stem.removesuffix(f"_{args.size}") for p in (CONFIGS / "model").glob(f"*_{args.size}.yaml"))
    for model in named_models(args):
        matches = difflib.get_close_matches(model, [*presets, *ABLATIONS], n=1)
        suggestion = f"did you mean {matches[0]}? " if matches else ""
        require(
            model in presets or model in ABLATIONS or ":" in model,
            f"{model} is no model of --size {args.size}; {suggestion}presets: {', '.join(presets)}; ablations: "
            f"{', '.join(ABLATIONS)}; a mixer of your own is package.module:Class",
        )
        require(
            named_models(args).count(model) == 1,
            f"{model} is named twice, but is one run of each seed and learning rate. Name it once",
        )


def named_models(args: argparse.Namespace) -> list[str]:
    return [argument for argument in args.arguments if "=" not in argument]
