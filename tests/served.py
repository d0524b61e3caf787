"""`corefit serve-reward` in a process of its own, for tests."""

from __future__ import annotations

import itertools
import socket
import time
from pathlib import Path

import forks
from attrs import frozen
from forks import Forked

NUMBERS = itertools.count()


@frozen
class Served:
    """A service that has started."""

    process: Forked
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def said(self) -> str:
        return self.log.read_text()


def start(folder: Path, *args: str, port: int = 0, name: str = "bright") -> Served:
    """Serve the reward of bright.py in `folder`; return once it listens. Port 0 takes a free one."""
    port, log = port or free_port(), folder / f"service-{next(NUMBERS)}.log"
    command = ("-m", "corefit", "serve-reward", name, "--plugin", "bright.py", "--port", str(port), *args)
    process = forks.start(*command, cwd=folder, log=log)
    late = time.monotonic() + 120
    while not (log.exists() and "serving" in log.read_text()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < late, "the service does not start"
        time.sleep(0.01)
    return Served(process, port, log)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
