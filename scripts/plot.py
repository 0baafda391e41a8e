"""Draw one figure of several models' results: python scripts/plot.py FIGURE FOLDER ... [--out FILE]

FIGURE: extrapolation, ratios (perplexity at n training lengths over that at one), decode_speed, training. FOLDER: runs,
or models that eval.py evaluated. Writes FILE as PNG and as SVG: plots/FIGURE in the folder above the first one.
"""

import argparse
import sys
from pathlib import Path

from glalm.evals import plot
from glalm.evals.html_report import names

FIGURES = {
    "extrapolation": (plot.plot_extrapolation, "extrapolation"),
    "ratios": (plot.plot_ratios, "extrapolation"),
    "decode_speed": (plot.plot_decoding, "decode_speed"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "training"])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="its suffix does not matter")
    args = parser.parse_args()
    out = args.out or args.folders[0].resolve().parent / "plots" / args.figure
    labels = names(args.folders)
    try:
        if args.figure == "training":
            curves = {name: folder / "metrics.jsonl" for name, folder in zip(labels, args.folders, strict=True)}
            paths = plot.plot_losses(curves, out)
        else:
            draw, evaluator = FIGURES[args.figure]
            files = (plot.existing(folder / "eval" / f"{evaluator}.json", evaluator) for folder in args.folders)
            paths = draw([file | {"model": name} for file, name in zip(files, labels, strict=True)], out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
