"""Find the text to prepare: files, folders and URLs, Python's standard library, data sets of the Hugging Face hub.

A source is a name and its inputs, in order. An input is a file, or one file of a data set that is streamed.
glalm.prepare.input_files reads it.
"""

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from glalm.prepare.input_files import FileInput, HubInput, Input, RemoteInput
from glalm.prepare.records import SUFFIXES
from glalm.prepare.remote import URL, RemoteFile, RemoteStatus, list_remote_files

# Tests are a third of the standard library and repeat themselves, and site-packages are not part of it.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """A named list of inputs. `skipped_files` are files of its folder that have an unknown suffix."""

    name: str
    inputs: tuple[FileInput | RemoteInput | HubInput, ...]
    skipped_files: tuple[Path | RemoteFile, ...] = ()


def parse_source(spec: str | os.PathLike | Source) -> Source:
    """Return the source that the command line calls `spec`, which is [NAME=] followed by one of

        stdlib                                 the standard library of the running interpreter
        a file or a folder                     its default name is that of the folder, or of the folder it lies in
        a URL                                  a file, or all files below it, of an object store: s3://bucket/folder
        hf:DATASET[:CONFIG[:SPLIT]][@REVISION] a data set of the Hugging Face hub, or a local folder of one, streamed

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The source has nothing to read.
    """
    if isinstance(spec, Source):
        return spec
    name = ""
    address = os.fspath(spec)
    if not Path(address).exists() and (match := re.fullmatch(r"([\w.-]+)=(.+)", address)):
        name, address = match.groups()
    if address == "stdlib":
        return find_stdlib(name=name or "stdlib")
    if URL.fullmatch(address):
        return find_remote_files(address, name)
    if address.startswith("hf:"):
        return find_hub_dataset(address.removeprefix("hf:"), name)
    return find_local_files(address, name)


