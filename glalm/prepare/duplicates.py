"""Find the documents that duplicate an earlier one, from their signatures alone.

Documents are compared in the order of the inputs. A document is removed if an earlier document that is itself not
removed has the same text or, if near-duplicates are looked for, a Jaccard index of the shingles of at least the
threshold. Equal texts have one fate: if the first is removed, so are the others, for the document that is kept in its
place. So there are no chains: each removed document resembles the one that is kept in its place. Documents that are
appended never change what was decided about earlier ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from glalm.prepare.signature_store import SignatureStore
from glalm.prepare.signatures import estimate_jaccard

# A document is compared with at most this many kept documents of each of its buckets. Without a limit, the time would
# be quadratic in the number of pages that share a template and are no duplicates. A document that resembles only later
# members of a bucket is missed there, but near-duplicates mostly share several buckets.
MAX_COMPARED = 32
PROGRESS_STEP = 1000  # documents
EXACT = "exact duplicate"
NEAR = "near duplicate"


class Duplicates(NamedTuple):
    """The removed documents in ascending order, by their numbers in the store.

    Attributes:
        removed: int64 [removed].
        kept: The earlier document that each of them duplicates, which is not removed: int64 [removed].
        jaccard: The Jaccard index of the two, 1 for equal texts: float64 [removed].
        exact: Whether the texts are equal: bool [removed].
    """

    removed: np.ndarray
    kept: np.ndarray
    jaccard: np.ndarray
    exact: np.ndarray


class Candidates(NamedTuple):
    """The buckets of the documents that share a band hash with another one.

    Attributes:
        documents: Documents in ascending order, each once for each of its buckets: int64 [memberships].
        buckets: Their buckets, which are numbered from 0: int64 [memberships].
        sizes: The number of documents of each bucket: int64 [buckets].
    """

    documents: np.ndarray
    buckets: np.ndarray
    sizes: np.ndarray


def find_duplicates(
    store: SignatureStore, threshold: float, on_progress: Callable[[int], None] = lambda document: None
) -> Duplicates:
    """Return the duplicates among the documents of a store.

    Args:
        threshold: The Jaccard index from which on two documents are near-duplicates. It has no effect on signatures of
            the mode "exact", which have no band hashes.
        on_progress: Is called with the number of a document before it is compared, once in PROGRESS_STEP documents.
    """
    if not len(store):
        return Duplicates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, bool))
    first_copy = find_first_copies(store.read_column("text_hash"))
    numbers = np.arange(len(store))
    # A document without words resembles nothing.
    compared = numbers[(first_copy == numbers) & (store.read_column("sketch_size") > 0)]
    representative = numbers.copy()  # the document that is kept in place of each
    jaccard = np.ones(len(store))
    for document, other, similarity in find_near_duplicates(store, compared, threshold, on_progress):
        representative[document] = other
        jaccard[document] = similarity
    # Copies of a document that was removed count as near-duplicates of the document that is kept in its place.
    representative = representative[first_copy]
    jaccard = jaccard[first_copy]
    removed = np.flatnonzero(representative != numbers)
    is_exact = representative == first_copy
    return Duplicates(removed, representative[removed], jaccard[removed], is_exact[removed])


def find_first_copies(text_hashes: np.ndarray) -> np.ndarray:
    """Return for each document the number of the first one with the same text.

    Args:
        text_hashes: uint64 [documents, 2].
    """
    order = np.lexsort((text_hashes[:, 1], text_hashes[:, 0]))  # It is stable, so copies stay in their order.
    in_order = text_hashes[order]
    starts_group = np.append(True, (in_order[1:] != in_order[:-1]).any(axis=1))
    group = np.cumsum(starts_group) - 1
    first_copy = np.empty(len(text_hashes), np.int64)
    first_copy[order] = order[starts_group][group]
    return first_copy


def find_near_duplicates(
    store: SignatureStore, compared: np.ndarray, threshold: float, on_progress: Callable[[int], None]
) -> list[tuple[int, int, float]]:
    """Return (document, earlier document that is kept, their Jaccard index) of the near-duplicates in `compared`."""
    candidates = group_by_bands(store, compared)
    # Each bucket has a region of `kept_members`, which fills with those of its documents that are kept.
    region_starts = np.cumsum(candidates.sizes) - candidates.sizes
    region_ends = region_starts.copy()
    kept_members = np.empty(len(candidates.documents), np.int64)
    documents, starts, counts = np.unique(candidates.documents, return_index=True, return_counts=True)
    found = []
    for i, document in enumerate(map(int, documents)):
        if i % PROGRESS_STEP == 0:
            on_progress(document)
        buckets = candidates.buckets[starts[i] : starts[i] + counts[i]]
        regions = zip(region_starts[buckets].tolist(), region_ends[buckets].tolist(), strict=True)
        others = {other for start, end in regions for other in kept_members[start:end].tolist()}
        match = _find_first_match(store, document, sorted(others), threshold)
        if match:
            found.append((document, *match))
        else:
            open_buckets = buckets[region_ends[buckets] - region_starts[buckets] < MAX_COMPARED]
            kept_members[region_ends[open_buckets]] = document
            region_ends[open_buckets] += 1
    return found


def _find_first_match(
    store: SignatureStore, document: int, others: list[int], threshold: float
) -> tuple[int, float] | None:
    """Return the first of `others` of which `document` is a near-duplicate, and their Jaccard index, or None."""
    sketch = store.read_sketch(document)
    for other in others:
        jaccard = estimate_jaccard(sketch, store.read_sketch(other))
        if jaccard >= threshold:
            return other, jaccard
    return None


def group_by_bands(store: SignatureStore, documents: np.ndarray) -> Candidates:
    """Return the buckets of `documents` that have at least two of them. One band is sorted at a time."""
    members = [np.empty(0, np.int64)]
    buckets = [np.empty(0, np.int64)]
    sizes = [np.empty(0, np.int64)]
    num_buckets = 0
    for band in range(store.num_bands):
        _, bucket, size = np.unique(store.read_band(band)[documents], return_inverse=True, return_counts=True)
        is_shared = size > 1
        numbers = num_buckets + np.cumsum(is_shared) - 1
        in_shared = is_shared[bucket]
        members.append(documents[in_shared])
        buckets.append(numbers[bucket[in_shared]])
        sizes.append(size[is_shared])
        num_buckets += len(sizes[-1])
    members = np.concatenate(members)
    order = np.argsort(members, kind="stable")
    return Candidates(members[order], np.concatenate(buckets)[order], np.concatenate(sizes))
