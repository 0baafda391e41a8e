"""Plan a preparation: begin a set, resume an interrupted preparation, or add inputs to a complete set."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from glalm.data.files import DamagedFile, read_json, read_jsonl, temporary_path, write_json
from glalm.data.shards import FORMAT, MANIFEST, PLAN, SPLITS, VERSION, TokenSet, read_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.input_files import HubInput, Input, Position, read_batches
from glalm.prepare.records import SkippedRecord, parse_records
from glalm.prepare.set_folder import JOURNAL, describe_file, last_commit, list_set_files, remove_set
from glalm.prepare.tokenizer_training import train_on_inputs
from glalm.progress import ProgressBar

FIELDS = ("text_field", "source_field")
SKIP_ADVICE = " To skip such records and count them, use --on-error skip."


@dataclass(frozen=True)
class Plan:
    """What a preparation reads and how. It is saved in the folder of the set until the set is complete.

    Attributes:
        fingerprint: The SHA-256 of the settings, the tokenizer and the inputs with which the set was begun.
        settings: The settings of the set; see `prepare_data`.
        fields: The text_field and source_field with which the inputs are read. The settings have those of the first
            inputs, and later ones may be added with others.
        tokenizer: The tokenizer's entry in the manifest.
        dtype: The dtype of the token ids.
        inputs: The inputs to read, as `Input.describe` returns them.
        base: The commit of the complete set to add to, or None to begin a set.
        overwrite: Whether `overwrite` began it, so that the same call resumes it.
    """

    fingerprint: str
    settings: dict
    fields: dict
    tokenizer: dict
    dtype: str
    inputs: list[dict]
    base: dict | None
    overwrite: bool = False


PLAN_SHAPE = {
    "fingerprint": str,
    "settings": dict,
    "fields": dict,
    "tokenizer": dict,
    "dtype": str,
    "inputs": [{"source": str, "name": str}],
    "base": (dict, type(None)),
    "overwrite": bool,
}


def make_plan(
    out: Path,
    settings: dict,
    inputs: list[Input],
    tokenizer: Tokenizer | None,
    *,
    on_error: str,
    add: bool,
    overwrite: bool,
    bar: ProgressBar,
) -> Plan | None:
    """Return the plan of the work in `out`, saved in `out`, or None if nothing is to be done.

    A set of an older format is prepared again, as with `overwrite`. An interrupted preparation that has committed no
    document is resumed by the same call, and does not hinder others.

    Args:
        settings: The caller's settings. With `add`, a text_field or source_field of None stands for that of the set.
        tokenizer: The tokenizer to use, or None to train one.
        on_error, add, overwrite: See `prepare_data`.

    Raises:
        ValueError: `out` has a set with other settings or inputs, or files that are not part of a set.
    """
    if overwrite and _has_begun_overwrite(out, settings, inputs):
        bar.log(f"Resuming the preparation that --overwrite has begun. To begin it again, delete {out} first.")
        overwrite = False
    has_manifest = (out / MANIFEST).exists()
    if has_manifest and not (add or overwrite):
        version = read_manifest(out, any_version=True)["version"]
        if version < VERSION:
            bar.log(f"{out} has a set of format {version}; it is prepared again in the current format, {VERSION}.")
            overwrite = True
    if not overwrite and (out / PLAN).exists():
        plan = read_plan(out)
        try:
            return _resume_plan(plan, out, settings, inputs, add, bar)
        except ValueError:
            if count_committed(out, plan):
                raise
            _discard_plan(out, plan)  # Nothing is lost, and this command may be the correction of a failed one.
    if not overwrite and (out / MANIFEST).exists():
        (out / JOURNAL).unlink(missing_ok=True)  # A process that was killed just after it completed the set left it.
        plan = _plan_addition(out, settings, inputs, add, bar)
    elif add:
        raise ValueError(f"{out} has no set to add to. Name the folder of a set, or omit --add to begin one.")
    else:
        plan = _plan_new_set(out, settings, inputs, tokenizer, on_error, bar)
        plan = dataclasses.replace(plan, overwrite=overwrite)
    if plan:
        write_json(out / PLAN, dataclasses.asdict(plan))
    return plan


def _plan_new_set(
    out: Path, settings: dict, inputs: list[Input], tokenizer: Tokenizer | None, on_error: str, bar: ProgressBar
) -> Plan:
    """Save the tokenizer of a new set, and return the plan.

    An existing set in `out` is removed only after the new inputs have been checked.
    """
    if list_set_files(out):
        check_first_documents(inputs, settings, on_error)
    if tokenizer is None:
        # remove_set removes this file, too. The Tokenizer has read it.
        tokenizer = train_on_inputs(inputs, settings, temporary_path(out / "tokenizer.model"), bar)
    remove_set(out)
    described = _save_tokenizer(tokenizer, out)
    inputs = [source_input.describe() for source_input in inputs]
    identities = [{key: entry[key] for key in ("source", "name", "bytes")} for entry in inputs]
    identity = [FORMAT, VERSION, settings, tokenizer.fingerprint, identities]
    return Plan(
        fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        settings=settings,
        fields=choose_fields(settings, settings),
        tokenizer=described,
        dtype="uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        inputs=inputs,
        base=None,
    )


def check_first_documents(inputs: list[Input], settings: dict, on_error: str) -> None:
    """Read the first document of each input, so that a bad input is reported before an existing set is removed.

    Raises:
        ValueError: An input cannot be read, a record before its first document is bad and `on_error` is "stop", or no
            input has a document.
    """
    found = False
    first_error = ""
    fields = (settings["text_field"], settings["source_field"])
    for source_input in inputs:
        if found and isinstance(source_input, HubInput) and source_input.index:
            continue  # All files of a hub data set have the same columns, and each is a request to the hub.
        # One record is read at a time, and none after the first document.
        batches = read_batches([source_input], list_fields(settings), batch_bytes=1)
        for item in chain.from_iterable(parse_records(batch.records, batch.first, *fields) for batch in batches):
            if not isinstance(item, SkippedRecord):
                found = True
                break
            if item.reason != "empty" and on_error == "stop":
                raise bad_record_error(source_input, item)
            if item.reason != "empty":
                first_error = first_error or f" ({source_input}:{item.number}: {item.detail})"
    if not found:
        raise ValueError(f"{inputs[0].source} has no text: all documents are empty or skipped{first_error}.")


def choose_fields(settings_of_set: dict, settings: dict) -> dict:
    """Return the text_field and source_field of the caller's settings or, where they are None, those of the set."""
    given = {name: settings[name] for name in FIELDS if settings[name] is not None}
    chosen = {name: settings_of_set[name] for name in FIELDS} | given
    return chosen | {"source_field": chosen["source_field"] or None}


