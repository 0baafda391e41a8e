"""Pretraining on several nodes by Slurm: `glalm slurm`, and the check at the start of its template's jobs."""

import sys
from contextlib import redirect_stdout
from importlib.resources import files

from glalm.commands import create_parser
from glalm.config.strict import ConfigError


def print_template() -> None:
    """Print the Slurm template for pretraining on several nodes: glalm slurm > pretrain.sbatch

    Its head says which lines your cluster decides. Then: sbatch --nodes=2 pretrain.sbatch experiment=gla_1b3
    """
    create_parser(print_template).parse_args()
    print(files("glalm.commands").joinpath("pretrain.sbatch").read_text(), end="")


def check_run(args: list[str]) -> None:
    """Print the folder of the run that `glalm train` with these arguments would start, or exit with its error.

    One process of a job does this before all of them start, so that what is wrong with the settings or the data is told
    once. Other output goes to stderr.
    """
    from glalm.cli import check_command_line, compose_config, exit_on_error
    from glalm.commands.train_and_eval import find_run
    from glalm.evals.options import TrainingRun

    with exit_on_error(), redirect_stdout(sys.stderr):
        for arg in args:
            if arg.startswith("-"):
                raise ConfigError(
                    f"{arg}: options of sbatch go before the template's name, and settings of glalm, KEY=VALUE, after "
                    f"it: sbatch {arg} pretrain.sbatch ..."
                )
        check_command_line(args, TrainingRun)
        config = compose_config(TrainingRun, "train", args, complete=lambda tree: find_run(tree, args, swept=[]))
        from glalm.train.run_dir import open_data  # It takes seconds to import, so a wrong config is refused before.

        open_data(config)
    print(config.folder)
