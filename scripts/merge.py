"""Run `glalm merge` from a clone: python scripts/merge.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("merge")
