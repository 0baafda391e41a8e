"""A tokenizer that takes no time, for tests of everything around one. Imported by tests and by what they start."""

import numpy as np


class ByteTokenizer:
    """A token a byte."""

    def __init__(self, name):
        self.vocab_size, self.bos_ids, self.eos_ids = 300, [1], [2]

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
