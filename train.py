"""Run `glalm train` from a clone: python train.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("train")
