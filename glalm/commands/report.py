"""Print what a run reached, and write a page of it: glalm report runs/demo [FOLDER ...]

The page is one HTML file with its tables and figures inside, which any browser opens. Of several folders (runs, models
that `glalm eval` evaluated, a sweep of glalm mqar) it compares what they have in common.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from glalm.data.files import atomic_write
from glalm.evals.html_report import render_report
from glalm.evals.report import print_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a run's directory, such as runs/demo")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="the page; report.html in the folder, or in the folder above several"
    )
    args = parser.parse_args()
    console = Console()
    try:
        for folder in args.folders:
            if (folder / "run.json").is_file():
                print_report(folder, console)
        above = args.folders[0] if len(args.folders) == 1 else args.folders[0].resolve().parent
        target = args.html or above / "report.html"
        content = render_report(args.folders).encode()
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as file:
            file.write(content)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"wrote {target}", highlight=False, markup=False, soft_wrap=True)
    return 0
