"""Where a run's checkpoints lie: a directory, or a prefix of an object store.

A folder of files appears whole or not at all. In a directory it is written under a temporary name,
fsynced and renamed. An object store has no atomic rename of several objects; there each object
appears whole by itself, and the last one, the manifest, makes the folder count. A claim is a small
file that only one of several writers can create.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec

from ganscale.atomic_files import write_bytes
from ganscale.data.storage import is_url
from ganscale.errors import ConfigError

__all__ = ["Folder", "LocalBackend", "ObjectStoreBackend", "StorageBackend", "open_backend"]

_TEMPORARY = ".tmp-"
_CHUNK_BYTES = 2**24
# The client sends a request at most twice and waits 20 s for each answer, and s3fs repeats a read
# once, so a stalled store is given up after 80 s at most. The caller retries the whole operation
# until a deadline that it knows; longer retries down here would hide a dead store from it.
_TIMEOUT_SECONDS = 20
_NUM_TRIES = 2


class Folder(Protocol):
    """A folder that is being written."""

    def add(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file. In an object store the last one added makes the folder count."""
        ...


class StorageBackend(Protocol):
    """Files below one directory or prefix. All methods raise `OSError` or the store's own error."""

    @property
    def location(self) -> str:
        """Absolute path or URL."""
        ...

    def files(self) -> list[str]:
        """Relative paths of all files, with forward slashes; half-written folders too.

        A directory's empty folders are listed with a slash at the end.
        """
        ...

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's bytes, in pieces; of a file that nobody replaces meanwhile."""
        ...

    def read(self, name: str) -> bytes:
        """A small file, whole, though it may be replaced meanwhile."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file durably; False if it is there already, by this or another writer."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a small file, in place of what is there; readers see either whole."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        ...

    def new_folder(self, name: str) -> Any:
        """A context that gives a `Folder`, which exists when the context ends without an error."""
        ...

    def remove_folder(self, name: str) -> None:
        """Delete a folder; one that is half deleted does not count as existing."""
        ...

    def move_folder(self, name: str, new_name: str) -> None:
        """Give a folder another name."""
        ...


def open_backend(location: str | Path) -> StorageBackend:
    """The backend of a path or URL. Raises `ConfigError` if it can never be written to."""
    return ObjectStoreBackend(str(location)) if is_url(str(location)) else LocalBackend(location)


class LocalBackend:
    """A directory, on this machine or shared."""

    def __init__(self, location: str | Path) -> None:
        self.root = Path(location).expanduser().absolute()
        self.location = str(self.root)
        self._has_durable_path = False

    def files(self) -> list[str]:
        paths = []
        for folder, folders, names in os.walk(self.root):
            path = Path(folder).relative_to(self.root)
            paths += [(path / name).as_posix() for name in names]
            # A writer that was killed before its first file leaves an empty folder to remove.
            if not names and not folders and Path(folder) != self.root:
                paths.append(f"{path.as_posix()}/")
        return sorted(paths)

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def chunks(self, name: str) -> Iterator[bytes]:
        with (self.root / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def create(self, name: str, data: bytes) -> bool:
        path = self.root / name
        self._make_folder(path.parent)
        # Opening with O_EXCL decides which of several writers has the claim, on shared file systems
        # too. It is not written under a temporary name, as others are: a rename replaces what is
        # there. A writer killed right here leaves an empty claim, which readers expect.
        try:
            file = path.open("xb")
        except FileExistsError:
            return False
        with file:
            _write(file, [data])
        _fsync(path.parent)  # the name lies in the folder, and is lost without this
        return True

    def replace(self, name: str, data: bytes) -> None:
        # Only holders' heartbeats come here: after a crash of the machine nobody is alive in it, so
        # an fsync every few seconds would protect nothing.
        write_bytes(self.root / name, data, fsync=False)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Folder]:
        # In the same folder as the final name, since only a rename within one file system is
        # atomic. The name holds the attempt, so no other writer uses this one.
        temporary, final = self.root / f"{_TEMPORARY}{name}", self.root / name
        shutil.rmtree(temporary, ignore_errors=True)  # of an earlier try of this attempt
        self._make_folder(temporary)
        try:
            # The order is what makes it durable. First every file's content (in `add`), then their
            # names in the folder, and only then the rename: the other way round, a power cut could
            # leave the final name with files that are empty. Last the renamed entry itself, because
            # older checkpoints are pruned as soon as this block has ended.
            yield _LocalFolder(temporary)
            _fsync(temporary)
            if final.exists():  # of an earlier try, whose last fsync failed
                shutil.rmtree(final)
            temporary.rename(final)
            _fsync(self.root)  # from here on the folder survives a power cut
        except BaseException:
            # Also where the disk is full: what is left would take the space of the next try.
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def remove_folder(self, name: str) -> None:
        # Renamed first, so that it stops being a checkpoint at one moment: a writer killed in the
        # middle would otherwise leave one with a manifest and without some of its files.
        path, condemned = self.root / name, self.root / f"{_TEMPORARY}removed-{name}"
        with suppress(FileNotFoundError):
            path.rename(condemned)
            path = condemned
        shutil.rmtree(path, ignore_errors=True)

    def move_folder(self, name: str, new_name: str) -> None:
        (self.root / new_name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).rename(self.root / new_name)

    def _make_folder(self, path: Path) -> None:
        """Make a folder, and once make sure that the names of those above survive a power cut."""
        path.mkdir(parents=True, exist_ok=True)
        if not self._has_durable_path:
            # Also of those that others have just made: the run's own folder is one.
            for folder in path.parents:
                try:
                    _fsync(folder)
                except PermissionError:  # nor can anybody here have made a folder in it
                    break
            self._has_durable_path = True


class _LocalFolder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        with (self._path / name).open("xb") as file:
            _write(file, pieces)


def _write(file: IO[bytes], pieces: Iterable[bytes | memoryview]) -> None:
    for piece in pieces:
        file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectStoreBackend:
    """A prefix of a store that fsspec writes to: s3://, gs://, memory:// and others.

    Claims need a store that honours "create only if it is not there" (If-None-Match: *), as S3, GCS
    and Ceph do.
    """

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        if self.location.startswith(("http://", "https://")):
            raise ConfigError(f"{location} cannot be written to: checkpoints need a path, s3://...")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.location, **_options(location))
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{location} cannot be opened: {reason}") from None
        if hasattr(self._fs, "retries"):
            # s3fs repeats reads by itself, besides what its client repeats (see `_options`).
            self._fs.retries = _NUM_TRIES

    # fsspec keeps listings, and other processes write here: each look begins with an empty cache.

    def files(self) -> list[str]:
        self._fs.invalidate_cache()
        prefix = self._root.rstrip("/") + "/"
        return sorted(str(path).removeprefix(prefix) for path in self._fs.find(self._root))

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path(name)))

    def chunks(self, name: str) -> Iterator[bytes]:
        with self._fs.open(self._path(name), "rb", block_size=_CHUNK_BYTES) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def read(self, name: str) -> bytes:
        self._fs.invalidate_cache()
        # In one request, unlike `chunks`, so that no replacement can come between two of them.
        data: bytes = self._fs.cat_file(self._path(name))
        return data

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Not all implementations turn the store's answer to "If-None-Match: *" into
            # FileExistsError; some pass it on in an OSError, or as its cause.
            if "PreconditionFailed" in repr(error) or "PreconditionFailed" in repr(error.__cause__):
                return False
            raise
        return True

    def replace(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Folder]:
        # Nothing to undo after an error: without its manifest the folder does not count, and the
        # next prune of the attempt removes it.
        yield _ObjectFolder(self._fs, self._path(name))

    def remove_folder(self, name: str) -> None:
        """Remove the manifest first: from then on the folder does not count."""
        self._fs.invalidate_cache()
        files = self._fs.find(self._path(name))
        for path in sorted(files, key=lambda path: not path.endswith("/manifest.json")):
            self._fs.rm_file(path)

    def move_folder(self, name: str, new_name: str) -> None:
        self._fs.invalidate_cache()
        for path in self._fs.find(self._path(name)):
            self._fs.mv(path, self._path(f"{new_name}/{path.rpartition('/')[2]}"))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class _ObjectFolder:
    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs, self._path = fs, path

    def add(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        file = self._fs.open(f"{self._path}/{name}", "wb", block_size=2 * _CHUNK_BYTES)
        try:
            for piece in pieces:
                file.write(piece)
            file.close()  # the upload's last request: from here on the object is durable
        except BaseException:
            # Before anything else. A file object of fsspec that is not closed completes its upload
            # when it is garbage collected, and that may come after the next try has written the
            # same name: the older, partial content would replace the newer one.
            file.closed = True
            with suppress(Exception):  # of the store that has just failed
                file.discard()
            raise


def _options(location: str) -> dict[str, Any]:
    """fsspec's options: short timeouts, few repetitions, and no listings from a cache."""
    if location.startswith("s3://"):
        seconds = {"connect_timeout": 10, "read_timeout": _TIMEOUT_SECONDS}
        return {
            "config_kwargs": {**seconds, "retries": {"total_max_attempts": _NUM_TRIES}},
            "use_listings_cache": False,
        }
    return {}
