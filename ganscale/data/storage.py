"""Where files of a shard set come from: a directory, S3, HTTP, anything that fsspec opens.

A store answers batches of byte ranges. What is wrong with one file (it is missing, or shorter than
the range) is that range's error. What is wrong on the way there (refused connections, resets, cuts,
stalls, 5xx) is retried with exponential backoff and jitter until the deadline, each range for
itself, so a cut costs the range that it hit and nothing else. The libraries' own retries are
switched off: they know nothing of the deadline, and would multiply with these. Credentials and
endpoints come from the stores' usual environment variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
...).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from ganscale.errors import ConfigError, DataError

__all__ = [
    "LocalStore",
    "MissingData",
    "OpenFile",
    "RemoteStore",
    "RetryPolicy",
    "SlowStoreWarning",
    "Span",
    "Store",
    "StoreError",
    "cut_short",
    "is_url",
    "open_store",
]

_PIECE_BYTES = 2**20
_PIECES_AT_ONCE = 8
_MAX_REQUESTS = 32
_MAX_OPEN_FILES = 128
_PATIENCE_SECONDS = 10.0
_READ_AHEAD_BYTES = 2**26
# Bugs of this program or of a library: to retry them would hide them until the deadline.
_PROGRAMMING_ERRORS = (AssertionError, AttributeError, NameError, TypeError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # botocore's, not imported


class StoreError(DataError):
    """A store that could not be reached within the deadline, or that refuses access."""


class MissingData(DataError):
    """A file that is not in the store, or ends before the bytes that were asked for."""


class SlowStoreWarning(UserWarning):
    """A store that sends far more than was asked for, or has not answered for a while."""


class Span(NamedTuple):
    """Bytes of a file of a store."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class RetryPolicy:
    """For how long failing requests to a store are retried."""

    deadline_seconds: float = 60.0
    """From the first attempt until the error."""
    attempt_seconds: float = 30.0
    """For one request of at most a megabyte; then the server is taken for stalled."""
    first_delay_seconds: float = 0.2
    max_delay_seconds: float = 10.0

    def delay(self, attempt: int) -> float:
        """Seconds to wait after attempt 1, 2, ...: doubled each time, with jitter.

        Many workers lose a store at the same moment. The jitter keeps them from coming back at the
        same moment; the lower half stays fixed, so that no worker retries at once.
        """
        longest = min(self.max_delay_seconds, self.first_delay_seconds * 2.0 ** (attempt - 1))
        return random.uniform(longest / 2, longest)

    def delays(self) -> Iterator[float]:
        """Seconds to wait after each failed attempt; ends when the deadline would pass."""
        deadline = time.monotonic() + self.deadline_seconds
        for attempt in itertools.count(1):
            delay = self.delay(attempt)
            if time.monotonic() + delay > deadline:
                return
            yield delay


class Store(Protocol):
    """Read access to the files of one directory or prefix."""

    @property
    def location(self) -> str:
        """Absolute path or URL."""
        ...

    def read(self, name: str) -> bytes:
        """A whole small file. Raises `MissingData` or `StoreError`."""
        ...

    def read_spans(self, spans: Sequence[Span]) -> list[bytes | MissingData]:
        """The bytes of each span, or why it has none. Raises `StoreError`."""
        ...

    def local_copy(self, name: str, num_bytes: int) -> AbstractContextManager[Path]:
        """A path to a file of known size, for as long as the context lasts."""
        ...


def is_url(location: str) -> bool:
    """Whether a location is a URL and not a path."""
    return "://" in location


def open_store(location: str | Path, policy: RetryPolicy | None = None) -> Store:
    """The store at a path or URL. Raises `ConfigError` if nothing can open such URLs."""
    if not is_url(str(location)):
        return LocalStore(location)
    return RemoteStore(str(location), policy or RetryPolicy())


