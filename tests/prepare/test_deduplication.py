"""Deduplication as a whole: its results depend on the documents and the settings alone."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from folder_contents import read_contents

from glalm.commands.deduplicate import list_duplicates
from glalm.data import files
from glalm.prepare import deduplication, duplicate_list, input_files, signature_store, units
from glalm.prepare.deduplication import deduplicate
from glalm.prepare.duplicate_list import DuplicateList

pytest.importorskip("datasketch")

ROOT = Path(__file__).parents[2]
QUIET = {"workers": 1, "progress": False}
RESULTS = ("duplicates.jsonl", "inputs.jsonl", "report.json")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files of 230 documents, which have copies and near-duplicates of each other, and a text file."""
    folder = tmp_path_factory.mktemp("sources") / "mixed"
    folder.mkdir()
    pick = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    texts = []
    for name in ("a", "b"):
        lines = []
        for i in range(230):
            if i % 3 == 0:
                texts.append(" ".join(pick.choices(words, k=pick.randrange(40, 120))))
                text = texts[-1]
            elif i % 3 == 1:
                text = pick.choice(texts)
            else:
                text = pick.choice(texts) + " and one more word"
            lines.append(json.dumps({"text": text}) if i % 50 else pick.choice(["{", '{"text": ""}', ""]))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "c.txt").write_text(texts[3])
    return folder


