import json
import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glalm.data.checksums import BLOCK, CheckedArray, DamagedFile, block_sums
from glalm.data.shards import TokenSet, read_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.encode import split_of
from glalm.prepare.pipeline import prepare_data


@pytest.fixture(scope="module")
def documents(prepared, texts):
    tokenizer = Tokenizer(prepared / "tokenizer.model")
    return [[1, *tokenizer.encode(t), 2] for t in texts if split_of(t) == "train"]


@pytest.fixture(scope="module")
def stream(documents):
    return list(chain.from_iterable(documents))


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "set")


def test_documents_and_counts(prepared, documents):
    tokens = TokenSet(prepared, "train")
    assert tokens.num_documents == len(documents)
    assert tokens.num_tokens == sum(map(len, documents))
    assert tokens.document_lengths.tolist() == [len(d) for d in documents]
    assert [tokens.read_document(i).tolist() for i in range(len(documents))] == documents
    assert (tokens.vocab_size, tokens.bos_id, tokens.eos_id) == (400, 1, 2)
    assert Tokenizer(tokens.tokenizer_path).fingerprint == tokens.tokenizer_fingerprint


@given(data=st.data())
def test_any_range_of_tokens_across_shards(prepared, stream, data):
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert TokenSet(prepared, "train").read_tokens(start, stop).tolist() == stream[start:stop]


def test_ranges_at_the_borders_of_shards(prepared, stream):
    tokens = TokenSet(prepared, "train")
    border = len(np.load(prepared / "train/corpus/00000.npy"))
    for start, stop in [(0, border), (border, border + 1), (border - 1, border + 1), (border, border)]:
        assert tokens.read_tokens(start, stop).tolist() == stream[start:stop]
    assert tokens.read_tokens(0, len(stream)).tolist() == stream


def test_out_of_range_is_an_error_not_a_shorter_answer(prepared):
    tokens = TokenSet(prepared, "train")
    for start, stop in [(-1, 5), (5, 4), (0, tokens.num_tokens + 1)]:
        with pytest.raises(ValueError, match="has tokens"):
            tokens.read_tokens(start, stop)
    for i in (-1, tokens.num_documents):
        with pytest.raises(ValueError, match="has documents"):
            tokens.read_document(i)


def test_tokens_cannot_be_changed_by_accident(prepared):
    with pytest.raises(ValueError, match="read-only"):
        TokenSet(prepared, "train").read_tokens(0, 5)[0] = 3


def test_an_empty_split_can_be_opened(copy, corpus):
    prepare_data([corpus], copy, vocab_size=400, held_out={"test": 0.1}, overwrite=True, progress=False)
    tokens = TokenSet(copy, "validation")
    assert (tokens.num_tokens, tokens.num_documents, len(tokens.document_lengths)) == (0, 0, 0)
    assert tokens.read_tokens(0, 0).tolist() == []


def test_missing_files_are_named_with_what_to_run(copy):
    for name in ("train/corpus/00001.docs.npy", "train/corpus/00001.npy", "tokenizer.model", "manifest.json"):
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*run: glalm prepare"):
            TokenSet(copy, "train")


def test_without_a_manifest_it_is_told_what_the_folder_is(copy, tmp_path):
    (copy / "manifest.json").unlink()
    raw = tmp_path / "raw"
    (raw / "train").mkdir(parents=True)
    (raw / "train/a.txt").touch()
    for path, message in [
        (copy, rf"run: .*--out {copy} SOURCE"),
        (tmp_path / "absent", r"run: .*absent SOURCE"),
        (raw, rf"raw is not a prepared set\. .*into another folder: .*--out SET {raw}"),
        (raw / "train/a.txt", r"a\.txt is not a prepared set\. .*"),
    ]:
        with pytest.raises(FileNotFoundError, match=rf"manifest\.json is missing\. .*{message}$"):
            read_manifest(path)
    (copy / ".plan.json").touch()
    with pytest.raises(FileNotFoundError, match=r"unfinished\. To resume, rerun the command that started it"):
        read_manifest(copy)


def test_a_file_that_is_not_what_the_manifest_says_is_named(copy, prepared):
    path = copy / "train/corpus/00001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"00001\.npy has \d+ bytes, not the manifest's.*run:"):
        TokenSet(copy, "train")
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=r"00001\.npy is damaged"):
        TokenSet(copy, "train")
    path.write_bytes(whole.replace(b"<u2", b"<i2"))
    with pytest.raises(ValueError, match=r"00001\.npy holds int16.*uint16"):
        TokenSet(copy, "train")
    path.write_bytes(whole)
    TokenSet(copy, "train")


def test_a_manifest_that_is_not_ours_is_refused(copy):
    path = copy / "manifest.json"
    text = path.read_text()
    for wrong, message in [
        (text[:-20], "damaged"),
        ("[]", "damaged"),
        (text.replace('"version": 3', '"version": 4'), r"format .*4"),
        (text.replace('"documents": ', '"documents": 1', 1), "do not add up|not the manifest's|holds"),
    ]:
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            TokenSet(copy, "train")
    with pytest.raises(ValueError, match="split='dev'"):
        TokenSet(copy, "dev")


ENTRIES = [("splits", "train"), ("splits", "test", "sources"), ("tokenizer",), ("tokenizer", "bos_id"), ("dtype",)]