def list_fields(settings: dict) -> list[str]:
    """Return the fields of a record that are read, of settings or of what `choose_fields` returns."""
    return [settings[name] for name in FIELDS if settings[name]]


def list_written_keys(out: Path) -> set[tuple[str, str]]:
    """Return the keys of the inputs that the set in `out` has so far."""
    path = out / "inputs.jsonl"
    return {(row["source"], row["name"]) for row in read_jsonl(path)} if path.exists() else set()


def count_written(books: dict[str, dict]) -> int:
    """Return the number of written documents in the counts of a manifest, a commit or a SetWriter."""
    return sum(counts["written"] for counts in books.values())


def read_plan(out: Path) -> Plan:
    """Return the plan in `out`. Raises FileNotFoundError, DamagedFile."""
    saved = read_json(out / PLAN, PLAN_SHAPE)
    return Plan(**{name: saved[name] for name in PLAN_SHAPE})


def count_committed(out: Path, plan: Plan) -> int:
    """Return the number of documents that the preparation of this plan has committed so far."""
    commit = last_commit(out)
    return count_written(commit["books"]) - count_written(plan.base["books"] if plan.base else {}) if commit else 0


def _has_begun_overwrite(out: Path, settings: dict, inputs: list[Input]) -> bool:
    """Return whether `out` has what an interrupted call with `overwrite` and the same settings and inputs has begun."""
    try:
        plan = read_plan(out)
        last_commit(out)
    except (FileNotFoundError, DamagedFile):
        return False
    described = [source_input.describe() for source_input in inputs]
    return plan.overwrite and plan.settings == settings and plan.inputs == described


def _discard_plan(out: Path, plan: Plan) -> None:
    """Remove the preparation of `plan`, which has committed no document. A set to which it adds stays complete."""
    if not plan.base:
        remove_set(out)
        return
    # The plan goes last, because without it the logs would count as those of the complete set.
    (out / JOURNAL).unlink(missing_ok=True)
    for name, size in plan.base["logs"].items():
        os.truncate(out / name, size)
    (out / PLAN).unlink()


