"""Run `glalm linearize` from a clone: python scripts/linearize.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("linearize")
