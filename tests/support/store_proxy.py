"""An S3 bucket on this machine whose requests fail when they are told to, and what is in it.

The server in front of moto knows requests and answers, not only bytes: a request that it fails has
either not happened at all or, with "lost", happened without the client learning of it.
"""

from __future__ import annotations

import math
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import pytest
from moto.backends import get_backend
from moto.server import create_backend_app

from ganscale.checkpoint import CheckpointStore, encoding
from ganscale.storage import RetryPolicy, objects
from tests.support.checkpoints import s3_bucket

PART_BYTES = 4096
"""Of an upload in parts; S3 wants 5 MiB."""

Fault = Literal["503", "500", "reset", "stall", "cut", "lost"]
"""Refused with SlowDown or InternalError; cut off before or within the upload, or, where nothing is
uploaded, within the answer; never answered; done, but cut off before the answer."""

FAULTS: tuple[Fault, ...] = ("503", "500", "reset", "stall", "cut", "lost")
_CODES = {"503": "SlowDown", "500": "InternalError"}
_GIVE_UP_SECONDS = 60


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    number: int
    """1, 2, ..."""
    method: str
    key: str
    """Of the object, without the bucket; empty for a listing."""
    query: tuple[str, ...]
    """Names of the parameters, such as uploadId and partNumber."""

    @property
    def kind(self) -> str:
        """The operation of S3, in a word or two."""
        names = {"list-type": "list", "uploads": "begin upload", "partNumber": "upload part"}
        named = [word for name, word in names.items() if name in self.query]
        if "uploadId" in self.query and not named:
            named = [{"POST": "complete upload", "DELETE": "abort upload"}[self.method]]
        return named[0] if named else self.method.lower()


@dataclass
class StoreProxy:
    """What goes wrong, and what was asked for."""

    url: str
    fault: Callable[[Request], Fault | None] = lambda request: None
    """From a request to what goes wrong with it."""
    requests: list[Request] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        """From here on nothing goes wrong, and requests are counted from 1."""
        with self._lock:
            self.fault = lambda request: None
            self.requests = []

    def fail(self, fault: Fault, *, first: int = 1, kind: str = "", num: float = math.inf) -> None:
        """From here on, fail the `first`-th request (of a kind), and all after it up to `num`."""
        num_alike = num_failed = 0

        def decide(request: Request) -> Fault | None:
            nonlocal num_alike, num_failed
            num_alike += kind in ("", request.kind)
            num_failed += num_alike >= first
            return fault if 1 <= num_failed <= num else None

        self.work()
        self.fault = decide

    def kinds(self) -> list[str]:
        """The operations so far, in order."""
        return [request.kind for request in self.requests]

    def _decide(self, method: str, target: str) -> tuple[Request, Fault | None]:
        parts = urlsplit(target)
        query = tuple(parse_qs(parts.query, keep_blank_values=True))
        key = parts.path.lstrip("/").partition("/")[2]
        with self._lock:
            request = Request(len(self.requests) + 1, method, key, query)
            self.requests.append(request)
            return request, self.fault(request)


@dataclass(frozen=True)
class Bucket:
    """A bucket of moto, and the server in front of it."""

    url: str
    proxy: StoreProxy
    scratch: Path

    def store(
        self, prefix: str, *, deadline_seconds: float = 0, attempt_seconds: float = 30
    ) -> CheckpointStore:
        """One that asks the server."""
        policy = RetryPolicy(deadline_seconds, attempt_seconds, 0.01, 0.02)
        return CheckpointStore(f"{self.url}/{prefix}", policy)

    def copy(self, store: CheckpointStore) -> CheckpointStore:
        """What is in a store, on the disk, to look at without asking the server."""
        shutil.rmtree(self.scratch)
        for name, data in self.contents(store.location.rpartition("/")[2]).items():
            path = self.scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return CheckpointStore(self.scratch)

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Objects by their names below a prefix."""
        found = self._of_moto().keys
        names = [name for name in found if name.startswith(f"{prefix}/")]
        return {name.removeprefix(f"{prefix}/"): found[name].value for name in names}

    def put(self, prefix: str, contents: dict[str, bytes]) -> None:
        """The opposite of `contents`."""
        for name, data in contents.items():
            _moto().put_object("runs", f"{prefix}/{name}", data)

    def remove(self, prefix: str) -> None:
        """All below a prefix."""
        for name in self.contents(prefix):
            _moto().delete_object("runs", f"{prefix}/{name}")
        for upload in self._uploads(prefix):
            del self._of_moto().multiparts[upload]

    def num_uploads(self, prefix: str) -> int:
        """How many were begun, and neither completed nor aborted."""
        return len(self._uploads(prefix))

    def _uploads(self, prefix: str) -> list[str]:
        uploads = self._of_moto().multiparts.items()
        return [number for number, u in uploads if u.key_name.startswith(f"{prefix}/")]

    def _of_moto(self) -> Any:
        return _moto().buckets["runs"]


def _moto() -> Any:
    return get_backend("s3")["123456789012"]["aws"]


@contextmanager
def failing_bucket(scratch: Path) -> Iterator[Bucket]:
    """With uploads in parts of `PART_BYTES`, one after the other."""
    with s3_bucket() as url, pytest.MonkeyPatch.context() as patch, _serving() as proxy:
        patch.setattr(objects, "_PART_BYTES", PART_BYTES)
        patch.setattr(objects, "_PARTS_AT_ONCE", 1)
        patch.setattr(encoding, "_PIECE_BYTES", PART_BYTES)
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Bucket(url, proxy, scratch)


@contextmanager
def _serving() -> Iterator[StoreProxy]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = StoreProxy(f"http://127.0.0.1:{server.server_address[1]}")
    # Not moto's own server: with a second one on the way, each request takes twice as long.
    server.moto = create_backend_app("s3")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        thread.join()
        for connection in list(server.connections):  # clients keep them open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()  # waits for the handlers


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    proxy: StoreProxy
    moto: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: set[socket.socket] = set()

    def shutdown_request(self, request: object) -> None:
        """Without the FIN of the base class, so that a reset is one."""
        assert isinstance(request, socket.socket)
        self.close_request(request)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # the client is gone
            super().handle()

    def answer(self) -> None:
        request, fault = self.server.proxy._decide(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "cut" and length:
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if fault == "reset":
            self._reset()
        elif fault == "stall":
            self._stall()
        elif fault in _CODES:
            self._refuse(request, fault)
        else:
            self._pass_on(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        client = self.server.moto.test_client(use_cookies=False)
        answer = client.open(
            self.path, method=self.command, headers=self.headers.items(), data=body
        )
        data = answer.get_data()
        if fault == "lost" or (fault == "cut" and not data):
            self._reset()
            return
        self.send_response_only(answer.status_code)
        for name, value in answer.headers:
            if name not in ("Connection", "Content-Length"):
                self.send_header(name, value)
        # Of a HEAD it is the length of what is not sent.
        self.send_header("Content-Length", answer.headers.get("Content-Length", str(len(data))))
        self.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)

    def _refuse(self, request: Request, fault: Fault) -> None:
        code = _CODES[fault]
        text = f"<Error><Code>{code}</Code><Message>{code} by the test</Message></Error>"
        data = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
        # S3 has sent the status of a long completion before it fails.
        late = fault == "500" and request.kind == "complete upload"
        self.send_response_only(200 if late else int(fault))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def _stall(self) -> None:
        """Until the client has had enough."""
        self.close_connection = True
        self.connection.settimeout(_GIVE_UP_SECONDS)
        self.connection.recv(1)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
