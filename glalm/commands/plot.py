"""Draw one figure of several models' results: glalm plot FIGURE FOLDER ... [--out FILE]

FIGURE: extrapolation, ratios (perplexity at n training lengths over that at one), decode_speed, training. FOLDER: runs,
or models that `glalm eval` evaluated. Writes FILE as PNG and as SVG: plots/FIGURE in the folder above the first one.
"""

import argparse
import sys
from pathlib import Path

from glalm.evals import plot
from glalm.evals.html_report import distinct_names

FIGURES = {
    "extrapolation": (plot.plot_extrapolation, "extrapolation"),
    "ratios": (plot.plot_ratios, "extrapolation"),
    "decode_speed": (plot.plot_decoding, "decode_speed"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "training"])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="without its suffix .png or .svg: both are written")
    args = parser.parse_args()
    out = args.out or args.folders[0].resolve().parent / "plots" / args.figure
    folders = list(zip(distinct_names(args.folders), args.folders, strict=True))  # One may be named twice.
    try:
        if args.figure == "training":
            paths = plot.plot_losses({name: folder / "metrics.jsonl" for name, folder in folders}, out)
        else:
            draw, evaluator = FIGURES[args.figure]
            records = []
            for name, folder in folders:
                record = plot.load_record(folder / "eval" / f"{evaluator}.json", evaluator)
                records.append(record | {"model": name})
            paths = draw(records, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"wrote {path}")
    return 0
