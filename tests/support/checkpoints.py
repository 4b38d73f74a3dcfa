"""A run's checkpoints in a directory or in S3, small states, and how to look behind the store."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import obstore
import pytest
import torch
from moto.server import ThreadedMotoServer
from obstore.store import LocalStore, ObjectStore, from_url
from torch import Tensor

from ganscale.checkpoint import Attempt, CheckpointName, CheckpointStore
from ganscale.checkpoint.files import saved_state


@contextmanager
def s3_bucket() -> Iterator[str]:
    """The URL of an S3 bucket; its endpoint and credentials are in the environment."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="runs")
        client.close()
        yield "s3://runs"
    moto.stop()


class Raw:
    """The bytes of a store, to look at and to damage behind its back."""

    def __init__(self, store: CheckpointStore) -> None:
        place = store.location
        self.raw: ObjectStore = (
            from_url(place, client_options={"allow_http": True})
            if place.startswith("s3://")
            else LocalStore(place, mkdir=True)
        )

    def get(self, path: str) -> bytes:
        return obstore.get(self.raw, path).bytes().to_bytes()

    def put(self, path: str, data: bytes) -> None:
        obstore.put(self.raw, path, data)

    def remove(self, path: str) -> None:
        obstore.delete(self.raw, path)

    def all(self) -> dict[str, bytes]:
        return {
            found["path"]: self.get(found["path"]) for found in obstore.list(self.raw).collect()
        }


def state_at(nimg: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(nimg)
    return {"G": {"weight": torch.randn(4, 3, generator=generator)}, "nimg": nimg}


def begin(store: CheckpointStore, up_to: int | None = None) -> Attempt:
    return store.claim(lambda: store.newest(up_to=up_to))[0]


def write(store: CheckpointStore, attempt: Attempt, nimg: int, **more: Any) -> CheckpointName:
    more = {"history": b'{"nimg": 1}\n', "metrics": {"score": 1e-05}, **more}
    return store.write(attempt, saved_state(nimg, state_at(nimg), {"run": "test"}, **more))


def newest(store: CheckpointStore) -> CheckpointName | None:
    """The newest one, found without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = store.newest()
    return None if files is None else files.name


def bits(value: Any) -> Any:
    """A state in which exactly what is equal bit by bit compares equal."""
    if isinstance(value, Tensor):
        raw = value.contiguous().reshape(-1).view(torch.uint8)
        return "tensor", value.dtype, tuple(value.shape), raw.tolist()
    if isinstance(value, dict):
        return "dict", [(type(key), key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    return type(value), struct.pack("<d", value) if isinstance(value, float) else value
