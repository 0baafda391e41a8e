"""Train a SentencePiece tokenizer: glalm tokenizer --out my.model --vocab-size 32000 PATH..."""

import argparse
import sys
from pathlib import Path

from glalm.prepare.encode import HELD_OUT, check_shares
from glalm.prepare.sources import collect_inputs, describe_repeated_files, describe_skipped_files, parse_source
from glalm.prepare.tokenizer_training import read_training_texts, train_sentencepiece
from glalm.progress import ProgressBar


def main() -> int:
    args = parse_arguments()
    held_out = {split: getattr(args, split) for split in HELD_OUT}
    try:
        check_shares(held_out)
        sources = [parse_source(spec) for spec in args.sources]
        inputs, repeated = collect_inputs(sources)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with ProgressBar() as bar:
            for message in (describe_skipped_files(sources), describe_repeated_files(repeated)):
                if message:
                    bar.log(message)
            texts = read_training_texts(inputs, held_out, args.text_field, bar)
            max_bytes = args.sample_mb * 10**6
            model = train_sentencepiece(texts, args.out, args.vocab_size, model_type=args.type, max_bytes=max_bytes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {model.vocab_size:,} pieces, bos {model.bos_id}, eos {model.eos_id}")
    return 0


def parse_arguments() -> argparse.Namespace:
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
