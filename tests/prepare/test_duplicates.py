"""Signatures and the search for duplicates, compared with sets of words and a comparison of all pairs."""

import json
import os
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glalm.prepare import duplicates, signatures
from glalm.prepare.duplicates import find_duplicates, find_first_copies
from glalm.prepare.input_files import Position, RecordBatch
from glalm.prepare.signature_store import SignatureStore
from glalm.prepare.signatures import compute_signatures, count_values_per_band, estimate_jaccard, hash_shingles

pytest.importorskip("datasketch")

NEAR = {"mode": "near", "threshold": 0.8, "ngram": 5, "text_field": "text", "source_field": None}
# Texts of a few words, so that many of them have the same runs.
TEXTS = st.lists(st.sampled_from(["a", "B", "c d", "e,", "ä", "-", "今日", ""]), max_size=30).map(" ".join)
# Words with marks and joiners, each of which is one word, in several scripts and normal forms.
MARKED = [
    "हिन्दी",
    "বাংলা",
    "தமிழ்",
    "שָׁלוֹם",
    "می\u200cخواهم",
    "cafe\u0301",
    "café",
    "ﬁn",
    "ガ",
    "カ\u3099",
    "葛\U000e0100",
    "မြ",
    "a_1",
]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def find_shingles(text: str, ngram: int = 5) -> set[tuple[str, ...]]:
    """The runs of words, by the definition: a word is a maximal run of letters, but each Han character is one."""
    words = re.findall(r"[今日]|[a-zä]+", text.lower())
    return {tuple(words[i : i + ngram]) for i in range(max(len(words) - ngram + 1, 1))} if words else set()


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def make_batch(texts: list[str]) -> RecordBatch:
    records = [json.dumps({"text": text}).encode() for text in texts]
    fields = dict.fromkeys(RecordBatch._fields, 0)
    return RecordBatch(**{**fields, "source": "s", "records": records, "end": len(records), "is_last": True})


def make_store(folder: Path, texts: list[str], **changes) -> SignatureStore:
    store = SignatureStore(folder)
    for start in range(0, len(texts), 7):  # in several parts
        store.add(compute_signatures(NEAR | changes, make_batch(texts[start : start + 7])), Position())
        store.commit()
    return store


@given(TEXTS, st.integers(1, 7))
@settings(max_examples=100)
def test_shingles_are_the_runs_of_words(text, ngram):
    hashes = hash_shingles(text, ngram)
    assert hashes.dtype == np.uint32 and (np.diff(hashes.astype(np.int64)) > 0).all()
    assert len(hashes) == len(find_shingles(text, ngram))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signatures, "CHARACTERS_AT_ONCE", 3)
        assert hash_shingles(text, ngram).tolist() == hashes.tolist()


def normalize(word: str) -> str:
    return unicodedata.normalize("NFKC", word)


@given(
    st.lists(st.sampled_from(MARKED), max_size=20), st.sampled_from([" ", "\n", "، ", "・", "।"]), st.integers(1, 50)
)
def test_combining_marks_are_part_of_words(words, separator, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signatures, "CHARACTERS_AT_ONCE", at_once)
        pieces = list(signatures._split_words(separator.join(words)))
    assert [word.decode() for piece in pieces for word in piece] == [normalize(word) for word in words]


def test_the_form_of_a_character_does_not_matter():
    text = "Déjà vu: là où l’été naît, हिन्दी ड़"
    hashes = {form: hash_shingles(unicodedata.normalize(form, text), 2).tolist() for form in ("NFC", "NFD", "NFKD")}
    assert hashes["NFC"] == hashes["NFD"] == hashes["NFKD"] and len(hashes["NFC"]) == 8


@pytest.mark.parametrize("text", ["今日" * 500, "a,b" * 500, "one\n" * 500, "กำ" * 500, "က္မ" * 500])
def test_texts_without_spaces_are_split_a_part_at_a_time(monkeypatch, text):
    monkeypatch.setattr(signatures, "CHARACTERS_AT_ONCE", 10)
    pieces = list(signatures._split_words(text))
    assert max(map(len, pieces)) <= 14
    monkeypatch.undo()
    [whole] = signatures._split_words(text)
    assert [word for piece in pieces for word in piece] == whole


