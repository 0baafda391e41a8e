"""Export a checkpoint of a run as a folder that transformers loads: weights, tokenizer, generation config, model card.

glalm export runs/demo --out exported/demo
python -c "import glalm.hf; from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported/demo')"
"""

import argparse
from pathlib import Path
from typing import get_args

from glalm.compat.export import export_run
from glalm.config.run import Weights
from glalm.config.strict import RunError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--checkpoint", default="latest", help="latest or step_N (default: %(default)s)")
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="current",
        help="those of the last step, or their moving average, train.ema_decay (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--mixer",
        action="append",
        default=[],
        metavar="PACKAGE.MODULE:CLASS",
        help="a mixer of your own code that the model has; may be repeated",
    )
    args = parser.parse_args()
    try:
        export_run(args.run, args.checkpoint, args.out, args.mixer, args.weights)
    except (RunError, OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(f"{args.out}: {args.out / 'README.md'} says how to load it")
