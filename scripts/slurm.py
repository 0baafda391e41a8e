"""Run `glalm slurm` from a clone: python scripts/slurm.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("slurm")
