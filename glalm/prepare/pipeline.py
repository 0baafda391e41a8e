"""Text to token shards: read, split by document, tokenise on all cores, write; the format is that of glalm.data.shards.

What is written depends on the sources and the settings alone: not on the number of processes, nor on how often the
work was killed and begun again.
"""

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from glalm.data.files import read_jsonl, try_lock, write_json
from glalm.data.shards import FORMAT, MANIFEST, PLAN, SPLITS, VERSION, TokenSet, count_leftover_tokens, read_manifest
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.encode import HELD_OUT, Block, Encoded, Recipe, blocks_of, encode_in_order, split_of
from glalm.prepare.progress import PreparationBar
from glalm.prepare.records import BadDocument, extract_document, is_blank
from glalm.prepare.sources import File, HubShard, Source, describe_skipped_files, open_source
from glalm.prepare.vocabulary import train_sentencepiece
from glalm.prepare.writer import JOURNAL, LOGS, SetWriter, describe, last_commit, state_of

BLOCK = 2**20  # bytes of records that are passed to a worker at once
# Smaller inputs are done before a second process has started.
SMALL = 2**23
MOST_TO_TRAIN_ON = 2**32  # bytes of input that are read to train a tokenizer
HELD_OUT_SHARD = 2**16  # tokens that a shard of held-out text may always have
LEFT_OVER_LENGTHS = tuple(2**i for i in range(8, 16))
OUR_FILES = re.compile(
    rf"manifest\.json|tokenizer\.model|tokenizer/[\w.-]+|({'|'.join(map(re.escape, LOGS))})|lengths\.png"
    rf"|({'|'.join(SPLITS)})/([^/]+/)?\.?\d+(\.docs\.npy|\.npy|\.crc32)(\.tmp)?"
)

Input = File | HubShard


def prepare_data(
    sources: Iterable[Source | str | os.PathLike],
    out: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    vocab_size: int = 2048,
    held_out: Mapping[str, float] = HELD_OUT,
    shard_tokens: int = 2**27,
    text_field: str = "text",
    source_field: str | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    add: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    commit_seconds: float = 15,
) -> dict[str, Any]:
    """Tokenise `sources` into the folder `out` and return its manifest.

    sources: Source objects, or what `sources.source` takes: "stdlib", paths, "hf:DATASET".
    tokenizer: what Tokenizer takes; None trains a SentencePiece model of `vocab_size` on the training documents.
    held_out: share of the documents in "validation" and in "test". A document's split depends on its text
        alone: it stays where it is as data is added, and copies of it are never on both sides.
    shard_tokens: a shard ends before it would hold more; a document longer than this has a shard to itself. Shards
        of held-out text are smaller by its share, so that the first ones of all splits are complete at one time.
    text_field, source_field: of a JSON line or a table's row, by its name, or else dots lead into nested fields.
        Documents are kept apart by what source_field says, or else by the name of their source.
    on_error: what to do at a record that gives no document: raise ValueError with its file and line, or leave it out
        and count it by reason. Empty documents are always left out and counted.
    workers: processes that tokenise (None: all cores).
    add: append what of `sources` is not in the set yet, with the settings and the tokenizer that the set has. There
        must be one, and no input that is in it may have changed.

    The same call again goes on where it was interrupted, or returns at once when the set is complete: input files
    count as the same by name, size and time of change, or else by name, size and sha256. Raises ValueError if `out`
    holds a set that was prepared otherwise, or one of which an input has changed, unless `overwrite` (then it is always
    written anew, once a document of each input was read and the tokenizer is there), or other files; and if an input
    changes while it is read.
    """
    _check(held_out, shard_tokens, on_error, workers)
    if add and overwrite:
        raise ValueError("add=True and overwrite=True: a set is added to or written anew; give one of them")
    out = Path(out)
    if out.is_file():
        raise ValueError(f"{out} is a file: name the folder (out, --out) to write the set into")
    sources = [open_source(s) for s in sources]
    inputs = _inputs(sources, out.resolve())
    opened = Tokenizer(tokenizer) if tokenizer else None  # now, because it may lie in `out`
    settings = {
        "tokenizer": opened.fingerprint if opened else {"vocab_size": vocab_size},
        "held_out": {split: float(held_out.get(split, 0)) for split in SPLITS[1:]},
        "shard_tokens": shard_tokens,
        "text_field": text_field,
        "source_field": source_field,
    }
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out), explain_full_disk(out), PreparationBar(progress) as bar:
        if said := describe_skipped_files(sources, out.resolve()):
            bar.say(said)
        if overwrite or (not add and _has_older_format(out, bar)):
            plan = _beginning(out, settings, inputs, opened, on_error, bar)
        else:
            plan = _plan(out, settings, inputs, opened, on_error, add, bar)
        if plan:
            _carry_out(plan, inputs, out, on_error, workers or _cores(), commit_seconds, bar)
            if len(inputs) > len(plan["inputs"]) and (new := _not_in(out, inputs, bar)):
                bar.say(f"{len(new)} inputs came after {out} was begun and are not in it: add them with --add")
    return read_manifest(out)


