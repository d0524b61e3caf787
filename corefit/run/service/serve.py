"""Opens a reward by name and keys, and serves it until a signal comes."""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from attrs import frozen

import corefit
from corefit.errors import ConfigError, PluginError, counted
from corefit.pipeline.reader import Reader, override
from corefit.plugins.host import Host
from corefit.system.files import json_digest, portable, source
from corefit.system.signals import ECHO, Signals
from corefit.types import KeyedReward, Reward, Weighted
from corefit.types.wire import Health

if TYPE_CHECKING:
    import uvicorn

    from corefit.run.service.app import Service

Say = Callable[[str], None]
"""Prints a line."""
INSTALL = "pip install 'corefit[rewards]'"
GRACE = 10
"""Seconds in which requests in progress may end after a signal."""


@frozen(kw_only=True)
class Settings:
    """Where and how a reward is served.

    host       the address to listen on; one that other machines reach needs a token
    port       0 lets the system choose a free one
    token_env  the environment variable that holds the token; "" for none
    max_mib    largest size of a request
    samples    most samples in a request
    batch      samples up to which waiting requests are scored together; 0 for each by itself
    """

    host: str = "127.0.0.1"
    port: int = 0
    token_env: str = ""
    max_mib: int = 64
    samples: int = 256
    batch: int = 0

    @property
    def token(self) -> str:
        """The token; ConfigError if there must be one and is none."""
        if not self.token_env:
            if not _is_loopback(self.host):
                raise ConfigError(
                    f"--host {self.host}: other machines could reach it, so it needs a token: put one into an "
                    "environment variable and name the variable with --token-env"
                )
            return ""
        token = os.environ.get(self.token_env, "")
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(
                f"--token-env {self.token_env}: the environment variable is not set, or holds no token; set it to a "
                "long random word of ASCII characters without spaces"
            )
        return token


def serve(name: str, keys: Sequence[str], files: Sequence[Path], settings: Settings, say: Say) -> None:
    """Serve the reward `name` until a signal comes; requests in progress are finished then.

    keys   KEY=VALUE for keys of the reward
    files  local plugin files
    """
    uvicorn = _uvicorn()
    token, opened = settings.token, Opened.of(name, keys, files)
    with _listening(settings) as listening:
        service = _service(opened, settings, token)
        config = uvicorn.Config(
            service.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="on"
        )
        server = uvicorn.Server(config)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        with Signals(say, ECHO).handled():
            _run(server, listening, lambda: say(f"serving {name} at {url}, version {opened.health.version}"), say)
    counts = service.counts
    done = f"{counted(counts.scores, 'score')} in {counted(counts.requests, 'request')}"
    say(f"stopped: {done}, {counted(counts.errors, 'error')}")


@frozen(eq=False)
class Opened:
    """A reward that is ready to be served, and what the service says about it."""

    entry: Weighted[Reward]
    health: Health

    @staticmethod
    def of(name: str, keys: Sequence[str], files: Sequence[Path]) -> Opened:
        """Make a reward as a pipeline would, with paths relative to the working directory, and check it."""
        host, folder = Host(), Path.cwd()
        for file in files:
            host.add_file(file)
        table: dict[str, Any] = {"use": name}
        override(table, keys)
        reader = Reader(host, folder)
        reward: Reward = reader.read({"reward": table}, _Table).reward
        if check := getattr(reward, "check", None):
            check()
        told: Mapping[str, Any] = portable(reader.tables(reward), folder)
        return Opened(Weighted(name, reward), Health(name, _version(reward, told), told))


@frozen
class _Table:
    """The only table that is read here."""

    reward: Reward


def _version(reward: Reward, keys: Mapping[str, Any]) -> str:
    """Return a hash of all that determines a reward's scores: its keys, its code, and what else it names."""
    top = type(reward).__module__.partition(".")[0]
    file = Path(getattr(sys.modules[top], "__file__", None) or top)
    also = reward.scores_key() if isinstance(reward, KeyedReward) else ""
    return json_digest({"keys": keys, "code": source(file), "corefit": corefit.__version__, "also": also})[:16]


def _service(opened: Opened, settings: Settings, token: str) -> Service:
    import torch

    from corefit.run.service.app import Limits, Service
    from corefit.run.service.scoring import Scorer
    from corefit.run.service.waiting import Line

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Service(
        line=Line(Scorer(opened.entry, device).results, settings.batch),
        health=opened.health,
        limits=Limits(size=settings.max_mib << 20, samples=settings.samples),
        token=token,
    )


def _uvicorn() -> Any:
    try:
        importlib.import_module("fastapi")
        return importlib.import_module("uvicorn")
    except ImportError as error:
        raise PluginError(f"serve-reward needs the package {error.name}; run {INSTALL}") from None


def _listening(settings: Settings) -> socket.socket:
    """Return a socket that listens; ConfigError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host, settings.port))
        found.listen(128)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"--host {settings.host} --port {settings.port}: it cannot listen there ({error.strerror or error}); name "
            "another port, or stop what uses this one"
        ) from None
    return found


def _run(server: uvicorn.Server, listening: socket.socket, started: Callable[[], None], say: Say) -> None:
    """Run the server in a thread, since signals reach the main one, and stop it when one comes."""
    ended = Event()  # not Thread.join: once a signal interrupts it, it takes the thread for ended

    def run() -> None:
        try:
            server.run(sockets=[listening])
        finally:
            ended.set()

    Thread(target=run, name="http", daemon=True).start()
    try:
        while not (server.started or ended.wait(0.02)):
            pass
        started()
        ended.wait()
    except KeyboardInterrupt:
        say("stopping after the requests in progress; once more to stop now")
        server.should_exit = True
        ended.wait()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
