"""Compute the signatures of documents: what deduplication stores and compares in place of their texts.

Near-duplicates share most of their shingles, the runs of `ngram` neighbouring words. A signature has two parts.
Documents are compared only if they have one of their band hashes, made of MinHash values, in common (Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). A sketch, the lowest hashes of the shingles, is what is
compared (Broder, On the resemblance and containment of documents, 1997).
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from glalm.prepare.input_files import RecordBatch
from glalm.prepare.records import SkippedRecord, parse_records

PERMUTATIONS = 128  # MinHash values of a document
SKETCH_SIZE = 1024  # This many of the lowest shingle hashes are kept, or all if a document has fewer.
MIN_RECALL = 0.99  # the share of the pairs at the threshold that have a band hash in common
CHARACTERS_AT_ONCE = 2**20  # bounds the memory for the words of a long document
SHINGLES_AT_ONCE = 2**14  # bounds the memory for the MinHash values of a long document: 128 x 4 bytes each
BEGINNING_BYTES = 64
# The letters of scripts without spaces: Han, kana, Thai, Lao, Burmese and Khmer.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Joiners, which words of Persian and Hindi contain, and the marks that select a variant of a Han character.
OTHER_MARKS = "\u200c\u200d\U000e0100-\U000e01ef"
DOCUMENT = np.dtype(
    [
        ("input_index", "<u4"),
        ("record", "<u8"),  # the number of its record, counted from 1
        ("text_hash", "<u8", 2),
        ("sketch_size", "<u4"),
        ("beginning", f"S{BEGINNING_BYTES}"),  # The report shows how the text begins, in UTF-8.
    ]
)


class Signatures(NamedTuple):
    """The signatures of neighbouring documents of one input.

    Attributes:
        documents: What is known of each document, of the dtype DOCUMENT: [documents].
        bands: The band hashes, uint64 [bands, documents].
        sketches: The sketches of all documents end to end, each in ascending order, uint32.
    """

    documents: np.ndarray
    bands: np.ndarray
    sketches: np.ndarray

    def shift_numbers(self, before: int) -> "Signatures":
        """Return the signatures with the numbers of records of which `before` others precede those that were read."""
        documents = self.documents.copy()  # Arrays that come from another process may be read-only.
        documents["record"] += before
        return self._replace(documents=documents)


def compute_signatures(settings: dict[str, Any], batch: RecordBatch) -> Signatures:
    """Return the signatures of the documents in a batch of records. Records without a document have none.

    Args:
        settings: Those of `glalm.prepare.deduplication.deduplicate`. If the mode is "exact", bands and sketches are
            empty.
    """
    is_near = settings["mode"] == "near"
    band_size = count_values_per_band(settings["threshold"]) if is_near else 0
    documents = []
    bands = []
    sketches = [np.empty(0, np.uint32)]
    for item in parse_records(batch.records, batch.first, settings["text_field"], settings["source_field"]):
        if isinstance(item, SkippedRecord):
            continue
        data = item.text.encode()
        shingles = hash_shingles(item.text, settings["ngram"]) if is_near else np.empty(0, np.uint32)
        sketches.append(shingles[:SKETCH_SIZE])
        bands.append(_hash_bands(shingles, band_size) if is_near else [])
        text_hash = np.frombuffer(blake2b(data, digest_size=16).digest(), "<u8")
        documents.append((batch.input_index, item.number, text_hash, len(sketches[-1]), data[:BEGINNING_BYTES]))
    return Signatures(
        np.array(documents, DOCUMENT),
        np.array(bands, np.uint64).reshape(len(documents), PERMUTATIONS // band_size if is_near else 0).T,
        np.concatenate(sketches),
    )


def count_values_per_band(threshold: float) -> int:
    """Return the number of MinHash values in a band: the most that give MIN_RECALL at the Jaccard index `threshold`.

    The more values a band has, the fewer documents are compared in vain. It is 1 if no number gives MIN_RECALL.
    """
    for band_size in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**band_size) ** (PERMUTATIONS // band_size) >= MIN_RECALL:
            return band_size
    return 1


def hash_shingles(text: str, ngram: int) -> np.ndarray:
    """Return the different 32-bit hashes of the runs of `ngram` neighbouring words, in ascending order.

    A word is a run of letters, digits and underscores with their combining marks, such as the vowel signs of Hindi and
    Tamil. In a script without spaces, each letter with its marks is a word. Words are compared in lower case and in
    Unicode's form NFKC. A text of fewer than `ngram` words, but at least one, has one shingle of all of them.
    """
    from xxhash import xxh32_intdigest

    hashes = [np.empty(0, np.uint32)]
    words: list[bytes] = []
    for piece in _split_words(text):
        words = words[max(len(words) - ngram + 1, 0) :] + piece
        runs = zip(*(islice(words, start, None) for start in range(ngram)), strict=False)
        shingles = set(map(b" ".join, runs))
        hashes.append(np.fromiter(map(xxh32_intdigest, shingles), np.uint32, len(shingles)))
    if words and not any(map(len, hashes)):
        hashes.append(np.array([xxh32_intdigest(b" ".join(words))], np.uint32))
    return np.unique(np.concatenate(hashes))


def estimate_jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Jaccard index |A and B| / |A or B| of the sets of which `a` and `b` are sketches; 0 for empty ones.

    It is exact if both have fewer than SKETCH_SIZE elements. Otherwise it is that of the SKETCH_SIZE lowest elements
    of the union, a random sample: at an index of 0.8 its standard error is 0.0125.
    """
    if len(a) == SKETCH_SIZE or len(b) == SKETCH_SIZE:
        last = np.union1d(a, b)[SKETCH_SIZE - 1]
        a = a[a <= last]
        b = b[b <= last]
    merged = np.sort(np.concatenate((a, b)))
    shared = np.count_nonzero(merged[1:] == merged[:-1])
    return shared / max(len(merged) - shared, 1)


