import hashlib
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from glalm.data import prepare as prepare_module
from glalm.data.prepare import prepare, split_of
from glalm.data.shards import SPLITS, TokenSet
from glalm.data.sources import stdlib
from glalm.data.tokenizer import Tokenizer, train_sentencepiece

SMALL = {"vocab_size": 400, "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_stream_is_the_documents_framed(prepared, texts):
    tokenizer = Tokenizer(prepared / "tokenizer.model")
    for split in SPLITS:
        expected = [[1, *tokenizer.encode(t), 2] for t in texts if split_of(t) == split]
        files = sorted(p for p in (prepared / split).glob("*.npy") if not p.name.endswith(".docs.npy"))
        stream = np.concatenate([np.load(f) for f in files])
        assert stream.dtype == np.uint16
        assert stream.tolist() == list(chain.from_iterable(expected))


def test_shards_hold_whole_documents_within_the_limit(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > 3
    for i, shard in enumerate(shards):
        tokens = np.load(prepared / f"train/{i:05d}.npy")
        borders = np.load(prepared / f"train/{i:05d}.docs.npy")
        assert borders.dtype == np.int64
        assert (borders[0], borders[-1], len(borders) - 1) == (0, len(tokens), shard["documents"])
        assert (tokens[borders[:-1]] == 1).all() and (tokens[borders[1:] - 1] == 2).all()
        assert len(tokens) <= 1000 or len(borders) == 2
        assert shard["tokens"] == len(tokens)


def test_manifest_tells_what_is_there(prepared, texts, corpus):
    manifest = json.loads((prepared / "manifest.json").read_text())
    files = {"manifest.json", "tokenizer.model"}
    for split in SPLITS:
        entry = manifest["splits"][split]
        mine = [t for t in texts if split_of(t) == split]
        assert entry["documents"] == len(mine)
        assert entry["text_bytes"] == sum(len(t.encode()) for t in mine)
        for shard in entry["shards"]:
            for file in shard["files"].values():
                data = (prepared / file["file"]).read_bytes()
                assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
                files.add(file["file"])
    assert set(contents(prepared)) == files  # nothing else is left, no temporary file either
    assert manifest["tokenizer"]["sha256"] == Tokenizer(prepared / "tokenizer.model").fingerprint
    assert manifest["sources"][0]["name"] == str(corpus)


def test_split_is_by_text_and_of_the_share_asked_for():
    documents = [f"document {i}" for i in range(4000)]
    splits = [split_of(d, {"validation": 0.1, "test": 0.3}) for d in documents]
    assert abs(splits.count("validation") - 400) < 80 and abs(splits.count("test") - 1200) < 120
    assert split_of("some document") == split_of("some document")
    assert {split_of(d, {}) for d in documents} == {"train"}
    # These may never move, or the test documents of older sets become training data.
    assert [split_of(f"document {i}") for i in (0, 1, 21, 30, 59)] == [
        "validation",
        "train",
        "test",
        "validation",
        "test",
    ]


def test_the_tokenizer_never_sees_held_out_text(prepared, texts, tmp_path):
    train = [t for t in texts if split_of(t) == "train"]
    expected = train_sentencepiece(train, tmp_path / "t.model", vocab_size=400)
    assert Tokenizer(prepared / "tokenizer.model").fingerprint == expected.fingerprint


def test_the_same_call_again_changes_nothing(corpus, tmp_path, monkeypatch):
    first = prepare([corpus], tmp_path / "a", **SMALL)
    before = contents(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_write", None)  # it would fail if it tokenised again
        assert prepare([corpus], tmp_path / "a", **SMALL) == first
        moved = tmp_path / "moved" / corpus.name
        moved.parent.mkdir()
        moved.write_bytes(corpus.read_bytes())
        assert prepare([moved], tmp_path / "a", **SMALL) == first
    assert contents(tmp_path / "a") == before
    prepare([corpus], tmp_path / "b", **SMALL)
    assert contents(tmp_path / "b") == before


def test_another_set_is_replaced_only_when_told(corpus, tmp_path):
    prepare([corpus], tmp_path / "set", shard_tokens=1000, **SMALL)
    for change in ({"shard_tokens": 2000}, {"vocab_size": 410}, {"held_out": {"test": 0.2}}):
        with pytest.raises(ValueError, match=r"prepared otherwise \(different .*choose another folder"):
            prepare([corpus], tmp_path / "set", **{"shard_tokens": 1000, **SMALL, **change})
    corpus_2 = tmp_path / "corpus.jsonl"
    corpus_2.write_bytes(corpus.read_bytes().replace(b"import", b"IMPORT", 1))
    with pytest.raises(ValueError, match="different sources"):
        prepare([corpus_2], tmp_path / "set", shard_tokens=1000, **SMALL)
    prepare([corpus_2], tmp_path / "set", overwrite=True, **SMALL)
    prepare([corpus_2], tmp_path / "fresh", **SMALL)
    left = contents(tmp_path / "set"), contents(tmp_path / "fresh")
    assert left[0] == left[1]  # of the old set's many shards none is left


def test_an_interrupted_preparation_is_not_a_set_and_begins_anew(corpus, prepared, tmp_path):
    out = tmp_path / "set"
    lines = corpus.read_text().splitlines(keepends=True)
    broken = tmp_path / "texts.jsonl"
    broken.write_text("".join(lines[:50]) + "{\n")
    given = {"tokenizer": prepared / "tokenizer.model", "shard_tokens": 1000, "progress": False}
    with pytest.raises(ValueError, match=r"texts\.jsonl:51"):
        prepare([broken], out, **given)
    assert (out / "train/00000.npy").exists() and list(out.rglob(".*.tmp"))
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
        TokenSet(out, "train")
    broken.write_text("".join(lines))
    prepare([broken], out, **given)
    prepare([broken], tmp_path / "fresh", **given)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_damaged_set_is_not_taken_for_done_and_is_repaired_by_overwriting(corpus, tmp_path):
    prepare([corpus], tmp_path / "set", **SMALL)
    before = contents(tmp_path / "set")
    shard = tmp_path / "set/test/00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"test/00000\.npy.*--overwrite"):
        prepare([corpus], tmp_path / "set", **SMALL)
    prepare([corpus], tmp_path / "set", overwrite=True, **SMALL)
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize("name", ["notes.txt", "train/photo.npy", "model/00000.npy"])
def test_a_folder_with_other_files_is_left_alone(corpus, tmp_path, name):
    mine = tmp_path / "set" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    (tmp_path / "set/train").mkdir(exist_ok=True)
    (tmp_path / "set/train/00000.npy").write_text("precious too")
    before = contents(tmp_path / "set")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not part of a prepared set"):
            prepare([corpus], tmp_path / "set", overwrite=overwrite, **SMALL)
    assert contents(tmp_path / "set") == before


def test_a_given_tokenizer_is_used_even_from_the_set_it_replaces(corpus, prepared, tmp_path):
    given = prepared / "tokenizer.model"
    prepare([corpus], tmp_path / "set", tokenizer=given, progress=False)
    prepare([corpus], tmp_path / "set", tokenizer=tmp_path / "set/tokenizer.model", overwrite=True, progress=False)
    assert (tmp_path / "set/tokenizer.model").read_bytes() == given.read_bytes()


def test_a_large_vocabulary_takes_uint32(corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [70_000, len(text)])
    monkeypatch.setattr("sentencepiece.SentencePieceProcessor.get_piece_size", lambda self: 2**16 + 5000)
    prepare([corpus], tmp_path / "set", tokenizer=prepared / "tokenizer.model", progress=False)
    tokens = TokenSet(tmp_path / "set", "train").document(0)
    assert tokens.dtype == np.uint32 and tokens[1] == 70_000


def test_empty_documents_are_counted_not_written(tmp_path, prepared):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n{"text": ""}\n')
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    manifest = prepare([tmp_path / "a.jsonl"], tmp_path / "set", **given)
    assert (manifest["empty_documents"], manifest["splits"]["train"]["documents"]) == (2, 1)
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="all documents are empty"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "other", **given)


def test_arguments_are_checked_before_anything_is_written(corpus, tmp_path):
    for wrong, message in [
        ({"held_out": {"valid": 0.1}}, "unknown split 'valid'"),
        ({"held_out": {"test": 0.6, "validation": 0.4}}, "leave some for training"),
        ({"held_out": {"test": -0.1}}, "must be 0 or more"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare([corpus], tmp_path / "set", **wrong)
    with pytest.raises(ValueError, match="sources is empty"):
        prepare([], tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_command_line(tmp_path):
    root = Path(__file__).parents[2]
    library = stdlib()
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in [f for f in library.files if f.startswith("json/")] + ["argparse.py", "ast.py", "typing.py"]:
        (mine / file.replace("/", "_")).write_text(next(library.read(file)).text, encoding="utf-8")
    script = [sys.executable, str(root / "scripts/prepare_data.py"), "--out", str(tmp_path / "set")]
    arguments = [str(mine), "--vocab-size", "500", "--test", "0.4"]
    done = subprocess.run(script + arguments, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for split in SPLITS:
        tokens = TokenSet(tmp_path / "set", split)
        row = next(line.split() for line in done.stdout.splitlines() if line.startswith(split))
        longest = max(tokens.document_lengths, default=0)
        assert row[1:3] + row[4:] == [f"{n:,}" for n in (tokens.num_documents, tokens.num_tokens, longest)]
    wrong = subprocess.run([*script, str(mine), "--vocab-size", "501"], capture_output=True, text=True, cwd=root)
    assert wrong.returncode == 1 and "--overwrite" in wrong.stderr and "Traceback" not in wrong.stderr
