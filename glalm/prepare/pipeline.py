"""Prepare text for training: sources -> records -> token ids -> shards in the format of glalm.data.shards.

The result depends on the sources and the settings alone: not on the number of processes, and not on how often the
preparation was interrupted and resumed.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from glalm.data.files import write_json
from glalm.data.processes import count_cores
from glalm.data.shards import PLAN, SPLITS, read_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.duplicate_list import DuplicateList
from glalm.prepare.encode import HELD_OUT, EncodedBatch, check_shares
from glalm.prepare.engine import check_engine, choose_engine, connect_engine
from glalm.prepare.input_files import FileInput, Input, out_of_memory_error
from glalm.prepare.object_store import SetCopy, staging_folder
from glalm.prepare.plan import (
    Plan,
    bad_record_error,
    choose_fields,
    count_written,
    find_new_inputs,
    list_fields,
    list_written_keys,
    make_plan,
)
from glalm.prepare.remote import URL
from glalm.prepare.set_folder import JOURNAL, create_folder, explain_full_disk, last_commit, lock_folder, remove_set
from glalm.prepare.sources import Source, collect_inputs, describe_unread_files, parse_source
from glalm.prepare.units import UnitEncoder, cut_units
from glalm.prepare.writer import SetWriter, format_counts
from glalm.progress import LINE_SECONDS, ProgressBar

# Smaller inputs are done before a second process has started.
BYTES_PER_WORKER = 2**23


def prepare_data(
    sources: Iterable[Source | str | os.PathLike],
    out: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    eos: str | None = None,
    vocab_size: int = 2048,
    held_out: Mapping[str, float] = HELD_OUT,
    shard_tokens: int = 2**27,
    text_field: str | None = None,
    source_field: str | None = None,
    duplicates: str | os.PathLike | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    staging: str | os.PathLike | None = None,
    add: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    commit_seconds: float = 15,
) -> dict[str, Any]:
    """Tokenize `sources` into the folder or URL `out`, and return the manifest of the set.

    The same call again resumes an interrupted preparation, and returns at once if the set is complete. Input files are
    recognised by name, size and time of change, or else by name, size and SHA-256.

    Args:
        sources: Source objects, or what `parse_source` takes: "stdlib", paths, "hf:DATASET".
        tokenizer: What `Tokenizer` takes. None trains a SentencePiece model of `vocab_size` on the training documents.
        eos: The token of `tokenizer` that ends a document, as `Tokenizer` takes it.
        held_out: The shares of the documents in "validation" and "test". A document's split depends on its text alone,
            so it stays there as data is added, and copies of a document are never on both sides.
        shard_tokens: A shard ends before it would exceed this. A longer document has a shard to itself. Shards of
            held-out text are smaller by its share, so that the first ones of all splits are complete at one time.
        text_field, source_field: The fields of a JSON line or a table's row that hold the text and the name of the
            document's source. A name with dots that is no field leads into nested fields. None is "text", and the
            source of the input; with `add` it is the field of the set, and "" the source of the input.
        duplicates: The folder of `deduplicate`, of which the listed documents are skipped and counted.
        on_error: For a record without a document, either raise ValueError with its file and line ("stop"), or skip it
            and count it by reason ("skip"). Empty documents are always skipped and counted.
        workers: The number of processes that read and tokenize, on this machine. None uses all cores.
        engine: Where to read and tokenize: in processes of this machine, or in tasks of a Ray cluster.
        address: The address of the Ray cluster; see `glalm.prepare.engine.connect_to_ray`.
        staging: The folder in which the set is prepared if `out` is a URL; see `glalm.prepare.object_store`. None is a
            folder below data/staging that is named after the URL.
        add: Append to a complete set those of `sources` that it lacks, with the settings and tokenizer of the set.
        overwrite: Replace a set in `out`, once a document of each input was read and the tokenizer is available. The
            same call again resumes, if the set that replaces it is unfinished.
        progress: Show a progress bar and messages on stderr.
        commit_seconds: The time between two commits: how much work an interruption may lose.

    Raises:
        ValueError: An argument is invalid; or `out` has a set with other settings, an input that has changed since, or
            files that are not part of a set; or an input changes while it is read.
        FileNotFoundError: A source or the tokenizer does not exist.
    """
    _check_arguments(held_out, shard_tokens, on_error, workers, add and overwrite)
    check_engine(engine, address, workers)
    url, out = find_folder(out, staging)
    sources = [parse_source(source) for source in sources]
    inputs, repeated = collect_inputs(sources, out.resolve())
    # Open the tokenizer now, because it may be part of the set that is replaced.
    opened = Tokenizer(tokenizer, eos) if tokenizer else None
    settings = {
        "tokenizer": opened.fingerprint if opened else {"vocab_size": vocab_size},
        "held_out": {split: float(held_out.get(split, 0)) for split in SPLITS[1:]},
        "shard_tokens": shard_tokens,
        "text_field": text_field if add else text_field or "text",
        "source_field": source_field if add else source_field or None,
    }
    if eos is not None:
        settings["eos"] = eos
    listed = DuplicateList(Path(duplicates)) if duplicates else None
    if listed:
        settings["duplicates"] = listed.sha256
        listed.check(choose_fields(read_manifest(out)["settings"], settings) if add else settings, inputs)
    with (
        connect_engine(engine, address),
        create_folder(out),
        lock_folder(out),
        explain_full_disk(out),
        ProgressBar(quiet=not progress, line_seconds=LINE_SECONDS) as bar,
        closing(SetCopy(url, out)) if url else nullcontext() as copy,
    ):
        if copy:
            copy.check_target(overwrite)
        for message in describe_unread_files(sources, repeated, out.resolve()):
            bar.log(message)
        plan = make_plan(out, settings, inputs, opened, on_error=on_error, add=add, overwrite=overwrite, bar=bar)
        if copy:
            copy.begin(overwrite and last_commit(out) is None)
        if plan:
            if listed:
                keys = {source_input.key for source_input in inputs} | list_written_keys(out)
                if message := listed.describe_absent_copies(keys):
                    bar.log(message)
            after_commit = copy.copy_shards if copy else None
            workers = workers or count_cores()
            run_plan(plan, inputs, out, listed, on_error, engine, workers, commit_seconds, after_commit, bar)
            new = find_new_inputs(out, inputs, bar) if len(inputs) > len(plan.inputs) else []
            if new:
                bar.log(f"{len(new)} inputs are not in {out}, because they appeared after it was begun. Use --add.")
        if copy:
            bar.log(f"Copying the last files to {url}")
            copy.finish()
        if plan:
            # The plan is deleted first, because a plan without a journal would start the work from the beginning.
            (out / PLAN).unlink()
            (out / JOURNAL).unlink()
    return read_manifest(out)


def run_plan(
    plan: Plan,
    inputs: list[Input],
    out: Path,
    listed: DuplicateList | None,
    on_error: str,
    engine: str,
    workers: int,
    commit_seconds: float,
    after_commit: Callable[[], None] | None,
    bar: ProgressBar,
) -> None:
    """Read, tokenize and write the inputs of the plan that are not written yet. The plan stays in `out`.

    Args:
        inputs: The plan's inputs, and possibly others.
        listed: The documents to skip, if there are any.
    """
    available = {source_input.key: source_input for source_input in inputs}
    inputs = [available[entry["source"], entry["name"]] for entry in plan.inputs]
    starts = [0, *accumulate(source_input.size for source_input in inputs)]  # of each input, in bytes
    fields = list_fields(plan.fields)
    if all(isinstance(source_input, FileInput) for source_input in inputs):
        workers = min(workers, 1 + starts[-1] // BYTES_PER_WORKER)
    tokenizer = plan.tokenizer
    try:
        writer = SetWriter(out, plan)
    except ValueError:
        # A file is damaged. The error advises --overwrite, which must not resume with the same file.
        write_json(out / PLAN, asdict(replace(plan, overwrite=False)))
        raise
    map_units, engine_name = choose_engine(engine, workers)
    bar.log(f"Tokenizing {len(inputs) - writer.position.input:,} files ({engine_name})")
    bar.start_task("tokenizing", starts[-1], starts[writer.position.input])
    start_time = commit_time = time.monotonic()
    documents = 0
    tokens = 0
    units = cut_units(inputs, fields, writer.position)
    encoder = UnitEncoder(
        out / tokenizer["name"], tokenizer["fingerprint"], plan.dtype, plan.settings | plan.fields, fields
    )
    results = map_units(encoder, units)
    try:
        for batch, encoded in results:
            if batch.input_index < writer.position.input:
                continue  # A damaged part has ended this input.
            source_input = inputs[batch.input_index]
            encoded = encoded.shift_numbers(writer.position.before)
            if on_error == "stop":
                _stop_at_bad_record(writer, encoded, source_input)
            if listed:
                encoded = listed.remove_from(encoded, source_input.key)
            writer.add_batch(batch, encoded, source_input)
            documents += len(encoded.documents)
            tokens += len(encoded.ids)
            now = time.monotonic()
            speed = tokens / max(now - start_time, 1e-9)
            status = f"{documents:,} documents  {tokens / 1e6:,.1f}M tokens  {speed / 1e6:.2f}M tokens/s"
            bar.update(starts[batch.input_index] + batch.bytes_read, status=status)
            if now - commit_time > commit_seconds:
                writer.commit()
                if after_commit:
                    after_commit()
                commit_time = now
    except MemoryError as error:
        raise out_of_memory_error(inputs[min(writer.position.input, len(inputs) - 1)]) from error
    finally:
        results.close()
    if not count_written(writer.counts):
        remove_set(out)
        found = "; ".join(format_counts(writer.counts))
        raise ValueError(f"{inputs[0].source} has no text: all documents are empty or skipped ({found}).")
    writer.finish()


def _stop_at_bad_record(writer: SetWriter, encoded: EncodedBatch, source_input: Input) -> None:
    """Raise ValueError if a record of a batch is bad, after a commit of what precedes the batch."""
    errors = [record for record in encoded.skipped if record.reason != "empty"]
    if not errors:
        return
    if writer.has_added:
        writer.commit()
    elif not writer.plan.base:
        remove_set(writer.out)  # There is nothing to resume.
    raise bad_record_error(source_input, errors[0])


def find_folder(out: str | os.PathLike, staging: str | os.PathLike | None) -> tuple[str, Path]:
    """Return `out` if it is a URL, else "", and the folder in which the set is prepared."""
    url = os.fspath(out) if URL.fullmatch(os.fspath(out)) else ""
    if staging and not url:
        raise ValueError(f"--staging is for a URL. {out} is a folder, in which the set is prepared; remove --staging.")
    folder = Path(staging or staging_folder(url) if url else out)
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Name a folder to write the set to with --out.")
    return url, folder


def _check_arguments(
    held_out: Mapping[str, float], shard_tokens: int, on_error: str, workers: int | None, add_and_overwrite: bool
) -> None:
    """Raise ValueError if an argument of `prepare_data` is invalid."""
    for split in held_out:
        if split not in SPLITS[1:]:
            raise ValueError(f"held_out names an unknown split {split!r}. The splits are {' and '.join(SPLITS[1:])}.")
    check_shares(held_out)
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens {shard_tokens} must be at least 1.")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r} must be 'stop' or 'skip'.")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1.")
    if add_and_overwrite:
        raise ValueError("--add and --overwrite exclude each other: add to the set or replace it.")