@pytest.mark.parametrize("keys", ENTRIES, ids=".".join)
@pytest.mark.parametrize("wrong", ["missing", [], None, "text"], ids=str)
def test_a_manifest_without_an_entry_is_damaged(copy, keys, wrong):
    manifest = json.loads((copy / "manifest.json").read_text())
    level = manifest
    for key in keys[:-1]:
        level = level[key]
    if wrong == "missing":
        del level[keys[-1]]
    else:
        level[keys[-1]] = wrong
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFile, match=r"manifest\.json is damaged: .*run: glalm prepare"):
        TokenSet(copy, "train")


def test_a_manifest_that_lists_no_file_of_the_tokenizer_is_damaged(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"]["files"] = []
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFile, match=r"manifest\.json lists no file of the tokenizer"):
        TokenSet(copy, "train")


def test_document_starts_across_shards(prepared, documents):
    tokens = TokenSet(prepared, "train")
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    assert tokens.document_starts(0, tokens.num_tokens).tolist() == starts.tolist()
    for start, stop in [
        (0, 0),
        (1, 900),
        (starts[3], starts[3]),
        (starts[3], starts[3] + 1),
        (starts[5] + 1, starts[40]),
    ]:
        expected = [s for s in starts if start <= s < stop]
        assert tokens.document_starts(int(start), int(stop)).tolist() == expected


@pytest.mark.parametrize("name", ["train/corpus/00001.npy", "train/corpus/00001.docs.npy", "tokenizer.model"])
def test_verify_finds_one_flipped_bit(copy, name):
    TokenSet(copy, "train").verify_checksums()
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        TokenSet(copy, "train").verify_checksums()
    if name == "tokenizer.model":
        with pytest.raises(ValueError, match=r"tokenizer\.model is damaged or another file"):
            TokenSet(copy, "test")
    if name.startswith("train"):
        TokenSet(copy, "test").verify_checksums()


@pytest.mark.parametrize("name", ["00001.npy", "00001.docs.npy"])
def test_a_flipped_bit_is_found_when_its_block_is_read_and_not_before(copy, name):
    path = copy / "train/corpus" / name
    data = bytearray(path.read_bytes())
    place = len(data) - 3
    data[place] ^= 4
    path.write_bytes(data)
    tokens = TokenSet(copy, "train")
    first = len(np.load(copy / "train/corpus/00000.npy"))
    tokens.read_tokens(0, first)
    with pytest.raises(DamagedFile, match=rf"{name} is damaged between byte 0 and {len(data)}"):
        tokens.read_tokens(first, first + 500) if name == "00001.npy" else tokens.document_starts(first, first + 1)


@pytest.mark.parametrize("name", ["00000.npy", "00000.docs.npy"])
@pytest.mark.parametrize("size", [0, 200, 100_000])
def test_a_shard_that_is_cut_while_it_is_mapped_is_named(copy, name, size):
    """The kernel would kill a process that reads a mapped file beyond its end."""
    tokens = TokenSet(copy, "train")
    tokens.read_tokens(0, 100)
    tokens.document_starts(0, 100)
    os.truncate(copy / "train/corpus" / name, size)
    with pytest.raises(DamagedFile, match=rf"{name} has {size} bytes now, and had \d+ when it was opened"):
        tokens.read_tokens(0, 100) if name == "00000.npy" else tokens.document_starts(0, 100)


def test_a_shard_that_is_removed_while_it_is_mapped_stays_readable(copy):
    tokens = TokenSet(copy, "train")
    expected = TokenSet(copy, "train").read_tokens(0, 100).tolist()
    (copy / "train/corpus/00000.npy").unlink()
    assert tokens.read_tokens(0, 100).tolist() == expected


def test_blocks_are_checked_one_by_one(tmp_path):
    path = tmp_path / "array.npy"
    np.save(path, np.arange(3 * BLOCK, dtype=np.uint16))
    sums, header, end = block_sums(path), 128, 6 * BLOCK + 128
    content = np.fromfile(path, dtype=np.uint8)
    content[header + 3 * BLOCK + 5] ^= 1  # In block 3 of blocks 0 to 6.
    array = CheckedArray(path, content, header, "uint16", sums)
    border = (3 * BLOCK - header) // 2  # The first element of block 3.
    assert array.read_range(0, border).tolist() == list(np.arange(border, dtype=np.uint16))
    assert len(array.read_range(2 * BLOCK, 3 * BLOCK)) == BLOCK
    for start, stop in [(border - 1, border + 1), (border, border + 1), (0, 3 * BLOCK)]:
        with pytest.raises(DamagedFile, match=f"array.npy is damaged between byte {3 * BLOCK} and {4 * BLOCK}"):
            array.read_range(start, stop)
    assert array.read_range(border, border).tolist() == []
    with pytest.raises(DamagedFile, match="6 checksums of"):
        CheckedArray(path, content[:end], header, "uint16", sums[:-1])


def test_a_set_may_lie_in_a_folder_whose_name_is_not_utf8(token_folder, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es"))
    shutil.copytree(token_folder, folder)
    expected = TokenSet(token_folder, "train")
    found = TokenSet(folder, "train")
    np.testing.assert_array_equal(found.read_tokens(0, 1000), expected.read_tokens(0, 1000))
