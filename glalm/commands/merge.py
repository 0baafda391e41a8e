"""Write the average of several checkpoints as a folder that transformers loads, like glalm export.

glalm merge runs/demo --steps 300 350 400 --out merged/demo
glalm merge runs/branch_a runs/branch_b --out merged/branches --shares 1 3

The checkpoints must be of one run, or of runs that continue one checkpoint: the average of models that were trained
independently is no model. glalm eval checkpoint=FOLDER evaluates the result, and glalm train train.init_from=FOLDER
starts a run from it.
"""

import argparse
from pathlib import Path
from typing import get_args

from glalm.compat.merge import merge_checkpoints
from glalm.config.run import Weights
from glalm.config.strict import RunError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="the steps of each run whose checkpoints are averaged (default: the latest)",
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        metavar="X",
        help="of the checkpoints in the average, run by run, in any unit (default: equal)",
    )
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="current",
        help="of the checkpoints: those of the last step, or their moving average (default: %(default)s)",
    )
    parser.add_argument(
        "--mixer",
        action="append",
        default=[],
        metavar="PACKAGE.MODULE:CLASS",
        help="a mixer of your own code that the model has; may be repeated",
    )
    args = parser.parse_args()
    names = ["latest"] if args.steps is None else [f"step_{step}" for step in args.steps]
    try:
        merge_checkpoints(args.runs, names, args.out, args.shares, args.mixer, args.weights)
    except (RunError, OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(f"{args.out}: {args.out / 'README.md'} says how to load it")
