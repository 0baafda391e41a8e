"""Trains a language model: `python train.py [GROUP=CHOICE ...] [KEY=VALUE ...]`, see `python train.py --help`."""

import atexit

from glalm.cli import hydra_entry
from glalm.config.run import RunConfig
from glalm.config.strict import ConfigError


def main(config: RunConfig) -> int:
    # after the config is checked: torch takes seconds to import
    from glalm.train.distributed import leave
    from glalm.train.loop import train

    evaluate = None
    if config.during.evals:
        from glalm.evals.in_training import during

        evaluate = during(config)
    try:
        signum = train(config, evaluate)
    except ConfigError:  # of all processes, before a collective of their GPUs, for whose end one could wait for another
        leave()
        raise
    atexit.register(leave)  # not yet: --multirun's next run is of the same processes
    return signum


if __name__ == "__main__":
    hydra_entry(main, RunConfig, "train")
