"""A prefix of an object store or HTTP server: s3://, gs://, az://, http(s)://, through obstore.

An object appears whole when its last request is done. There is no atomic rename of several, so the
last object of a folder, its manifest, makes the folder count. A claim is a PUT with "If-None-Match:
*", which one of several writers can do; S3, Google Cloud Storage, Azure and Ceph honour it.
Credentials, region and endpoint come from the store's usual environment variables
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME,
...), from a pod's or instance's role, or from the AWS_PROFILE that is named. obstore has threads,
which do not outlive a fork: processes that use a store are spawned.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, from_url

from ganscale.errors import ConfigError
from ganscale.storage.local import Add, Pieces
from ganscale.storage.retry import RetryPolicy, SlowStoreWarning, StoreError, retry
from ganscale.storage.spans import MissingData, Span

_SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "http", "https")
_PIECE_BYTES = 2**22
_PIECES_AT_ONCE = 4
_MAX_REQUESTS = 32
_PART_BYTES = 2**23
"""Of an upload; S3 wants 5 MiB at least, and at most 10,000 parts."""
_PARTS_AT_ONCE = 4
_NUM_TRIES = 3
"""Of each request to a store that is written to, so that one that fails does not cost a whole
upload, or the caller a whole claim. More would hide a dead store from who knows the deadline."""

Result = TypeVar("Result")


class ObjectStore:
    """The objects below a prefix, with the methods of `LocalStore`.

    `read_spans` and `chunks` retry each request until the policy's deadline and then raise
    `StoreError`, so that a cut costs the range that it hit and nothing else. The others try a few
    times if the store is one `for_writing`, else once. A refusal of access is a `StoreError`.
    """

    def __init__(self, location: str, policy: RetryPolicy, *, for_writing: bool = False) -> None:
        self.location = location.rstrip("/")
        self.policy = policy
        self._num_tries = _NUM_TRIES if for_writing else 1
        self._client = _client(self.location, policy, num_retries=0)
        # obstore repeats a part of an upload, which cannot be done here. It does not repeat what it
        # cannot know to be harmless, creations and deletions, so all others are repeated here.
        self._uploader = _client(self.location, policy, num_retries=self._num_tries - 1)
        self._pool = ThreadPoolExecutor(_MAX_REQUESTS, thread_name_prefix="store")

    def read(self, name: str) -> bytes:
        return self._ask(name, lambda: obstore.get(self._client, name).bytes().to_bytes())

    def read_spans(self, spans: Sequence[Span]) -> list[bytes | MissingData]:
        return list(self._pool.map(self._read_span, spans))

    def chunks(self, name: str, num_bytes: int | None = None) -> Iterator[bytes]:
        if num_bytes is None:
            num_bytes = self._ask(name, lambda: self._size(name))
        # In pieces, so that a transfer that is cut off is resumed at the piece that was lost, and
        # the time limit of a request means the same for small and for large files.
        starts = range(0, num_bytes, _PIECE_BYTES)
        spans = [Span(name, start, min(_PIECE_BYTES, num_bytes - start)) for start in starts]
        for first in range(0, len(spans), _PIECES_AT_ONCE):
            for piece in self.read_spans(spans[first : first + _PIECES_AT_ONCE]):
                if isinstance(piece, MissingData):
                    raise piece
                yield piece

    @contextmanager
    def local_copy(self, name: str, num_bytes: int) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ganscale-") as folder:
            path = Path(folder) / Path(name).name
            with path.open("wb") as file:
                file.writelines(self.chunks(name, num_bytes))
            yield path

    def files(self) -> list[str]:
        return sorted(self._files_in(""))

    def exists(self, name: str) -> bool:
        with suppress(MissingData):
            self._ask(name, lambda: self._size(name))
            return True
        return False

    def create(self, name: str, data: bytes) -> bool:
        def put() -> bool:
            try:
                obstore.put(self._client, name, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        # After a lost answer the second try is refused by the first. Callers look at what is there.
        return self._ask(name, put)

    def replace(self, name: str, pieces: Pieces) -> None:
        rest, head = iter(pieces), bytearray()
        for piece in rest:
            head += piece
            if len(head) > _PART_BYTES:
                break
        try:
            with self._naming(name):
                obstore.put(
                    self._uploader,
                    name,
                    chain([bytes(head)], rest),
                    use_multipart=len(head) > _PART_BYTES,  # a small file takes one request
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                )
        except MissingData as error:  # the upload: its end was done, and the answer to that lost
            raise OSError(str(error)) from None

    def remove(self, name: str) -> None:
        with suppress(MissingData):
            self._ask(name, lambda: obstore.delete(self._client, name))

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Add]:
        # Nothing to undo after an error: without its manifest the folder does not count, and the
        # next prune of the attempt removes it.
        yield lambda file, pieces: self.replace(f"{name}/{file}", pieces)

    def remove_folder(self, name: str) -> None:
        """Remove the manifest first: from then on the folder does not count."""
        files = self._files_in(name)
        for path in sorted(files, key=lambda path: not path.endswith("/manifest.json")):
            self.remove(path)

    def move_folder(self, name: str, new_name: str) -> None:
        for path in self._files_in(name):
            new = f"{new_name}/{path.rpartition('/')[2]}"
            with self._naming(path):
                obstore.rename(self._client, path, new)

    def _files_in(self, name: str) -> list[str]:
        files = self._ask(name, lambda: obstore.list(self._client, name).collect())
        return [file["path"] for file in files]

    def _size(self, name: str) -> int:
        return obstore.head(self._client, name)["size"]

    def _read_span(self, span: Span) -> bytes | MissingData:
        failure = f"{self._url(span.name)} could not be read"
        try:
            return retry(lambda: self._try_span(span), self.policy, failure)
        except MissingData as error:
            return error

    def _try_span(self, span: Span) -> bytes:
        end = span.start + span.length
        try:
            with self._naming(span.name):
                try:
                    options: Any = {"range": (span.start, end)}
                    answer = obstore.get(self._client, span.name, options=options)
                    size, data = answer.meta["size"], answer.bytes().to_bytes()
                except NotSupportedError:
                    data = obstore.get(self._client, span.name).bytes().to_bytes()
                    size, data = len(data), data[span.start : end]
                    if size > span.length:
                        warnings.warn(
                            f"{self.location} ignores Range requests: every read fetches a whole "
                            "file. Set data.cache_dir, or serve it with a server that knows them",
                            SlowStoreWarning,
                            stacklevel=2,
                        )
        except OSError:
            # A range that begins beyond the end of the file is refused, by each kind of store in
            # its own words. Only the file's size tells it from what a retry may cure.
            with self._naming(span.name):
                size, data = self._size(span.name), b""
            if size > span.start:
                raise
        if len(data) == span.length:
            return data
        if size >= end:
            raise ConnectionError(f"{len(data)} of {span.length} bytes came")
        raise MissingData.cut_short(self._url(span.name), span, len(data))

    def _ask(self, name: str, action: Callable[[], Result]) -> Result:
        for _ in range(self._num_tries - 1):
            with suppress(OSError), self._naming(name):
                return action()
            time.sleep(self.policy.delay(1))
        with self._naming(name):
            return action()

    def _url(self, name: str) -> str:
        return f"{self.location}/{name}" if name else self.location

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Let errors of the block be `MissingData`, `StoreError` or `OSError`, with the URL."""
        try:
            yield
        except FileNotFoundError as error:
            is_bucket = "NoSuchBucket" in str(error)
            what = "no such bucket in the store" if is_bucket else "no such file in the store"
            raise MissingData(f"{self._url(name)}: {what}") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreError(f"{self._url(name)} is refused: {_cause(error)}") from None
        except BaseError as error:
            raise OSError(f"{self._url(name)}: {_cause(error)}") from None


