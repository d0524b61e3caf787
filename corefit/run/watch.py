"""`corefit watch`: serves the page of a run's folder on this machine alone, and lets the browser follow the run.

The page is made from the files of the folder when they have changed, for a run that goes on, has ended, or was
killed. Nothing is written, and nothing but the page is served.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from attrs import define, field

from corefit.errors import ConfigError, DataError
from corefit.run.report.page import POLICY, fingerprint, is_run, render

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""What a browser on this machine may call the server; a page elsewhere that was given its address has another name."""
OFTEN = 1.0
"""Seconds between two looks at the files, however many browsers ask."""


@define(eq=False)
class Watched:
    """A run's folder: its page, and a version that changes with its files."""

    folder: Path
    _lock: threading.Lock = field(init=False, factory=threading.Lock)
    _looked: float = field(init=False, default=0.0)
    _version: str = field(init=False, default="")
    _page: tuple[str, bytes] = field(init=False, default=("", b""))

    def version(self) -> str:
        with self._lock:
            return self._look()

    def page(self) -> bytes:
        """Return the page as it is now, with the script that asks for its version."""
        with self._lock:
            version = self._look()
            if self._page[0] != version:
                self._page = version, render([("", self.folder)], self.folder.name, live=version)
            return self._page[1]

    def _look(self) -> str:
        now = time.monotonic()
        if not self._version or now - self._looked > OFTEN:
            self._version, self._looked = fingerprint(self.folder), now
        return self._version


def watch(folder: Path, port: int, opened: Callable[[str], None]) -> None:
    """Serve the page of a run's folder until Ctrl-C. `opened` is called with its address once it is served.

    Raises ConfigError if the folder is not that of a run, DataError if the port is taken.
    """
    server = serve(folder, port)
    for number in (signal.SIGINT, signal.SIGTERM):  # a script's shell lets what it starts with & ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    try:
        opened(f"http://{HOST}:{server.server_address[1]}/")
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """Return a server of the folder's page that listens; 0 is any free port."""
    folder = folder.resolve()
    if not folder.is_dir() or not is_run(folder):
        raise ConfigError(f"{folder} is not the folder of a run; name one such as runs/NAME, which holds pipeline.toml")
    watched = Watched(folder)

    class Handler(_Handler):
        run = watched

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise DataError(f"port {port} cannot be used: {error.strerror}; give another --port, or none") from error


class _Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page and GET /version with its version; anything else is not there."""

    run: Watched
    server_version, sys_version = "corefit", ""
    timeout = 10

    def do_GET(self) -> None:
        if self.headers.get("Host", "").rpartition(":")[0] not in NAMES:
            self.send_error(403, "this page is for this machine alone")
        elif self.path == "/version":
            self._send(self.run.version().encode(), "text/plain")
        elif self.path == "/":
            self._send(self.run.page(), "text/html; charset=utf-8")
        else:
            self.send_error(404)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": POLICY,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a browser asks every few seconds."""