# ------------------------------------------------------------------------------------------------- what is to be done


def _inputs(sources: list[Source], out: Path) -> list[Input]:
    """What is to be read, in order, less a set's own files in `out`, which may lie in the folder of its source.

    ValueError if it is nothing, or if two inputs could not be told apart later.
    """
    if not sources:
        raise ValueError("sources is empty: name 'stdlib', the path of some text or hf:DATASET")
    inputs = [i for s in sources for i in s.inputs]
    inputs = [i for i in inputs if not (isinstance(i, File) and out in i.path.resolve().parents)]
    if not inputs:
        raise ValueError(f"all sources lie in {out}, the folder of the set (out, --out): write it into another folder")
    first: dict[tuple[str, str], Input] = {}
    for i in inputs:
        if (other := first.setdefault((i.source, i.name), i)) is not i:
            raise ValueError(
                f"{other} and {i} would both be {i.name!r} of the source {i.source!r}: give one of them another name "
                "(NAME=PATH), or leave it out if they are the same"
            )
    return inputs


def _plan(
    out: Path, settings: dict, inputs: list[Input], tokenizer: Tokenizer | None, on_error: str, add: bool, bar
) -> dict | None:
    """What is to be done in `out`; None if nothing is."""
    wanted = None if add else settings
    if (out / PLAN).exists():
        return _unfinished(out, wanted, inputs)
    (out / JOURNAL).unlink(missing_ok=True)  # of a set that was finished, and killed just then
    if (out / MANIFEST).exists():
        return _addition(out, wanted, inputs, bar)
    if add:
        raise ValueError(f"{out}: no set to add to; name its folder, or leave out --add (add=True) to begin one")
    return _beginning(out, settings, inputs, tokenizer, on_error, bar)


def _beginning(out: Path, settings: dict, inputs: list[Input], tokenizer: Tokenizer | None, on_error: str, bar) -> dict:
    """The plan of a new set. It is on disk, with the tokenizer, before the work begins; a set that was in `out` goes
    when nothing is left to be refused but what lies deep in the inputs."""
    if _set_files(out):
        _try(inputs, settings, on_error)
    tokenizer = tokenizer or _train(settings, inputs, bar)
    _clear(out)
    described = _save_tokenizer(tokenizer, out)
    content = [FORMAT, VERSION, settings, tokenizer.fingerprint, [_key(i) for i in inputs]]
    plan = {
        "version": VERSION,
        "fingerprint": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        "settings": settings,
        "tokenizer": described,
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "inputs": [_entry(i) for i in inputs],
        "base": None,
    }
    return _written(plan, out)


def _unfinished(out: Path, settings: dict | None, inputs: list[Input]) -> dict:
    """The plan of a set that was interrupted; ValueError if it was for other settings, or for inputs that are gone or
    have changed."""
    plan = json.loads((out / PLAN).read_bytes())
    given = {(i.source, i.name): i for i in inputs}
    gone = [i["name"] for i in plan["inputs"] if (i["source"], i["name"]) not in given]
    changed = _difference(plan["settings"], settings) + [f"{name}, which is gone" for name in gone[:1]]
    if changed:
        raise ValueError(
            f"{out} holds an unfinished set that was prepared otherwise (different {', '.join(changed)}): finish it "
            "with the command that began it, choose another folder, or overwrite it (overwrite=True, --overwrite)"
        )
    touched = [i for i in plan["inputs"] if i != _entry(given[i["source"], i["name"]])]
    digests = _read_whole(out) if touched else {}
    for entry in touched:
        i = given[key := (entry["source"], entry["name"])]
        if entry["bytes"] != i.size or key not in digests or digests[key] != i.sha256():
            raise _changed(i, out)
    return plan


