"""Run `glalm scaling` from a clone: python scripts/scaling.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("scaling")
