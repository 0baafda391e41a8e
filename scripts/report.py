"""Run `glalm report` from a clone: python scripts/report.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("report")
