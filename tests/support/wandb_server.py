"""What a W&B run needs of its server, as far as rows go, and what may go wrong there.

Answers wandb's client (0.31) in the way that the real one does where a run is begun, resumed,
streams rows and ends; what was streamed is kept. At any moment it can begin to hang, to refuse or
to fail.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal

from tests.support.http_server import answering

KEY = "local" + 35 * "0"
"""Has the form of an API key."""

WandbFault = Literal["hang", "refuse", "500"]

_PROJECT = {"id": "p", "name": "tests", "entity": {"id": "e", "name": "tester"}}
_BUCKET = {"id": "r", "name": "run", "displayName": "run", "project": _PROJECT, "config": "{}"}
_VIEWER = {
    "id": "u",
    "entity": "tester",
    "username": "tester",
    "email": "tester@localhost",
    "flags": "{}",
    "teams": {"edges": []},
}
_ANSWERS: dict[str, Any] = {
    "UpsertBucket": {"upsertBucket": {"bucket": _BUCKET, "inserted": True}},
    "CreateRunFiles": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}},
    "Viewer": {"viewer": _VIEWER},
}


@dataclass
class WandbServer:
    """What was asked, and how it answers."""

    url: str = ""
    fault: WandbFault | None = None
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """GraphQL operations with their variables."""
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows by `_step`, the client's count of them: a row that is sent again takes its own place."""
    num_sent: int = 0
    """Rows that came, those that were sent again included."""
    num_refused: int = 0
    """Requests that were answered with 500."""
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """History, in the order of its steps."""
        return [row for _, row in sorted(self.history.copy().items())]

    def bucket(self) -> dict[str, Any] | None:
        """The run as a client that resumes it reads it; None before it was begun."""
        if not any(name == "UpsertBucket" for name, _ in self.asked):
            return None
        tail = [json.dumps(row) for row in self.rows[-1:]]
        return {
            **_BUCKET,
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "wandbConfig": json.dumps({"t": 1}),
            "tags": [],
        }

    def settings(self) -> dict[str, str]:
        """The environment in which wandb logs here, with its shortest pause between rows."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_MODE": "online",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",  # less than 1 is taken for 15
        }


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a free port of this machine."""
    state = WandbServer()

    class Handler(_Handler):
        server_state = state

    with answering(Handler, state.closed) as state.url:
        yield state


class _Handler(BaseHTTPRequestHandler):
    server_state: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        state = self.server_state
        if state.fault == "hang":
            state.closed.wait(300)
        if state.fault in ("hang", "refuse"):
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if state.fault == "500":
            state.num_refused += 1
            self._answer(500, {})
        elif self.path == "/graphql":
            self._answer(200, {"data": self._graphql(json.loads(body))})
        else:
            if self.path.endswith("/file_stream"):
                self._take_rows(json.loads(body))
            self._answer(200, {})

    do_GET = do_PUT = do_POST

    def _graphql(self, request: dict[str, Any]) -> Any:
        name = request.get("operationName", "")
        self.server_state.asked.append((name, request.get("variables") or {}))
        if name == "RunResumeStatus":
            return {"model": {**_PROJECT, "bucket": self.server_state.bucket()}}
        return _ANSWERS.get(name, {})

    def _take_rows(self, request: dict[str, Any]) -> None:
        history = request.get("files", {}).get("wandb-history.jsonl", {"content": []})
        rows = [json.loads(line) for line in history["content"]]
        self.server_state.history |= {row["_step"]: row for row in rows}
        self.server_state.num_sent += len(rows)

    def _answer(self, code: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