def _read_whole(out: Path) -> dict[tuple[str, str], str | None]:
    """{(source, name): sha256} of the inputs of which all is in an unfinished set, or in the one that it adds to."""
    if not (commit := last_commit(out)):
        return {}
    lines = (out / "inputs.jsonl").read_bytes()[: commit["logs"]["inputs.jsonl"]].splitlines()
    return {(row["source"], row["name"]): row["sha256"] for row in map(json.loads, lines)}


def _addition(out: Path, settings: dict | None, inputs: list[Input], bar: PreparationBar) -> dict | None:
    """The plan to add what a complete set lacks of `inputs`; None if it has them all.

    settings: what it must have been prepared with, and with all inputs; None if inputs may be added.
    """
    manifest = {split: TokenSet(out, split) for split in SPLITS}["train"].manifest
    new = _not_in(out, inputs, bar)
    there = {(row["source"], row["name"]) for row in read_jsonl(out / "inputs.jsonl")}
    if i := next((i for i in new if (i.source, i.name) in there), None):
        raise ValueError(
            f"{i} is not what {out} has as {i.name!r} of the source {i.source!r}: if it has changed, prepare the set "
            "anew (overwrite=True, --overwrite), or documents of it would be there twice; if it is another file, or "
            "holds only what is new, give it another name (NAME=PATH)"
        )
    changed = _difference(manifest["settings"], settings) + (["sources"] if new and settings else [])
    if changed:
        raise ValueError(
            f"{out} holds a set that was prepared otherwise (different {', '.join(changed)}): choose another folder, "
            "overwrite it (overwrite=True, --overwrite), or add what is new to it (add=True, --add)"
        )
    if not new:
        return None
    kept = {key: manifest[key] for key in ("version", "fingerprint", "settings", "tokenizer", "dtype")}
    return _written({**kept, "inputs": [_entry(i) for i in new], "base": state_of(manifest)}, out)


def _not_in(out: Path, inputs: list[Input], bar: PreparationBar) -> list[Input]:
    """Those of `inputs` whose content a complete set lacks."""
    known = read_jsonl(out / "inputs.jsonl")
    by_key = {(i["source"], i["name"], i["bytes"]): i for i in known}
    by_content = {i["sha256"]: i["name"] for i in known}
    sizes = {i["bytes"] for i in known}
    new = []
    for i in inputs:
        entry = by_key.get((i.source, i.name, i.size))
        if entry and (entry.get("mtime_ns") == i.mtime_ns or entry["sha256"] == i.sha256()):
            continue
        if isinstance(i, File) and i.size in sizes and (same := by_content.get(i.sha256())):
            bar.say(f"{i.path} is in the set already, as {same}")
        else:
            new.append(i)
    return new


def _has_older_format(out: Path, bar: PreparationBar) -> bool:
    version = read_manifest(out, any_version=True)["version"] if (out / MANIFEST).exists() else VERSION
    if version < VERSION:
        bar.say(
            f"{out}: token sets had format {version} when it was prepared and have {VERSION} now: preparing it anew"
        )
    return version < VERSION


def _try(inputs: list[Input], settings: dict, on_error: str) -> None:
    """Read the first document of each of `inputs`; ValueError as the work would raise it, or if none has one."""
    found, first_bad = False, ""
    for i in inputs:
        if found and isinstance(i, HubShard) and i.index:
            continue  # of one data set, all have the columns of the first; and each is a request
        records = (record for some, _ in i.read(_fields(settings)) for record in some)
        for number, record in enumerate(records, start=1):
            try:
                extract_document(record, settings["text_field"], settings["source_field"])
                found = True
                break
            except BadDocument as bad:
                reason, detail = bad.args
                if is_blank(record) or reason == "empty":
                    continue
                if on_error == "stop":
                    raise _bad(i, number, detail) from None
                first_bad = first_bad or f"; {i}:{number}: {detail}"
    if not found:
        raise ValueError(f"no text in {inputs[0].source}: all documents are empty or left out{first_bad}")


def _train(settings: dict, inputs: list[Input], bar: PreparationBar) -> Tokenizer:
    """A tokenizer of the training documents."""
    size = sum(i.size for i in inputs)
    if size > MOST_TO_TRAIN_ON or not all(isinstance(i, File) for i in inputs):
        raise ValueError(
            "tokenizer: to train one on all of these sources would mean to read them twice; train one on a part of "
            "them (scripts/train_tokenizer.py) and give it, or give another (--tokenizer)"
        )
    bar.start("reading", size)
    texts = training_texts(inputs, settings["held_out"], settings["text_field"], bar)
    with TemporaryDirectory() as folder:
        return train_sentencepiece(texts, Path(folder) / "tokenizer.model", settings["tokenizer"]["vocab_size"])


