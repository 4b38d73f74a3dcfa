"""An HTTP server for a folder, with Range requests, that misbehaves when it is told to."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Fault = Literal["cut", "reset", "stall", "flip", "no range", "no length", "503", "403", "404"]


@dataclass
class FolderServer:
    """What is served, what goes wrong, and how often it was asked."""

    folder: Path
    url: str = ""
    fault: Callable[[int, str], Fault | None] = lambda number, name: None
    """From the request's number (1, 2, ...) and the file's name to what goes wrong with it."""
    num_requests: int = 0
    closed: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, name: str) -> Fault | None:
        """Count a request and decide about it."""
        with self._lock:
            self.num_requests += 1
            return self.fault(self.num_requests, name)


@contextmanager
def serving(folder: Path) -> Iterator[FolderServer]:
    """Serve a folder on a free port of this machine."""
    state = FolderServer(folder)

    class Handler(_Handler):
        files = state

    with answering(Handler, state.closed) as state.url:
        yield state


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler], closed: threading.Event) -> Iterator[str]:
    """Serve on a free port of this machine; yields the URL. `closed` is set before the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        closed.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    files: FolderServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        size = (self.files.folder / self.path.lstrip("/")).stat().st_size
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        fault = self.files.next_fault(name)
        path = self.files.folder / name
        if fault == "stall":
            self.files.closed.wait(30)
            self.close_connection = True
            return
        if fault in ("503", "403", "404") or not path.is_file():
            self.send_error(int(fault) if fault in ("503", "403", "404") else 404)
            return
        self._send(path.read_bytes(), fault)

    def _send(self, data: bytes, fault: Fault | None) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        size = len(data)
        partial = wanted is not None and fault != "no range"
        if wanted is not None and partial:
            first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
            if first >= size:
                self.send_error(416)
                return
            data = data[first : last + 1]
        if fault == "flip" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(206 if partial else 200)
        if wanted is not None and partial:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        if fault == "no length":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("cut", "reset", "no length"):
            data = data[: len(data) // 2]
            self.close_connection = True
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
