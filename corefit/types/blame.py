"""Blame a plugin for its mistakes by name and file, and keep its sys.exit() from ending the process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import FrameType, TracebackType
from typing import Any

from corefit.errors import PluginError, short_repr

GROUP = "corefit"
"""The entry-point group of plugins."""
LOCAL = "corefit_local_"
"""The prefix of the module names of local plugin files."""


def require_result(value: Any, fine: Callable[[Any], bool], plugin: Any, member: str, wanted: str) -> None:
    """Raise PluginError with the plugin's class, file and member unless `value`, which the member gave, is fine.

    wanted  what the message says that the value must be
    """
    if not fine(value):
        raise PluginError(f"{member} of {place(type(plugin))} is {short_repr(value)}, not {wanted}; fix it")


def require(condition: bool, plugin: Any, mistake: str) -> None:
    """Raise PluginError with the plugin's class and file, and its mistake, unless `condition` holds."""
    if not condition:
        raise PluginError(f"{place(type(plugin))} {mistake}; fix it")


def place(cls: type) -> str:
    """Return a class's name and the file that it is written in, for a message."""
    try:
        return f"{cls.__name__} ({inspect.getfile(cls)})"
    except (OSError, TypeError):  # a class of an interactive session, or one written in C, has no file
        return f"{cls.__module__}.{cls.__name__}"


EXITING = ("click", "rich")
"""Packages that may end the process: click after shell completion, rich where nobody reads its output any more."""


@contextmanager
def no_exit() -> Generator[None]:
    """Turn a SystemExit inside the block into a PluginError, because it would end a run as if it were done."""
    try:
        yield
    except SystemExit as error:
        if _package(list(_frames(error.__traceback__))[-1][0]) in EXITING:
            raise
        raise PluginError(
            f"{_place(error.__traceback__)} called sys.exit({'' if error.code is None else repr(error.code)}), which "
            "would end the run as if it were done; raise an error there instead"
        ) from error


@contextmanager
def no_missing_package() -> Generator[None]:
    """Turn a ModuleNotFoundError inside the block into a PluginError that names the line which needs the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "corefit":
            raise  # a bug, or a broken installation
        raise PluginError(f"{_place(error.__traceback__)}: {error}; install the package that has it") from error


def _place(traceback: TracebackType | None) -> str:
    """Return the innermost line that is a plugin's, as "plugin 'sharp' (sharp.py:12)"; without one, the last line."""
    every = [each for each in _frames(traceback) if not each[0].f_code.co_filename.startswith("<frozen importlib")]
    frames = [each for each in every if each[0].f_code.co_name != "exit"] or every  # wandb puts its own for sys.exit
    names = {point.module.partition(".")[0]: point.name for point in entry_points(group=GROUP)}
    names.pop("corefit", None)
    for frame, line in reversed(frames):
        package = _package(frame)
        where = f"{frame.f_code.co_filename}:{line}"
        if package.startswith(LOCAL):
            return f"plugin file {where}"
        if package in names:
            return f"plugin {names[package]!r} ({where})"
    frame, line = frames[-1]
    return f"{frame.f_code.co_filename}:{line}"


def _package(frame: FrameType) -> str:
    """Return the name of the top-level package whose code a frame runs."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of a traceback with their line numbers, from the outermost inwards."""
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
