"""The HTTP server of the rating page, on this machine's loopback address by default.

Nothing that is sent reveals which images are real. A page of another site can neither read nor
write: on a loopback address only requests to this machine's names are served (against DNS
rebinding), and answers must be JSON, which browsers do not send to another origin without asking
it.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from ganscale.errors import ConfigError
from ganscale.rating.session import RatingSession, rater_name

_MAX_BODY_BYTES = 4096
_IDLE_SECONDS = 60
_IMAGE_PREFIX = "/image/"


class RatingServer(ThreadingHTTPServer):
    """Serves one session while `serve_forever` runs."""

    daemon_threads = True
    # Browsers open several connections for each rater, and the default of 5 refuses some.
    request_queue_size = 64

    def __init__(self, session: RatingSession, host: str, port: int) -> None:
        """Bind to the address, at a free port if `port` is 0. Raises `ConfigError` if that
        fails."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.session = session
        self.page = resources.files("ganscale.rating").joinpath("page.html").read_bytes()
        self.policy = _content_policy(self.page.decode())
        self.only_loopback = is_loopback(host)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot serve at --host {host} --port {port}: {error}") from None

    @property
    def url(self) -> str:
        """The address of the page for a browser."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that closed the connection; report other errors."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    """Whether an address or name can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "ganscale", ""
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        if not self._is_addressed():
            return
        image = None
        if self.path.startswith(_IMAGE_PREFIX):
            image = self.server.session.image(self.path.removeprefix(_IMAGE_PREFIX))
        if image is not None:
            self._send(HTTPStatus.OK, "image/png", image)
        elif self.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_addressed() or (body := self._body()) is None:
            return
        try:
            self._send_json(HTTPStatus.OK, self._answered(json.loads(body)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.send_error(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            self.send_error(HTTPStatus.INSUFFICIENT_STORAGE, f"the answer is not stored: {error}")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors are JSON; the connection ends, since a body may not have been read."""
        # The base class answers unknown methods so, but this server will not implement them later.
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code = HTTPStatus.METHOD_NOT_ALLOWED
        self.close_connection = True
        self._send_json(code, {"error": message or HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal shows the page's address and the results."""

    def _answered(self, request: dict[str, Any]) -> dict[str, Any]:
        """Store the answer, if the request is one, and return the rater's state."""
        session, rater = self.server.session, rater_name(request["rater"])
        if self.path == "/answer":
            seconds = float(request["response_seconds"])
            session.answer(rater, request["token"], request["answer"], seconds)
        return session.state(rater)

    def _is_addressed(self) -> bool:
        """Whether the request is addressed to this machine; refuses it otherwise."""
        # DNS rebinding: another site can let its name resolve to 127.0.0.1, and its pages would
        # then count as of one origin with this server. Its requests have its name as their host.
        name = re.sub(r":\d+$", "", self.headers.get("Host", "")).strip("[]")
        if not self.server.only_loopback or is_loopback(name):
            return True
        self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "served to this machine only")
        return False

    def _body(self) -> bytes | None:
        """The JSON of the request; None if the request was refused."""
        length = self.headers.get("Content-Length", "")
        refusal = None
        if self.path not in ("/question", "/answer"):
            refusal = HTTPStatus.NOT_FOUND
        elif self.headers.get_content_type() != "application/json":
            refusal = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        elif not re.fullmatch("[0-9]{1,9}", length):
            refusal = HTTPStatus.LENGTH_REQUIRED
        elif int(length) > _MAX_BODY_BYTES:
            refusal = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if refusal is not None:
            self.send_error(refusal)
            return None
        return self.rfile.read(int(length))

    def _send_json(self, code: int, content: dict[str, Any]) -> None:
        self._send(code, "application/json", json.dumps(content).encode())

    def _send(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _content_policy(page: str) -> str:
    """A content security policy: the page's own script and style, and this server's responses."""
    # By hashes of the page's own elements, so that no text that is shown can run as a script.

    def hash_of(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return (
        f"default-src 'none'; img-src 'self' data:; connect-src 'self'; "
        f"script-src 'sha256-{hash_of('script')}'; style-src 'sha256-{hash_of('style')}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
