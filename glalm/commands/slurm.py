"""Print the Slurm template for pretraining on several nodes: glalm slurm > pretrain.sbatch

Its head says which lines your cluster decides. Then: sbatch --nodes=2 pretrain.sbatch experiment=gla_1b3
"""

import argparse
from importlib.resources import files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(files("glalm.commands").joinpath("pretrain.sbatch").read_text(), end="")
