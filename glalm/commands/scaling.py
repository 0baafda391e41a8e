"""Fit the loss against model size, and predict other runs' losses: glalm scaling RUN ... [--predict RUN ...]

Fits L = E + A N^-a, and B D^-b where runs of one size have different tokens, to the last validation losses of complete
runs: N is the number of parameters without embeddings, D that of tokens. Of runs that differ in their learning rates or
seeds, the best is fitted. Prints a table with the law's loss beside each measured one. For example:

    glalm scaling runs/depth_2 runs/depth_4 runs/depth_6 --predict runs/depth_8 --out scaling.json
    glalm scaling --points scaling.json --depth 12

The second line predicts the loss of experiment=gla_dial model.num_hidden_layers=12 before it is trained.
"""

import argparse
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from glalm.cli import exit_on_error
from glalm.config.strict import require


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="the folder of a run to fit")
    parser.add_argument("--points", type=Path, metavar="FILE", help="fit the runs of a file of --out, too")
    parser.add_argument("--predict", type=Path, nargs="+", default=[], metavar="RUN", help="runs that are not fitted")
    parser.add_argument("--depth", type=int, nargs="+", default=[], metavar="N", help="predict experiment=gla_dial")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="of --depth (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the law and the fitted runs as JSON")
    args = parser.parse_args()
    with exit_on_error():
        run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    from glalm.studies import scaling  # It imports torch, which takes seconds.

    require(bool(args.runs or args.points), "name runs to fit, or a file of theirs: --points FILE")
    measured = scaling.measure_runs([*args.runs, *args.predict])
    predicted = measured[len(args.runs) :]
    measured = measured[: len(args.runs)] + (scaling.read_points(args.points) if args.points else [])
    fitted = scaling.select_best(measured)
    law = scaling.fit_loss_law(fitted)
    table = Table(box=box.MARKDOWN)
    for column in ("run", "parameters", "tokens", "lr", "loss", "law", ""):
        table.add_column(column, justify="left" if column in ("run", "") else "right")
    for m in sorted([*measured, *predicted], key=lambda m: (m.parameters, m.tokens, m.lr)):
        use = "predicted" if m in predicted else "fitted" if m in fitted else ""
        sizes = (f"{m.parameters:,}", f"{m.tokens:,}", f"{m.lr:.3g}", f"{m.loss:.4f}")
        table.add_row(m.name, *sizes, f"{law.predict(m.parameters, m.tokens):.4f}", use)
    for depth in args.depth:
        dial, parameters = scaling.describe_dial(depth, args.vocab_size)
        expected = f"{law.predict(parameters, dial.tokens):.4f}"
        table.add_row(f"depth {depth}", f"{parameters:,}", f"{dial.tokens:,}", "", "", expected, "predicted")
    console = Console(width=140, markup=False, highlight=False)
    console.print(table)
    tokens_term = f" + {law.B:.4g} D^-{law.b:.4f}" if law.B else ""
    console.print(f"L = {law.E:.4f} + {law.A:.4g} N^-{law.a:.4f}{tokens_term}")
    if args.out:
        scaling.write_points(args.out, law, fitted)
        console.print(f"wrote {args.out}")
