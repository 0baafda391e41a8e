"""Run `glalm export` from a clone: python scripts/export_hf.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("export")
