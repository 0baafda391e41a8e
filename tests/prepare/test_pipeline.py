import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from folder_contents import read_contents
from hypothesis import given
from hypothesis import strategies as st

from glalm.data.shards import SPLITS, TokenSet, read_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.prepare import input_files, pipeline, units
from glalm.prepare.encode import split_of
from glalm.prepare.inspection import inspect_set
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.sources import find_stdlib
from glalm.prepare.tokenizer_training import train_sentencepiece
from glalm.prepare.writer import folder_name

SMALL = {"vocab_size": 400, "progress": False}


def test_the_stream_is_the_documents_with_bos_and_eos(prepared, texts):
    tokenizer = Tokenizer(prepared / "tokenizer.model")
    for split in SPLITS:
        expected = [[1, *tokenizer.encode(t), 2] for t in texts if split_of(t) == split]
        files = sorted(p for p in (prepared / split).glob("*/*.npy") if not p.name.endswith(".docs.npy"))
        stream = np.concatenate([np.load(f) for f in files])
        assert stream.dtype == np.uint16
        assert stream.tolist() == list(chain.from_iterable(expected))


def test_shards_hold_whole_documents_within_the_limit(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    shards = manifest["splits"]["train"]["sources"]["corpus"]["shards"]
    assert len(shards) > 3
    for i, shard in enumerate(shards):
        tokens = np.load(prepared / f"train/corpus/{i:05d}.npy")
        borders = np.load(prepared / f"train/corpus/{i:05d}.docs.npy")
        assert borders.dtype == np.int64
        assert (borders[0], borders[-1], len(borders) - 1) == (0, len(tokens), shard["documents"])
        assert (tokens[borders[:-1]] == 1).all() and (tokens[borders[1:] - 1] == 2).all()
        assert len(tokens) <= 1000 or len(borders) == 2
        assert shard["tokens"] == len(tokens)


def test_the_manifest_describes_all_files(prepared, texts, corpus):
    manifest = json.loads((prepared / "manifest.json").read_text())
    files = {"manifest.json", "tokenizer.model", "inputs.jsonl", "skipped.jsonl"}
    for split in SPLITS:
        entry = manifest["splits"][split]
        mine = [t for t in texts if split_of(t) == split]
        assert entry["documents"] == len(mine)
        assert entry["text_bytes"] == sum(len(t.encode()) for t in mine)
        for shard in entry["sources"]["corpus"]["shards"]:
            for file in shard["files"].values():
                data = (prepared / file["file"]).read_bytes()
                assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
                files.add(file["file"])
    assert set(read_contents(prepared)) == files  # No other file is left, not even a temporary one.
    assert manifest["tokenizer"]["fingerprint"] == Tokenizer(prepared / "tokenizer.model").fingerprint
    assert (manifest["complete"], manifest["books"]) == (True, {"corpus": {"read": 60, "written": 60, "skipped": {}}})
    assert [json.loads(line) for line in (prepared / "inputs.jsonl").read_text().splitlines()] == [
        {
            "source": "corpus",
            "name": "texts.jsonl",
            "bytes": corpus.stat().st_size,
            "mtime_ns": corpus.stat().st_mtime_ns,
            "sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
            "read": 60,
            "written": 60,
        }
    ]
    for split in SPLITS:
        tokens = TokenSet(prepared, split).num_tokens
        assert manifest["splits"][split]["left_over"]["256"] == ((tokens - 1) % 256 if tokens > 256 else tokens)


def test_split_is_by_text_and_of_the_share_asked_for():
    documents = [f"document {i}" for i in range(4000)]
    splits = [split_of(d, {"validation": 0.1, "test": 0.3}) for d in documents]
    assert abs(splits.count("validation") - 400) < 80 and abs(splits.count("test") - 1200) < 120
    assert split_of("some document") == split_of("some document")
    assert {split_of(d, {}) for d in documents} == {"train"}
    # These must never change, or test documents of older sets become training data.
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
    first = prepare_data([corpus], tmp_path / "a", **SMALL)
    before = read_contents(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_plan", None)  # To tokenise again would fail.
        assert prepare_data([corpus], tmp_path / "a", **SMALL) == first
        moved = tmp_path / "moved" / "corpus" / corpus.name
        moved.parent.mkdir(parents=True)
        moved.write_bytes(corpus.read_bytes())
        assert prepare_data([moved], tmp_path / "a", **SMALL) == first
    assert read_contents(tmp_path / "a") == before
    prepare_data([corpus], tmp_path / "b", **SMALL)
    assert read_contents(tmp_path / "b") == before


def test_a_set_in_the_folder_of_its_source_does_not_read_itself(corpus, tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(corpus.read_bytes())
    first = prepare_data([tmp_path], tmp_path / "set", **SMALL)
    assert prepare_data([tmp_path], tmp_path / "set", **SMALL) == first
    assert prepare_data([tmp_path], tmp_path / "set", add=True, progress=False) == first


def test_another_set_is_replaced_only_with_overwrite(corpus, tmp_path):
    prepare_data([corpus], tmp_path / "set", shard_tokens=1000, **SMALL)
    for name, change in (
        ("--shard-tokens", {"shard_tokens": 2000}),
        ("--vocab-size", {"vocab_size": 410}),
        ("--validation or --test", {"held_out": {"test": 0.2}}),
    ):
        with pytest.raises(ValueError, match=rf"prepared otherwise \(different {name}\)\. Choose another folder"):
            prepare_data([corpus], tmp_path / "set", **{"shard_tokens": 1000, **SMALL, **change})
    corpus_2 = tmp_path / "corpus" / "texts.jsonl"
    corpus_2.parent.mkdir()
    corpus_2.write_bytes(corpus.read_bytes().replace(b"import", b"IMPORT", 1))
    with pytest.raises(ValueError, match=r"differs from what .* has as 'texts\.jsonl' of the source 'corpus'"):
        prepare_data([corpus_2], tmp_path / "set", shard_tokens=1000, **SMALL)
    prepare_data([corpus_2], tmp_path / "set", overwrite=True, **SMALL)
    prepare_data([corpus_2], tmp_path / "fresh", **SMALL)
    left = read_contents(tmp_path / "set"), read_contents(tmp_path / "fresh")
    assert left[0] == left[1]  # None of the old set's many shards is left.


def test_a_damaged_set_is_refused_and_repaired_by_overwriting(corpus, tmp_path):
    prepare_data([corpus], tmp_path / "set", **SMALL)
    before = read_contents(tmp_path / "set")
    shard = tmp_path / "set/test/corpus/00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"test/corpus/00000\.npy.*--overwrite"):
        prepare_data([corpus], tmp_path / "set", **SMALL)
    prepare_data([corpus], tmp_path / "set", overwrite=True, **SMALL)
    assert read_contents(tmp_path / "set") == before


@pytest.mark.parametrize("name", ["notes.txt", "train/photo.npy", "model/00000.npy"])
def test_a_folder_with_other_files_is_not_touched(corpus, tmp_path, name):
    mine = tmp_path / "set" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    (tmp_path / "set/train").mkdir(exist_ok=True)
    (tmp_path / "set/train/00000.npy").write_text("precious too")
    before = read_contents(tmp_path / "set")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not part of a prepared set"):
            prepare_data([corpus], tmp_path / "set", overwrite=overwrite, **SMALL)
    assert read_contents(tmp_path / "set") == before


def test_a_given_tokenizer_is_used_even_from_the_set_it_replaces(corpus, prepared, tmp_path):
    given = prepared / "tokenizer.model"
    prepare_data([corpus], tmp_path / "set", tokenizer=given, progress=False)
    prepare_data([corpus], tmp_path / "set", tokenizer=tmp_path / "set/tokenizer.model", overwrite=True, progress=False)
    assert (tmp_path / "set/tokenizer.model").read_bytes() == given.read_bytes()


def test_a_large_vocabulary_takes_uint32(corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode_array", lambda self, text: np.array([70_000, len(text)]))
    opened = Tokenizer.__init__
    with_size = lambda self, *args: opened(self, *args) or setattr(self, "vocab_size", 70_001)  # noqa: E731
    monkeypatch.setattr(Tokenizer, "__init__", with_size)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [])
    prepare_data([corpus], tmp_path / "set", tokenizer=prepared / "tokenizer.model", progress=False)
    tokens = TokenSet(tmp_path / "set", "train").read_document(0)
    assert tokens.dtype == np.uint32 and tokens[1] == 70_000


def test_empty_documents_are_counted_not_written(tmp_path, prepared):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n{"text": ""}\n')
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    manifest = prepare_data([tmp_path / "a.jsonl"], tmp_path / "set", **given)
    counts = {"read": 3, "written": 1, "skipped": {"empty": 2}}
    assert (list(manifest["books"].values()), manifest["splits"]["train"]["documents"]) == ([counts], 1)
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="all documents are empty"):
        prepare_data([tmp_path / "a.jsonl"], tmp_path / "other", **given)


def test_file_names_that_are_not_unicode_are_logged(tmp_path, prepared):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"\\ud800": "x"}\n{"text": "y"}\n')
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "on_error": "skip", "progress": False}
    for _ in range(2):  # The second call recognises the file.
        prepare_data([tmp_path / "in"], tmp_path / "set", **given)
    for log in ("inputs.jsonl", "skipped.jsonl"):
        [line] = (tmp_path / "set" / log).read_text().splitlines()
        assert json.loads(line)["name"] == os.fsdecode(b"caf\xe9.jsonl")
    assert "\ud800" in json.loads(line)["detail"]


