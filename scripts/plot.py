"""Run `glalm plot` from a clone: python scripts/plot.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("plot")
