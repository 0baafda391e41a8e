"""Find duplicate documents, which glalm prepare then leaves out: exact copies, and near-duplicates by MinHash LSH."""

import argparse
import sys
from shlex import quote
from typing import Any

from glalm.config.strict import ConfigError, refuse_url
from glalm.prepare.deduplication import deduplicate
from glalm.prepare.duplicate_list import COUNTS, LIST, REPORT
from glalm.prepare.records import SUFFIXES

EXAMPLES = """\
examples:
  Find near-duplicates, and prepare a set without them:
    glalm deduplicate --out data/mine-duplicates notes/ corpus.jsonl.zst
    glalm prepare --out data/mine --duplicates data/mine-duplicates notes/ corpus.jsonl.zst
  Find equal texts only:
    glalm deduplicate --out data/mine-duplicates --mode exact notes/ corpus.jsonl.zst
"""
SHOWN_CHARACTERS = 48  # of a text in an example


def list_duplicates() -> int:
    try:
        args = parse_arguments()
        report = deduplicate(**vars(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print_report(args.out, report)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="List the documents that duplicate an earlier one. glalm prepare --duplicates FOLDER leaves them "
        "out. The same command again resumes an interrupted one, and with more sources it compares these, too.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="as for glalm prepare (" + ", ".join(SUFFIXES) + "); of copies, the first in this order is kept",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder of the signatures and the results")
    parser.add_argument(
        "--mode",
        choices=("near", "exact"),
        default="near",
        help="find equal texts and near-duplicates, or equal texts only (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.8,
        metavar="J",
        help="Jaccard index of the word n-grams from which on two documents are near-duplicates (default: %(default)s)",
    )
    parser.add_argument("--ngram", type=int, default=5, metavar="N", help="words of an n-gram (default: %(default)s)")
    parser.add_argument("--text-field", default="text", metavar="FIELD", help="as for glalm prepare (default: text)")
    parser.add_argument("--source-field", metavar="FIELD", help="as for glalm prepare")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read (default: all cores); the result is the same"
    )
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="as for glalm prepare; the result is the same"
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="as for glalm prepare")
    parser.add_argument("--overwrite", action="store_true", help="replace the deduplication in FOLDER")
    args = parser.parse_args()
    refuse_url("--out ", args.out)
    return args


def print_report(folder: str, report: dict[str, Any]) -> None:
    print(f"{'source':<24}" + "".join(f"{name:>18}" for name in COUNTS))
    for source, counts in report["sources"].items():
        print(f"{source:<24}" + "".join(f"{counts[name]:>18,}" for name in COUNTS))
    for example in report["examples"]:
        of = example["of"]
        print(f"{example['kind']} (Jaccard index {example['jaccard']}):")
        for where, text in ((example, example["text"]), (of, example["of_text"])):
            print(f"  {where['source']}, {where['name']}:{where['record']}: {text[:SHOWN_CHARACTERS]!r}")
    print(f"All pairs are in {folder}/{LIST}, and these counts in {folder}/{REPORT}.")
    print(f"To prepare a set without the duplicates, add to glalm prepare: --duplicates {quote(folder)}")
