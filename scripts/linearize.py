"""Turn a LLaMA-style softmax checkpoint into GLA or ReGLA, to be trained on.

    python scripts/linearize.py LLAMA OUT                                        every layer GLA
    python scripts/linearize.py LLAMA OUT --mixer regla --softmax-layers 7 15    layers 7 and 15 stay softmax attention
    python scripts/linearize.py LLAMA OUT --distil 500 --data data/corpus        first fit each new layer to the old one
    python train.py --config-dir OUT/configs model=linearized train.init_from=OUT data.path=data/corpus name=...

LLAMA: a folder that transformers loads as a LlamaForCausalLM (safetensors; with --gguf FILE a GGUF file in it). OUT
gets the model as save_pretrained writes it, its config for train.py and, if LLAMA has one, the tokenizer: prepare the
data with it (scripts/prepare_data.py --tokenizer OUT). docs/linearize.md has the whole way, and what it gives.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import LongTensor
from transformers import AutoTokenizer, LlamaForCausalLM

from glalm.compat.linearize import MIXERS, distil, linearize
from glalm.config.strict import ConfigError, RunError, require
from glalm.data.loader import Windows, training_batches
from glalm.data.shards import TokenSet, read_manifest
from glalm.train.init_weights import model_fields


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", type=Path)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--gguf", help="the GGUF file in LLAMA to read instead of safetensors")
    parser.add_argument("--mixer", choices=MIXERS, default="gla")
    parser.add_argument("--softmax-layers", type=int, nargs="*", default=[], metavar="LAYER", help="from 0")
    parser.add_argument("--distil", type=int, default=0, metavar="STEPS")
    parser.add_argument("--data", type=Path, help="a prepared set, for --distil")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3, help="of --distil (1e-3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of --distil")
    args = parser.parse_args()
    try:
        run(args)
    except (ConfigError, RunError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    return 0


def run(args: argparse.Namespace) -> None:
    check(args)
    source = {"gguf_file": args.gguf} if args.gguf else {"use_safetensors": True}
    llama, info = LlamaForCausalLM.from_pretrained(
        args.llama, dtype=torch.float32, local_files_only=True, output_loading_info=True, **source
    )
    lacking = sorted(info["missing_keys"])  # which transformers would leave random, with a warning
    require(not lacking, f"{args.llama} lacks {', '.join(lacking[:4])}")
    torch.manual_seed(0)
    model = linearize(llama.eval(), args.mixer, args.softmax_layers)
    if args.distil:
        fit(model, llama, args)
    model.save_pretrained(args.out)
    save_tokenizer(args)
    save_config(model.config, args.out / "configs" / "model" / "linearized.yaml")
    print(f"wrote {args.out}; go on with")
    print(f"  python train.py --config-dir {args.out}/configs model=linearized train.init_from={args.out} ...")


def check(args: argparse.Namespace) -> None:
    """ConfigError for what can be told before the Llama, which may take minutes, is loaded."""
    require(not args.out.exists(), f"{args.out} exists; choose another OUT")
    for name, least in (("distil", 0), ("batch_size", 1), ("seq_len", 1)):
        value = getattr(args, name)
        require(value >= least, f"--{name.replace('_', '-')} {value} must be at least {least}")
    if args.distil:
        require(args.data is not None, "--distil needs --data, a prepared set")
        try:
            torch.zeros(1, device=args.device).item()
        except (RuntimeError, AssertionError, ImportError) as error:  # torch raises any of them
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"--device {args.device} cannot be used here ({why}); write cpu, or cuda") from error


def fit(model, llama: LlamaForCausalLM, args: argparse.Namespace) -> None:
    llama.to(args.device, torch.bfloat16 if args.device != "cpu" else torch.float32)
    model.to(args.device)
    for step, loss in enumerate(distil(model, llama, token_batches(args, llama.vocab_size), args.lr), 1):
        require_finite(math.isfinite(loss), f"step {step}: the loss is {loss}", args)
        if step % max(1, args.distil // 20) == 0 or step == 1:
            print(f"step {step:5d}  relative error of the layers' outputs {loss:.4f}", flush=True)
    model.cpu()
    with torch.no_grad():  # no loss has seen the last update
        logits = model(torch.arange(min(16, llama.vocab_size))[None]).logits
    require_finite(bool(logits.isfinite().all()), f"the logits after step {args.distil} are not finite", args)


def require_finite(condition: bool, what: str, args: argparse.Namespace) -> None:
    if not condition:
        raise RunError(f"{what}: the distillation diverged, nothing was written; choose a lower --lr than {args.lr:g}")


def token_batches(args: argparse.Namespace, vocab_size: int) -> Iterator[LongTensor]:
    tokens = TokenSet(args.data, "train", read_manifest(args.data))
    require(
        tokens.vocab_size <= vocab_size,
        f"--data {args.data} has a vocabulary of {tokens.vocab_size}, {args.llama} one of {vocab_size}; prepare it "
        "with that model's tokenizer (scripts/prepare_data.py --tokenizer)",
    )
    windows = Windows(tokens, args.seq_len)
    stream = training_batches(windows, seed=0, batch_size=args.batch_size)
    for _ in range(args.distil):
        yield next(stream)[1]["input_ids"].to(args.device)


def save_tokenizer(args: argparse.Namespace) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.llama, gguf_file=args.gguf, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"no tokenizer is written: {error}".splitlines()[0])
        return
    tokenizer.save_pretrained(args.out)


def save_config(config, path: Path) -> None:
    """What train.py needs to know of the model: every field of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(model_fields(config))))


if __name__ == "__main__":
    sys.exit(main())
