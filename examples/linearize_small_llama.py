"""Compare a model converted from a small Llama with the same model trained from scratch.

    python examples/linearize_small_llama.py --data data/demo --folder runs/linearize    10 minutes on 2 CPU cores

This trains a Transformer++ of 1.4 million parameters and converts it to GLA, to ReGLA and to GLA with one softmax
layer, each with and without distillation. Then it trains these, and GLA and ReGLA from random weights, on the same
number of further tokens (including those of the distillation) at the same learning rate. It prints the validation
losses as a table, which docs/linearize.md discusses.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from glalm.compat.llama import PARAMETER_NAMES
from glalm.hf import GLALMForCausalLM
from glalm.model.mixers.attention import attention_heads
from glalm.train.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {"gla": [], "regla": ["--mixer", "regla"], "hybrid": ["--softmax-layers", "1"]}


def run_python(*command) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def train(args: argparse.Namespace, name: str, steps: int, *options) -> dict[int, float]:
    """Run train.py and return the validation losses by step."""
    run_python(
        "train.py", *options, f"name={name}", f"runs_dir={args.folder}", f"data.path={args.data}",
        f"train.steps={steps}", "train.eval_every=25", "train.checkpoint.every=1000", "optim.warmup_steps=20",
    )  # fmt: skip
    rows = map(json.loads, (args.folder / name / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def save_as_llama(run: Path, out: Path) -> None:
    """Save the last checkpoint of a run of our Transformer++ as transformers' Llama, which computes the same."""
    model = GLALMForCausalLM.from_pretrained(latest_checkpoint(run / "checkpoints"))
    heads, kv_heads = attention_heads(model.config)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "tie_word_embeddings")
    shape = {name: getattr(model.config, name) for name in names} | {"rms_norm_eps": model.config.norm_eps}
    llama = LlamaForCausalLM(LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **shape))
    weights = {}
    for name, tensor in model.state_dict().items():
        for llama_name, our_name in PARAMETER_NAMES.items():
            name = name.replace(f".{our_name}.", f".{llama_name}.")
        weights[name] = tensor
    llama.load_state_dict(weights)
    llama.save_pretrained(out)


def convert_llama(args: argparse.Namespace, variant: str, distil: int) -> Path:
    """Run linearize.py, unless an earlier call did, and return the folder of the converted model."""
    out = args.folder / f"converted-{variant}-{distil}"
    options = ["--distil", distil, "--data", args.data, "--batch-size", 16, "--seq-len", 256] if distil else []
    if not out.exists():
        run_python("scripts/linearize.py", args.folder / "as_llama", out, *VARIANTS[variant], *options)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--folder", type=Path, default=Path("runs/linearize"))
    parser.add_argument("--steps", type=int, default=400, help="steps of the Llama (default: %(default)s)")
    parser.add_argument(
        "--more",
        type=int,
        default=150,
        help="further steps, including those of the distillation (default: %(default)s)",
    )
    parser.add_argument("--distil", type=int, default=50, help="steps of the distillation (default: %(default)s)")
    args = parser.parse_args()
    args.data = args.data.resolve()
    args.folder = args.folder.resolve()
    llama = train(args, "llama", args.steps, "model=attention_tiny")
    save_as_llama(args.folder / "llama", args.folder / "as_llama")
    table = {}
    for variant in VARIANTS:
        for distil in (0, args.distil):
            out = convert_llama(args, variant, distil)
            start = ["--config-dir", out / "configs", "model=linearized"]
            losses = train(args, f"{variant}-{distil}", args.more - distil, *start, f"train.init_from={out}")
            table[f"{variant}, {distil} steps of distillation"] = {distil + n: x for n, x in losses.items()}
        if variant != "hybrid":
            table[f"{variant} from scratch"] = train(args, f"{variant}-scratch", args.more, *start)
    print(f"\nLlama: {llama[args.steps]:.3f} nats after {args.steps} steps of 4,096 tokens\n")
    columns = range(0, args.more + 1, 25)
    print("| further steps |", " | ".join(map(str, columns)), "|\n|-|" + "-|" * len(columns))
    for name, losses in table.items():
        print(f"| {name} |", " | ".join(f"{losses[n]:.3f}" if n in losses else "" for n in columns), "|")


if __name__ == "__main__":
    main()
