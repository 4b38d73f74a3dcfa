"""A directory, on this machine or shared, that is written so that a crash loses nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ganscale.atomic_files import replacing
from ganscale.storage.retry import StoreError
from ganscale.storage.spans import MissingData, Span

_TEMPORARY = ".tmp-"
_CHUNK_BYTES = 2**24
_MAX_OPEN_FILES = 128
_READ_AHEAD_BYTES = 2**26

Pieces = Iterable[bytes | memoryview]
Add = Callable[[str, Pieces], None]
"""Writes a file of a folder. In an object store the last one makes the folder count."""


class LocalStore:
    """The files of a directory, named by relative paths with forward slashes.

    Methods raise an `OSError` where trying again may help, and `MissingData` for a file that is not
    there; `read_spans` raises `StoreError` where the system cannot read a file that is. Threads
    share the open files, and need no lock for that.
    """

    def __init__(self, location: str | Path) -> None:
        self.root = Path(location).expanduser().absolute()
        self.location = str(self.root)
        self._has_durable_path = False
        # A limit on open files, as a set may have more shards than a process may open. A file that
        # is evicted while another thread reads from it closes when that thread lets go of it.
        self._opened = lru_cache(maxsize=_MAX_OPEN_FILES)(lambda name: OpenFile(self.root / name))

    def read(self, name: str) -> bytes:
        """A small file, whole, though it may be replaced meanwhile."""
        return b"".join(self.chunks(name))

    def read_spans(self, spans: Sequence[Span]) -> list[bytes | MissingData]:
        """The bytes of each span, or why it has none."""
        return [self._read_span(span) for span in spans]

    def _read_span(self, span: Span) -> bytes | MissingData:
        try:
            # Held while it is read: a thread that has opened a file at the same time as another one
            # may have the only reference to it.
            file = self._opened(span.name)
            data = os.pread(file.descriptor, span.length, span.start)
        except FileNotFoundError as error:
            path = self.root / span.name
            return MissingData(f"shard {path} cannot be opened: {error.strerror}")
        except OSError as error:
            # A disk or a process in trouble, and not a damaged sample, which may be left out.
            path = self.root / span.name
            raise StoreError(f"shard {path} cannot be read: {error.strerror}") from error
        if len(data) < span.length:
            return MissingData.cut_short(self.root / span.name, span, len(data))
        return data

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file in pieces; one that nobody replaces meanwhile."""
        try:
            file = (self.root / name).open("rb")
        except FileNotFoundError as error:
            raise MissingData(f"{self.root / name} cannot be read: {error.strerror}") from None
        with file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    @contextmanager
    def local_copy(self, name: str, num_bytes: int) -> Iterator[Path]:
        """A path to a file of known size, for as long as the context lasts."""
        path = self.root / name
        if not path.is_file():
            raise MissingData(f"{path}: missing")
        if path.stat().st_size != num_bytes:
            raise MissingData(f"{path}: {path.stat().st_size} bytes, expected {num_bytes}")
        yield path

    def files(self) -> list[str]:
        """All files, sorted; those of half-written folders, and empty folders with a slash, too."""
        paths = []
        for folder, folders, names in walk(self.root):
            path = Path(folder).relative_to(self.root)
            paths += [(path / name).as_posix() for name in names]
            # A writer that was killed before its first file leaves an empty folder to remove.
            if not names and not folders and Path(folder) != self.root:
                paths.append(f"{path.as_posix()}/")
        return sorted(paths)

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.root / name).is_file()

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file durably; False if it is there already, by this or another writer."""
        path = self.root / name
        self._make_folder(path.parent)
        # Opening with O_EXCL decides which of several writers has the claim, on shared file systems
        # too. It is not written under a temporary name, as others are: a rename replaces what is
        # there. A writer killed right here leaves an empty claim, which readers expect.
        try:
            _add(path, [data])
        except FileExistsError:
            return False
        _fsync(path.parent)  # the name lies in the folder, and is lost without this
        return True

    def replace(self, name: str, pieces: Pieces) -> None:
        """Write a file, in place of what is there; readers see either whole."""
        # Holders' heartbeats come here: after a crash of the machine nobody is alive in it, so an
        # fsync every few seconds would protect nothing.
        with replacing(self.root / name, fsync=False) as file:
            file.writelines(pieces)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Add]:
        """Write the files of a folder, which exists when the block ends without an error."""
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
            yield lambda name, pieces: _add(temporary / name, pieces)
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
        """Delete a folder; one that is half deleted does not count as existing."""
        # Renamed first, so that it stops being a checkpoint at one moment: a writer killed in the
        # middle would otherwise leave one with a manifest and without some of its files.
        path, condemned = self.root / name, self.root / f"{_TEMPORARY}removed-{name}"
        with suppress(FileNotFoundError):
            path.rename(condemned)
            path = condemned
        shutil.rmtree(path, ignore_errors=True)

    def move_folder(self, name: str, new_name: str) -> None:
        """Give a folder another name."""
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


class OpenFile:
    """A descriptor that closes when the last user lets go of it.

    A shard's images are read in a shuffled order, which the system's own read-ahead does not help.
    So the system is told on opening that the first part of the file will be needed (all of it, if
    it is small): that made streaming from a cold disk twice as fast.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # where opening it has failed
            os.close(self.descriptor)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, which skips folders that are removed meanwhile, and raises all other errors.

    `os.walk` skips every folder that it cannot list. A disk that is away for a moment would look
    like an empty one, and a run whose checkpoints lie there would begin anew.
    """

    def report(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    return os.walk(root, onerror=report)


def _add(path: Path, pieces: Pieces) -> None:
    """Write a file durably that is not there. Raises `FileExistsError`."""
    with path.open("xb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
