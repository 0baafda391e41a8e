"""Everything of the package that the golden recordings know by name.

The harness runs the repository's commands and reads the files that they write, because commands and files outlive
modules. Whoever renames one of the keys or functions below updates this file, and no other file of the harness.
"""

from collections.abc import Mapping
from pathlib import Path

# The choices of `model=` for the tiny presets: every mixer, and the hybrid of gated linear attention and attention.
MODELS = (
    "gla_tiny",
    "attention_tiny",
    "linear_tiny",
    "retention_tiny",
    "regla_tiny",
    "mamba_tiny",
    "mamba2_tiny",
    "deltanet_tiny",
    "gated_deltanet_tiny",
    "hybrid_tiny",
)

# Settings of train.py whose keys are likely to be renamed.
CONCATENATED = "data.document_boundaries=ignore"
RESET = "data.document_boundaries=reset_state"
SEGMENT_LENGTH = "train.tbptt_length"
EVALUATE_WHILE_TRAINING = "train_evals"

# A setting of eval.py: every context of the extrapolation evaluator.
ALL_CONTEXTS = "extrapolation.contexts=[stateful,sliding_window,reset]"

# Words that have been renamed since the reference was recorded: {new: old}. They are translated back to the old word
# wherever a recording contains them as a key, as a whole value, or as a name that an error message mentions.
RENAMED = {
    "data.document_boundaries": "data.boundaries",
    "train.tbptt_length": "train.segment_length",
    "train_evals.evals": "during.evals",
    "document_boundaries": "boundaries",
    "ignore": "concatenate",
    "reset_state": "reset",
    "stateful_over_reset": "carried_over_reset",
    "stateful": "carried",
    "sliding_window": "sliding",
}


def compute_data_order(
    seed: int,
    batch_size: int,
    windows: Mapping[str, int],
    weights: Mapping[str, float] | None,
    steps: int,
    world: int,
) -> list[list[int]]:
    """Compute the global ids of the windows that each process reads in the first steps of a run.

    Args:
        seed: The run's seed.
        batch_size: Windows a step, over all processes.
        windows: The number of windows of each source.
        weights: The share of each source, or None to read every source in proportion to its size.
        steps: The number of steps.
        world: The number of processes.

    Returns:
        One list of ids for each process, in the order in which it reads them.
    """
    from glalm.data.order import Order, rank_slice

    order = Order(seed, batch_size, windows, weights)
    return [
        [int(window) for step in range(steps) for window in rank_slice(order.window_ids(step), rank, world)]
        for rank in range(world)
    ]


def export_to_fla(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint of one process in the format of flash-linear-attention."""
    from glalm.compat.fla import export_checkpoint
    from glalm.hf import GLALMForCausalLM

    export_checkpoint(GLALMForCausalLM.from_pretrained(checkpoint), folder)
