"""Trains a language model: `python train.py [GROUP=CHOICE ...] [KEY=VALUE ...]`, see `python train.py --help`."""

from glalm.cli import hydra_entry
from glalm.config import RunConfig


def main(config: RunConfig) -> int:
    from glalm.train.loop import train  # after the config is checked: torch takes seconds to import

    return train(config)


if __name__ == "__main__":
    hydra_entry(main, RunConfig, "train")
