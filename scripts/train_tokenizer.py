"""Run `glalm tokenizer` from a clone: python scripts/train_tokenizer.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("tokenizer")
