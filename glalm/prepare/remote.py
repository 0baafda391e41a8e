"""Files of an object store, such as S3, which are read through fsspec as those of a disk are."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

URL = re.compile(r"[A-Za-z][\w+.-]+://(.+)")
BUFFER_BYTES = 2**20


def open_url(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL, and the path in it.

    Raises:
        ValueError: There is no such filesystem, or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        advice = "For s3://, install the extra s3: pip install 'glalm[s3]'"
        raise ValueError(f"{url} cannot be opened: {error}. {advice}") from error


class RemoteStatus(NamedTuple):
    """The size of a remote file, and the time of its last change if its filesystem knows it, as in os.stat_result."""

    st_size: int
    st_mtime_ns: int | None


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, with those methods of Path by which files are read."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    def stat(self, from_cache: bool = True) -> RemoteStatus:
        filesystem, path = open_url(self.url)
        if not from_cache:
            filesystem.invalidate_cache()
        return read_status(filesystem.info(path))

    def open(self, mode: str = "rb") -> IO[bytes]:
        filesystem, path = open_url(self.url)
        return io.BufferedReader(filesystem.open(path, mode), BUFFER_BYTES)

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()


def read_status(info: dict[str, Any]) -> RemoteStatus:
    """Return the status in what a filesystem of fsspec says of a file. Each names the time of change as it likes.

    The time is in whole seconds, because S3 may give fractions of them in a listing and not for a single file.
    """
    time = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("last_modified")
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    seconds = time.timestamp() if isinstance(time, datetime) else time
    return RemoteStatus(info["size"], None if seconds is None else int(seconds) * 10**9)


def list_remote_files(url: str) -> Iterator[tuple[str, RemoteStatus]]:
    """Yield the path below `url` and the status of each file, sorted; the path of a single file is its name.

    Raises:
        FileNotFoundError: There is nothing at `url`.
        ValueError: The filesystem cannot list it, or lists files without their sizes, as that of http:// does.
    """
    filesystem, root = open_url(url)
    try:
        found = filesystem.find(root, detail=True)
    except Exception as error:  # Filesystems raise many kinds.
        problem = f"{url} cannot be listed ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}. Check the address and your credentials for it.") from error
    if not found:
        raise FileNotFoundError(f"{url}: there are no files.")
    folder = root.rstrip("/").rpartition("/")[0] if list(found) == [root] else root.rstrip("/")
    for path, info in sorted(found.items()):
        if info.get("size") is None:
            problem = f"{url}: its files are listed without their sizes, which are needed to read them"
            raise ValueError(f"{problem}. Download them to a disk, and name their folder.")
        yield path.removeprefix(f"{folder}/"), read_status(info)
