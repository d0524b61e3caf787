"""The machine around a run: disks, rights, locks, limits."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hostile import mounts
from benchmarks.hostile.case import CHECK, PIPELINE, RUN, Case, Project

Inside = Callable[[], object]
PREPARE = ("prepare", PIPELINE)


def cases() -> list[Case]:
    """All of this file."""
    return [*_disks(), *_rights(), *_locks(), *_limits()]


def surrounded(name: str, *says: str, typed: tuple[str, ...] = RUN, again: bool = True, **rest: Any) -> Case:
    return Case(name=name, area="environment", says=says, typed=typed, again=again, **rest)


# a disk that refuses


def _refusing(function: str, number: int, code: int, times: int = 10**9) -> Inside:
    """From its `number`-th call on, a function of os fails, so many times."""

    def inside() -> None:
        real, calls = getattr(os, function), itertools.count(1)

        def refusing(*args: Any, **keys: Any) -> Any:
            if number <= next(calls) < number + times:
                raise OSError(code, os.strerror(code), str(args[0]) if args else None)
            return real(*args, **keys)

        setattr(os, function, refusing)

    return inside


def _disks() -> list[Case]:
    full, quota, broken = errno.ENOSPC, errno.EDQUOT, errno.EIO
    found = [
        surrounded(f"disk is full at fsync {number}", "space", inside=_refusing("fsync", number, full))
        for number in (1, 4, 10, 16, 22, 30, 40)
    ]
    found += [
        surrounded(f"disk is full at rename {number}", "space", inside=_refusing("rename", number, full))
        for number in (1, 3, 6)
    ]
    found += [
        surrounded(f"disk is full at replace {number}", "space", inside=_refusing("replace", number, full))
        for number in (1, 2, 5)
    ]
    found += [
        surrounded(f"files of at most {size} bytes", inside=_limited(resource.RLIMIT_FSIZE, size))
        for size in (10_000, 30_000, 60_000, 200_000)
    ]
    return [
        *found,
        surrounded("quota is used up", "quota", inside=_refusing("fsync", 12, quota)),
        surrounded("disk fails once", inside=_refusing("fsync", 12, broken, 1), status=(0, 2)),
        surrounded("disk fails for good", "error", inside=_refusing("fsync", 20, broken)),
        surrounded("mkdir fails", "space", inside=_refusing("mkdir", 3, full)),
        surrounded("full disk while encoding", "space", typed=PREPARE, inside=_refusing("fsync", 1, full)),
        surrounded(
            "full disk of runs, 16 KiB", "space", spoil=_made("runs"), inside=mounts.small("runs", 16), root=True
        ),
        surrounded(
            "full disk of runs, 200 KiB", "space", spoil=_made("runs"), inside=mounts.small("runs", 200), root=True
        ),
        surrounded(
            "full disk of runs, 600 KiB", "space", spoil=_made("runs"), inside=mounts.small("runs", 600), root=True
        ),
        surrounded(
            "full disk of .corefit, 8 KiB",
            "space",
            spoil=_made(".corefit"),
            inside=mounts.small(".corefit", 8),
            root=True,
        ),
        surrounded(
            "read-only file system: runs", "read-only", spoil=_made("runs"), inside=mounts.frozen("runs"), root=True
        ),
        surrounded(
            "read-only file system: .corefit",
            "read-only",
            spoil=_made(".corefit"),
            inside=mounts.frozen(".corefit"),
            root=True,
        ),
        surrounded("read-only file system: all", "read-only", inside=mounts.frozen("."), root=True),
        surrounded(
            "read-only file system: base and pictures",
            inside=mounts.frozen("base", "pictures"),
            root=True,
            status=(0,),
            equal=True,
        ),
        surrounded(
            "read-only file system, all is finished",
            "read-only",
            start="finished",
            inside=mounts.frozen("."),
            root=True,
            status=(0, 2),
        ),
        surrounded(
            "read-only file system, show",
            "read-only",
            typed=("show", PIPELINE),
            start="encoded",
            inside=mounts.frozen("."),
            root=True,
        ),
        surrounded(
            "read-only file system, check", typed=CHECK, inside=mounts.frozen("."), root=True, status=(0,), again=False
        ),
        surrounded(
            "read-only file system, dry run",
            typed=(*RUN, "--dry-run"),
            inside=mounts.frozen("."),
            root=True,
            status=(0,),
            again=False,
        ),
    ]


def _made(name: str) -> Callable[[Project], None]:
    return lambda project: project.path(name).mkdir(exist_ok=True)


# rights


def _powerless() -> None:
    """Without the capabilities of root, so that modes count; who is not root has none."""
    library, version = ctypes.CDLL(None), 0x20080522
    library.capset((ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)())


def _unwritable(name: str, mode: int = 0o555) -> Callable[[Project], object]:
    """The right to write, or another one, is taken from a file, or from a folder and what is in it."""

    def spoil(project: Project) -> None:
        target = project.path(name)
        for path in [*target.rglob("*"), target]:
            path.chmod(mode if path.is_dir() else mode & 0o666)

    return spoil


def _rights() -> list[Case]:
    def of(name: str, target: str, *says: str, mode: int = 0o555, made: bool = False, **rest: Any) -> Case:
        def spoil(project: Project) -> None:
            if made:
                project.path(target).mkdir(exist_ok=True)
            _unwritable(target, mode)(project)

        return surrounded(name, *(says or (Path(target).name,)), spoil=spoil, inside=_powerless, **rest)

    return [
        of("no right to write the project", ".", "permission"),
        of("no right to write runs", "runs", made=True),
        of("no right to write .corefit", ".corefit", made=True),
        of("no right to write the run", "runs/demo", start="interrupted"),
        of("no right to write a stage", "runs/demo/01-sft", start="interrupted"),
        of("no right to write checkpoints", "runs/demo/01-sft/checkpoints", start="interrupted"),
        of("no right to write the cache", ".corefit/cache", start="encoded", status=(0, 2)),
        of("no right to read the pipeline", PIPELINE, mode=0),
        of("no right to read the data", "train.jsonl", mode=0),
        of("no right to read a picture", "pictures/2.png", mode=0),
        of("no right to enter pictures", "pictures", mode=0),
        of("no right to enter the base", "base", mode=0),
        of("no right to read the transformer", "base/transformer", mode=0o111),
        of("no right to read the plugin", "bright.py", mode=0),
        of("no right to read held-out prompts", "heldout.jsonl", mode=0),
        of("no right to read the cache", ".corefit/cache", mode=0, start="finished"),
        of("no right to read a finished stage", "runs/demo/01-sft", mode=0, start="finished"),
    ]


# locks


def _lockless(code: int) -> Inside:
    def inside() -> None:
        import fcntl

        def refuse(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        fcntl.flock = refuse
        fcntl.lockf = refuse

    return inside


def _second() -> None:
    """Another run, stopped in the middle of a stage."""
    if other := os.fork():
        os.waitpid(other, os.WUNTRACED)
        return
    from corefit.cli import main

    os.environ.update(HOSTILE_STOP="sft 1", HOSTILE_SIGNAL=str(int(signal.SIGSTOP)))
    sys.argv = ["corefit", *RUN]
    main()


def _locks() -> list[Case]:
    return [
        surrounded("no locks: ENOLCK", "lock", inside=_lockless(errno.ENOLCK), status=(0, 2)),
        surrounded("no locks: EOPNOTSUPP", "lock", inside=_lockless(errno.EOPNOTSUPP), status=(0, 2)),
        surrounded("no locks: EIO", "lock", inside=_lockless(errno.EIO), status=(0, 2)),
        surrounded("no locks while encoding", "lock", typed=PREPARE, inside=_lockless(errno.ENOLCK), status=(0, 2)),
        surrounded("another run is in the folder", "another", inside=_second, again=True),
    ]


# limits


def _limited(what: int, soft: int) -> Inside:
    def inside() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(what, (soft, resource.getrlimit(what)[1]))

    return inside


def _limits() -> list[Case]:
    files = resource.RLIMIT_NOFILE
    return [
        surrounded("8 open files", inside=_limited(files, 8), status=(0, 2)),
        surrounded("16 open files", inside=_limited(files, 16), status=(0, 2)),
        surrounded("64 open files", inside=_limited(files, 64), status=(0,), equal=True),
        surrounded("8 open files in check", typed=CHECK, inside=_limited(files, 8), status=(0, 2), again=False),
        surrounded(
            "no core and no locked memory", inside=_limited(resource.RLIMIT_MEMLOCK, 0), status=(0,), equal=True
        ),
        surrounded("umask 077", inside=lambda: os.umask(0o077), status=(0,), equal=True, after=_modes(0o600)),
        surrounded("umask 022", inside=lambda: os.umask(0o022), status=(0,), equal=True, after=_modes(0o644)),
        surrounded("umask 777", inside=lambda: os.umask(0o777), status=(0, 2), again=False),
    ]


def _modes(mode: int) -> Callable[[Project], list[str]]:
    """Every file that a run leaves has this mode, as the umask says."""

    def after(project: Project) -> list[str]:
        made = (path for path in project.run_folder.rglob("*") if path.is_file())
        files = [path for path in made if path.stat().st_nlink == 1]  # others are the user's, linked
        other = [path.name for path in files if path.stat().st_mode & 0o777 != mode]
        return [f"not of mode {mode:o}: {', '.join(sorted(set(other))[:5])}"] if other else []

    return after
