"""Print what a run reached, and the paths of everything it wrote: python scripts/report.py runs/demo"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from glalm.evals.report import report


def main() -> int:
    parser = argparse.ArgumentParser(description="Print what a run reached, and the paths of everything it wrote.")
    parser.add_argument("run", type=Path, metavar="FOLDER", help="the run's directory, such as runs/demo")
    try:
        return report(parser.parse_args().run, Console())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
