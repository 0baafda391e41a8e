"""Text in, batches out: sources -> prepare -> token shards -> order -> loader.

Everything that a run must remember about its data is the seed and the step: see glalm.data.order.
"""
