"""Write a model as a folder that transformers loads: `glalm export`, `glalm merge` and `glalm linearize`."""

import argparse
import sys
from pathlib import Path
from shlex import quote
from typing import get_args

from glalm.commands import create_parser
from glalm.compat.export import export_run
from glalm.compat.linearize import LinearizeOptions, linearize_checkpoint
from glalm.compat.llama import LINEAR_MIXERS
from glalm.compat.merge import merge_checkpoints
from glalm.config.run import Weights
from glalm.config.strict import ConfigError, RunError


def export_checkpoint() -> None:
    """Export a checkpoint of a run as a folder that transformers loads.

    It has the weights, the tokenizer, the generation config and a model card.

    glalm export runs/demo --out exported/demo
    python -c "import glalm.hf; from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported/demo')"
    """
    parser = create_parser(export_checkpoint)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--checkpoint", default="latest", help="latest or step_N (default: %(default)s)")
    add_shared_options(parser)
    args = parser.parse_args()
    try:
        export_run(args.run, args.checkpoint, args.out, args.mixer, args.weights)
    except (RunError, OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(f"{args.out}: {args.out / 'README.md'} says how to load it")


def average_checkpoints() -> None:
    """Write the average of several checkpoints as a folder that transformers loads, like glalm export.

    glalm merge runs/demo --steps 300 350 400 --out merged/demo
    glalm merge runs/branch_a runs/branch_b --out merged/branches --shares 1 3

    The checkpoints must be of one run, or of runs that continue one checkpoint: the average of models that were trained
    independently is no model. glalm eval checkpoint=FOLDER evaluates the result, and glalm train train.init_from=FOLDER
    starts a run from it.
    """
    parser = create_parser(average_checkpoints)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="the steps of each run whose checkpoints are averaged (default: the latest)",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        metavar="X",
        help="of the checkpoints in the average, run by run, in any unit (default: equal)",
    )
    add_shared_options(parser)
    args = parser.parse_args()
    names = ["latest"] if args.steps is None else [f"step_{step}" for step in args.steps]
    try:
        merge_checkpoints(args.runs, names, args.out, args.shares, args.mixer, args.weights)
    except (RunError, OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(f"{args.out}: {args.out / 'README.md'} says how to load it")


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add which weights are read, where the folder is written, and the user's code that reading a run needs."""
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


def linearize_llama() -> int:
    """Convert a Llama with softmax attention to GLA or ReGLA, to be trained further.

        glalm linearize LLAMA OUT                                        every layer becomes GLA
        glalm linearize LLAMA OUT --mixer regla --softmax-layers 7 15    layers 7 and 15 stay softmax attention
        glalm linearize LLAMA OUT --distil 500 --data data/corpus        first fit each new layer to the old one
        glalm train --config-dir OUT/configs model=linearized train.init_from=OUT data.path=data/corpus name=...

    LLAMA is a folder that transformers loads as a LlamaForCausalLM: safetensors, or a GGUF file in it with --gguf FILE.
    OUT gets the model as save_pretrained writes it, its config for `glalm train` and, if LLAMA has one, the tokenizer.
    Prepare the data with that: `glalm prepare --tokenizer OUT`. docs/linearize.md describes all steps, with results.
    """
    parser = create_parser(linearize_llama, argument_default=argparse.SUPPRESS)  # LinearizeOptions has the defaults.
    parser.add_argument("llama", type=Path)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--gguf", help="the GGUF file in LLAMA to read instead of safetensors")
    parser.add_argument("--mixer", choices=LINEAR_MIXERS, help="default: gla")
    parser.add_argument("--softmax-layers", type=int, nargs="*", metavar="LAYER", help="counted from 0")
    parser.add_argument("--distil", type=int, metavar="STEPS", help="default: 0")
    parser.add_argument("--data", type=Path, help="the folder of a prepared set, for --distil")
    parser.add_argument("--batch-size", type=int, help="sequences a step of --distil (default: 8)")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence of --distil (default: 512)")
    parser.add_argument("--lr", type=float, help="learning rate of --distil (default: 1e-3)")
    parser.add_argument("--device", help="device of --distil (default: cuda, or cpu without a GPU)")
    arguments = vars(parser.parse_args())
    try:
        options = LinearizeOptions(**arguments)
        linearize_checkpoint(options)
    except (ConfigError, RunError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    print(f"Wrote {options.out}. To train it, run:")
    init_from = quote(f"train.init_from={options.out}")
    print(f"  glalm train --config-dir {quote(f'{options.out}/configs')} model=linearized {init_from} ...")
    return 0