class LocalStore:
    """A directory, read with pread, which threads can share a descriptor for."""

    def __init__(self, location: str | Path) -> None:
        self.root = Path(location).expanduser().absolute()
        self.location = str(self.root)
        # A limit on open files, as a set may have more shards than a process may open. A file that
        # is evicted while another thread reads from it closes when that thread lets go of it.
        self._opened = lru_cache(maxsize=_MAX_OPEN_FILES)(lambda name: OpenFile(self.root / name))

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise MissingData(f"{self.root / name} cannot be read: {error.strerror}") from None

    def read_spans(self, spans: Sequence[Span]) -> list[bytes | MissingData]:
        return [self._read_span(span) for span in spans]

    @contextmanager
    def local_copy(self, name: str, num_bytes: int) -> Iterator[Path]:
        path = self.root / name
        if not path.is_file():
            raise MissingData(f"{path}: missing")
        if path.stat().st_size != num_bytes:
            raise MissingData(f"{path}: {path.stat().st_size} bytes, expected {num_bytes}")
        yield path

    def _read_span(self, span: Span) -> bytes | MissingData:
        try:
            data = os.pread(self._opened(span.name).descriptor, span.length, span.start)
        except OSError as error:
            path = self.root / span.name
            return MissingData(f"shard {path} cannot be opened: {error.strerror}")
        return data if len(data) == span.length else cut_short(self.root / span.name, span, data)


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
        with contextlib.suppress(AttributeError, OSError):  # where opening it has failed
            os.close(self.descriptor)


