"""Python programs as forks of a process that has imported torch and the rest already: a start costs no imports.

What differs from a start of its own: imports, and the seed of Python's hashes, which all forks share. Run as a program,
this file is that process. It reads a line of JSON for each start from stdin, and says on stdout what it started and how
that ended; when stdin closes, it ends with all that it has started.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import quick
from attrs import define, field
from huggingface_hub import constants

from corefit.run import observers


@define
class Forked:
    """A started program, with the methods of subprocess.Popen that tests use."""

    pid: int
    out: Path
    err: Path
    """What its stdout and stderr go to."""
    server: Server
    returncode: int | None = None

    def poll(self) -> int | None:
        self.server.listen(0)
        self.returncode = self.server.ended.get(self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        late = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > late:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.server.listen(0.1)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait, and what it has written to stdout and to stderr."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@define
class Server:
    """The process that forks, as seen from the tests; each pytest process has one, once it needs one."""

    process: subprocess.Popen[bytes]
    folder: tempfile.TemporaryDirectory[str]
    ended: dict[int, int] = field(factory=dict[int, int])
    """Process -> exit status, or the negative number of the signal that ended it."""
    _started: list[int] = field(factory=list[int])
    _heard: bytes = b""
    _number: itertools.count[int] = field(factory=itertools.count)

    @staticmethod
    @functools.cache
    def of_this_process() -> Server:
        folder = tempfile.TemporaryDirectory(prefix="corefit-forks-")
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        return Server(process, folder)

    def start(
        self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], log: Path | None = None
    ) -> Forked:
        """`python *arguments`, where the first is a file or "-m"; what it says is added to `log`, if there is one."""
        assert self.process.stdin
        folder = Path(self.folder.name) / str(next(self._number))
        folder.mkdir()
        out, err = log or folder / "out", log or folder / "err"
        told = {"arguments": arguments, "cwd": cwd, "environment": dict(environment), "out": out, "err": err}
        self.process.stdin.write(json.dumps(told, default=str).encode() + b"\n")
        self.process.stdin.flush()
        while not self._started:
            self.listen(1)
        return Forked(self._started.pop(), out, err, self)

    def listen(self, timeout: float) -> None:
        """Take in what the process says, waiting for it for so many seconds at most."""
        assert self.process.stdout
        while select.select([self.process.stdout], [], [], timeout)[0]:
            said = os.read(self.process.stdout.fileno(), 1 << 16)
            assert said, f"{__file__} has ended with status {self.process.wait()}"
            *lines, self._heard = (self._heard + said).split(b"\n")
            for pid, status in map(json.loads, lines):
                if status is None:
                    self._started.append(pid)
                    self.ended.pop(pid, None)  # of a former process of that number
                else:
                    self.ended[pid] = status
            timeout = 0


def start(*arguments: str, cwd: Path, log: Path | None = None, **environment: str) -> Forked:
    """`python *arguments` in the folder `cwd`, with these variables on top of this process's own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return Server.of_this_process().start(arguments, cwd, variables, log)


def ranks(*commands: Sequence[str], cwd: Path | Sequence[Path], **environment: str) -> list[Forked]:
    """A rank of each command, without a launcher that would end one when another is gone, as a cluster starts them.

    A single one is started as it would be by hand.

    cwd  the folder of all, or one for each
    """
    folders = [cwd] * len(commands) if isinstance(cwd, Path) else cwd
    if len(commands) == 1:
        return [start(*commands[0], cwd=folders[0], **environment)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = str(len(commands))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return [
        start(*command, cwd=folder, RANK=str(rank), LOCAL_RANK=str(rank), **where, **environment)
        for rank, (command, folder) in enumerate(zip(commands, folders, strict=True))
    ]


# the process that forks


def main() -> None:
    quick.ready()
    quick.without_waiting_for_the_disk()
    observers.curves = quick.blank
    assert threading.active_count() == 1, "a fork has one thread, whatever the others hold"
    with quick.uncollected():
        if told := serve():
            become(**told)


def serve() -> Mapping[str, Any] | None:
    """In each fork, what it is to run; None in this process, once stdin is closed."""
    heard, running = b"", set[int]()
    while True:
        if select.select([0], [], [], 0.02 if running else None)[0]:
            said = os.read(0, 1 << 16)
            if not said:
                break
            *lines, heard = (heard + said).split(b"\n")
            for line in lines:
                pid = os.fork()
                if not pid:
                    return json.loads(line)
                running.add(pid)
                tell(pid, None)
        for pid in [*running]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                tell(pid, os.waitstatus_to_exitcode(status))
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return None


def tell(pid: int, status: int | None) -> None:
    os.write(1, json.dumps([pid, status]).encode() + b"\n")


def become(arguments: Sequence[str], cwd: str, environment: Mapping[str, str], out: str, err: str) -> None:
    """Be the program, and end as it does."""
    written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    streams = ((os.devnull, os.O_RDONLY), (out, written), (err, written))
    for number, (path, mode) in enumerate(streams):
        os.dup2(os.open(path, mode, 0o600), number)
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[1:1] = added
    constants.HF_HUB_OFFLINE = environment.get("HF_HUB_OFFLINE") == "1"  # which is read as the library is imported
    try:
        if arguments[0] == "-m":
            sys.path[0], sys.argv = cwd, [*arguments[1:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(arguments[0]).parent), [*arguments]
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        status = ended.code or 0
    # what Python does at an end, but for taking half a second to free all that was imported
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
