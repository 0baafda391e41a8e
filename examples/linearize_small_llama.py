"""Is a converted model worth more than one from scratch? A small Llama, trained here, converted and trained on.

    python examples/linearize_small_llama.py --data data/demo --folder runs/linearize  10 min, 2 CPU cores

Trains a Transformer++ of 1.4 million parameters; converts it to GLA, to ReGLA and to GLA with one softmax layer, each
as it is and after distillation; trains these, and the same GLA and ReGLA from random weights, on as many further tokens
(those of the distillation included) at the same learning rate. Prints the validation loss along the way as a table.
docs/linearize.md has it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from glalm.hf import GLALMForCausalLM
from glalm.model.mixers.attention import attention_heads
from glalm.train.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {"gla": [], "regla": ["--mixer", "regla"], "hybrid": ["--softmax-layers", "1"]}


def python(*command) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def train(args: argparse.Namespace, name: str, steps: int, *options) -> dict[int, float]:
    """One run of train.py; its validation losses by step."""
    python(
        "train.py", *options, f"name={name}", f"runs_dir={args.folder}", f"data.path={args.data}",
        f"train.steps={steps}", "train.eval_every=25", "train.checkpoint.every=1000", "optim.warmup_steps=20",
    )  # fmt: skip
    rows = map(json.loads, (args.folder / name / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def as_llama(run: Path, out: Path) -> None:
    """Our Transformer++ as transformers' Llama: the same function under other names."""
    saved = latest_checkpoint(run / "checkpoints")
    model = GLALMForCausalLM.from_pretrained(saved)
    c = model.config
    heads, kv_heads = attention_heads(c)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=c.intermediate_size,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_word_embeddings,
        )
    )  # fmt: skip
    weights = {}
    for name, x in model.state_dict().items():
        name = name.replace("attn_norm", "input_layernorm").replace("mlp_norm", "post_attention_layernorm")
        weights[name.replace(".attn.", ".self_attn.").replace("model.embeddings", "model.embed_tokens")] = x
    llama.load_state_dict(weights)
    llama.save_pretrained(out)


def convert(args: argparse.Namespace, variant: str, distil: int) -> Path:
    out = args.folder / f"converted-{variant}-{distil}"
    options = ["--distil", distil, "--data", args.data, "--batch-size", 16, "--seq-len", 256] if distil else []
    if not out.exists():  # which linearize.py refuses
        python("scripts/linearize.py", args.folder / "as_llama", out, *VARIANTS[variant], *options)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--folder", type=Path, default=Path("runs/linearize"))
    parser.add_argument("--steps", type=int, default=400, help="of the Llama (400)")
    parser.add_argument("--more", type=int, default=150, help="further steps (150), those of the distillation included")
    parser.add_argument("--distil", type=int, default=50, help="steps of the distillation (50)")
    args = parser.parse_args()
    args.data, args.folder = args.data.resolve(), args.folder.resolve()
    llama = train(args, "llama", args.steps, "model=attention_tiny")
    as_llama(args.folder / "llama", args.folder / "as_llama")
    table = {}
    for variant in VARIANTS:
        for distil in (0, args.distil):
            out = convert(args, variant, distil)
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
