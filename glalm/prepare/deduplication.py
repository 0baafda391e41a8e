"""Deduplicate documents before they are prepared: compute their signatures, find duplicates, and list them.

The folder of a deduplication has a plan (settings and inputs), the signatures, and the results, of which the report is
written last. The same inputs give the same results for any number of processes, and however often the work was
interrupted and resumed.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from glalm.data.files import DamagedFile, read_json, remove_entry, temporary_path, write_json
from glalm.data.processes import count_cores
from glalm.prepare.duplicate_list import FORMAT, INPUTS, LIST, REPORT, VERSION, read_report, write_results
from glalm.prepare.duplicates import find_duplicates
from glalm.prepare.engine import MapUnits, check_engine, choose_engine, connect_engine
from glalm.prepare.input_files import Input, RecordBatch, out_of_memory_error
from glalm.prepare.plan import list_fields
from glalm.prepare.set_folder import create_folder, explain_full_disk, lock_folder
from glalm.prepare.signature_store import SignatureStore
from glalm.prepare.signatures import Signatures, compute_signatures
from glalm.prepare.sources import Source, collect_inputs, describe_unread_files, parse_source
from glalm.prepare.units import Unit, cut_units, limit_workers, read_unit
from glalm.progress import LINE_SECONDS, ProgressBar

PLAN = "plan.json"
SIGNATURES = "signatures"
PLAN_SHAPE = {"format": {FORMAT}, "version": int, "settings": dict, "inputs": [{"source": str, "name": str}]}
MAX_PENDING_BYTES = 2**26  # of signatures that are kept in memory


def deduplicate(
    sources: Iterable[Source | str | os.PathLike],
    out: str | os.PathLike,
    *,
    mode: Literal["near", "exact"] = "near",
    threshold: float = 0.8,
    ngram: int = 5,
    text_field: str = "text",
    source_field: str | None = None,
    workers: int | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    commit_seconds: float = 15,
) -> dict[str, Any]:
    """Write a list of the documents of `sources` that duplicate an earlier one to the folder `out`. Return the report.

    `glalm.prepare.duplicates` says which documents these are. The same call again resumes, or returns at once. A call
    with more sources compares their documents with the earlier ones, about which nothing changes.

    Args:
        sources: See `prepare_data`. Their order decides which copy is kept.
        mode: "near" looks for equal texts and near-duplicates, "exact" for equal texts only.
        threshold: Two documents are near-duplicates if the Jaccard index of their shingles is at least this.
        ngram: The number of words of a shingle.
        text_field, source_field: See `prepare_data`. Records that it would skip are not compared.
        workers: The number of processes that read and compute signatures, on this machine. None uses all cores.
        engine, address: Where to do so; see `prepare_data`. Signatures are compared on this machine.
        overwrite: Discard an earlier deduplication in `out`. The same call again resumes, if it was interrupted.
        commit_seconds: The time between two commits: how much work an interruption may lose.

    Raises:
        ValueError: An argument is invalid; or `out` has other files, or a deduplication with other settings or of an
            input that has changed since; or an input changes while it is read.
        FileNotFoundError: A source does not exist.
    """
    _check_arguments(mode, threshold, ngram, workers)
    check_engine(engine, address, workers)
    out = Path(out)
    if out.is_file():
        raise ValueError(f"{out} is a file. Name a folder for the results with --out.")
    sources = [parse_source(source) for source in sources]
    inputs, repeated = collect_inputs(sources, out.resolve())
    settings = {"mode": mode, "text_field": text_field, "source_field": source_field}
    if mode == "near":
        settings |= {"threshold": threshold, "ngram": ngram}
    workers = limit_workers(workers or count_cores(), inputs) if engine == "local" else 1
    map_units, engine_name = choose_engine(engine, workers)
    with (
        connect_engine(engine, address),
        create_folder(out),
        lock_folder(out),
        explain_full_disk(out),
        ProgressBar(quiet=not progress, line_seconds=LINE_SECONDS) as bar,
    ):
        for message in describe_unread_files(sources, repeated, out.resolve()):
            bar.log(message)
        _check_folder(out, settings, inputs, overwrite)
        store = SignatureStore(out / SIGNATURES)
        entries = plan_inputs(out, settings, inputs, store.finished, overwrite)
        if not (out / REPORT).exists():
            bar.log(f"Computing signatures of {len(entries) - store.position.input:,} inputs ({engine_name})")
            available = {source_input.key: source_input for source_input in inputs}
            planned = [available.get((entry["source"], entry["name"])) for entry in entries]
            add_signatures(store, planned, settings, map_units, commit_seconds, bar)
            bar.start_task("comparing", len(store))
            duplicates = find_duplicates(store, threshold, lambda document: bar.update(document))
            write_results(out, settings, entries, store, duplicates)
    return read_report(out)


def plan_inputs(
    out: Path, settings: dict, inputs: list[Input], finished: list[str | None], overwrite: bool
) -> list[dict]:
    """Return the inputs of the deduplication in `out`, as `Input.describe` returns them: its earlier ones, and others.

    Args:
        inputs: The inputs of this call.
        finished: The SHA-256 of those of which all signatures are stored.
        overwrite: Whether to record that `overwrite` began the deduplication, so that the same call resumes it.

    Raises:
        ValueError: The deduplication has other settings, or an input of it has changed or is missing.
    """
    path = out / PLAN
    saved = read_json(path, PLAN_SHAPE) if path.exists() else {"version": VERSION, "settings": settings, "inputs": []}
    advice = "Choose another folder, or replace it with --overwrite."
    if saved["version"] != VERSION:
        raise ValueError(f"{out} has a deduplication of another format, {saved['version']}. {advice}")
    old = saved["settings"]
    differing = [f"--{key.replace('_', '-')}" for key in settings | old if settings.get(key) != old.get(key)]
    if differing:
        raise ValueError(f"{out} has a deduplication with different {', '.join(differing)}. {advice}")
    available = {source_input.key: source_input for source_input in inputs}
    for index, entry in enumerate(saved["inputs"]):
        source_input = available.pop((entry["source"], entry["name"]), None)
        sha256 = finished[index] if index < len(finished) else None
        if source_input is None and index >= len(finished):
            problem = f"{out} has an unfinished deduplication of {entry['source']}, {entry['name']}, which is missing"
            raise ValueError(f"{problem}. Finish it with the sources of the earlier command. {advice}")
        same = not source_input or source_input.describe() == entry
        if not same and not (sha256 and sha256 == source_input.compute_sha256()):
            raise ValueError(f"{source_input} has changed since the deduplication in {out} began. {advice}")
    if available:
        # Without a report, the results that it describes do not count.
        (out / REPORT).unlink(missing_ok=True)
        saved["inputs"] += [source_input.describe() for source_input in available.values()]
        write_json(path, {"format": FORMAT, **saved, "overwrite": overwrite})
    return saved["inputs"]


def sign_unit(settings: dict, fields: list[str], unit: Unit) -> Iterator[tuple[RecordBatch, Signatures]]:
    """Yield the batches of a unit, without their records, and the signatures of their documents.

    Args:
        settings: See `compute_signatures`.
        fields: The columns to read from a table.
    """
    for batch in read_unit(unit, fields):
        yield batch._replace(records=[]), compute_signatures(settings, batch)


def add_signatures(
    store: SignatureStore,
    inputs: list[Input],
    settings: dict,
    map_units: MapUnits,
    commit_seconds: float,
    bar: ProgressBar,
) -> None:
    """Compute the signatures of the documents of `inputs` that are not in the store.

    Args:
        inputs: All planned inputs. Those that are finished may be None.
        map_units: Applies a pure function to units, and yields the results of all units in order.

    Raises:
        ValueError: An input changed while it was read.
    """
    bytes_before = [0, *accumulate(source_input.size if source_input else 0 for source_input in inputs)]
    position = store.position
    bar.start_task("reading", bytes_before[-1], bytes_before[position.input])
    fields = list_fields(settings)
    results = map_units(partial(sign_unit, settings, fields), cut_units(inputs, fields, position))
    documents = len(store)
    commit_time = time.monotonic()
    try:
        for batch, signatures in results:
            if batch.input_index < position.input:
                continue  # A damaged part has ended this input. Its later parts are skipped.
            source_input = inputs[batch.input_index]
            signatures = signatures.shift_numbers(position.before)
            position = position.after(batch)
            store.add(signatures, position)
            if position.input > batch.input_index:
                store.finish_input(source_input.compute_sha256())
                if source_input.has_changed():
                    advice = "Run the command again with --overwrite."
                    raise ValueError(f"{source_input} changed while it was read. {advice}")
            documents += len(signatures.documents)
            bar.update(bytes_before[batch.input_index] + batch.bytes_read, status=f"{documents:,} documents")
            if store.pending_bytes > MAX_PENDING_BYTES or time.monotonic() - commit_time > commit_seconds:
                store.commit()
                commit_time = time.monotonic()
        store.commit()
    except MemoryError as error:
        raise out_of_memory_error(inputs[min(position.input, len(inputs) - 1)]) from error
    finally:
        results.close()


def _check_arguments(mode: str, threshold: float, ngram: int, workers: int | None) -> None:
    """Raise ValueError if an argument of `deduplicate` is invalid, or a library is missing."""
    if mode not in ("near", "exact"):
        raise ValueError(f"--mode {mode} must be near or exact.")
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold {threshold} must be above 0 and at most 1.")
    if ngram < 1:
        raise ValueError(f"--ngram {ngram} must be at least 1.")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1.")
    missing = [name for name in ("datasketch", "xxhash") if not find_spec(name)]
    if mode == "near" and missing:
        advice = "Run pip install 'glalm[dedup]', or look for equal texts with --mode exact."
        raise ValueError(f"Near-duplicates need {' and '.join(missing)}. {advice}")


def _check_folder(out: Path, settings: dict, inputs: list[Input], overwrite: bool) -> None:
    """Discard the deduplication in `out` if `overwrite` is set, unless the same call has begun it and was interrupted.

    Raises:
        ValueError: There are files of another kind.
    """
    # The plan is the first file of a deduplication, so that without it no file is taken for a part of one.
    try:
        plan = read_json(out / PLAN, PLAN_SHAPE) if (out / PLAN).exists() else None
    except DamagedFile as error:
        advice = (
            f"If {out} has nothing but a deduplication, delete it and run the command again. Else choose another --out"
        )
        raise DamagedFile(f"{error}. {advice}.") from error
    known = {PLAN, SIGNATURES, REPORT, LIST, INPUTS} if plan else set()
    for path in out.iterdir():
        if path.name not in known and not path.name.startswith("."):
            raise ValueError(f"{path} is not part of a deduplication. Choose another folder than {out} with --out.")
    if overwrite and plan and not _has_begun_overwrite(out, plan, settings, inputs):
        # The signatures vanish all at once, because a part that stays could be taken for one of the next.
        hidden = temporary_path(out / SIGNATURES)
        remove_entry(hidden)
        remove_entry(out / REPORT)
        if (out / SIGNATURES).exists():
            (out / SIGNATURES).rename(hidden)
        for path in (hidden, out / LIST, out / INPUTS, out / PLAN):
            remove_entry(path)


def _has_begun_overwrite(out: Path, plan: dict, settings: dict, inputs: list[Input]) -> bool:
    """Return whether `out` has what an interrupted call with `overwrite` and the same settings and inputs has begun."""
    expected = {"version": VERSION, "settings": settings, "overwrite": True}
    expected["inputs"] = [source_input.describe() for source_input in inputs]
    if (out / REPORT).exists() or any(plan.get(key) != value for key, value in expected.items()):
        return False
    with suppress(DamagedFile):
        SignatureStore(out / SIGNATURES)
        return True
    return False
