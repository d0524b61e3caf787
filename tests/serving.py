"""A small HTTP server on loopback for the tests, which answers as it is told and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from attrs import Factory, define, frozen


@frozen
class Answer:
    """What the server sends: a status, a body (JSON unless it is bytes), headers; after `seconds`, or not at all."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = Factory(dict)
    seconds: float = 0.0
    hang_up: bool = False


@define
class Asked:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: Any


@define
class Server:
    """`answer(asked, number)` says what request `number`, counted from 0, gets; `asked` holds all of them."""

    url: str
    asked: list[Asked]


@contextmanager
def serving(answer: Callable[[Asked, int], Answer]) -> Iterator[Server]:
    """Serve on a free port of loopback until the block ends."""
    asked: list[Asked] = []
    lock, stop = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                number = len(asked)
                asked.append(Asked(self.path, dict(self.headers), json.loads(body) if body else None))
            found = answer(asked[number], number)
            stop.wait(found.seconds)
            if found.hang_up:
                return
            content = found.body if isinstance(found.body, bytes) else json.dumps(found.body).encode()
            self.send_response(found.status)
            for name, value in {"Content-Length": str(len(content)), **found.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None: ...  # a client that left

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}", asked)
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