def _resume_plan(plan: Plan, out: Path, settings: dict, inputs: list[Input], add: bool, bar: ProgressBar) -> Plan:
    """Return the plan of the interrupted preparation, after checking that its settings and inputs are unchanged.

    An input that has changed before it was read is taken as it is now, such as one with a bad record that was
    corrected. `inputs` that are not in the plan are ignored here; `prepare_data` logs them at the end.

    Raises:
        ValueError: The settings differ, or an input is missing or has changed after a part of it was written.
    """
    if add:
        # What is added has the settings of the set, but may have other fields and another list of duplicates.
        own = choose_fields(plan.settings, settings) | {"duplicates": settings.get("duplicates")}
        settings = plan.settings | own
    available = {source_input.key: source_input for source_input in inputs}
    planned = {(entry["source"], entry["name"]): entry for entry in plan.inputs}
    changed = _differing_keys(plan.settings | plan.fields, settings)
    missing = [name for source, name in planned if (source, name) not in available]
    if changed or missing:
        difference = f"with different {', '.join(changed)}"
        if not changed:
            difference = f"but {len(missing)} of its inputs are missing, such as {missing[0]}"
        advice = "Finish it with the command that started it, choose another folder, or replace it with --overwrite."
        raise ValueError(f"{out} has an unfinished set, {difference}. {advice}")
    commit = last_commit(out)
    log = out / "inputs.jsonl"
    # Rows after the last commit do not count, because their inputs will be read again.
    rows = read_jsonl(log, commit["logs"][log.name]) if commit and log.exists() else []
    written = {(row["source"], row["name"]): row["sha256"] for row in rows}
    begun = Position(**commit["cursor"]) if commit else Position()
    first_unread = begun.input + (begun != Position(begun.input))
    changed_inputs = []
    for index, (key, entry) in enumerate(planned.items()):
        if entry == available[key].describe():
            continue
        # The files of another version of a data set may have their records in another order.
        is_of_hub = isinstance(available[key], HubInput) and available[key].is_remote
        if index >= first_unread and not is_of_hub:
            changed_inputs.append(available[key])
        # A changed modification time is accepted for an input that was written completely, because the hash that was
        # logged for it shows that the content is the same.
        elif not written.get(key) or written[key] != available[key].compute_sha256():
            problem = f"{available[key]} has changed since the preparation of {out} began, and {out} has old documents"
            commit_of_hub = re.match(r"hf://datasets/[^@]+@(\w+)/", entry.get("version", ""))
            advice = f"Name its old revision, @{commit_of_hub[1]}" if commit_of_hub else "Restore the file and its time"
            raise ValueError(f"{problem}. {advice}, or prepare the set again with --overwrite.")
    if changed_inputs:
        others = f", and {len(changed_inputs) - 1:,} other inputs" if len(changed_inputs) > 1 else ""
        bar.log(f"{changed_inputs[0]} has changed, before it was read{others}. The new content is prepared.")
        planned |= {source_input.key: source_input.describe() for source_input in changed_inputs}
        plan = dataclasses.replace(plan, inputs=list(planned.values()))
        write_json(out / PLAN, dataclasses.asdict(plan))
    return plan


def _plan_addition(out: Path, settings: dict, inputs: list[Input], add: bool, bar: ProgressBar) -> Plan | None:
    """Return a plan that adds to a complete set those of `inputs` that it does not have, or None if it has all.

    Args:
        settings: See `make_plan`. Without `add`, the set must have these settings and, implicitly, all inputs.

    Raises:
        ValueError: The set has other settings, or has other content for one of the inputs.
    """
    for split in SPLITS:
        manifest = TokenSet(out, split).manifest  # Opening a split checks its files.
    new = find_new_inputs(out, inputs, bar)
    written = list_written_keys(out)
    for source_input in new:
        if source_input.key in written:
            raise ValueError(
                f"{source_input} differs from what {out} has as {source_input.name!r} of the source "
                f"{source_input.source!r}. If the file has changed, prepare the set again with --overwrite. If it "
                "has only new documents, give it another name: NAME=PATH."
            )
    _refuse_renamed_files(out, new, inputs, written)
    changed = [] if add else _differing_keys(manifest["settings"], settings)
    if new and not add:
        changed.append("sources")
    if changed:
        difference = f"{out} has a set that was prepared otherwise (different {', '.join(changed)})."
        advice = "Choose another folder, replace the set with --overwrite, or add new sources to it with --add."
        raise ValueError(f"{difference} {advice}")
    if not new:
        return None
    duplicates = settings.get("duplicates")
    if "duplicates" in manifest["settings"] and not duplicates:
        advice = "Look for duplicates of all sources, old and new, with glalm deduplicate, and name its folder"
        raise ValueError(f"{out} was prepared without duplicates. {advice} with --duplicates.")
    kept = {key: manifest[key] for key in ("fingerprint", "settings", "tokenizer", "dtype")}
    if duplicates:
        kept["settings"] = kept["settings"] | {"duplicates": duplicates}
    fields = choose_fields(manifest["settings"], settings)
    described = [source_input.describe() for source_input in new]
    return Plan(**kept, fields=fields, inputs=described, base=_describe_base(manifest))