def training_texts(
    inputs: Iterable[Input], held_out: Mapping[str, float], text_field: str, bar: PreparationBar
) -> Iterator[str]:
    """The documents of `inputs` that are not held out. Bad records are passed over, as preparation will meet them, but
    where there is nothing else: ValueError with the first of them."""
    before, found, first_bad = 0, False, ""
    for i in inputs:
        seen = 0
        for records, position in i.read([text_field]):
            for number, record in enumerate(records, start=seen + 1):
                try:
                    text, _ = extract_document(record, text_field, None)
                except BadDocument as bad:
                    reason, detail = bad.args
                    if not (first_bad or is_blank(record) or reason == "empty"):
                        first_bad = f"{i}:{number}: {detail}"
                    continue
                if split_of(text, held_out) == "train":
                    found = True
                    yield text
            seen += len(records)
            bar.update(before + position, len(records))
        before += i.size
    if first_bad and not found:
        raise ValueError(f"no text to train a tokenizer on; {first_bad}")


# -------------------------------------------------------------------------------------------------------- the work


def _carry_out(plan: dict, given: list[Input], out: Path, on_error: str, workers: int, every: float, bar) -> None:
    """Read, tokenise and write what the plan says, from the last commit on, and commit `every` so many seconds."""
    settings = plan["settings"]
    known = {(i.source, i.name): i for i in given}
    inputs = [known[i["source"], i["name"]] for i in plan["inputs"]]
    writer = SetWriter(out, plan["dtype"], _shard_tokens(settings), last_commit(out) or plan["base"])
    fields = {key: settings[key] for key in ("held_out", "text_field", "source_field")}
    recipe = Recipe(out / plan["tokenizer"]["name"], plan["dtype"], **fields)
    starts = [0, *accumulate(i.size for i in inputs)]
    bar.start("tokenising", starts[-1], starts[writer.cursor[0]])
    if all(isinstance(i, File) for i in inputs):
        workers = min(workers, 1 + starts[-1] // SMALL)
    committed = time.monotonic()
    for block, encoded in encode_in_order(_blocks(inputs, *writer.cursor, settings), recipe, workers):
        _write(writer, block, encoded, inputs[block.input], on_error)
        bar.update(starts[block.input] + block.position, len(encoded.documents), len(encoded.ids))
        if time.monotonic() - committed > every:
            writer.commit()
            _write_manifest(out, plan, writer, complete=False)
            committed = time.monotonic()
    if not any(book["written"] for book in writer.books.values()):
        _clear(out)
        said = "; ".join(format_counts(writer.books))
        raise ValueError(f"no text in {inputs[0].source}: all documents are empty or left out ({said})")
    writer.finish()
    writer.commit()
    _write_manifest(out, plan, writer, complete=True)
    for name in (PLAN, JOURNAL):  # without a journal, a plan would begin anew
        (out / name).unlink()


def _blocks(inputs: list[Input], number: int, record: int, settings: dict) -> Iterator[Block]:
    for n, i in enumerate(inputs[number:], start=number):
        yield from blocks_of(i.read(_fields(settings)), n, i.source, record, BLOCK)
        record = 0


def _write(writer: SetWriter, block: Block, encoded: Encoded, i: Input, on_error: str) -> None:
    """Write a block's documents and enter it into the books; ValueError if it may not have what it has."""
    bad = [entry for entry in encoded.skipped if entry[1] != "empty"]
    if bad and on_error == "stop":
        writer.commit()
        number, _, detail = bad[0]
        raise _bad(i, number + 1, detail)
    start = 0
    for split, name, tokens, text_bytes in encoded.documents:
        writer.write(split, name, encoded.ids[start : start + tokens], text_bytes)
        start += tokens
    for number, reason, detail in encoded.skipped:
        line = {"source": i.source, "name": i.name, "record": number + 1, "reason": reason, "detail": detail[:200]}
        writer.log("skipped.jsonl", line)
    writer.count(i.source, len(encoded.documents), [reason for _, reason, _ in encoded.skipped])
    writer.cursor = [block.input, block.first + len(block.records)]
    if block.last:
        digest = i.sha256()
        if i.has_changed():
            raise _changed(i, writer.out)
        writer.log("inputs.jsonl", {**_entry(i), "sha256": digest, **writer.current})
        writer.next_input()


def _write_manifest(out: Path, plan: dict, writer: SetWriter, complete: bool) -> None:
    """Each split's left_over: tokens at the ends of its sources that fill no window of so many."""
    splits = writer.splits()
    for entry in splits.values():
        counts = [source["tokens"] for source in entry["sources"].values()]
        entry["left_over"] = {str(T): sum(count_leftover_tokens(n, T) for n in counts) for T in LEFT_OVER_LENGTHS}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "complete": complete,
        **{key: plan[key] for key in ("fingerprint", "settings", "tokenizer", "dtype")},
        "books": writer.books,
        "splits": splits,
        "logs": {name: describe(out / name, out) for name in LOGS} if complete else {},
    }
    write_json(out / MANIFEST, manifest, indent=1)


