"""Whole shards of a remote store kept in a directory, fetched once per node.

Entries are named by the sha256 of their content, so sets and runs share them, and an entry can be
checked without asking anybody. A file lock for each entry lets one of a node's processes fetch it
while the others wait. Each process compares the hash when it opens an entry, and fetches a damaged
one again. Where there is a limit, the entries that were opened longest ago are removed first; the
system keeps a removed file for a process that still has it open.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from ganscale.data.shards import Shard
from ganscale.errors import ConfigError
from ganscale.storage import MissingData, ObjectStore, OpenFile, Span

_FETCHES_AT_ONCE = 4
_MAX_FETCHES = 3
_MAX_OPEN_FILES = 256
_ROOM_POLL_SECONDS = 0.05


class CachedStore:
    """A remote store behind a local directory of its shards.

    Args:
        store: where shards come from.
        shards: sizes and hashes of the files that can be asked for.
        folder: the cache; made if it is not there, shared by any number of processes.
        limit_bytes: how much may lie there; None for no limit.
    """

    def __init__(
        self, store: ObjectStore, shards: Sequence[Shard], folder: Path, limit_bytes: int | None
    ) -> None:
        self.store = store
        self.location = store.location
        self.folder = folder.expanduser().absolute()
        self.limit_bytes = limit_bytes
        self._shards = {shard.name: shard for shard in shards}
        self._pool = ThreadPoolExecutor(_FETCHES_AT_ONCE, thread_name_prefix="fetch")
        largest = max(shard.num_bytes for shard in shards)
        if limit_bytes is not None and limit_bytes < largest:
            raise ConfigError(
                f"data.cache_limit_gb is less than the largest shard ({largest / 1e9:.3f} GB)"
            )
        # A file that is open keeps its space after its eviction. So a process holds no more open
        # than the limit allows, or the disk could fill although the folder is within it.
        max_open = _MAX_OPEN_FILES if limit_bytes is None else limit_bytes // largest
        self._opened = lru_cache(maxsize=min(max_open, _MAX_OPEN_FILES))(self._open)
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir={folder} cannot be made: {error.strerror}") from None

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch the shards that are not here yet, several at a time."""
        self._files(names)

    def read_spans(self, spans: Sequence[Span]) -> list[bytes | MissingData]:
        files = self._files(list(dict.fromkeys(span.name for span in spans)))
        # A shard whose copy in the store is damaged is not kept. Its spans are read from the store:
        # the samples that are intact are used, and the reader's CRCs name the others.
        direct = [span for span in spans if files[span.name] is None]
        answers = iter(self.store.read_spans(direct) if direct else [])
        return [
            next(answers) if (file := files[span.name]) is None else self._pread(file, span)
            for span in spans
        ]

    def close(self) -> None:
        """End without waiting: fetches that have begun end by themselves, the others never begin.

        Nothing can be read afterwards.
        """
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _files(self, names: Sequence[str]) -> dict[str, OpenFile | None]:
        return dict(zip(names, self._pool.map(self._opened, names), strict=True))

    def _pread(self, file: OpenFile, span: Span) -> bytes | MissingData:
        data = os.pread(file.descriptor, span.length, span.start)
        if len(data) != span.length:
            return MissingData.cut_short(self._entry(self._shards[span.name]), span, len(data))
        return data

    def _open(self, name: str) -> OpenFile | None:
        """The shard's entry, fetched if it is not there; None if the store's copy is damaged."""
        shard = self._shards[name]
        path = self._entry(shard)
        with self._lock(shard.sha256):
            # Hashed whenever a process opens it: disks fail, and fetched files are renamed without
            # an fsync, so that after a crash of the machine one may be cut off. An entry that is
            # wrong three times running is not damaged on its way.
            num_fetches = 0
            while not (path.exists() and _sha256(path) == shard.sha256):
                path.unlink(missing_ok=True)
                if num_fetches == _MAX_FETCHES:
                    return None
                try:
                    self._fetch(shard, path)
                except MissingData:
                    return None
                num_fetches += 1
            # The time of the last use, for evictions; many file systems do not record it by itself.
            os.utime(path)
            return OpenFile(path)

    def _fetch(self, shard: Shard, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        # What a killed fetch of this shard left takes space, and its lock, without which it cannot
        # be evicted, is the one that this fetch holds.
        temporary.unlink(missing_ok=True)
        self._make_room(shard.num_bytes, temporary)
        try:
            with temporary.open("r+b") as file:
                file.writelines(self.store.chunks(shard.name, shard.num_bytes))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int, temporary: Path) -> None:
        """Wait until `num_bytes` fit, and claim them by a file of that size.

        Several processes fetch at the same time. Each sees what the others have claimed, so
        together they stay within the limit; the claim becomes the file that is fetched into.
        """
        while not self._claim(num_bytes, temporary):
            # What others are opening or fetching now can be evicted soon. Nobody who waits here
            # keeps an entry from being evicted: his own is not in the cache yet.
            time.sleep(_ROOM_POLL_SECONDS)

    def _claim(self, num_bytes: int, temporary: Path) -> bool:
        """Evict what is needed for `num_bytes`, and claim them if they fit."""
        with self._lock("evict"):
            entries = self._entries()
            total = sum(state.st_size for state in entries.values())
            for path in sorted(entries, key=lambda path: entries[path].st_mtime_ns):
                if self.limit_bytes is None or total + num_bytes <= self.limit_bytes:
                    break
                if self._evict(path):
                    total -= entries[path].st_size
            if self.limit_bytes is not None and total + num_bytes > self.limit_bytes:
                return False
            with temporary.open("wb") as file:
                file.truncate(num_bytes)
            return True

    def _entries(self) -> dict[Path, os.stat_result]:
        """What lies in the cache now; others may rename and remove meanwhile."""
        entries = {}
        # .tar and .tmp: what is being fetched takes space too.
        for path in self.folder.glob("*.t*"):
            with suppress(FileNotFoundError):
                entries[path] = path.stat()
        return entries

    def _evict(self, path: Path) -> bool:
        """Remove an entry, or what a killed fetch left, unless a process is fetching it now."""
        # Without waiting, since whoever waits here holds the lock of evictions.
        try:
            with self._lock(path.stem, timeout=0):
                path.unlink(missing_ok=True)
        except Timeout:
            return False
        return True

    def _entry(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock", timeout=timeout)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
