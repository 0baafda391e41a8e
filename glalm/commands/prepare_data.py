"""Prepare text for training: `glalm prepare` writes token shards, `glalm tokenizer` trains a tokenizer."""

import argparse
import json
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

from glalm.config.strict import ConfigError, refuse_url
from glalm.data.shards import MANIFEST, SPLITS, read_manifest
from glalm.prepare.encode import HELD_OUT, check_shares
from glalm.prepare.inspection import inspect_set
from glalm.prepare.pipeline import find_folder, prepare_data
from glalm.prepare.records import SUFFIXES
from glalm.prepare.remote import RemoteFile
from glalm.prepare.sources import collect_inputs, describe_unread_files, parse_source
from glalm.prepare.tokenizer_training import read_training_texts, train_sentencepiece
from glalm.prepare.writer import format_counts
from glalm.progress import ProgressBar

EXAMPLES = """\
examples:
  Prepare the standard library of this Python, and train a tokenizer on it:
    glalm prepare --out data/demo stdlib
  Prepare your own text, with a larger vocabulary:
    glalm prepare --out data/mine --vocab-size 32000 notes/ corpus.jsonl.zst
  Prepare SlimPajama from the hub with Mistral's tokenizer, as in the paper (docs/data.md):
    glalm prepare --out data/slimpajama --tokenizer mistral-v1 \\
      --source-field meta.redpajama_set_name --on-error skip hf:cerebras/SlimPajama-627B
  Add text to a set, and text in a field of another name:
    glalm prepare --out data/mine --add more.jsonl.gz
    glalm prepare --out data/mine --add --text-field content code.parquet
  Show what is in a set:
    glalm prepare inspect data/mine
"""
SETTINGS_OF_SET = ("tokenizer", "eos", "vocab_size", "validation", "test", "shard_tokens")
SETTINGS = (*SETTINGS_OF_SET, "text_field", "source_field")


def prepare_or_inspect() -> int:
    """Split text, tokenize it, and write token shards. `glalm prepare inspect` shows what is in a set."""
    try:
        if sys.argv[1:2] != ["inspect"]:
            return prepare()
        parser = argparse.ArgumentParser(prog="glalm prepare inspect", description="Show what is in a prepared set.")
        parser.add_argument("path", metavar="PATH", help="the folder of the set; lengths.png is written into it")
        parser.add_argument("--quick", action="store_true", help="do not read every file to verify its SHA-256")
        args = parser.parse_args(sys.argv[2:])
        refuse_url("", args.path)
        return inspect_set(args.path, verify=not args.quick)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def prepare() -> int:
    args = parse_prepare_arguments()
    start = time.perf_counter()
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    held_out = {split: settings.pop(split, share) for split, share in HELD_OUT.items()}
    url, folder = find_folder(args.out, args.staging)
    before = None
    with suppress(Exception):  # Filesystems raise many kinds. `prepare_data` says what is wrong.
        before = json.loads(RemoteFile(f"{url.rstrip('/')}/{MANIFEST}").read_bytes()) if url else read_manifest(folder)
    manifest = prepare_data(
        args.sources,
        args.out,
        held_out=held_out,
        duplicates=args.duplicates,
        on_error=args.on_error,
        workers=args.workers,
        engine=args.engine,
        address=args.address,
        staging=args.staging,
        add=args.add,
        overwrite=args.overwrite,
        **settings,
    )
    if manifest == before and not args.overwrite:
        print(describe_complete_set(args.out, folder, manifest))
    else:
        print_summary(args.out, manifest, time.perf_counter() - start)
    return 0


