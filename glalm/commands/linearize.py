"""Convert a Llama with softmax attention to GLA or ReGLA, to be trained further.

    glalm linearize LLAMA OUT                                        every layer becomes GLA
    glalm linearize LLAMA OUT --mixer regla --softmax-layers 7 15    layers 7 and 15 stay softmax attention
    glalm linearize LLAMA OUT --distil 500 --data data/corpus        first fit each new layer to the old one
    glalm train --config-dir OUT/configs model=linearized train.init_from=OUT data.path=data/corpus name=...

LLAMA is a folder that transformers loads as a LlamaForCausalLM: safetensors, or a GGUF file in it with --gguf FILE. OUT
gets the model as save_pretrained writes it, its config for `glalm train` and, if LLAMA has one, the tokenizer. Prepare
the data with that: `glalm prepare --tokenizer OUT`. docs/linearize.md describes all steps, with results.
"""

import argparse
import sys
from pathlib import Path

from glalm.compat.linearize import LinearizeOptions, linearize_checkpoint
from glalm.compat.llama import LINEAR_MIXERS
from glalm.config.strict import ConfigError, RunError


def main() -> int:
    arguments = parse_arguments()
    try:
        options = LinearizeOptions(**arguments)
        linearize_checkpoint(options)
    except (ConfigError, RunError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    print(f"Wrote {options.out}. To train it, run:")
    print(f"  glalm train --config-dir {options.out}/configs model=linearized train.init_from={options.out} ...")
    return 0


def parse_arguments() -> dict:
    """Return the explicit arguments. LinearizeOptions has the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
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
    return vars(parser.parse_args())
