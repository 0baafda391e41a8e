"""Run `glalm ladder` from a clone: python scripts/ladder.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("ladder")
