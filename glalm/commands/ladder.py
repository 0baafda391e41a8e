"""Train and evaluate many models at one size and token budget: glalm ladder [NAME ...] [KEY=VALUE ...]

NAME is a preset NAME_SIZE of configs/model (default: all mixers and the hybrid), or one of the GLA paper's ablations:
gla_scalar_gate, gla_fixed_gate, gla_no_gate, gla_1_head, gla_8_heads, and gla_12_segments, which trains on windows of
twelve training lengths by truncated backpropagation. KEY=VALUE overrides the config of training in every run; the rest
is in configs/experiment/ladder_SIZE.yaml. For example, two seeds of everything, three runs at a time on each GPU:

    glalm ladder --size small --seeds 2 --at-once 3 data.path=data/mine

Three models, three seeds and two learning rates, first what they would cost:

    glalm ladder gla retention attention --seeds 3 --lrs 1e-3,3e-3 --dry-run

Each run is `glalm train` followed by `glalm eval`. Its folder is FOLDER/NAME-SEED, or FOLDER/NAME-lr-LR-SEED. Beside
it, its output is in a .log, and until it is complete, what it does in a .status.json. Run the same command again to
skip complete runs and resume interrupted ones.
FOLDER/ladder.json has the table, ladder.csv a line for each run, loss.png and .svg the validation loss against tokens,
positions.png and .svg the perplexity against position. The figures show each model at its best rate, with bands over
seeds. hydra/launcher=NAME runs them elsewhere, for example as jobs of Slurm (docs/launch.md, Sweeps).
"""

import sys

from glalm.cli import exit_on_error
from glalm.studies.ladder_arguments import check_models, parse_arguments


def main() -> int:
    args = parse_arguments(__doc__)
    with exit_on_error():
        check_models(args)
        print("checking the runs ...", file=sys.stderr, flush=True)
        from glalm.studies.ladder import run_ladder  # It imports torch, which takes seconds.

        return run_ladder(args)
