"""What a plugin did wrong, told with its name and file; a plugin that calls sys.exit() does not end the process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import FrameType, TracebackType
from typing import Any

from corefit.errors import PluginError, shown

GROUP = "corefit"
"""The entry points of plugins."""
LOCAL = "corefit_local_"
"""Begins the module names of local plugin files."""


def returned(value: Any, fine: Callable[[Any], bool], of: Any, member: str, wanted: str) -> None:
    """PluginError that names class, member and file unless `value`, which a plugin gave, is as wanted."""
    if not fine(value):
        raise PluginError(f"{member} of {place(type(of))} is {shown(value)}, not {wanted}; mend it")


def expect(fine: bool, of: Any, done: str) -> None:
    """PluginError that names the class of `of` and its file, and what it has done, unless all is fine."""
    if not fine:
        raise PluginError(f"{place(type(of))} {done}; mend it")


def place(cls: type) -> str:
    """A class with the file that it is written in."""
    try:
        return f"{cls.__name__} ({inspect.getfile(cls)})"
    except (OSError, TypeError):  # of a session, or written in C
        return f"{cls.__module__}.{cls.__name__}"


@contextmanager
def no_exit() -> Generator[None]:
    """Turn a SystemExit of the block into a PluginError: it would end a run as if it were done."""
    try:
        yield
    except SystemExit as error:
        if _package(list(_frames(error.__traceback__))[-1][0]) == "click":  # which has answered a shell
            raise
        raise PluginError(
            f"{_place(error.__traceback__)} called sys.exit({'' if error.code is None else repr(error.code)}), which "
            "would end the run as if it were done; raise an error there instead"
        ) from error


def _place(traceback: TracebackType | None) -> str:
    """The innermost line of a plugin, or of whatever it was: "plugin 'sharp' (sharp.py:12)"."""
    frames = list(_frames(traceback))
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
    """The first part of the name of the module that a line is in."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