# ----------------------------------------------------------------------------------------------------------- details


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from preparing a set in `folder`. Raises ValueError if one already does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise ValueError(f"{folder}: another process is preparing this set. Wait until it ends, or stop it.")
        yield
    finally:
        os.close(handle)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Say in the error of a full disk that the same command resumes the preparation."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = f"{folder}: the disk is full. Free some space and run the same command again; it resumes from here."
        raise OSError(error.errno, advice) from error


def _check(held_out: Mapping[str, float], shard_tokens: int, on_error: str, workers: int | None) -> None:
    if unknown := set(held_out) - set(SPLITS[1:]):
        raise ValueError(f"held_out: unknown split {min(unknown)!r}; give shares of {' and '.join(SPLITS[1:])}")
    if min(held_out.values(), default=0) < 0 or sum(held_out.values()) >= 1:
        raise ValueError(f"held_out={dict(held_out)}: shares must be 0 or more and leave some for training")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r} must be 'stop' or 'skip'")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shard_tokens(settings: dict) -> dict[str, int]:
    most = settings["shard_tokens"]
    shares = settings["held_out"]
    return {"train": most} | {split: min(most, max(HELD_OUT_SHARD, int(most * shares[split]))) for split in shares}


def _key(i: Input) -> dict:
    return {"source": i.source, "name": i.name, "bytes": i.size}


def _entry(i: Input) -> dict:
    return {**_key(i), "mtime_ns": i.mtime_ns}


def _fields(settings: dict) -> list[str]:
    return [settings[key] for key in ("text_field", "source_field") if settings[key]]


def format_counts(books: dict) -> list[str]:
    """A line for each source."""
    return [
        f"{source}: {book['read']:,} documents read, {book['written']:,} written"
        + "".join(f", {count:,} left out ({reason})" for reason, count in sorted(book["skipped"].items()))
        for source, book in books.items()
    ]


def _bad(i: Input, number: int, detail: str) -> ValueError:
    return ValueError(
        f"{i}:{number}: {detail}. To leave out and count such documents: on_error='skip', --on-error skip"
    )


def _changed(i: Input, out: Path) -> ValueError:
    return ValueError(
        f"{i} has changed since {out} was begun, which may hold a part of it as it was: put it back, with the time of "
        "its last change, or prepare the set anew (overwrite=True, --overwrite)"
    )


def _difference(old: dict, new: dict | None) -> list[str]:
    return [key for key in new or () if old.get(key) != new[key]]


def _written(plan: dict, out: Path) -> dict:
    write_json(out / PLAN, plan)
    return plan


def _save_tokenizer(tokenizer: Tokenizer, out: Path) -> dict:
    name = tokenizer.save(out)
    paths = sorted((out / name).iterdir()) if (out / name).is_dir() else [out / name]
    return {
        "name": name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "before": tokenizer.bos_ids,
        "after": tokenizer.eos_ids,
        "round_trips": tokenizer.round_trips,
        "files": [describe(path, out) for path in paths],
    }


def _set_files(out: Path) -> list[Path]:
    """The files of a set, finished or not, in `out`; ValueError if other files are there."""
    ours = []
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if OUR_FILES.fullmatch(name) or name in (PLAN, JOURNAL) or path.match(".*.tmp"):
            ours.append(path)
        elif path.is_file() and not path.name.startswith("."):
            raise ValueError(f"{path} is not part of a prepared set: choose another folder than {out}")
    return ours


def _clear(out: Path) -> None:
    """Remove a set, finished or not, from `out`. ValueError, and nothing removed, if other files are there."""
    # First what says that there is a set, or a part of one.
    for path in sorted(_set_files(out), key=lambda path: {MANIFEST: 0, PLAN: 1}.get(path.name, 2)):
        path.unlink()
    for path in sorted(out.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
