"""Multi-query associative recall (Zoology, arXiv 2312.04927): glalm mqar [KEY=VALUE ...]

Trains a small model for every mixer, length, width and learning rate, until one rate solves the task. Writes
FOLDER/eval/*.json, one file for each model, and the figure FOLDER/plots/mqar.png and .svg. Run the same command again
to train what is missing; interrupted models resume after their last epoch. For example, in minutes on two cores:

    glalm mqar mixers=[attention,gla] lengths=[64] pairs=[4] widths=[64] learning_rates=[3e-3] \
        vocab_size=512 train_examples=20000 test_examples=1000 epochs=8 batch_size=128

and with twelve models at once on each GPU: glalm mqar hydra/launcher=processes hydra.launcher.at_once=12
"""

from hydra.core.hydra_config import HydraConfig

from glalm.cli import hydra_entry
from glalm.studies.mqar import MQARConfig


def main() -> None:
    hydra_entry(run_sweep, MQARConfig, "mqar")


def run_sweep(config: MQARConfig) -> int:
    from glalm.studies.mqar_sweep import main  # only after the config has been checked

    return main(config, HydraConfig.get().overrides.hydra)
