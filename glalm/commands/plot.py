"""Draw one figure of several models' results: glalm plot FIGURE FOLDER ... [--out FILE]

FIGURE: extrapolation, ratios (perplexity at n training lengths over that at one), decode_speed, training, or layers
(of one run with train.statistics_every). FOLDER: runs, or models that `glalm eval` evaluated, or one result of theirs,
FOLDER/eval/NAME.json. Results that do not compare, because their text or settings differ, are refused. Writes FILE as
PNG and as SVG: plots/FIGURE in the folder above the first one.
"""

import argparse
import sys
from pathlib import Path

from glalm.evals import plot
from glalm.evals.html_report import distinct_names
from glalm.evals.layer_plot import plot_layers

FIGURES = {
    "extrapolation": (plot.plot_extrapolation, "extrapolation"),
    "ratios": (plot.plot_ratios, "extrapolation"),
    "decode_speed": (plot.plot_decoding, "decode_speed"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "training", "layers"])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="without its suffix .png or .svg: both are written")
    args = parser.parse_args()
    out = args.out or model_folder(args.folders[0].resolve()).parent / "plots" / args.figure
    names = distinct_names([model_folder(path) for path in args.folders])
    folders = list(zip(names, args.folders, strict=True))  # One may be named twice.
    try:
        if args.figure == "training":
            paths = plot.plot_losses({name: folder / "metrics.jsonl" for name, folder in folders}, out)
        elif args.figure == "layers":
            if len(folders) > 1:
                parser.error("layers: name one run")
            paths = plot_layers(args.folders[0] / "metrics.jsonl", out)
        else:
            draw, evaluator = FIGURES[args.figure]
            records = []
            for name, folder in folders:
                path = folder if is_result(folder) else folder / "eval" / f"{evaluator}.json"
                records.append(plot.load_record(path, evaluator) | {"model": name})
            paths = draw(records, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"wrote {path}")
    return 0


def is_result(path: Path) -> bool:
    """Return whether a path is one result, not a folder of them."""
    return path.suffix == ".json" and not path.is_dir()


def model_folder(path: Path) -> Path:
    """Return the folder of the run or the model that a path names by itself or by one result in its eval/."""
    return path.parent.parent if is_result(path) else path