def _split_words(text: str) -> Iterator[list[bytes]]:
    """Yield the words of a text, normalized and in lower case, those of about CHARACTERS_AT_ONCE at a time."""
    word, boundary = _compile_words()
    text = unicodedata.normalize("NFKC", text).lower()
    start = 0
    while start < len(text):
        match = boundary.search(text, start + CHARACTERS_AT_ONCE)
        stop = match.start() if match else len(text)
        yield " ".join(word.findall(text, start, stop)).encode().split()
        start = stop


@lru_cache(maxsize=1)
def _compile_words() -> tuple[re.Pattern, re.Pattern]:
    """Return the patterns of a word, and of a character before which a text may be cut, because no word spans it."""
    # Marks above U+FFFF belong to rare scripts, and would make each search several times slower.
    marks = "".join(filter(lambda mark: unicodedata.category(mark).startswith("M"), map(chr, range(2**16))))
    marks += OTHER_MARKS
    letters = rf"[^\W{UNSPACED}]"
    letter = rf"(?=\w)[{UNSPACED}]"
    word = rf"{letters}+(?:[{marks}]+{letters}*)*|{letter}[{marks}]*"
    return re.compile(word), re.compile(rf"[^\w{marks}]|{letter}")


def _hash_bands(shingles: np.ndarray, band_size: int) -> list[int]:
    """Return the hashes of PERMUTATIONS // `band_size` bands of MinHash values."""
    from xxhash import xxh3_64_intdigest

    minhash = _make_minhash()
    minhash.clear()
    for start in range(0, len(shingles), SHINGLES_AT_ONCE):
        minhash.update_batch(shingles[start : start + SHINGLES_AT_ONCE])
    bands = minhash.hashvalues[: PERMUTATIONS // band_size * band_size].reshape(-1, band_size)
    return [xxh3_64_intdigest(band.tobytes()) for band in bands]


@lru_cache(maxsize=1)
def _make_minhash() -> Any:
    """Return a datasketch.MinHash of values that are hashes already, made once by each process."""
    from datasketch import MinHash

    return MinHash(PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")