def _refuse_renamed_files(out: Path, new: list[Input], inputs: list[Input], written: set[tuple[str, str]]) -> None:
    """Raise ValueError if a data set of the hub has new files, and lacks some that `out` has and they may repeat."""
    files = {}  # one new file of each data set
    for source_input in new:
        if isinstance(source_input, HubInput) and source_input.is_remote:
            dataset, _, file = source_input.name.partition(", ")
            files[source_input.source, dataset] = file
    absent = sorted(written - {source_input.key for source_input in inputs}) if files else []
    for source, name in absent:
        dataset, _, old = name.partition(", ")
        if file := files.get((source, dataset)):
            problem = (
                f"hf:{dataset} now has {file}, and no longer {old}, which {out} has: files were renamed or replaced"
            )
            advice = "Name the old revision with @REVISION or, if the new files repeat nothing, give them another name"
            raise ValueError(f"{problem}. {advice}: NAME=hf:{dataset}.")


def _describe_base(manifest: dict) -> dict:
    """Return the state of a complete set, from which SetWriter continues as from one that SetWriter.commit wrote."""
    splits = {}
    for split, entry in manifest["splits"].items():
        splits[split] = {name: {"shards": source["shards"], "open": None} for name, source in entry["sources"].items()}
    logs = {name: entry["bytes"] for name, entry in manifest["logs"].items()}
    cursor = dataclasses.asdict(Position())
    return {"cursor": cursor, "books": manifest["books"], "current": {}, "logs": logs, "splits": splits}


def find_new_inputs(out: Path, inputs: list[Input], bar: ProgressBar) -> list[Input]:
    """Return those of `inputs` whose content a complete set lacks."""
    rows = read_jsonl(out / "inputs.jsonl")
    by_key = {(row["source"], row["name"]): row for row in rows}
    name_of_content = {row["sha256"]: row["name"] for row in rows if row["sha256"]}  # Streamed files have no hash.
    sizes = {row["bytes"] for row in rows}
    new = []
    for source_input in inputs:
        row = by_key.get(source_input.key)
        if row and source_input.is_recorded_as(row):
            continue
        # A file of another size than all others is new without being hashed.
        sha256 = source_input.compute_sha256() if source_input.size in sizes else None
        if sha256 not in name_of_content:
            new.append(source_input)
        elif not row or row["sha256"] != sha256:
            bar.log(f"{source_input} is already in the set, as {name_of_content[sha256]}.")
    return new


def bad_record_error(source_input: Input, record: SkippedRecord) -> ValueError:
    """Return the error of a record without a document."""
    return ValueError(f"{source_input}:{record.number}: {record.detail}.{SKIP_ADVICE}")


def _differing_keys(old: dict, new: dict) -> list[str]:
    """Return the options of the command line that differ."""
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    names = {key: f"--{key.replace('_', '-')}" for key in keys} | {"held_out": "--validation or --test"}
    if isinstance(old.get("tokenizer"), dict) and isinstance(new.get("tokenizer"), dict):
        names["tokenizer"] = "--vocab-size"  # Both sets train a tokenizer.
    return [names[key] for key in keys]


def _save_tokenizer(tokenizer: Tokenizer, out: Path) -> dict:
    """Save the tokenizer in the folder of a set, and return its entry in the manifest."""
    name = tokenizer.save(out)
    # transformers writes several chat templates into a folder of their own.
    paths = [out / name, *sorted((out / name).rglob("*"))]
    return {
        "name": name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "before": tokenizer.bos_ids,
        "after": tokenizer.eos_ids,
        "round_trips": tokenizer.round_trips,
        "files": [describe_file(path, out) for path in paths if path.is_file()],
    }
