"""Turn text into token shards: see glalm/data/prepare.py for the files that it writes."""

import argparse
import sys
import time

from glalm.data.prepare import HELD_OUT, prepare
from glalm.data.shards import SPLITS, TokenSet

EXAMPLES = """\
examples:
  the standard library of this Python, with a tokenizer trained on it:
    python scripts/prepare_data.py --out data/demo stdlib
  your own text, with a larger vocabulary:
    python scripts/prepare_data.py --out data/mine --vocab-size 32000 notes/ corpus.jsonl.zst
  more text for a tokenizer that you have:
    python scripts/prepare_data.py --out data/more --tokenizer data/mine/tokenizer.model more.jsonl.gz
"""


def main() -> int:
    args = parse_args()
    start = time.perf_counter()
    try:
        manifest = prepare(
            args.sources,
            args.out,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            held_out={"validation": args.validation, "test": args.test},
            shard_tokens=args.shard_tokens,
            overwrite=args.overwrite,
        )
        summarise(args.out, manifest, time.perf_counter() - start)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Split text by document into train, validation and test, tokenise it and write token "
        "shards. The same command again does nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="'stdlib', or a file or folder: .jsonl, .jsonl.gz, .jsonl.zst (a \"text\" field in each line), "
        ".txt, .md, .py (a document each)",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece .model (default: train one)")
    tokenizer.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="of the one trained (%(default)s)")
    for split, share in HELD_OUT.items():
        parser.add_argument(
            f"--{split}",
            type=float,
            default=share,
            metavar="SHARE",
            help=f"of the documents for {split} (%(default)s)",
        )
    parser.add_argument("--shard-tokens", type=int, default=2**27, metavar="N", help="most tokens a file (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the set in FOLDER")
    return parser.parse_args()


def summarise(folder: str, manifest: dict, seconds: float) -> None:
    print(f"{'split':<12}{'documents':>12}{'tokens':>16}{'bytes/token':>13}{'longest document':>18}")
    for split in SPLITS:
        tokens = TokenSet(folder, split)
        longest = tokens.document_lengths.max(initial=0)
        ratio = tokens.text_bytes / max(tokens.num_tokens, 1)
        print(f"{split:<12}{tokens.num_documents:>12,}{tokens.num_tokens:>16,}{ratio:>13.2f}{longest:>18,}")
    print(f"{folder}: vocabulary of {manifest['tokenizer']['vocab_size']:,}, ready in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