def test_the_maximum_of_sources_under_a_usual_limit_of_open_files(tmp_path, prepared):
    lines = [json.dumps({"text": f"{i} {j}", "of": f"language {i}"}) + "\n" for i in range(256) for j in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    given = {"tokenizer": str(prepared / "tokenizer.model"), "source_field": "of", "progress": False}
    shares = {"held_out": {"validation": 0.3, "test": 0.3}}
    script = (
        "import resource\nfrom glalm.prepare.pipeline import prepare_data\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        f"prepare_data([{str(tmp_path / 'a.jsonl')!r}], {str(tmp_path / 'set')!r}, **{given | shares!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    assert len(TokenSet(tmp_path / "set", "train").source_tokens) == 256


def test_arguments_are_checked_before_anything_is_written(corpus, tmp_path):
    for wrong, message in [
        ({"held_out": {"valid": 0.1}}, "unknown split 'valid'"),
        ({"held_out": {"test": 0.6, "validation": 0.4}}, "leaves no documents for training"),
        ({"held_out": {"test": -0.1}}, "must be 0 or more"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare_data([corpus], tmp_path / "set", **wrong)
    with pytest.raises(ValueError, match="There are no sources"):
        prepare_data([], tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_command_line(tmp_path):
    root = Path(__file__).parents[2]
    library = find_stdlib()
    mine = tmp_path / "mine"
    mine.mkdir()
    names = [i.name for i in library.inputs]
    library_root = Path(sysconfig.get_path("stdlib"))
    for file in [f for f in names if f.startswith("json/")] + ["argparse.py", "ast.py", "typing.py"]:
        (mine / file.replace("/", "_")).write_bytes((library_root / file).read_bytes())
    script = [sys.executable, str(root / "scripts/prepare_data.py"), "--out", str(tmp_path / "set")]
    arguments = [str(mine), "--vocab-size", "500", "--test", "0.4"]
    done = subprocess.run(script + arguments, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for split in SPLITS:
        tokens = TokenSet(tmp_path / "set", split)
        row = next(line.split() for line in done.stdout.splitlines() if line.startswith(split))
        assert row[1:3] == [f"{n:,}" for n in (tokens.num_documents, tokens.num_tokens)]
    wrong = subprocess.run([*script, str(mine), "--vocab-size", "501"], capture_output=True, text=True, cwd=root)
    assert wrong.returncode == 1 and "--overwrite" in wrong.stderr and "Traceback" not in wrong.stderr


def test_adding_keeps_existing_shards(corpus, prepared, tmp_path):
    out = shutil.copytree(prepared, tmp_path / "set")
    before, old = read_contents(out), read_manifest(out)
    (tmp_path / "more").mkdir()
    for i in range(20):
        (tmp_path / "more" / f"{i}.txt").write_text(f"if more: return {i} " * 30)
    (tmp_path / "more" / "copy.jsonl").write_bytes(corpus.read_bytes())
    with pytest.raises(ValueError, match=r"different sources.*--add"):
        prepare_data([corpus, tmp_path / "more"], out, vocab_size=400, shard_tokens=1000, progress=False)
    manifest = prepare_data([corpus, tmp_path / "more"], out, add=True, progress=False)
    after = read_contents(out)
    assert {k: after[k] for k in before if "npy" in k} == {k: v for k, v in before.items() if "npy" in k}
    assert manifest["books"]["more"] == {
        "read": 20,
        "written": 20,
        "skipped": {},
    }  # The copy of a file that is in the set is not added.
    assert manifest["books"]["corpus"] == old["books"]["corpus"]
    assert (manifest["fingerprint"], manifest["complete"]) == (old["fingerprint"], True)
    added = TokenSet(out, "train")
    assert list(added.source_tokens) == ["corpus", "more"]
    assert added.source_tokens["corpus"] == TokenSet(prepared, "train").num_tokens
    for again in ([corpus], [tmp_path / "more"], [corpus, tmp_path / "more"]):
        prepare_data(again, out, add=True, progress=False)
        prepare_data(again, out, vocab_size=400, shard_tokens=1000, progress=False)  # Everything is in the set.
    assert read_contents(out) == after
    pinned = TokenSet(out, "train", old)  # A run that began earlier reads this.
    assert (
        pinned.read_tokens(0, pinned.num_tokens).tolist()
        == TokenSet(prepared, "train").read_tokens(0, pinned.num_tokens).tolist()
    )
    prepare_data([corpus], out, vocab_size=410, shard_tokens=1000, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="has changed since the run began"):
        TokenSet(out, "train", old)


def test_a_file_that_was_changed_is_refused_whenever_that_was(texts, prepared, tmp_path):
    """The changed file has the same size, and is older than the set. A file that was only touched is accepted, and new
    content is accepted under another name."""
    source, out = tmp_path / "in", tmp_path / "set"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.txt").write_text(texts[i])
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    prepare_data([source], out, **given)
    begun = (source / "0.txt").stat().st_mtime_ns
    (source / "0.txt").write_text(texts[0].swapcase())
    for name in ("0.txt", "1.txt"):
        os.utime(source / name, ns=(begun - 1, begun - 1))
    before = read_contents(out)
    for add in (False, True):
        with pytest.raises(ValueError, match=r"0\.txt differs from what .*set has as '0\.txt' of the source 'in'\. "):
            prepare_data([source], out, **given, add=add)
    assert read_contents(out) == before
    for _ in range(2):
        manifest = prepare_data([f"later={source}"], out, add=True, progress=False)
        assert [manifest["books"][name]["written"] for name in ("in", "later")] == [3, 1]


def test_a_file_that_has_grown_is_not_added(texts, prepared, tmp_path):
    """To add it would repeat its documents."""
    path, out = tmp_path / "in.jsonl", tmp_path / "set"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:50]))
    given = {"tokenizer": prepared / "tokenizer.model", "progress": False}
    before = prepare_data([path], out, **given)
    with path.open("a") as file:
        file.write(json.dumps({"text": texts[50]}) + "\n")
    with pytest.raises(ValueError, match=r"in\.jsonl differs from what .*--overwrite.*NAME=PATH"):
        prepare_data([path], out, add=True, progress=False)
    assert read_manifest(out) == before
    assert prepare_data([path], out, overwrite=True, **given)["books"][tmp_path.name]["written"] == 51


def test_a_set_without_the_times_of_its_inputs_knows_them(corpus, prepared, tmp_path):
    out = shutil.copytree(prepared, tmp_path / "set")
    [row] = map(json.loads, (out / "inputs.jsonl").read_text().splitlines())
    del row["mtime_ns"]
    (out / "inputs.jsonl").write_text(json.dumps(row) + "\n")
    before = read_contents(out)
    prepare_data([corpus], out, add=True, progress=False)
    assert read_contents(out) == before


def test_a_set_that_is_not_complete_can_be_read_so_far(texts, prepared, tmp_path):
    """Preparation stops at a bad line. The shards before it are readable, and do not change later."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 5) + "{\n")
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "shard_tokens": 1000, "progress": False}
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match=r"a\.jsonl:301: not JSON.*--on-error skip"),
    ):
        patch.setattr(input_files, "BATCH_BYTES", 10_000)
        prepare_data([path], tmp_path / "set", commit_seconds=0, **given)
    early = TokenSet(tmp_path / "set", "train")
    assert not early.is_complete and early.num_documents > 100
    stream = early.read_tokens(0, early.num_tokens).tolist()
    manifest = prepare_data([path], tmp_path / "set", on_error="skip", **given)
    assert list(manifest["books"].values()) == [{"read": 301, "written": 300, "skipped": {"not JSON": 1}}]
    whole = TokenSet(tmp_path / "set", "train")
    assert whole.is_complete and whole.read_tokens(0, early.num_tokens).tolist() == stream
    assert TokenSet(tmp_path / "set", "train", early.manifest).num_tokens == early.num_tokens


def test_a_set_of_an_older_format_is_prepared_again_with_a_message(corpus, tmp_path, capsys):
    out = tmp_path / "set"
    (out / "train").mkdir(parents=True)
    (out / "train/00000.npy").write_bytes(b"old")
    (out / "manifest.json").write_text('{"format": "glalm-tokens", "version": 1}')
    with pytest.raises(ValueError, match="has format"):
        prepare_data([corpus], out, vocab_size=400, add=True)
    assert (out / "train/00000.npy").exists()
    prepare_data([corpus], out, vocab_size=400)
    assert "has a set of format 1; it is prepared again in the current format, 3." in capsys.readouterr().err
    assert TokenSet(out, "train").is_complete and not (out / "train/00000.npy").exists()


def test_a_file_that_appeared_during_preparation_is_reported(texts, prepared, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n{\n")
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="not JSON"):
        patch.setattr(input_files, "BATCH_BYTES", 1)  # The first document is written.
        prepare_data([tmp_path / "in"], tmp_path / "set", **given)
    (tmp_path / "in/b.jsonl").write_text(json.dumps({"text": texts[1]}) + "\n")
    assert prepare_data([tmp_path / "in"], tmp_path / "set", on_error="skip", **given)["books"]["in"]["written"] == 1
    assert "1 inputs are not in" in capsys.readouterr().err
    assert prepare_data([tmp_path / "in"], tmp_path / "set", add=True)["books"]["in"]["written"] == 2
    assert "are not in" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_every_kind_of_source_gives_the_same_set(texts, prepared, tmp_path, kind):
    rows = [{"body": {"text": t}, "from": "ab"[i % 2]} for i, t in enumerate(texts)]
    folder = tmp_path / "source"
    folder.mkdir()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    else:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"source=hf:{folder}" if kind == "hub" else folder
    given = {"tokenizer": prepared / "tokenizer.model", "text_field": "body.text", "source_field": "from"}
    prepare_data([spec], tmp_path / "set", progress=False, **given)
    for split in SPLITS:
        tokens, tokenizer = TokenSet(tmp_path / "set", split), Tokenizer(prepared / "tokenizer.model")
        mine = [t for name in (0, 1) for t in texts[name::2] if split_of(t) == split]
        assert [tokenizer.decode(tokens.read_document(i)) for i in range(tokens.num_documents)] == mine


def test_a_wrong_column_name_is_refused_even_with_skip(texts, prepared, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "x", "id": 1}]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    given = {"tokenizer": prepared / "tokenizer.model", "on_error": "skip", "progress": False}
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'\. It has body, id"):
        prepare_data([tmp_path / "a.parquet"], tmp_path / "set", **given)
    with pytest.raises(ValueError, match=r"all documents are empty or skipped.*no field text"):
        prepare_data([tmp_path / "a.jsonl"], tmp_path / "other", **given)


def test_a_wrong_field_is_named_before_a_tokenizer_is_trained(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"body": "x"}\n' * 3)
    for on_error in ("stop", "skip"):
        with pytest.raises(ValueError, match=r"to train a tokenizer on.*a\.jsonl:2: no field 'text', only body"):
            prepare_data([tmp_path / "a.jsonl"], tmp_path / "set", on_error=on_error, **SMALL)


def test_inputs_with_the_same_name_are_refused(texts, prepared, tmp_path):
    """Otherwise the first of two folders named train/ would be skipped, and the second one read twice."""
    folders = [tmp_path / "books/train", tmp_path / "code/train"]
    for folder, text in zip(folders, texts, strict=False):
        folder.mkdir(parents=True)
        (folder / "0.txt").write_text(text)
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    for sources in (folders, [folders[0], folders[0] / "0.txt"]):
        with pytest.raises(ValueError, match=r"books/train/0\.txt and .* would both be '0\.txt' of the source 'train'"):
            prepare_data(sources, tmp_path / "set", **given)
    manifest = prepare_data([f"books={folders[0]}", f"code={folders[1]}"], tmp_path / "set", **given)
    assert {name: book["written"] for name, book in manifest["books"].items()} == {"books": 1, "code": 1}


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_refused_command_leaves_the_old_set_unchanged(corpus, prepared, tmp_path, on_error):
    out, before = shutil.copytree(prepared, tmp_path / "set"), read_contents(prepared)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "zero.parquet")
    (tmp_path / "a.jsonl.gz").write_text('{"text": "not packed"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    given = {"tokenizer": prepared / "tokenizer.model"}
    for sources, options, message in [
        ([corpus, tmp_path / "a.parquet"], given, "has no column 'text'. It has body"),
        ([corpus], {"vocab_size": 10**6}, "--vocab-size 1000000 does not fit"),
        ([corpus], given | {"text_field": "body"}, r"texts\.jsonl:1: no field 'body'"),
        ([tmp_path / "b.jsonl"], {"source_field": "from", "text_field": "body"}, "no field 'from'"),
        ([tmp_path / "a.jsonl.gz"], given, "damaged"),
        ([tmp_path / "zero.parquet"], given, "all documents are empty or skipped"),
        ([corpus], given | {"add": True}, "exclude each other"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare_data(sources, out, overwrite=True, on_error=on_error, progress=False, **options)
        assert read_contents(out) == before


def test_a_table_without_rows_is_reported(prepared, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "zero.parquet")
    with pytest.raises(ValueError, match=r"skipped \(zero: 0 documents read = 0 written\)\.$"):
        given = {"tokenizer": prepared / "tokenizer.model", "progress": False}
        prepare_data([f"zero={tmp_path / 'zero.parquet'}"], tmp_path / "set", **given)


def test_an_unsuitable_output_folder_is_refused(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file\. Name a folder .* --out"):
        prepare_data([corpus], tmp_path / "file", **SMALL)
    with pytest.raises(ValueError, match=r"All sources lie in .*corpus, the folder of the set"):
        prepare_data([corpus], corpus.parent, **SMALL)


def test_skipped_files_are_counted_by_suffix(corpus, prepared, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "B.TXT", "c.csv", "d.CSV", "README", ".hidden"):
        (tmp_path / "in" / name).write_text(f"text of {name}")
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}}
    for _ in range(2):  # At the second call, the files of the set lie in the folder.
        manifest = prepare_data([tmp_path / "in"], tmp_path / "in/set", **given)
        assert manifest["books"]["in"]["written"] == 2
        assert ": 2 .csv, 1 no suffix\n" in capsys.readouterr().err
    prepare_data([corpus], tmp_path / "other", **given)
    assert "Skipped" not in capsys.readouterr().err


def test_there_must_be_a_set_to_add_to(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"typo has no set to add to"):
        prepare_data([corpus], tmp_path / "typo", add=True, **SMALL)


def test_a_hugging_face_tokenizer_goes_with_the_set(corpus, tmp_path, hugging_face):
    manifest = prepare_data([corpus], tmp_path / "set", tokenizer=hugging_face, progress=False)
    tokens = TokenSet(tmp_path / "set", "train")
    opened = Tokenizer(tokens.tokenizer_path)
    assert opened.fingerprint == manifest["tokenizer"]["fingerprint"] == Tokenizer(hugging_face).fingerprint
    tokens.verify_checksums()
    prepare_data([corpus], tmp_path / "set", tokenizer=hugging_face, progress=False)  # It recognises its own tokenizer.
    with pytest.raises(ValueError, match="different --tokenizer"):
        prepare_data([corpus], tmp_path / "set", vocab_size=400, progress=False)


def test_any_names_of_sources_have_folders_of_their_own(prepared, tmp_path):
    names = [
        ".",
        "..",
        "x" * 300,
        "x" * 301,
        "漢" * 90,
        "a/b",
        "a_b",
        "a b",
        "a\\b",
        "\0",
        "\n",
        "",
        "~",
        "-",
        "é",
        "e\u0301",
    ]
    names += [folder_name("a/b"), ".hidden", "[red]", "CON"]
    rows = [{"text": f"text {i}", "s": name} for i, name in enumerate(names)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "source_field": "s", "progress": False}
    manifest = prepare_data([f"in={tmp_path / 'in.jsonl'}"], tmp_path / "set", **given)
    sources = manifest["splits"]["train"]["sources"]
    assert set(sources) == {name or "in" for name in names}
    assert [entry["documents"] for entry in sources.values()] == [1] * len(names)
    tokens = TokenSet(tmp_path / "set", "train")
    assert sorted(tokens.source_tokens) == sorted(sources) and tokens.num_documents == len(names)
    assert inspect_set(tmp_path / "set") == 0


@given(st.lists(st.text(max_size=300), unique=True, max_size=20))
def test_names_of_folders_are_valid_and_different(sources):
    folders = [folder_name(source) for source in sources if source]
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert len(folder.encode()) <= 200 and not folder.startswith(".") and not set(folder) & set("/\0\n\\")


@pytest.mark.parametrize("share", [math.nan, -0.1, 1.0, math.inf])
def test_shares_that_cannot_be_are_named(texts, tmp_path, share):
    with pytest.raises(
        ValueError, match=rf"^--validation {share:g} --test 0.1.*(shares must be 0 or more|leaves no documents)"
    ):
        prepare_data(["stdlib"], tmp_path / "set", held_out={"validation": share, "test": 0.1}, progress=False)


def test_an_interrupted_preparation_of_linked_files_resumes(texts, prepared, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / f"in/{number}.txt").write_text(text)
        (tmp_path / f"in/{number}-link.txt").symlink_to(f"{number}.txt")
    given = {"tokenizer": prepared / "tokenizer.model", "held_out": {}}
    manifest = prepare_data([tmp_path / "in"], tmp_path / "set", **given)
    assert manifest["books"]["in"]["written"] == len(texts)
    assert f"Skipped {len(texts):,} other names of files" in capsys.readouterr().err
    again = prepare_data([tmp_path / "in"], tmp_path / "set", **given)
    assert again == manifest


@pytest.mark.parametrize("place", ["encode_batch", "read_file"])
def test_a_document_too_large_for_the_memory_is_named(prepared, tmp_path, monkeypatch, place):
    (tmp_path / "a.txt").write_text("river")

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(units if place == "encode_batch" else input_files, place, fail)
    with pytest.raises(ValueError, match=r"a\.txt: memory ran out\. .*If several processes run, .*--workers"):
        given = {"tokenizer": prepared / "tokenizer.model", "progress": False}
        prepare_data([tmp_path / "a.txt"], tmp_path / "set", **given)
