"""Run `glalm eval` from a clone: python eval.py --help"""

from glalm.__main__ import main

if __name__ == "__main__":
    main("eval")
