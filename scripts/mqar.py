"""Run `glalm mqar` from a clone: python scripts/mqar.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("mqar")
