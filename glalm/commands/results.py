"""Show the results of runs: `glalm report` and `glalm plot`."""

import sys
from pathlib import Path

from rich.console import Console

from glalm.commands import create_parser
from glalm.data.files import atomic_write
from glalm.evals import plot
from glalm.evals.html_report import distinct_names, render_report
from glalm.evals.layer_plot import plot_layers
from glalm.evals.report import print_report

FIGURES = {
    "extrapolation": (plot.plot_extrapolation, "extrapolation"),
    "ratios": (plot.plot_ratios, "extrapolation"),
    "gains": (plot.plot_gains, "extrapolation"),
    "decode_speed": (plot.plot_decoding, "decode_speed"),
}


def report_runs() -> int:
    """Print what a run reached, and write a page of it: glalm report runs/demo [FOLDER ...]

    The page is one HTML file with its tables and figures inside, which any browser opens. Of several folders (runs,
    models that `glalm eval` evaluated, a sweep of glalm mqar) it compares what they have in common.
    """
    parser = create_parser(report_runs)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a run's directory, such as runs/demo")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="the page; report.html in the folder, or in the folder above several"
    )
    args = parser.parse_args()
    console = Console()
    # A pattern such as runs/mine-* also matches what Hydra wrote of the sweep, runs/mine-sweep, which has no results.
    folders = [
        folder
        for folder in args.folders
        if not (folder / "multirun.yaml").is_file() or any((folder / name).exists() for name in ("run.json", "eval"))
    ] or args.folders
    try:
        for folder in folders:
            if (folder / "run.json").is_file():
                print_report(folder, console)
        above = folders[0] if len(folders) == 1 else folders[0].resolve().parent
        target = args.html or above / "report.html"
        content = render_report(folders).encode()
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as file:
            file.write(content)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"wrote {target}", highlight=False, markup=False, soft_wrap=True)
    return 0


def plot_results() -> int:
    """Draw one figure of several models' results: glalm plot FIGURE FOLDER ... [--out FILE]

    FIGURE: extrapolation, ratios (perplexity at n training lengths over that at one), gains (the loss with the state
    reset minus that with it carried), decode_speed, training, or layers (of one run with train.statistics_every).
    FOLDER: runs, or models that `glalm eval` evaluated, or one result of theirs, FOLDER/eval/NAME.json. Results that do
    not compare, because their text or settings differ, are refused. Writes FILE as PNG and as SVG: plots/FIGURE in the
    folder above the first one.
    """
    parser = create_parser(plot_results)
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
