"""Run `glalm prepare` from a clone: python scripts/prepare_data.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("prepare")
