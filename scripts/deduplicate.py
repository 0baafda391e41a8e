"""Run `glalm deduplicate` from a clone: python scripts/deduplicate.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("deduplicate")
