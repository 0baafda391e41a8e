"""Multi-query associative recall (Zoology, arXiv 2312.04927): python scripts/mqar.py [KEY=VALUE ...]

Trains a small model for every mixer, length, width and learning rate, until one rate solves the task. Writes
FOLDER/eval/*.json, one file for each model, and the figure FOLDER/plots/mqar.png and .svg. Run the same command again
to train what is missing; interrupted models resume after their last epoch. For example, in minutes on two cores:

    python scripts/mqar.py mixers=[attention,gla] lengths=[64] pairs=[4] widths=[64] learning_rates=[3e-3] \
        vocab_size=512 train_examples=20000 test_examples=1000 epochs=8 batch_size=128

and with many models at once on one GPU: python scripts/mqar.py workers=12
"""

from glalm.cli import hydra_entry
from glalm.studies.mqar import MQARConfig


def main(config: MQARConfig) -> int:
    from glalm.studies.mqar_sweep import main as run_sweep  # only after the config has been checked

    return run_sweep(config)


if __name__ == "__main__":
    hydra_entry(main, MQARConfig, "mqar")
