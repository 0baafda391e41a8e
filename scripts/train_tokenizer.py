"""Train a SentencePiece tokenizer: python scripts/train_tokenizer.py --out my.model --vocab-size 32000 PATH..."""

import argparse
import sys
from pathlib import Path

from glalm.prepare.encode import HELD_OUT
from glalm.prepare.sources import describe_skipped_files, open_source
from glalm.prepare.tokenizer_training import read_training_texts, train_sentencepiece
from glalm.progress import ProgressBar


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a byte-level-complete SentencePiece tokenizer (byte fallback, no normalisation: every text "
        "round-trips). Documents that prepare_data.py would hold out are left out.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="as prepare_data.py takes them; all of it is read")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .model to write")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="(%(default)s)")
    parser.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="(%(default)s); only bpe is exported")
    parser.add_argument("--sample-mb", type=int, default=100, metavar="N", help="megabytes to train on (%(default)s)")
    parser.add_argument("--text-field", default="text", metavar="FIELD", help="of a JSON line or a row (%(default)s)")
    for split, share in HELD_OUT.items():
        parser.add_argument(f"--{split}", type=float, default=share, metavar="SHARE", help="as there (%(default)s)")
    args = parser.parse_args()
    try:
        sources = [open_source(spec) for spec in args.sources]
        inputs = [i for s in sources for i in s.inputs]
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        held_out = {split: getattr(args, split) for split in HELD_OUT}
        with ProgressBar() as bar:
            skipped = describe_skipped_files(sources)
            if skipped:
                bar.log(skipped)
            texts = read_training_texts(inputs, held_out, args.text_field, bar)
            model = train_sentencepiece(
                texts, args.out, args.vocab_size, model_type=args.type, max_bytes=args.sample_mb * 10**6
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {model.vocab_size:,} pieces, bos {model.bos_id}, eos {model.eos_id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
