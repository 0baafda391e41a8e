"""Copy a set to an object store, such as S3, while it is prepared in a folder on a disk.

An object store has no renaming, no locks and no files that grow. So a set is prepared in a staging folder, with all
guarantees of one, and its files are copied when they are complete, the manifest last: what has a manifest.json is a
complete set. What was copied is recorded in the staging folder, from which the same command resumes.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from glalm.data.files import DamagedFile, read_json, write_json
from glalm.data.shards import MANIFEST, PLAN, list_files, read_manifest
from glalm.prepare.remote import open_url
from glalm.prepare.set_folder import SET_FILES

COPIED = ".copied.json"  # in the folder: the SHA-256 of each file that was copied, by its name
STAGING = Path("data/staging")
THREADS = 4


def staging_folder(url: str) -> Path:
    """Return the default folder in which a set is prepared that is copied to `url`.

    Raises:
        ValueError: The path in `url` leads out of that folder.
    """
    scheme, _, path = url.partition("://")
    if ".." in path.split("/"):
        raise ValueError(f"{url} has the part '..', so no folder in {STAGING} is named after it. Add --staging FOLDER.")
    return STAGING / scheme / path.strip("/")


class SetCopy:
    """The copy of the set in `folder` at `url`.

    Only one process may write to a URL at a time, which nothing enforces but the lock of the staging folder.
    """

    def __init__(self, url: str, folder: Path):
        self.url = url.rstrip("/")
        self.folder = folder
        self._filesystem, self._root = open_url(self.url)
        self._pool = ThreadPoolExecutor(THREADS, "glalm-copy")
        self._copied: dict[str, str] = {}
        self._pending: dict[str, Future] = {}  # by the file's name

    def check_target(self, overwrite: bool) -> None:
        """Raise ValueError if the URL has files that are not of a set, or another complete set and not `overwrite`."""
        for name in self._list_files():
            if not SET_FILES.fullmatch(name):
                problem = f"{self.url}/{name} is not part of a prepared set"
                raise ValueError(f"{problem}. Move it elsewhere, or choose another URL with --out.")
        found = self._read_manifest()
        prepared = self._read_fingerprint()
        if found and not overwrite and json.loads(found)["fingerprint"] != prepared:
            problem = f"{self.url} has a complete set, which is not the one that {self.folder} has"
            if prepared is None:
                problem = f"{self.url} has a complete set, but {self.folder}, from which it would be copied, has none"
            advice = "Choose another URL, name the folder of that set with --staging, or replace the set with "
            raise ValueError(f"{problem}. {advice}--overwrite.")

    def begin(self, overwrite: bool) -> None:
        """Prepare to copy the set that the folder has now. With `overwrite`, the URL has no complete set any more."""
        if overwrite:
            self._remove([MANIFEST])
            (self.folder / COPIED).unlink(missing_ok=True)
        elif (self.folder / COPIED).exists():
            self._copied = read_json(self.folder / COPIED, {str: str})

    def copy_shards(self) -> None:
        """Copy the shards that the last commit of the set has and the URL lacks, in threads. Raise what they raised."""
        self._record_copied(wait=False)
        for split in read_manifest(self.folder)["splits"].values():
            self._start_copies(list_files(split))

    def finish(self) -> None:
        """Copy all of a complete set that the URL lacks, then its manifest, and remove the files of other sets.

        Files that are not of a set, which someone has put there in the meantime, stay.

        Raises:
            ValueError: A file is missing at the URL, or has another size than in the folder.
        """
        manifest = read_manifest(self.folder)
        shards = [list_files(split) for split in manifest["splits"].values()]
        entries = [*chain(*shards), *manifest["logs"].values(), *manifest["tokenizer"]["files"]]
        self._record_copied(wait=True)
        self._start_copies(entries)
        self._record_copied(wait=True)
        sizes = self._list_files()
        for entry in entries:
            if sizes.get(entry["file"]) != entry["bytes"]:
                (self.folder / COPIED).unlink()  # Someone changed what was copied.
                problem = f"{self.url}/{entry['file']} is missing"
                if entry["file"] in sizes:
                    found = sizes[entry["file"]]
                    problem = f"{self.url}/{entry['file']} has {found:,} bytes, not {entry['bytes']:,}"
                raise ValueError(f"{problem}. Run the same command again to copy the set again.")
        content = (self.folder / MANIFEST).read_bytes()
        if self._read_manifest() != content:
            self._filesystem.pipe_file(f"{self._root}/{MANIFEST}", content)
        stale = sizes.keys() - {entry["file"] for entry in entries} - {MANIFEST}
        self._remove(sorted(name for name in stale if SET_FILES.fullmatch(name)))

    def close(self) -> None:
        """Wait for the files that are being copied, and drop those that wait."""
        self._pool.shutdown(cancel_futures=True)

    def _start_copies(self, entries: list[dict]) -> None:
        """Copy files that are not copied yet, each in a thread."""
        for entry in entries:
            name = entry["file"]
            if self._copied.get(name) != entry["sha256"] and name not in self._pending:
                self._pending[name] = self._pool.submit(self._copy_file, entry)

    def _copy_file(self, entry: dict) -> dict:
        """Copy a file of the set, and return its entry."""
        target = f"{self._root}/{entry['file']}"
        try:
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)  # Filesystems with folders need them.
            self._filesystem.put_file(str(self.folder / entry["file"]), target)
        except Exception as error:  # Filesystems raise many kinds.
            problem = f"{entry['file']} could not be copied to {self.url} ({type(error).__name__}: {error})"
            raise ValueError(f"{problem}. Run the same command again to resume.") from error
        return entry

    def _record_copied(self, wait: bool) -> None:
        """Record the files that have been copied; with `wait`, all of them. Raise what copying raised."""
        for name, future in list(self._pending.items()):
            if wait or future.done():
                del self._pending[name]
                self._copied[name] = future.result()["sha256"]
        write_json(self.folder / COPIED, self._copied)

    def _list_files(self) -> dict[str, int]:
        """Return the size of each file at the URL, by its path below it."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(self._root, detail=True)
        except Exception as error:  # Filesystems raise many kinds.
            problem = f"{self.url} cannot be listed ({type(error).__name__}: {error})"
            raise ValueError(f"{problem}. Check that the bucket exists and your credentials for it.") from error
        return {path.removeprefix(f"{self._root}/"): entry["size"] for path, entry in found.items()}

    def _read_manifest(self) -> bytes | None:
        try:
            return self._filesystem.cat_file(f"{self._root}/{MANIFEST}")
        except FileNotFoundError:
            return None

    def _read_fingerprint(self) -> str | None:
        """Return the fingerprint of the set in the folder, complete or not, or None if there is none."""
        for name in (PLAN, MANIFEST):
            try:
                return read_json(self.folder / name, {"fingerprint": str})["fingerprint"]
            except (FileNotFoundError, DamagedFile):
                continue
        return None

    def _remove(self, names: list[str]) -> None:
        for name in names:
            if self._filesystem.exists(f"{self._root}/{name}"):
                self._filesystem.rm_file(f"{self._root}/{name}")
