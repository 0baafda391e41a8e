"""Text in, batches out: sources -> prepare -> token shards -> order -> loader.

All that a run must remember of its data are the seed, the step and the batches before: see glalm.data.order.
"""