def find_stdlib(root: str | os.PathLike | None = None, name: str = "stdlib") -> Source:
    """Return Python's standard library as a source: its .py files in the order of their paths, without tests.

    These are about 700 documents and 12 MB; the longest have several hundred thousand characters.

    Args:
        root: The folder of the library. None is that of the running interpreter.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    inputs = []
    for file in _list_files(root):
        parts = file.split("/")
        # These were written when the interpreter was built. Without them, a version of Python always gives one text.
        is_generated = parts[0].startswith("config-") or parts[-1].startswith("_sysconfigdata")
        if file.endswith(".py") and NOT_LIBRARY.isdisjoint(parts) and not is_generated and (root / file).is_file():
            inputs.append(_describe_file(name, root, file))
    if not inputs:
        raise ValueError(f"{root} has no .py files of a standard library. Name a folder of text instead.")
    return Source(name, tuple(inputs))


def find_local_files(path: str | os.PathLike, name: str = "") -> Source:
    """Return the source that consists of one file, or of all files below a folder.

    Only files whose names end in one of SUFFIXES, ignoring case, are read. Hidden files and folders are skipped.

    Raises:
        FileNotFoundError: `path` does not exist, or a link below it leads nowhere.
        ValueError: No file has one of SUFFIXES.
    """
    path = Path(path)
    if not path.exists():
        _refuse_dangling_link(path)
        raise FileNotFoundError(f"{path} does not exist. A source is 'stdlib', a path, a URL, or hf:DATASET.")
    if not path.is_dir() and not path.is_file():
        problem = f"{path} is a pipe, a socket or a device, which can be read only once"
        raise ValueError(f"{problem}. Write its content to a file, and name that.")
    folder = path if path.is_dir() else path.parent
    name = name or folder.resolve().name or "files"
    inputs = []
    skipped = []
    for file in _list_files(path) if path.is_dir() else [path.name]:
        has_suffix = file.lower().endswith(SUFFIXES)
        if has_suffix or not Path(file).suffix:
            _refuse_dangling_link(folder / file)
        if has_suffix and (folder / file).is_file():
            inputs.append(_describe_file(name, folder, file))
        else:
            skipped.append(folder / file)
    if not inputs:
        raise ValueError(f"{path}: no file to read. File names must end in one of {', '.join(SUFFIXES)}.")
    return Source(name, tuple(inputs), tuple(skipped))


def find_remote_files(url: str, name: str = "") -> Source:
    """Return the source that consists of one file at a URL, or of all files below it, as `find_local_files` does.

    Raises:
        FileNotFoundError: There is nothing at `url`.
        ValueError: No file has one of SUFFIXES, or `url` cannot be listed.
    """
    url = url.rstrip("/")
    found = list(list_remote_files(url))
    is_file = url.endswith(f"/{found[0][0]}") and len(found) == 1
    folder = url.rpartition("/")[0] if is_file else url
    name = name or PurePosixPath(folder).name
    inputs = []
    skipped = []
    for file, status in found:
        path = RemoteFile(f"{folder}/{file}")
        if any(part.startswith(".") for part in file.split("/")):
            continue
        if file.lower().endswith(SUFFIXES):
            inputs.append(RemoteInput(name, file, status.st_size, status.st_mtime_ns, path))
        else:
            skipped.append(path)
    if not inputs:
        raise ValueError(f"{url}: no file to read. File names must end in one of {', '.join(SUFFIXES)}.")
    return Source(name, tuple(inputs), tuple(skipped))


def _refuse_dangling_link(path: Path) -> None:
    """Raise FileNotFoundError if `path` is a link that leads nowhere: text that should be there is missing."""
    if path.is_symlink() and not path.exists():
        problem = f"{path} is a link to {os.readlink(path)}, which does not exist"
        raise FileNotFoundError(f"{problem}. Restore what it leads to, or remove the link.")


def _describe_file(source: str, root: Path, name: str) -> FileInput:
    """Return the file `root` / `name` as an input, with its current size and time."""
    status = (root / name).stat()
    identity = (status.st_dev, status.st_ino)
    return FileInput(source, name, status.st_size, status.st_mtime_ns, root / name, identity)


def find_hub_dataset(spec: str, name: str = "") -> Source:
    """Return a data set that `datasets` finds as a source.

    Args:
        spec: DATASET[:CONFIG[:SPLIT]][@REVISION]. SPLIT defaults to train.
    """
    from datasets import load_dataset_builder  # takes seconds

    address, _, revision = spec.partition("@")
    path, config, split, *_ = [*address.split(":"), "", ""]
    try:
        builder = load_dataset_builder(path, config or None, revision=revision or None)
        dataset = builder.as_streaming_dataset(split or "train")
    except Exception as error:  # `datasets` and its libraries raise many kinds.
        problem = f"hf:{spec}: `datasets` cannot open it: {error}"
        advice = "If its first file is damaged, download the files and name their folder without hf:."
        raise ValueError(f"{problem}\n{advice}") from error
    # The builder would convert all columns of each file to the types of the first file's, and fail for a column that
    # is not even read. Without these types it leaves them as they are.
    builder.info.features = None
    name = name or Path(path).name
    count = dataset.num_shards
    size = (dataset.info.download_size or 0) // count or 1
    files = (builder.config.data_files or {}).get(split or "train", [])
    addresses = files if len(files) == count else [""] * count
    inputs = []
    for index, file in enumerate(addresses):
        shard = f"{address}, {_find_path_in_dataset(file, path) or f'shard {index} of {count}'}"
        status = Path(file).stat() if Path(file).is_file() else RemoteStatus(size, None)
        version = file or str(builder.hash)
        inputs.append(HubInput(name, shard, status.st_size, status.st_mtime_ns, dataset, index, file, version))
    return Source(name, tuple(inputs))


def _find_path_in_dataset(file: str, folder: str) -> str:
    """Return the path of a file in its data set, on the hub or in a local folder; "" if it is unknown.

    It lacks the revision: files of that path are taken for one as data is added, and as a preparation is resumed.
    """
    if on_hub := re.fullmatch(r"hf://datasets/[^@]+@[^/]+/(.+)", file):
        return on_hub[1]
    root = Path(folder).absolute()
    return str(Path(file).relative_to(root)) if Path(file).is_relative_to(root) else ""


def collect_inputs(sources: list[Source], out: Path | None = None) -> tuple[list[Input], list[FileInput]]:
    """Return the inputs of all `sources`, in order, and the inputs that are other names of one of these files.

    A file that several links or sources lead to is read once: under a path without links below the folder of its
    source if there is one, or else under the first.

    Args:
        out: The folder of the set, an absolute path without links. Files in it are excluded: a set that is written into
            the folder of a source is not read as text.

    Raises:
        ValueError: There are no inputs, or two have the same source and name.
    """
    if not sources:
        raise ValueError("There are no sources. Name at least one: 'stdlib', a file or folder of text, or hf:DATASET.")
    inputs: dict[tuple[str, str], Input] = {}
    for source in sources:
        for source_input in source.inputs:
            if isinstance(source_input, FileInput) and out in source_input.path.resolve().parents:
                continue
            other = inputs.get(source_input.key)
            if other:
                both = f"{other} and {source_input} would both be {source_input.name!r} of the source {source.name!r}."
                raise ValueError(f"{both} Give one of them another name (NAME=PATH), or remove it if it is a copy.")
            inputs[source_input.key] = source_input
    if not inputs:
        raise ValueError(f"All sources lie in {out}, the folder of the set. Choose another folder with --out.")
    repeated = _find_repeated_files(inputs.values())
    for file in repeated:
        del inputs[file.key]
    return list(inputs.values()), repeated


def _find_repeated_files(inputs: Iterable[Input]) -> list[FileInput]:
    """Return the inputs that are the same file as another one, which is to be read in place of them."""
    by_identity: dict[tuple[int, int], list[FileInput]] = {}
    for source_input in inputs:
        if isinstance(source_input, FileInput):
            by_identity.setdefault(source_input.identity, []).append(source_input)
    repeated = []
    for names in by_identity.values():
        if len(names) > 1:
            read = next((file for file in names if not _has_link(file)), names[0])
            repeated += [file for file in names if file is not read]
    return repeated


def _has_link(file: FileInput) -> bool:
    """Return whether the path of a file contains a link below the folder of its source."""
    folder = str(file.path).removesuffix(file.name)
    return os.path.realpath(file.path) != os.path.join(os.path.realpath(folder), file.name)


def describe_unread_files(sources: Iterable[Source], repeated: list[FileInput], out: Path | None = None) -> list[str]:
    """Return the messages about files that are not read: those skipped, but for the folder `out`, and other names."""
    messages = []
    if skipped := describe_skipped_files(sources, out):
        messages.append(skipped)
    if repeated:
        other_names = f"{len(repeated):,} other names of files that are read already (links), such as {repeated[0]}"
        messages.append(f"Skipped {other_names}")
    return messages


def describe_skipped_files(sources: Iterable[Source], out: Path | None = None) -> str:
    """Return a message that counts skipped files by suffix, without those in the folder `out`; "" if there are none."""
    counts = Counter()
    for source in sources:
        for path in source.skipped_files:
            kind = path.suffix.lower() or "no suffix"
            if isinstance(path, RemoteFile):
                counts[kind] += 1
            elif out not in path.resolve().parents:
                is_file = path.is_file() or path.is_symlink()
                counts[kind if is_file else "pipes, sockets or devices"] += 1
    found = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())
    return f"Skipped what is not a file that ends in {', '.join(SUFFIXES)}: {found}" if counts else ""


def _list_files(folder: Path, parents: tuple[str, ...] = ()) -> list[str]:
    """Return the sorted names of what is below `folder`, but not of folders.

    Links to folders are followed, except to its `parents`.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return []
    names = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        # os.path.isdir returns False for links in a circle, for which entry.is_dir() raises.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            names += [f"{entry.name}/{name}" for name in _list_files(Path(entry), (*parents, real))]
        else:
            names.append(entry.name)
    return sorted(names)