@given(TEXTS, TEXTS)
@settings(max_examples=100)
def test_the_jaccard_index_is_that_of_the_sets(a, b):
    expected = jaccard(find_shingles(a, 2), find_shingles(b, 2))
    assert estimate_jaccard(hash_shingles(a, 2), hash_shingles(b, 2)) == expected


NUMBERS = st.sets(st.integers(0, 40))


@given(NUMBERS, NUMBERS)
def test_of_long_documents_it_is_that_of_the_lowest_hashes(a, b):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signatures, "SKETCH_SIZE", 8)
        sketches = [np.array(sorted(numbers)[:8], np.uint32) for numbers in (a, b)]
        is_exact = max(len(a), len(b)) < 8
        sample = a | b if is_exact else set(sorted(a | b)[:8])
        assert estimate_jaccard(*sketches) == jaccard(a & sample, b & sample)


def test_long_documents_are_estimated_within_the_standard_error():
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(50):
        hashes = generator.choice(2**32, 9000, replace=False).astype(np.uint32)
        a = np.sort(hashes[:8100])[: signatures.SKETCH_SIZE]
        b = np.sort(hashes[900:])[: signatures.SKETCH_SIZE]
        errors.append(estimate_jaccard(a, b) - 7200 / 9000)
    assert abs(np.mean(errors)) < 0.006 and 0.009 < np.std(errors) < 0.016  # The standard error is 0.0125.


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1])
def test_bands_find_pairs_at_the_threshold(threshold):
    """Draw the MinHash values of pairs at the threshold, which agree with that probability, and count common bands."""
    rows = count_values_per_band(threshold)
    agree = np.random.default_rng(0).random((4000, signatures.PERMUTATIONS)) < threshold
    bands = agree[:, : signatures.PERMUTATIONS // rows * rows].reshape(4000, -1, rows).all(axis=2)
    assert bands.any(axis=1).mean() > 0.98
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < signatures.MIN_RECALL


def compare_all_pairs(texts: list[str], threshold: float) -> dict[int, int]:
    """Return {removed document: the one it duplicates} by the definition, in the order of the texts."""
    sets = [find_shingles(text) for text in texts]
    kept = []
    removed = {}
    for i, text in enumerate(texts):
        match = [j for j in kept if texts[j] == text or jaccard(sets[i], sets[j]) >= threshold]
        if match:
            removed[i] = match[0]
        else:
            kept.append(i)
    return removed


@st.composite
def corpora(draw) -> list[str]:
    """Texts in the order of a random list, many of which are made from another one by few edits."""
    pick = random.Random(draw(st.integers(0, 2**32)))
    texts = []
    for _ in range(draw(st.integers(0, 25))):
        words = pick.choice(texts).split() if texts and pick.random() < 0.7 else pick.choices("abcdefgh", k=40)
        for _ in range(pick.choice([0, 0, 1, 1, 2, 5])):
            place = pick.randrange(len(words) + 1)
            words[place : place + pick.randrange(3)] = pick.choices("abcdefghijk", k=2)
        texts.append(" ".join(words[: pick.choice([40, 40, 40, 3, 1, 0])]) or pick.choice(["", "!", "?"]))
    return [text for text in texts if text]


@given(corpora(), st.sampled_from([0.5, 0.8, 1.0]))
@settings(max_examples=25)
def test_it_removes_what_a_comparison_of_all_pairs_does(tmp_path_factory, texts, threshold):
    with pytest.MonkeyPatch.context() as patch:
        # With bands of one value no pair above the thresholds is missed.
        patch.setattr(signatures, "count_values_per_band", lambda threshold: 1)
        found = find_duplicates(make_store(tmp_path_factory.mktemp("store"), texts), threshold)
    removed = compare_all_pairs(texts, threshold)
    assert dict(zip(found.removed.tolist(), found.kept.tolist(), strict=True)) == removed
    for document, kept, index, exact in zip(*found, strict=True):
        assert exact == (texts[document] == texts[kept])
        assert index == 1 if exact else index == jaccard(find_shingles(texts[document]), find_shingles(texts[kept]))


@given(corpora(), st.integers(1, 3))
@settings(max_examples=15)
def test_with_few_comparisons_each_removed_document_still_resembles_a_kept_one(tmp_path_factory, texts, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "MAX_COMPARED", limit)
        found = find_duplicates(make_store(tmp_path_factory.mktemp("store"), texts), 0.8)
    assert not set(found.removed) & set(found.kept)
    assert (found.kept < found.removed).all()
    for document, kept in zip(found.removed, found.kept, strict=True):
        similarity = jaccard(find_shingles(texts[document]), find_shingles(texts[kept]))
        assert texts[document] == texts[kept] or similarity >= 0.8


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_the_first_copy_is_the_first_of_equal_hashes(hashes):
    assert find_first_copies(np.array(hashes, np.uint64)).tolist() == [hashes.index(pair) for pair in hashes]


def test_there_are_no_chains(tmp_path):
    """Of three texts of which neighbours are alike, the third is kept, because it does not resemble the first."""
    words = [f"w{i}" for i in range(104)]
    chain = [" ".join(words[start : start + 90]) for start in (0, 7, 14)]
    first, second, third = ({tuple(text.split()[i : i + 5]) for i in range(86)} for text in chain)
    assert jaccard(first, second) > 0.8 and jaccard(second, third) > 0.8 and jaccard(first, third) < 0.8
    found = find_duplicates(make_store(tmp_path / "store", chain), 0.8)
    assert (found.removed.tolist(), found.kept.tolist()) == ([1], [0])


def test_a_copy_of_a_removed_document_duplicates_the_kept_one(tmp_path):
    words = [f"w{i}" for i in range(100)]
    texts = [" ".join(words), " ".join(words[:-4]), "x", " ".join(words[:-4]), "x"]
    found = find_duplicates(make_store(tmp_path / "store", texts), 0.8)
    assert (found.removed.tolist(), found.kept.tolist()) == ([1, 3, 4], [0, 0, 2])
    assert (found.jaccard.tolist(), found.exact.tolist()) == ([92 / 96, 92 / 96, 1], [False, False, True])


def test_documents_without_words_resemble_nothing(tmp_path):
    found = find_duplicates(make_store(tmp_path / "store", ["!", "?", "-", "!", "a b", "B A"]), 0.8)
    assert found.removed.tolist() == [3]


def test_the_files_of_a_store_do_not_grow_in_number(tmp_path):
    """One file for each column and band, in which the band's hashes of all documents are neighbours."""
    texts = [f"{i} is a text of six words" for i in range(20)]
    store = make_store(tmp_path / "store", texts)
    names = {path.name for path in store.folder.iterdir()}
    assert names == {"documents", "sketches", "finished.jsonl", "journal.json", *(f"band-{i:03d}" for i in range(21))}
    expected = compute_signatures(NEAR, make_batch(texts))
    (store.folder / "band-003").write_bytes((store.folder / "band-003").read_bytes() + b"cut short by a kill")
    for found in (store, SignatureStore(store.folder)):
        assert [found.read_band(i).tolist() for i in range(21)] == expected.bands.tolist()
        assert np.concatenate([found.read_sketch(i) for i in range(20)]).tolist() == expected.sketches.tolist()
    found.add(expected, Position())
    found.commit()
    assert found.read_band(3).tolist() == expected.bands[3].tolist() * 2 and len(found) == 40


def test_in_exact_mode_only_equal_texts_count(tmp_path):
    store = make_store(tmp_path / "store", ["a b c", "A b c", "a b c", "a b c "], mode="exact")
    assert store.num_bands == 0 and not len(store.read_sketch(1))
    found = find_duplicates(store, 0.8)
    assert (found.removed.tolist(), found.kept.tolist(), found.exact.tolist()) == ([2], [0], [True])