def _client(location: str, policy: RetryPolicy, num_retries: int) -> Any:
    options: Any = {
        "client_options": {
            "timeout": timedelta(seconds=policy.attempt_seconds),
            "allow_http": True,  # where the endpoint's URL says so
        },
        "retry_config": {
            "max_retries": num_retries,
            "backoff": {
                "init_backoff": timedelta(seconds=policy.first_delay_seconds),
                "max_backoff": timedelta(seconds=policy.max_delay_seconds),
            },
        },
    }
    scheme = location.partition("://")[0]
    if scheme not in _SCHEMES:
        schemes = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigError(f"{location} cannot be opened: expected a path, {schemes}")
    try:
        if scheme in ("http", "https"):  # else hosts of clouds would become buckets
            return HTTPStore.from_url(location, **options)
        if scheme == "s3":
            # Google's S3 interface, among others, knows no deletion of several objects.
            options["config"] = {"disable_bulk_delete": True}
            if "AWS_PROFILE" in os.environ:
                from obstore.auth.boto3 import Boto3CredentialProvider

                options["credential_provider"] = Boto3CredentialProvider()
        return from_url(location, **options)
    except Exception as error:  # of obstore, or of boto3, which may not be there to name them
        raise ConfigError(f"{location} cannot be opened: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """What obstore says, in one line: without the dump of its structures, but with their kind."""
    text, _, dump = str(error).partition("\n\nDebug source:")
    kind = re.search(r"kind: (\w+)", dump)
    cause = " ".join(text.split())[:300] + (f" ({kind[1].lower()})" if kind else "")
    hint = "no credentials in the environment, and no role of this machine: "
    return hint + cause if "169.254.169.254" in text else cause
