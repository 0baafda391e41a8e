"""Compare many runs: `glalm ladder`, `glalm scaling` and `glalm mqar`.

What imports torch, which takes seconds, is imported only once the command line has been checked.
"""

import argparse
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from rich import box
from rich.console import Console
from rich.table import Table

from glalm.cli import exit_on_error, hydra_entry
from glalm.commands import create_parser
from glalm.config.strict import require
from glalm.studies.ladder_arguments import check_models, parse_arguments


def compare_models() -> int:
    """Train and evaluate many models at one size and token budget: glalm ladder [NAME ...] [KEY=VALUE ...]

    NAME is a preset NAME_SIZE of configs/model (default: all mixers and the hybrid), or one of the GLA paper's
    ablations: gla_scalar_gate, gla_fixed_gate, gla_no_gate, gla_1_head, gla_8_heads, and gla_12_segments, which trains
    on windows of twelve training lengths by truncated backpropagation. KEY=VALUE overrides the config of training in
    every run; the rest is in configs/experiment/ladder_SIZE.yaml. For example, two seeds of everything, three runs at a
    time on each GPU:

        glalm ladder --size small --seeds 2 --at-once 3 data.path=data/mine

    Three models, three seeds and two learning rates, first what they would cost:

        glalm ladder gla retention attention --seeds 3 --lrs 1e-3,3e-3 --dry-run

    Each run is `glalm train` followed by `glalm eval`. Its folder is FOLDER/NAME-SEED, or FOLDER/NAME-lr-LR-SEED.
    Beside it, its output is in a .log, and until it is complete, what it does in a .status.json. Run the same command
    again to skip complete runs and resume interrupted ones.
    FOLDER/ladder.json has the table, ladder.csv a line for each run, loss.png and .svg the validation loss against
    tokens, positions.png and .svg the perplexity against position. The figures show each model at its best rate, with
    bands over seeds. hydra/launcher=NAME runs them elsewhere, for example as jobs of Slurm (docs/launch.md, Sweeps).
    """
    args = parse_arguments(create_parser(compare_models))
    with exit_on_error():
        check_models(args)
        print("checking the runs ...", file=sys.stderr, flush=True)
        from glalm.studies.ladder import run_ladder

        return run_ladder(args)


def fit_scaling_law() -> int:
    """Fit the loss against model size, and predict other runs' losses: glalm scaling RUN ... [--predict RUN ...]

    Fits L = E + A N^-a, and B D^-b where runs of one size have different tokens, to the last validation losses of
    complete runs: N is the number of parameters without embeddings, D that of tokens. Of runs that differ in their
    learning rates or seeds, the best is fitted. All must have been validated alike, and have the same mixers. Prints a
    table with the law's loss beside each measured one. For example:

        glalm scaling runs/depth_2 runs/depth_4 runs/depth_6 --predict runs/depth_8 --out scaling.json
        glalm scaling --points scaling.json --depth 12

    The second line predicts the loss of experiment=gla_dial model.num_hidden_layers=12 before it is trained.
    """
    parser = create_parser(fit_scaling_law)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="the folder of a run to fit")
    parser.add_argument("--points", type=Path, metavar="FILE", help="fit the runs of a file of --out, too")
    parser.add_argument("--predict", type=Path, nargs="+", default=[], metavar="RUN", help="runs that are not fitted")
    parser.add_argument("--depth", type=int, nargs="+", default=[], metavar="N", help="predict experiment=gla_dial")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="of --depth (default: that of the runs)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the law and the fitted runs as JSON")
    args = parser.parse_args()
    with exit_on_error():
        predict_losses(args)
    return 0


def predict_losses(args: argparse.Namespace) -> None:
    from glalm.studies import scaling

    require(bool(args.runs or args.points), "name runs to fit, or a file of theirs: --points FILE")
    measured = [scaling.measure_run(folder) for folder in args.runs]
    measured += scaling.read_points(args.points) if args.points else []
    predicted = [scaling.measure_run(folder) for folder in args.predict]
    scaling.require_comparable([*measured, *predicted])
    vocab_size = args.vocab_size
    if args.depth and vocab_size is None:
        vocab_size = scaling.shared_vocabulary(measured)
    fitted = scaling.select_best(measured)
    law = scaling.fit_loss_law(fitted)
    table = Table(box=box.MARKDOWN)
    for column in ("run", "parameters", "tokens", "lr", "loss", "law", ""):
        table.add_column(column, justify="left" if column in ("run", "") else "right")
    for m in sorted([*measured, *predicted], key=lambda m: (m.parameters, m.tokens, m.lr)):
        use = "predicted" if m in predicted else "fitted" if m in fitted else ""
        sizes = (f"{m.parameters:,}", f"{m.tokens:,}", f"{m.lr:.3g}", f"{m.loss:.4f}")
        table.add_row(m.name, *sizes, f"{law.predict(m.parameters, m.tokens):.4f}", use)
    sizes_of_predicted = {m.name: (m.parameters, m.tokens) for m in predicted}
    for depth in args.depth:
        dial, parameters = scaling.describe_dial(depth, vocab_size)
        expected = f"{law.predict(parameters, dial.tokens):.4f}"
        table.add_row(f"depth {depth}", f"{parameters:,}", f"{dial.tokens:,}", "", "", expected, "predicted")
        sizes_of_predicted[f"depth {depth}"] = (parameters, dial.tokens)
    console = Console(width=140, markup=False, highlight=False)
    console.print(table)
    tokens_term = f" + {law.B:.4g} D^-{law.b:.4f}" if law.B else ""
    console.print(f"L = {law.E:.4f} + {law.A:.4g} N^-{law.a:.4f}{tokens_term}")
    others = []
    if not law.B:
        others = [name for name, sizes in sizes_of_predicted.items() if not scaling.is_by_rule(fitted, *sizes)]
    if others:
        console.print(
            f"The law has no term of tokens, so it only holds for tokens that grow with the size as the runs' do. For "
            f"their sizes, these have others: {', '.join(others)}. Name runs of one size with several tokens, too."
        )
    if args.out:
        scaling.write_points(args.out, law, fitted)
        console.print(f"wrote {args.out}")


def measure_recall() -> None:
    r"""Measure associative recall: glalm mqar [KEY=VALUE ...]

    Trains a small model for every mixer, length, width and learning rate, until one rate solves the task. Writes
    FOLDER/eval/*.json, one file for each model, and the figure FOLDER/plots/mqar.png and .svg. Run the same command
    again to train what is missing; interrupted models resume after their last epoch. For example, in minutes on two
    cores:

        glalm mqar mixers=[attention,gla] lengths=[64] pairs=[4] widths=[64] learning_rates=[3e-3] \
            vocab_size=512 train_examples=20000 test_examples=1000 epochs=8 batch_size=128

    and with twelve models at once on each GPU: glalm mqar hydra/launcher=processes hydra.launcher.at_once=12

    The task is multi-query associative recall (Zoology, arXiv 2312.04927). task=associative_recall is that of Hyena's
    paper (arXiv 2302.10866): the value of one key at the end of a long sequence (docs/evaluation.md, Recall).
    """
    from glalm.studies.mqar import MQARConfig

    hydra_entry(run_recall_sweep, MQARConfig, "mqar")


def run_recall_sweep(config) -> int:
    """Train the missing models of an MQARConfig, draw the figure of all, and return 0."""
    from glalm.studies.mqar_sweep import main

    return main(config, HydraConfig.get().overrides.hydra)