@pytest.fixture(scope="module")
def uninterrupted(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "dedup"
    deduplicate([sources], out, **QUIET)
    return out


def read_results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def read_texts(folder: Path) -> dict[tuple[str, int], str]:
    """The documents by their file and line, in order."""
    texts = {}
    for path in sorted(folder.iterdir()):
        lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [json.dumps({"text": path.read_text()})]
        for number, line in enumerate(lines, 1):
            if line not in ("", "{", '{"text": ""}'):
                texts[path.name, number] = json.loads(line)["text"]
    return texts


def test_the_list_names_each_removed_document_and_the_one_it_duplicates(sources, uninterrupted):
    texts = read_texts(sources)
    first = {}
    kept = []
    expected = []
    for where, text in texts.items():
        words = text.split()
        shingles = {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
        similar = ((len(shingles & other) / len(shingles | other), at) for at, other in kept)
        index, at = next(((index, at) for index, at in similar if index >= 0.8), (0, None))
        if at is None:
            kept.append((where, shingles))
        else:
            kind = "exact duplicate" if texts[at] == text else "near duplicate"
            row = {"source": "mixed", "name": where[0], "record": where[1], "kind": kind, "jaccard": round(index, 4)}
            expected.append({**row, "of": {"source": "mixed", "name": at[0], "record": at[1]}})
        first.setdefault(text, where)
    rows = files.read_jsonl(uninterrupted / "duplicates.jsonl")
    assert rows == expected and len(rows) > 200


def test_the_report_counts_by_source_and_kind(sources, uninterrupted):
    report = json.loads((uninterrupted / "report.json").read_text())
    rows = files.read_jsonl(uninterrupted / "duplicates.jsonl")
    kinds = [row["kind"] for row in rows]
    counts = {"documents": len(read_texts(sources)), **{kind: kinds.count(kind) for kind in sorted(set(kinds))}}
    assert report["sources"] == {"mixed": counts}
    inputs = files.read_jsonl(uninterrupted / "inputs.jsonl")
    assert [row["name"] for row in inputs] == ["a.jsonl", "b.jsonl", "c.txt"]
    for row in inputs:
        mine = [other["kind"] for other in rows if other["name"] == row["name"]]
        assert {kind: row[kind] for kind in set(kinds)} == {kind: mine.count(kind) for kind in set(kinds)}
        assert row["sha256"] == files.file_sha256(sources / row["name"])
    texts = read_texts(sources)
    examples = report["examples"]
    assert sorted({example["kind"] for example in examples}) == sorted(set(kinds))
    assert examples[0]["jaccard"] == min(row["jaccard"] for row in rows)
    for example in examples:
        assert texts[example["name"], example["record"]].startswith(example["text"])
        assert texts[example["of"]["name"], example["of"]["record"]].startswith(example["of_text"])


def test_the_same_call_again_changes_nothing(sources, uninterrupted, monkeypatch):
    before = read_contents(uninterrupted)
    monkeypatch.setattr(deduplication, "compute_signatures", None)  # To compute one again would fail.
    monkeypatch.setattr(deduplication, "find_duplicates", None)
    assert deduplicate([sources], uninterrupted, **QUIET) == json.loads(before["report.json"])
    assert read_contents(uninterrupted) == before


@pytest.mark.parametrize("part_bytes, batch_bytes", [(1, 10_000), (10**5, 20_000)])
def test_the_parts_of_the_signatures_do_not_matter(
    sources, uninterrupted, tmp_path, monkeypatch, part_bytes, batch_bytes
):
    monkeypatch.setattr(deduplication, "MAX_PENDING_BYTES", part_bytes)
    monkeypatch.setattr(input_files, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(units, "UNIT_BYTES", batch_bytes)  # The files are read in ranges of bytes.
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # There are many commits.
    commits = []
    write_json = signature_store.write_json
    monkeypatch.setattr(signature_store, "write_json", lambda *args: commits.append(write_json(*args)))
    deduplicate([sources], tmp_path / "out", **QUIET)
    assert len(commits) > 1
    assert read_results(tmp_path / "out") == read_results(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_results(sources, uninterrupted, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(units, "UNIT_BYTES", 5_000)
    deduplicate([sources], tmp_path / "out", workers=workers, progress=False)
    assert read_results(tmp_path / "out") == read_results(uninterrupted)


@pytest.mark.parametrize("moment", ["rename_into_place", "atomic_write", "flush_to_disk", "fsync_path", "write_json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_between_any_two_steps_on_the_disk(sources, uninterrupted, tmp_path, monkeypatch, moment, overwrite):
    """Stop before the n-th call of a function that changes the disk, for several n."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(input_files, "BATCH_BYTES", 20_000)
    if overwrite:
        deduplicate([sources / "a.jsonl"], tmp_path / "out", mode="exact", **QUIET)
    total = [0]
    original = getattr(files, moment)

    def counted(*args, **options):
        total[0] += 1
        if total[0] == limit:
            raise Killed
        return original(*args, **options)

    for module in (files, signature_store, duplicate_list, deduplication):
        if hasattr(module, moment):
            monkeypatch.setattr(module, moment, counted)
    deaths = 0
    for limit in (1, 2, 3, 5, 8, 13, 10**9):  # noqa: B007 (counted reads it)
        total[0] = 0
        try:
            deduplicate([sources], tmp_path / "out", overwrite=overwrite and not deaths, commit_seconds=0, **QUIET)
            break
        except Killed:
            deaths += 1
    assert deaths >= 3
    assert read_results(tmp_path / "out") == read_results(uninterrupted)


def test_the_same_command_resumes_an_interrupted_overwrite(sources, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    deduplicate([sources / "a.jsonl"], out, mode="exact", **QUIET)
    given = {"overwrite": True, "commit_seconds": 0, **QUIET}
    sign_unit = deduplication.sign_unit
    signed = []

    def interrupt():
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(input_files.FileInput, "compute_sha256", lambda self: _raise_at(self, "b.jsonl"))
            deduplicate([sources], out, **given)

    def count_signed(settings, fields, unit):
        signed.extend(part.source_input.name for part in unit)
        return sign_unit(settings, fields, unit)

    interrupt()
    with monkeypatch.context() as patch:
        patch.setattr(deduplication, "sign_unit", count_signed)
        deduplicate([sources], out, **given)
    assert "b.jsonl" in signed and "a.jsonl" not in signed
    assert read_results(out) == read_results(uninterrupted)
    interrupt()
    os.truncate(out / "signatures/band-007", 0)
    with pytest.raises(ValueError, match=r"is damaged.*--overwrite"):
        deduplicate([sources], out, **QUIET)
    deduplicate([sources], out, **given)
    assert read_results(out) == read_results(uninterrupted)


@pytest.mark.parametrize("kept_steps", range(5))
def test_killed_while_it_overwrites(sources, uninterrupted, tmp_path, monkeypatch, kept_steps):
    """After each step of the removal, the next command either resumes with the old settings or begins anew."""

    class Killed(BaseException):
        pass

    out = tmp_path / "out"
    deduplicate([sources / "a.jsonl"], out, mode="exact", **QUIET)
    left = [kept_steps]

    def counted(path):
        if not left[0]:
            raise Killed
        left[0] -= 1
        files.remove_entry(path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(deduplication, "remove_entry", counted)
        deduplicate([sources], out, overwrite=True, **QUIET)
    deduplicate([sources], out, overwrite=True, **QUIET)
    assert read_results(out) == read_results(uninterrupted)


def test_more_sources_leave_earlier_decisions_as_they_are(sources, uninterrupted, tmp_path):
    """Inputs can be added one by one, also without the earlier ones, and the result is that of all at once."""
    names = [f"mixed={sources / name}" for name in ("a.jsonl", "b.jsonl", "c.txt")]
    for count in (1, 2):
        deduplicate(names[:count], tmp_path / "out", **QUIET)
        rows = files.read_jsonl(tmp_path / "out/duplicates.jsonl")
        assert rows == files.read_jsonl(uninterrupted / "duplicates.jsonl")[: len(rows)]
    deduplicate(names[2:], tmp_path / "out", **QUIET)
    assert read_results(tmp_path / "out") == read_results(uninterrupted)


def test_documents_at_urls_are_compared(sources, uninterrupted, tmp_path):
    bucket = fsspec.filesystem("memory")
    for path in sources.iterdir():
        bucket.pipe(f"/bucket/mixed/{path.name}", path.read_bytes())
    deduplicate(["mixed=memory://bucket/mixed"], tmp_path / "out", **QUIET)
    assert (tmp_path / "out/duplicates.jsonl").read_bytes() == (uninterrupted / "duplicates.jsonl").read_bytes()


def test_a_changed_input_is_refused(sources, tmp_path):
    (tmp_path / "mixed").mkdir()
    path = tmp_path / "mixed/a.jsonl"
    path.write_bytes((sources / "a.jsonl").read_bytes())
    first = deduplicate([path], tmp_path / "out", **QUIET)
    os.utime(path)
    assert deduplicate([path], tmp_path / "out", **QUIET) == first  # Its content is the same.
    path.write_text(path.read_text().replace("word", "WORD"))
    with pytest.raises(ValueError, match=rf"{path} has changed since .*--overwrite"):
        deduplicate([path], tmp_path / "out", **QUIET)
    assert deduplicate([path], tmp_path / "out", overwrite=True, **QUIET)["sources"] == first["sources"]


def test_an_input_that_changes_while_it_is_read_is_refused(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(input_files.FileInput, "has_changed", lambda self: True)
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read"):
        deduplicate([sources], tmp_path / "out", **QUIET)


def test_an_unfinished_input_must_not_be_missing(sources, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(input_files.FileInput, "compute_sha256", lambda self: _raise_at(self, "b.jsonl"))
        deduplicate([sources], tmp_path / "out", commit_seconds=0, **QUIET)
    with pytest.raises(ValueError, match=r"unfinished deduplication of mixed, b\.jsonl, which is missing"):
        deduplicate([sources / "a.jsonl"], tmp_path / "out", **QUIET)


def _raise_at(source_input, name):
    if source_input.name == name:
        raise RuntimeError
    return files.file_sha256(source_input.path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"threshold": 0.7}, "with different --threshold"),
        ({"ngram": 4}, "with different --ngram"),
        ({"mode": "exact"}, "with different --mode, --threshold, --ngram"),
        ({"text_field": "body"}, "with different --text-field"),
        ({"threshold": 0}, r"--threshold 0 must be above 0"),
        ({"threshold": float("nan")}, r"--threshold nan must be above 0"),
        ({"ngram": 0}, r"--ngram 0 must be at least 1"),
        ({"workers": 0}, r"--workers 0 must be at least 1"),
        ({"mode": "fuzzy"}, r"--mode fuzzy must be near or exact"),
    ],
)
def test_other_settings_are_refused(sources, uninterrupted, changes, message):
    before = read_contents(uninterrupted)
    with pytest.raises(ValueError, match=message):
        deduplicate([sources], uninterrupted, **{**QUIET, **changes})
    assert read_contents(uninterrupted) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "report.json", "duplicates.jsonl"])
def test_a_folder_with_other_files_is_not_touched(sources, tmp_path, name, overwrite):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"{name} is not part of a deduplication"):
        deduplicate([sources], tmp_path, overwrite=overwrite, **QUIET)
    assert read_contents(tmp_path) == {name: b"precious"}


def test_a_damaged_part_is_refused(sources, tmp_path):
    deduplicate([sources / "a.jsonl"], tmp_path / "out", **QUIET)
    path = tmp_path / "out/signatures/band-007"
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=rf"{path} is damaged: it has 1000 bytes.*--overwrite"):
        deduplicate([sources], tmp_path / "out", **QUIET)
    deduplicate([sources], tmp_path / "out", overwrite=True, **QUIET)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_a_damaged_plan_the_folder_is_to_be_deleted(sources, tmp_path, overwrite):
    """No other file says that the folder is a deduplication, which --overwrite may delete."""
    deduplicate([sources], tmp_path / "out", **QUIET)
    os.truncate(tmp_path / "out/plan.json", 100)
    with pytest.raises(files.DamagedFile, match=r"plan\.json is damaged.*delete it and run the command again"):
        deduplicate([sources], tmp_path / "out", overwrite=overwrite, **QUIET)


def test_if_memory_runs_out_at_the_end_the_last_input_is_named(sources, tmp_path, monkeypatch):
    def run_out(store):
        raise MemoryError

    monkeypatch.setattr(signature_store.SignatureStore, "commit", run_out)
    with pytest.raises(ValueError, match=r"c\.txt: memory ran out"):
        deduplicate([sources], tmp_path / "out", **QUIET)


def test_a_missing_library_is_named(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(deduplication, "find_spec", lambda name: None if name == "xxhash" else name)
    with pytest.raises(ValueError, match=r"Near-duplicates need xxhash\. .*\[dedup\].*--mode exact"):
        deduplicate([sources], tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()
    deduplicate([sources], tmp_path / "out", mode="exact", **QUIET)


def test_each_input_has_its_own_checksum_also_without_records(tmp_path):
    for number, text in enumerate(["", '{"text": "a"}\n', "\n\n", "", '{"text": "b"}\n']):
        (tmp_path / f"{number}.jsonl").write_text(text)
    deduplicate([tmp_path / f"{number}.jsonl" for number in range(5)], tmp_path / "out", **QUIET)
    for row in files.read_jsonl(tmp_path / "out/inputs.jsonl"):
        assert row["sha256"] == files.file_sha256(tmp_path / row["name"])


def test_sources_without_documents_have_no_duplicates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    report = deduplicate([tmp_path / "a.jsonl"], tmp_path / "out", **QUIET)
    assert [counts["documents"] for counts in report["sources"].values()] == [0]
    assert (tmp_path / "out/duplicates.jsonl").read_bytes() == b""


def test_the_command_prints_counts_and_examples(sources, tmp_path, monkeypatch, capsys):
    argv = ["glalm deduplicate", "--out", str(tmp_path / "out"), "--workers", "1", str(sources)]
    monkeypatch.setattr(sys, "argv", argv)
    assert list_duplicates() == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    counts = report["sources"]["mixed"]
    assert [word for word in printed.splitlines()[1].split()] == ["mixed", *map(str, counts.values())]
    example = report["examples"][0]
    assert f"mixed, {example['name']}:{example['record']}: '{example['text'][:20]}" in printed
    assert f"--duplicates {tmp_path / 'out'}" in printed
    monkeypatch.setattr(sys, "argv", [*argv, "--ngram", "3"])
    assert list_duplicates() == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes(sources, uninterrupted, tmp_path):
    """Kill a process with two workers by SIGKILL again and again, and let the last one finish."""
    script = (
        "import time\nfrom glalm.prepare import deduplication, input_files\n"
        "from glalm.prepare.signature_store import SignatureStore\ninput_files.BATCH_BYTES = 3_000\n"
        "commit = SignatureStore.commit\nSignatureStore.commit = lambda *args: (time.sleep(0.02), commit(*args))\n"
        "if __name__ == '__main__':\n"
        f"    deduplication.deduplicate([{str(sources)!r}], {str(tmp_path / 'out')!r}, workers=2, commit_seconds=0)"
    )
    (tmp_path / "run.py").write_text(script)
    where = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    journal = tmp_path / "out/signatures/journal.json"

    def count_documents():
        return json.loads(journal.read_text())["sizes"]["documents"] if journal.exists() else 0

    counts = [0]
    for _ in range(4):
        process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], **where)
        while process.poll() is None and count_documents() == counts[-1]:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(count_documents())
    assert counts == sorted(set(counts)) and not (tmp_path / "out/report.json").exists(), counts
    subprocess.run([sys.executable, str(tmp_path / "run.py")], check=True, **where)
    assert read_results(tmp_path / "out") == read_results(uninterrupted)


@pytest.mark.slow
def test_recall_and_precision(tmp_path):
    """Of 20,000 documents, with duplicates of all kinds at a Jaccard index from 0.5 to 1."""
    path = ROOT / "benchmarks" / "bench_deduplicate.py"
    spec = importlib.util.spec_from_file_location("bench_deduplicate", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    nearest = benchmark.write_documents(tmp_path / "text.jsonl", 20_000, seed=1)
    deduplicate([tmp_path / "text.jsonl"], tmp_path / "out", progress=False)
    removed = benchmark.read_removed(tmp_path / "out")
    true = {number for number, jaccard in nearest.items() if jaccard >= 0.8}
    assert len(true) > 3000
    assert len(true & removed) / len(true) > 0.99
    assert len(true & removed) / len(removed) > 0.99
    assert DuplicateList(tmp_path / "out").sha256 == files.file_sha256(tmp_path / "out/duplicates.jsonl")
