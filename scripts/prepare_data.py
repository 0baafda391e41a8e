"""Turn text into token shards: glalm/prepare/pipeline.py says how, glalm/data/shards.py what is written."""

import argparse
import sys
import time

from glalm.data.shards import SPLITS
from glalm.prepare.inspection import inspect_set
from glalm.prepare.pipeline import HELD_OUT, format_counts, prepare_data
from glalm.prepare.records import SUFFIXES

EXAMPLES = """\
examples:
  the standard library of this Python, with a tokenizer trained on it:
    python scripts/prepare_data.py --out data/demo stdlib
  your own text, with a larger vocabulary:
    python scripts/prepare_data.py --out data/mine --vocab-size 32000 notes/ corpus.jsonl.zst
  the paper's: SlimPajama from the hub, Mistral's tokenizer (docs/data.md)
    python scripts/prepare_data.py --out data/slimpajama --tokenizer mistral-v1 \\
      --source-field meta.redpajama_set_name --on-error skip hf:cerebras/SlimPajama-627B
  more text, later:
    python scripts/prepare_data.py --out data/mine --add more.jsonl.gz
  what is in a set:
    python scripts/prepare_data.py inspect data/mine
"""
SETTINGS = ("tokenizer", "vocab_size", "validation", "test", "shard_tokens", "text_field", "source_field")


def main() -> int:
    try:
        if sys.argv[1:2] == ["inspect"]:
            return show()
        return make()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def show() -> int:
    parser = argparse.ArgumentParser(prog="prepare_data.py inspect", description="What is in a prepared set.")
    parser.add_argument("path", metavar="PATH", help="the set's folder; lengths.png is written into it")
    parser.add_argument("--quick", action="store_true", help="do not read every file to check its sha256")
    args = parser.parse_args(sys.argv[2:])
    return inspect_set(args.path, verify=not args.quick)


def make() -> int:
    args = parse_args()
    start = time.perf_counter()
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    shares = {split: given.pop(split, share) for split, share in HELD_OUT.items()}
    more = {name: getattr(args, name) for name in ("on_error", "workers", "add", "overwrite")}
    manifest = prepare_data(args.sources, args.out, held_out=shares, **given, **more)
    summarise(args.out, manifest, time.perf_counter() - start)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Split text by document into train, validation and test, tokenise it on all cores and write token "
        "shards. The same command again goes on where it was interrupted; when the set is complete, it does nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="'stdlib'; a file or folder (" + ", ".join(SUFFIXES) + "); or hf:DATASET[:CONFIG[:SPLIT]][@REVISION], "
        "streamed. NAME=SOURCE names it; without, it is called after its folder",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="a SentencePiece .model, a Hugging Face folder or name, or mistral-v1 (default: train one)",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="of the one that is trained (2048)")
    for split, share in HELD_OUT.items():
        parser.add_argument(f"--{split}", type=float, metavar="SHARE", help=f"of the documents for {split} ({share})")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="most tokens of a file (2^27)")
    parser.add_argument("--text-field", metavar="FIELD", help="of a line or row, dots lead into nested ones (text)")
    parser.add_argument("--source-field", metavar="FIELD", help="that names a document's source, to mix or count by")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a broken document: stop with its file and line, or leave it out and count it (%(default)s)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (all cores); the output is the same")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--add", action="store_true", help="append sources to the set in FOLDER, with its settings")
    instead.add_argument("--overwrite", action="store_true", help="replace the set in FOLDER")
    args = parser.parse_args()
    if args.add and (given := [name for name in SETTINGS if getattr(args, name) is not None]):
        parser.error(f"--add keeps the settings of the set: leave out --{given[0].replace('_', '-')}")
    if args.tokenizer and args.vocab_size:
        parser.error("--vocab-size is of a tokenizer that is trained: leave it out, or --tokenizer")
    return args


def summarise(folder: str, manifest: dict, seconds: float) -> None:
    print(f"{'split':<12}{'documents':>14}{'tokens':>18}{'bytes/token':>13}{'shards':>8}")
    for split in SPLITS:
        entry = manifest["splits"][split]
        ratio = entry["text_bytes"] / max(entry["tokens"], 1)
        shards = sum(len(source["shards"]) for source in entry["sources"].values())
        print(f"{split:<12}{entry['documents']:>14,}{entry['tokens']:>18,}{ratio:>13.2f}{shards:>8,}")
    print("\n".join(format_counts(manifest["books"])))
    tokenizer = manifest["tokenizer"]
    if not tokenizer["round_trips"]:
        print("note: this tokenizer does not give every text back as it was: it normalises")
    print(f"{folder}: vocabulary of {tokenizer['vocab_size']:,}, ready in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
