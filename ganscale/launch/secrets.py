"""Secrets of a job: from the submitter to the driver, and from the driver to its workers.

Ray shows a job's entrypoint, metadata and runtime environment to whoever may look at its dashboard,
and writes them into logs. So the submitter leaves the values beside the job, under a name that
nobody can guess, in the memory of the cluster's head; the driver takes them from there and deletes
them before it does anything else. Values that no driver takes, the head deletes after ten minutes.
Workers ask the driver's host for them, from process to process.

They are kept from being shown and from being stored, not from people who may run code on the
cluster: those could read the memory of its processes.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping

from ganscale.errors import ConfigError, GanscaleError

__all__ = [
    "NAMES_VARIABLE",
    "PLACE_VARIABLE",
    "for_workers",
    "new_place",
    "own",
    "pack",
    "receive",
    "unpack",
]

PLACE_VARIABLE = "GANSCALE_SECRETS_AT"
"""Where the driver of a job finds its secrets."""
NAMES_VARIABLE = "GANSCALE_SECRETS"
"""Names, with commas, of a driver's environment variables that its workers get as well."""

# What Ray quotes of a package that it could not store, its first fifteen bytes, tells nothing.
_HEAD = b"ganscale secrets, version 1\n"


def new_place() -> str:
    """A name for a job's secrets, in the form of the packages that Ray's head takes and deletes."""
    return f"gcs://ganscale-{secrets.token_hex(16)}.zip"


def pack(values: Mapping[str, str]) -> bytes:
    """The form in which secrets travel."""
    return _HEAD + json.dumps(dict(values)).encode()


def unpack(data: bytes) -> dict[str, str]:
    """What `pack` was given."""
    if not data.startswith(_HEAD):
        raise GanscaleError("the secrets of this job are in a form that this version cannot read")
    values: dict[str, str] = json.loads(data.removeprefix(_HEAD))
    return values


def own(names: Iterable[str]) -> dict[str, str]:
    """The named variables of this process. Raises `ConfigError` for one that is not set."""
    names = list(names)
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ConfigError(
            f"{', '.join(missing)}: not set here; secrets are taken from this environment"
        )
    return {name: os.environ[name] for name in names}


def receive() -> None:
    """In the driver of a job: put the secrets that its submitter left into the environment.

    Nothing to do where there is no such job. Raises `GanscaleError` if they are gone.
    """
    place = os.environ.pop(PLACE_VARIABLE, "")
    if not place:
        return
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is compiled

    head, key = GcsClient(address=os.environ["RAY_ADDRESS"]), place.encode()
    data = head.internal_kv_get(key, None, timeout=30)
    if data is None:
        raise GanscaleError(
            "the secrets of this job are gone: they are given once, and kept for ten minutes; "
            "submit it again when the cluster has room"
        )
    head.internal_kv_del(key, False, None, timeout=30)
    values = unpack(data)
    os.environ.update(values)
    os.environ[NAMES_VARIABLE] = ",".join(values)


def for_workers() -> dict[str, str]:
    """What this driver's workers get of its environment."""
    names = [name.strip() for name in os.environ.get(NAMES_VARIABLE, "").split(",")]
    return own(name for name in names if name)
