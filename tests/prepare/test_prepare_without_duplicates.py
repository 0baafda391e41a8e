"""A set that is prepared with a list of duplicates is the set of the other documents, and counts all of them."""

import json
import os
from pathlib import Path

import pytest
from folder_contents import read_contents

from glalm.commands.prepare_data import prepare_or_inspect
from glalm.data import files
from glalm.data.shards import SPLITS
from glalm.prepare import input_files, pipeline, units, writer
from glalm.prepare.deduplication import deduplicate
from glalm.prepare.pipeline import prepare_data

pytest.importorskip("datasketch")

QUIET = {"workers": 1, "progress": False}


@pytest.fixture(scope="module")
def sources(texts, tmp_path_factory):
    """A JSON Lines file with copies, near-duplicates and blank lines, and two text files, one of them a copy."""
    folder = tmp_path_factory.mktemp("sources") / "mixed"
    folder.mkdir()
    lines = []
    for i, text in enumerate(texts):
        lines.append(json.dumps({"text": text}))
        lines += ["", ""] if i % 4 == 0 else []
        lines += [json.dumps({"text": texts[i // 2]})] if i % 3 == 0 else []
        lines += [json.dumps({"text": f"{texts[i // 2]} and more"})] if i % 3 == 1 else []
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "b.txt").write_text(texts[5])
    (folder / "c.txt").write_text("this is another text")
    return folder


@pytest.fixture(scope="module")
def listed(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("listed") / "duplicates"
    deduplicate([sources], out, **QUIET)
    return out


@pytest.fixture(scope="module")
def settings(prepared):
    return {"tokenizer": prepared / "tokenizer.model", "shard_tokens": 1000, **QUIET}


@pytest.fixture(scope="module")
def expected(sources, listed, settings, tmp_path_factory):
    """The set of the documents that are not listed."""
    folder = tmp_path_factory.mktemp("kept") / "mixed"
    folder.mkdir()
    removed = {(row["name"], row["record"]) for row in files.read_jsonl(listed / "duplicates.jsonl")}
    lines = (sources / "a.jsonl").read_text().splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines, 1) if ("a.jsonl", number) not in removed]
    (folder / "a.jsonl").write_text("".join(kept))
    assert ("b.txt", 1) in removed and len(removed) > 20
    (folder / "c.txt").write_text((sources / "c.txt").read_text())
    prepare_data([folder], folder.parent / "set", **settings)
    return folder.parent / "set"


def read_shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in read_contents(folder).items() if name.startswith(SPLITS)}


@pytest.mark.parametrize("batch_bytes", [200, 2**20])
def test_the_set_has_the_other_documents(sources, listed, expected, settings, tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(input_files, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(units, "UNIT_BYTES", 10 * batch_bytes)  # The file is read in ranges of bytes.
    manifest = prepare_data([sources], tmp_path / "set", duplicates=listed, **settings)
    assert read_shards(tmp_path / "set") == read_shards(expected)
    assert manifest["splits"] == json.loads((expected / "manifest.json").read_text())["splits"]


def test_the_removed_documents_are_counted_and_logged(sources, listed, settings, tmp_path):
    manifest = prepare_data([sources], tmp_path / "set", duplicates=listed, **settings)
    counts = manifest["books"]["mixed"]
    rows = files.read_jsonl(listed / "duplicates.jsonl")
    kinds = [row["kind"] for row in rows]
    assert counts["skipped"] == {kind: kinds.count(kind) for kind in ("exact duplicate", "near duplicate")}
    report = json.loads((listed / "report.json").read_text())
    assert counts["read"] == report["sources"]["mixed"]["documents"] == counts["written"] + len(rows)
    assert counts["written"] == sum(manifest["splits"][split]["documents"] for split in SPLITS)
    skipped = files.read_jsonl(tmp_path / "set/skipped.jsonl")
    for row, entry in zip(rows, skipped, strict=True):
        of = row["of"]
        detail = f"Jaccard index {row['jaccard']:.3f} with mixed, {of['name']}:{of['record']}"
        where = {key: row[key] for key in ("source", "name", "record")}
        assert entry == {**where, "reason": row["kind"], "detail": detail}


def test_an_interrupted_preparation_resumes(sources, listed, expected, settings, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    monkeypatch.setattr(input_files, "BATCH_BYTES", 2000)
    add_batch = writer.SetWriter.add_batch
    for limit in (3, 1, 6, 10**9):
        left = [limit]

        def counted(*args):
            left[0] -= 1  # noqa: B023 (it is called before the next round)
            if left[0] < 0:  # noqa: B023
                raise Killed
            add_batch(*args)

        monkeypatch.setattr(writer.SetWriter, "add_batch", counted)
        try:
            prepare_data([sources], tmp_path / "set", duplicates=listed, commit_seconds=0, **settings)
        except Killed:
            continue
    assert read_shards(tmp_path / "set") == read_shards(expected)


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(sources, listed, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    for workers in (1, 3):
        given = {**settings, "workers": workers}
        prepare_data([sources], tmp_path / f"set{workers}", duplicates=listed, **given)
    assert read_contents(tmp_path / "set1") == read_contents(tmp_path / "set3")


def test_another_list_is_another_setting(sources, listed, settings, tmp_path):
    first = prepare_data([sources], tmp_path / "set", duplicates=listed, **settings)
    assert prepare_data([sources], tmp_path / "set", duplicates=listed, **settings) == first
    deduplicate([sources], tmp_path / "exact", mode="exact", **QUIET)
    for changes in ({"duplicates": tmp_path / "exact"}, {}):
        with pytest.raises(ValueError, match=r"prepared otherwise \(different --duplicates\)"):
            prepare_data([sources], tmp_path / "set", **changes, **settings)


def test_more_text_is_added_with_a_longer_list(sources, copied, settings, tmp_path):
    (copied / "a.jsonl").write_text((sources / "a.jsonl").read_text().replace('{"text": ', '{"body": '))
    inputs = [f"mixed={copied / name}" for name in ("a.jsonl", "b.txt", "c.txt")]
    field = {"text_field": "body"}
    deduplicate(inputs[:1], tmp_path / "list", **field, **QUIET)
    prepare_data(inputs[:1], tmp_path / "set", duplicates=tmp_path / "list", **field, **settings)
    options = {"add": True, **settings, "tokenizer": None}
    with pytest.raises(ValueError, match=r"b\.txt.* has no .*glalm deduplicate --out"):
        prepare_data(inputs[1:], tmp_path / "set", duplicates=tmp_path / "list", **options)
    deduplicate(inputs, tmp_path / "list", **field, **QUIET)
    with pytest.raises(ValueError, match=r"without duplicates.*--duplicates"):
        prepare_data(inputs[1:], tmp_path / "set", **options)
    manifest = prepare_data(inputs[1:], tmp_path / "set", duplicates=tmp_path / "list", **options)
    whole = prepare_data(inputs, tmp_path / "whole", duplicates=tmp_path / "list", **field, **settings)
    assert manifest["books"] == whole["books"] and manifest["settings"] == whole["settings"]
    assert prepare_data(inputs, tmp_path / "set", duplicates=tmp_path / "list", **field, **settings) == manifest


@pytest.fixture
def copied(sources, tmp_path):
    """A copy of the inputs that a test may change."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sources.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_input_of_another_content_is_refused(copied, listed, settings, tmp_path):
    prepare_data([copied], tmp_path / "set", duplicates=listed, **settings)  # Only the times differ.
    (copied / "c.txt").write_text("something else entirely")
    with pytest.raises(ValueError, match=r"c\.txt has changed since .*glalm deduplicate"):
        prepare_data([copied], tmp_path / "other", duplicates=listed, **settings)
    assert not (tmp_path / "other").exists()


def test_other_fields_are_refused(sources, listed, settings, tmp_path):
    for changes in ({"text_field": "body"}, {"source_field": "set"}):
        with pytest.raises(ValueError, match=r"with another --(text|source)-field"):
            prepare_data([sources], tmp_path / "set", duplicates=listed, **changes, **settings)


def test_an_unfinished_or_damaged_list_is_refused(sources, settings, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished deduplication.*glalm deduplicate --out"):
        prepare_data([sources], tmp_path / "set", duplicates=tmp_path / "list", **settings)
    deduplicate([sources], tmp_path / "list", **QUIET)
    with open(tmp_path / "list/duplicates.jsonl", "ab") as file:
        file.write(b"\n")
    with pytest.raises(ValueError, match=r"duplicates\.jsonl is damaged"):
        prepare_data([sources], tmp_path / "set", duplicates=tmp_path / "list", **settings)


def test_a_changed_count_of_an_input_is_refused(sources, settings, tmp_path):
    """The counts say which lines of the list belong to an input, so that another count would remove other documents."""
    deduplicate([sources], tmp_path / "list", **QUIET)
    path = tmp_path / "list/inputs.jsonl"
    rows = files.read_jsonl(path)
    rows[0]["near duplicate"] -= 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"inputs\.jsonl is damaged.*--overwrite"):
        prepare_data([sources], tmp_path / "set", duplicates=tmp_path / "list", **settings)


def test_documents_of_which_the_set_has_no_copy_are_reported(sources, listed, settings, tmp_path, capsys):
    options = {**settings, "duplicates": listed, "progress": True}
    copy, other = (f"mixed={sources / name}" for name in ("b.txt", "c.txt"))
    message = f"Of 1 documents this set has no copy: {listed} keeps one in mixed, a.jsonl"
    prepare_data([copy, other], tmp_path / "one", **options)
    assert message in capsys.readouterr().err.replace("\n", " ")
    prepare_data([other, f"mixed={sources / 'a.jsonl'}"], tmp_path / "two", **options)
    prepare_data([copy], tmp_path / "two", add=True, **{**options, "tokenizer": None})
    prepare_data([sources], tmp_path / "three", **options)
    assert "has no copy" not in capsys.readouterr().err


def test_the_command_takes_the_folder(sources, listed, settings, tmp_path, monkeypatch, capsys):
    argv = ["glalm prepare", "--out", str(tmp_path / "set"), "--tokenizer", str(settings["tokenizer"]), "--workers"]
    monkeypatch.setattr("sys.argv", [*argv, "1", "--duplicates", os.fspath(listed), str(sources)])
    assert prepare_or_inspect() == 0
    assert "skipped (near duplicate)" in capsys.readouterr().out