def parse_prepare_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Split text by document into train, validation and test, tokenize it on all cores, and write token "
        "shards. The same command again resumes an interrupted preparation, and does nothing if the set is complete.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="'stdlib'; a file, a folder or a URL ("
        + ", ".join(SUFFIXES)
        + "); or hf:DATASET[:CONFIG[:SPLIT]][@REVISION], "
        "which is streamed. NAME=SOURCE gives it a name; the default is that of its folder",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder of the set, or a URL: s3://...")
    parser.add_argument(
        "--staging",
        metavar="FOLDER",
        help="where a set is prepared that is copied to a URL (default: a folder in data/staging)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="a SentencePiece .model, a Hugging Face tokenizer.json, folder or name, or mistral-v1 (default: train it)",
    )
    parser.add_argument(
        "--eos",
        metavar="TOKEN",
        help="the token of a Hugging Face tokenizer that ends a document, if it does not say so: '<|endoftext|>'",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="size of a trained tokenizer (default: 2048)")
    for split, share in HELD_OUT.items():
        help_text = f"share of the documents for {split} (default: {share})"
        parser.add_argument(f"--{split}", type=float, metavar="SHARE", help=help_text)
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="maximum tokens of a shard (default: 2^27)")
    parser.add_argument(
        "--text-field",
        metavar="FIELD",
        help="field of a line or row that holds the text; dots lead into nested fields (default: text, or with --add "
        "that of the set)",
    )
    parser.add_argument(
        "--source-field",
        metavar="FIELD",
        help="field that names a document's source, to mix sources (default: none, or with --add that of the set; "
        "'' is none)",
    )
    parser.add_argument(
        "--duplicates", metavar="FOLDER", help="leave out the documents that glalm deduplicate --out FOLDER listed"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a bad record: stop with its file and line, or skip and count it (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that tokenize (default: all cores); the result is the same"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where to tokenize: in processes of this machine or on a Ray cluster; the result is the same",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of the Ray cluster, or 'auto' for the one that runs on this machine"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--add", action="store_true", help="add sources to the set in FOLDER, with its tokenizer")
    mode.add_argument("--overwrite", action="store_true", help="replace the set in FOLDER")
    args = parser.parse_args()
    check_prepare_arguments(parser, args)
    return args


def check_prepare_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with the parser's error where options contradict each other. Raise ConfigError for what may not be a URL."""
    refuse_url("--tokenizer ", args.tokenizer)
    refuse_url("--staging ", args.staging)
    refuse_url("--duplicates ", args.duplicates)
    for name in SETTINGS_OF_SET:
        if args.add and getattr(args, name) is not None:
            parser.error(f"--add uses the settings of the set. Remove --{name.replace('_', '-')}.")
    if args.tokenizer and args.vocab_size:
        parser.error("--vocab-size is the size of a tokenizer that is trained. Remove it, or remove --tokenizer.")
    if args.eos and not args.tokenizer:
        parser.error("--eos names a token of --tokenizer. Add --tokenizer tokenizer.json, or remove --eos.")


def describe_complete_set(out: str, folder: Path, manifest: dict) -> str:
    """Return a line about the set at `out`, which lies in `folder` on this machine."""
    documents = sum(manifest["splits"][split]["documents"] for split in SPLITS)
    tokens = sum(manifest["splits"][split]["tokens"] for split in SPLITS)
    return (
        f"{out} is already complete: {documents:,} documents, {tokens:,} tokens, vocabulary of "
        f"{manifest['tokenizer']['vocab_size']:,}. To see what is in it, run: "
        f"glalm prepare inspect {shlex.quote(str(folder))}"
    )


def print_summary(folder: str, manifest: dict, seconds: float) -> None:
    print(f"{'split':<12}{'documents':>14}{'tokens':>18}{'bytes/token':>13}{'shards':>8}")
    for split in SPLITS:
        entry = manifest["splits"][split]
        ratio = entry["text_bytes"] / max(entry["tokens"], 1)
        shards = sum(len(source["shards"]) for source in entry["sources"].values())
        print(f"{split:<12}{entry['documents']:>14,}{entry['tokens']:>18,}{ratio:>13.2f}{shards:>8,}")
    print("\n".join(format_counts(manifest["books"])))
    if not manifest["splits"]["validation"]["documents"]:
        print("Note: no document is in the validation split, which training needs. Prepare with a larger --validation.")
    tokenizer = manifest["tokenizer"]
    if not tokenizer["round_trips"]:
        print("Note: this tokenizer normalizes, so decoding does not return every text unchanged.")
    print(f"{folder} is ready: vocabulary of {tokenizer['vocab_size']:,}, prepared in {seconds:.1f} s")
    if "://" in folder:
        tools = f"aws s3 sync {folder} FOLDER, or rclone copy" if folder.startswith("s3://") else "rclone copy"
        print(f"To train on it elsewhere, copy it to a disk there: {tools}")


def train_tokenizer() -> int:
    """Train a SentencePiece tokenizer: glalm tokenizer --out my.model --vocab-size 32000 PATH..."""
    args = parse_tokenizer_arguments()
    held_out = {split: getattr(args, split) for split in HELD_OUT}
    try:
        refuse_url("--out ", args.out)
        check_shares(held_out)
        if args.sample_mb < 1:
            raise ValueError(f"--sample-mb {args.sample_mb} must be at least 1.")
        if Path(args.out).is_file():
            raise ValueError(f"{args.out} exists. Choose another --out, or remove it to train another tokenizer.")
        sources = [parse_source(spec) for spec in args.sources]
        inputs, repeated = collect_inputs(sources)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with ProgressBar() as bar:
            for message in describe_unread_files(sources, repeated):
                bar.log(message)
            texts = read_training_texts(inputs, held_out, args.text_field, bar)
            max_bytes = args.sample_mb * 10**6
            model = train_sentencepiece(texts, args.out, args.vocab_size, model_type=args.type, max_bytes=max_bytes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{args.out}: {model.vocab_size:,} pieces, bos {model.bos_id}, eos {model.eos_id}")
    return 0


def parse_tokenizer_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a SentencePiece tokenizer with byte fallback and without normalisation, so that every text "
        "round-trips. It is not trained on documents that glalm prepare would hold out.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="as for glalm prepare; all of it is read")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--type", choices=("bpe", "unigram"), default="bpe", help="(default: %(default)s); only bpe can be exported"
    )
    parser.add_argument(
        "--sample-mb", type=int, default=100, metavar="N", help="megabytes of text to train on (default: %(default)s)"
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="FIELD",
        help="field of a JSON line or row that holds the text (default: %(default)s)",
    )
    for split, share in HELD_OUT.items():
        help_text = f"share of the documents that is held out for {split} (default: %(default)s)"
        parser.add_argument(f"--{split}", type=float, default=share, metavar="SHARE", help=help_text)
    return parser.parse_args()
