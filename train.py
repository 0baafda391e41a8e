"""Trains a language model: `python train.py [GROUP=CHOICE ...] [KEY=VALUE ...]`, see `python train.py --help`."""

import atexit

from glalm.cli import hydra_entry
from glalm.config.strict import ConfigError
from glalm.evals.options import TrainingRun


def main(config: TrainingRun) -> int:
    from glalm.train.parallel import leave_process_group
    from glalm.train.trainer import train

    evaluate = None
    if config.train_evals.evals:
        from glalm.evals.in_training import make_evaluator

        evaluate = make_evaluator(config)
    try:
        signum = train(config, evaluate)
    except ConfigError:  # of all processes, before a collective of their GPUs, for whose end one could wait for another
        leave_process_group()
        raise
    atexit.register(leave_process_group)  # not yet: --multirun's next run is of the same processes
    return signum


if __name__ == "__main__":
    hydra_entry(main, TrainingRun, "train")
