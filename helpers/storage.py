"""Folders that are whole or not there: written aside, hashed, renamed into place, one writer at a time.

A reader never sees half an index, whatever was killed when: a folder is read under the lock that its writer holds,
and every file in it must match the hash that its manifest gives, before any of them is parsed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from helpers.chunking import printable

MANIFEST = "manifest.json"
LOCK_SECONDS = 600


class IndexRefused(Exception):
    """An index on disk that can't be trusted or doesn't fit; the message says how to build it anew."""


def refused(folder: Path, why: str) -> IndexRefused:
    """Return the exception for an index that can't be used, with what to do."""
    return IndexRefused(
        f"The index in {printable(folder)} is refused: {why}. Delete that folder, and the next "
        "`python -m helpers index` (or Index.open) builds it anew from the documents."
    )


@contextmanager
def locked(folder: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of a folder or file; put back what a writer killed between its two renames left.

    The operating system frees the lock of a process that dies. Raises TimeoutError after `seconds`, or `LOCK_SECONDS`;
    OSError where nothing can be written.
    """
    from filelock import FileLock, Timeout

    seconds = LOCK_SECONDS if seconds is None else seconds
    lock = FileLock(folder.with_name(folder.name + ".lock"), timeout=seconds)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise TimeoutError(
            f"Another process holds the lock {printable(lock.lock_file)} (waited {seconds} s): wait for it or stop it."
        ) from error
    except OSError as error:
        raise OSError(
            f"{printable(folder)} can't be written ({error.strerror}): make it writable, or name another place."
        ) from error
    try:
        if not folder.exists() and _aside(folder, "old").exists():
            _aside(folder, "old").rename(folder)
        yield
    finally:
        lock.release()


def put_back(folder: Path) -> None:
    """Call this before reading a folder without its lock: where a writer was between its renames, it is there again."""
    if not folder.exists() and _aside(folder, "old").exists():
        with locked(folder):
            pass


def holds_other(folder: Path, mark: str) -> bool:
    """Say whether a place holds something else than a folder with the file `mark` in it; an empty folder holds none."""
    return folder.exists() and not (folder / mark).exists() and (not folder.is_dir() or any(folder.iterdir()))


@contextmanager
def put_in_place(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into; when that is done, rename it to `folder`. Call it with the lock held.

    Where something goes wrong, what was written goes, and `folder` is as it was.
    """
    new = _aside(folder, "new")
    shutil.rmtree(new, ignore_errors=True)  # what a killed writer left
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(_aside(folder, "old"), ignore_errors=True)
        folder.rename(_aside(folder, "old"))
    new.rename(folder)
    shutil.rmtree(_aside(folder, "old"), ignore_errors=True)


def write_manifest(folder: Path, version: int, facts: Mapping) -> None:
    """Write `manifest.json`: the version of the format, `facts`, and the SHA-256 of every file in the folder."""
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(_files_below(folder))}
    manifest = {"format": version, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def checked_manifest(folder: Path, version: int) -> dict:
    """Return the manifest after comparing every file with it. Raises IndexRefused with what doesn't match."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found, listed = manifest["format"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise refused(folder, f"its {MANIFEST} is damaged") from error
    if found != version:
        raise refused(folder, f"its format is {found}, this code writes {version}")
    present = {path.relative_to(folder).as_posix(): path for path in _files_below(folder)}
    present.pop(MANIFEST)
    for name in sorted(listed.keys() | present.keys()):
        if name not in present:
            raise refused(folder, f"{printable(name)} is missing")
        if name not in listed:
            raise refused(folder, f"{printable(name)} doesn't belong to it")
        if sha256_of(present[name]) != listed[name]:
            raise refused(folder, f"{printable(name)} doesn't match its hash in {MANIFEST}")
    return manifest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file's bytes; '' for what can't be read, so that it is tried again."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _aside(folder: Path, what: str) -> Path:
    """Return where a folder is written, or kept until the new one is there: hidden, as nobody names a backup so."""
    return folder.with_name(f".{folder.name}.{what}")


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]
