"""Where shards, checkpoints and copies of run folders lie: a directory, or a prefix of a store.

`open_store` gives the store of a path or URL (s3://, gs://, az://, http(s)://, file://). Both kinds
have the same methods, which `LocalStore` documents: reading ranges and whole files, creating a file
that only one of several writers can create, and folders that appear whole or not at all. `local`
does it with system calls and `objects` with requests; `retry` holds the policy by which those that
fail are repeated until a deadline.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ganscale.errors import ConfigError
from ganscale.storage.local import LocalStore, OpenFile
from ganscale.storage.objects import ObjectStore
from ganscale.storage.retry import RetryPolicy, SlowStoreWarning, StoreError, one_line, retry
from ganscale.storage.spans import MissingData, Span

__all__ = [
    "LocalStore",
    "MissingData",
    "ObjectStore",
    "OpenFile",
    "RetryPolicy",
    "SlowStoreWarning",
    "Span",
    "Store",
    "StoreError",
    "is_url",
    "one_line",
    "open_store",
    "retry",
]

Store = LocalStore | ObjectStore


def is_url(location: str) -> bool:
    """Whether a location is a URL and not a path."""
    return "://" in location


def open_store(
    location: str | Path, policy: RetryPolicy | None = None, *, for_writing: bool = False
) -> Store:
    """The store at a path or URL. Raises `ConfigError` if there is none, or it is read-only."""
    url = str(location)
    if not is_url(url):
        return LocalStore(location)
    if url.startswith("file://"):
        return LocalStore(unquote(urlsplit(url).path))
    if for_writing and url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} cannot be written to: checkpoints need a path, s3://...")
    return ObjectStore(url, policy or RetryPolicy(), for_writing=for_writing)
