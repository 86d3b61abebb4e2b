"""A page over HTTP, for browsers of this machine.

Invariant: it listens on 127.0.0.1 only, answers GET of `PATHS` only, and only where the browser
asked for this machine by its own name: a site whose name is made to point here (DNS rebinding)
reads nothing. No file is served, whatever the path.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""With any port: a tunnel (`ssh -L`) has another one at its end."""
PATHS = ("/", "/version")
IDLE_S = 10.0
"""A connection on which nothing comes is closed."""


@dataclass(frozen=True)
class Served:
    """What is shown now."""

    html: str
    version: str
    """Of the page: another one, another page."""
    status: Sequence[str]
    """Lines about how the runs stand, which change without a new page."""
    policy: str
    """Content-Security-Policy of the page."""


class PageServer(ThreadingHTTPServer):
    """Serves what `current` returns; each request is answered in a thread of its own."""

    daemon_threads = True

    def __init__(self, port: int, current: Callable[[], Served]) -> None:
        """Listen on `port`, 0: a free one. ValueError where it cannot be had."""
        self.current = current
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"--port {port}: {error.strerror}; name another one, or 0 for a free one"
            ) from error

    @property
    def url(self) -> str:
        """What to open."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = IDLE_S
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").partition(":")[0]
        if name not in NAMES:
            self.send_error(HTTPStatus.FORBIDDEN, "only for browsers of this machine")
            return
        if self.path not in PATHS:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        found = self.server.current()
        if self.path == "/":
            self._answer("text/html", found.html, found.policy)
        else:
            told = {"version": found.version, "status": list(found.status)}
            self._answer("application/json", json.dumps(told), "default-src 'none'")

    def _answer(self, kind: str, text: str, policy: str) -> None:
        # UTF-8 cannot hold half a surrogate pair, which a completion may have.
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", f"{policy}; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "rlhf3d"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal for each request."""