class RemoteStore:
    """A prefix of an object store or HTTP server, read with range requests through fsspec."""

    def __init__(self, location: str, policy: RetryPolicy) -> None:
        self.location = location.rstrip("/")
        self.policy = policy
        try:
            fs, self._root = fsspec.core.url_to_fs(self.location, **_options(location))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{location} cannot be opened: {_one_line(error)}") from None
        if hasattr(fs, "retries"):  # those of s3fs itself, besides its client's in `_options`
            fs.retries = 1
        self._fs: AsyncFileSystem = (
            fs if isinstance(fs, AsyncFileSystem) else AsyncFileSystemWrapper(fs)
        )

    def read(self, name: str) -> bytes:
        (data,) = self._run([_Request(name, None, None)])
        if isinstance(data, MissingData):
            raise data
        return data

    def read_spans(self, spans: Sequence[Span]) -> list[bytes | MissingData]:
        return self._run([_Request(s.name, s.start, s.start + s.length) for s in spans])

    @contextmanager
    def local_copy(self, name: str, num_bytes: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ganscale-") as folder:
            path = Path(folder) / Path(name).name
            with path.open("wb") as file:
                self.fetch(name, num_bytes, file)
            yield path

    def fetch(self, name: str, num_bytes: int, file: IO[bytes]) -> None:
        """Copy a file of known size, a megabyte a request. Raises `MissingData`, `StoreError`."""
        # In pieces, so that a transfer that is cut off is resumed at the piece that was lost, and
        # the time limit of a request means the same for small and for large files.
        starts = range(0, num_bytes, _PIECE_BYTES)
        spans = [Span(name, start, min(_PIECE_BYTES, num_bytes - start)) for start in starts]
        for first in range(0, len(spans), _PIECES_AT_ONCE):
            for piece in self.read_spans(spans[first : first + _PIECES_AT_ONCE]):
                if isinstance(piece, MissingData):
                    raise piece
                file.write(piece)

    def _run(self, requests: Sequence[_Request]) -> list[bytes | MissingData]:
        # On fsspec's own event loop, which has a thread: callers are threads without one.
        results: list[bytes | MissingData] = sync(self._fs.loop, self._all, requests)
        return results

    async def _all(self, requests: Sequence[_Request]) -> list[bytes | MissingData]:
        free = asyncio.Semaphore(_MAX_REQUESTS)
        return await asyncio.gather(*(self._one(request, free) for request in requests))

    async def _one(self, request: _Request, free: asyncio.Semaphore) -> bytes | MissingData:
        began = time.monotonic()
        attempt = 0
        warned = False
        while True:
            attempt += 1
            try:
                # The time spent waiting for a free slot is not the server's, and does not count.
                async with free:
                    return await asyncio.wait_for(
                        self._attempt(request), self.policy.attempt_seconds
                    )
            except Exception as error:
                cause = _one_line(error)
                if isinstance(error, _PROGRAMMING_ERRORS):
                    raise
                if not _may_pass(error):
                    raise StoreError(f"{self._url(request.name)} is refused: {cause}") from None
                delay = self.policy.delay(attempt)
                if time.monotonic() + delay - began > self.policy.deadline_seconds:
                    raise StoreError(
                        f"{self._url(request.name)} could not be read within "
                        f"{self.policy.deadline_seconds:.0f} s, {attempt} attempts; last: {cause}"
                    ) from None
                # Once for each request: a run that seems to hang should say what it waits for.
                if not warned and time.monotonic() - began > _PATIENCE_SECONDS:
                    warned = True
                    warnings.warn(
                        f"{self._url(request.name)} does not answer ({cause}); asking again for up "
                        f"to {self.policy.deadline_seconds:.0f} s",
                        SlowStoreWarning,
                        stacklevel=2,
                    )
            await asyncio.sleep(delay)

    async def _attempt(self, request: _Request) -> bytes | MissingData:
        path = f"{self._root}/{request.name}"
        try:
            data: bytes = await self._fs._cat_file(path, start=request.start, end=request.end)
        except FileNotFoundError:
            return MissingData(f"{self._url(request.name)}: no such file in the store")
        except Exception as error:
            if not _is_past_the_end(error):
                raise
            data = b""
        if request.start is None or request.end is None:
            return data
        if len(data) > request.end - request.start:
            warnings.warn(
                f"{self.location} ignores Range requests: every read fetches a whole file. Set "
                "data.cache_dir, or serve it with a server that knows them",
                SlowStoreWarning,
                stacklevel=2,
            )
            data = data[request.start : request.end]
        if len(data) == request.end - request.start:
            return data
        # Too few bytes: either the file ends there, which no retry changes, or the connection broke
        # without an error. Only the file's size tells these apart.
        size = (await self._fs._info(path)).get("size")
        if size is not None and size >= request.end:
            raise ConnectionError(f"{len(data)} of {request.end - request.start} bytes came")
        span = Span(request.name, request.start, request.end - request.start)
        return cut_short(self._url(request.name), span, data)

    def _url(self, name: str) -> str:
        return f"{self.location}/{name}"


@dataclass(frozen=True)
class _Request:
    name: str
    start: int | None
    end: int | None


def _options(location: str) -> dict[str, Any]:
    """fsspec's options: no retries by the library, and no listings from a cache."""
    if location.startswith("s3://"):
        return {
            "config_kwargs": {"retries": {"total_max_attempts": 1}},
            "use_listings_cache": False,
        }
    return {}


def _may_pass(error: Exception) -> bool:
    """Whether a retry may help; not after a refusal such as 401, 403 or 405."""
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        return False
    # Of 4xx, only timeouts and "too many requests" pass by themselves. Errors without a status are
    # those of connections, or of libraries that nobody can list; the deadline bounds them.
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))


def _is_past_the_end(error: Exception) -> bool:
    # A range that begins at or after the end of the file, in HTTP's words and in S3's.
    return getattr(error, "status", None) == 416 or "InvalidRange" in str(error)


def cut_short(where: str | Path, span: Span, data: bytes) -> MissingData:
    """The error of a file that ended after `data` of a span."""
    return MissingData(
        f"{where} is truncated: it ends at byte {span.start + len(data)} of a sample that reaches "
        f"to byte {span.start + span.length}"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
