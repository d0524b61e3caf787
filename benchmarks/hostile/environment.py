"""The machine around a run: disks, limits, signals, terminals, variables, clocks."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hostile import mounts
from benchmarks.hostile.case import CHECK, PIPELINE, RUN, Case, Project

Inside = Callable[[], None]
PREPARE = ("prepare", PIPELINE)
NOBODY = 65534


def cases() -> list[Case]:
    """All of this area."""
    return [*_disks(), *_rights(), *_locks(), *_limits(), *_signals(), *_outputs(), *_variables(), *_clocks()]


def _case(name: str, *says: str, typed: tuple[str, ...] = RUN, again: bool = True, **rest: Any) -> Case:
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
        _case(f"disk is full at fsync {number}", "space", inside=_refusing("fsync", number, full))
        for number in (1, 4, 10, 16, 22, 30, 40)
    ]
    found += [
        _case(f"disk is full at rename {number}", "space", inside=_refusing("rename", number, full)) for number in (1, 3, 6)
    ]
    found += [
        _case(f"disk is full at replace {number}", "space", inside=_refusing("replace", number, full)) for number in (1, 2, 5)
    ]
    found += [
        _case(f"files of at most {size} bytes", inside=_limited(resource.RLIMIT_FSIZE, size))
        for size in (0, 100, 2_000, 10_000, 50_000)
    ]
    return [
        *found,
        _case("quota is used up", "quota", inside=_refusing("fsync", 12, quota)),
        _case("disk fails once", inside=_refusing("fsync", 12, broken, 1), status=(0, 2)),
        _case("disk fails for good", "error", inside=_refusing("fsync", 20, broken)),
        _case("mkdir fails", "space", inside=_refusing("mkdir", 3, full)),
        _case("full disk while encoding", "space", typed=PREPARE, inside=_refusing("fsync", 1, full)),
        _case("full disk of runs, 16 KiB", "space", spoil=_made("runs"), inside=mounts.small("runs", 16), root=True),
        _case("full disk of runs, 200 KiB", "space", spoil=_made("runs"), inside=mounts.small("runs", 200), root=True),
        _case("full disk of runs, 600 KiB", "space", spoil=_made("runs"), inside=mounts.small("runs", 600), root=True),
        _case("full disk of .corefit, 8 KiB", "space", spoil=_made(".corefit"), inside=mounts.small(".corefit", 8), root=True),
        _case("read-only file system: runs", "read-only", spoil=_made("runs"), inside=mounts.frozen("runs"), root=True),
        _case("read-only file system: .corefit", "read-only", spoil=_made(".corefit"), inside=mounts.frozen(".corefit"), root=True),
        _case("read-only file system: all", "read-only", inside=mounts.frozen("."), root=True),
        _case("read-only file system: base and pictures", inside=mounts.frozen("base", "pictures"), root=True, status=(0,), equal=True),
        _case("read-only file system, all is finished", "read-only", start="finished", inside=mounts.frozen("."), root=True, status=(0, 2)),
        _case("read-only file system, show", "read-only", typed=("show", PIPELINE), start="encoded", inside=mounts.frozen("."), root=True),
        _case("read-only file system, check", typed=CHECK, inside=mounts.frozen("."), root=True, status=(0,), again=False),
        _case("read-only file system, dry run", typed=(*RUN, "--dry-run"), inside=mounts.frozen("."), root=True, status=(0,), again=False),
    ]


def _made(name: str) -> Callable[[Project], None]:
    return lambda project: project.path(name).mkdir(exist_ok=True)


# rights


def _nobody() -> None:
    """Without the rights of root, where the process has them."""
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _unwritable(name: str, mode: int = 0o555) -> Callable[[Project], None]:
    """All may be written by everybody, but for this."""

    def spoil(project: Project) -> None:
        for folder, _, files in os.walk(project.folder):
            os.chmod(folder, 0o777)
            for file in files:
                os.chmod(Path(folder, file), 0o666)
        target = project.path(name)
        for path in [target, *target.rglob("*")]:
            os.chmod(path, mode if path.is_dir() else mode & 0o666)

    return spoil


def _rights() -> list[Case]:
    def of(name: str, target: str, *says: str, mode: int = 0o555, made: bool = False, **rest: Any) -> Case:
        def spoil(project: Project) -> None:
            if made:
                project.path(target).mkdir(exist_ok=True)
            _unwritable(target, mode)(project)

        return _case(name, *(says or (Path(target).name,)), spoil=spoil, inside=_nobody, **rest)

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
        _case("no locks: ENOLCK", "lock", inside=_lockless(errno.ENOLCK), status=(0, 2)),
        _case("no locks: EOPNOTSUPP", "lock", inside=_lockless(errno.EOPNOTSUPP), status=(0, 2)),
        _case("no locks: EIO", "lock", inside=_lockless(errno.EIO), status=(0, 2)),
        _case("no locks while encoding", "lock", typed=PREPARE, inside=_lockless(errno.ENOLCK), status=(0, 2)),
        _case("another run is in the folder", "another", inside=_second, again=True),
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
        _case("8 open files", inside=_limited(files, 8), status=(0, 2)),
        _case("16 open files", inside=_limited(files, 16), status=(0, 2)),
        _case("64 open files", inside=_limited(files, 64), status=(0,), equal=True),
        _case("8 open files in check", typed=CHECK, inside=_limited(files, 8), status=(0, 2), again=False),
        _case("no core and no locked memory", inside=_limited(resource.RLIMIT_MEMLOCK, 0), status=(0,), equal=True),
        _case("umask 077", inside=lambda: os.umask(0o077) and None, status=(0,), equal=True, after=_modes(0o600)),
        _case("umask 022", inside=lambda: os.umask(0o022) and None, status=(0,), equal=True, after=_modes(0o644)),
        _case("umask 777", inside=lambda: os.umask(0o777) and None, status=(0, 2), again=False),
    ]


def _modes(mode: int) -> Callable[[Project], list[str]]:
    """Every file that a run leaves has this mode, as the umask says."""

    def after(project: Project) -> list[str]:
        files = [path for path in project.run_folder.rglob("*") if path.is_file()]
        other = [path.name for path in files if path.stat().st_mode & 0o777 != mode]
        return [f"not of mode {mode:o}: {', '.join(sorted(set(other))[:5])}"] if other else []

    return after


# signals


def _sent(number: int, where: str, call: int, times: int = 1) -> Inside:
    """A signal as a function is called for the `call`-th time; it is one of os, or opens a picture."""

    def inside() -> None:
        import PIL.Image

        module: Any = PIL.Image if where == "open" else os
        real, calls = getattr(module, where), itertools.count(1)

        def sending(*args: Any, **keys: Any) -> Any:
            if next(calls) == call:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return real(*args, **keys)

        setattr(module, where, sending)

    return inside


def _signals() -> list[Case]:
    named = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP, "SIGUSR1": signal.SIGUSR1}
    found = [
        _case(f"{name} while {phase}", "continue", env=env, inside=inside, status=(130,))
        for name, number in named.items()
        for phase, env, inside in (
            ("training", {"HOSTILE_STOP": "sft 2", "HOSTILE_SIGNAL": str(int(number))}, lambda: None),
            ("encoding", {}, _sent(number, "open", 3)),
        )
    ]
    found += [
        _case(f"SIGTERM at fsync {call}", inside=_sent(signal.SIGTERM, "fsync", call), status=(130,)) for call in (2, 8, 14, 20, 26, 36)
    ]
    found += [
        _case(f"SIGKILL at fsync {call}", inside=_sent(signal.SIGKILL, "fsync", call), status=(-9,)) for call in (2, 8, 14, 20, 26, 36)
    ]
    found += [_case(f"SIGKILL at rename {call}", inside=_sent(signal.SIGKILL, "rename", call), status=(-9,)) for call in (1, 4, 7)]
    return [
        *found,
        _case("SIGTERM twice at once", inside=_sent(signal.SIGTERM, "fsync", 12, 2), status=(130,)),
        _case("SIGTERM in the last stage", env={"HOSTILE_STOP": "grpo 1"}, status=(130,)),
        _case("SIGTERM at the last step", env={"HOSTILE_STOP": "grpo 2"}, status=(0, 130)),
        _case("SIGPIPE", inside=_sent(signal.SIGPIPE, "fsync", 5), status=(0,), equal=True),
        _case("SIGWINCH and SIGCONT", inside=_sent(signal.SIGWINCH, "fsync", 5), status=(0,), equal=True),
        _case("SIGINT in prepare", typed=PREPARE, inside=_sent(signal.SIGINT, "open", 3), status=(130,)),
        _case("SIGTERM in prepare", typed=PREPARE, inside=_sent(signal.SIGTERM, "open", 3), status=(130,)),
        _case("SIGINT in check", typed=CHECK, inside=_interrupted, status=(130,), again=False),
    ]


def _interrupted() -> None:
    threading.Timer(0.03, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


# where output goes


def _closed(*numbers: int) -> Inside:
    return lambda: [os.close(number) for number in numbers] and None


def _broken() -> None:
    """A pipe that nobody reads: corefit ... | head -1."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def _to(device: str) -> Inside:
    return lambda: os.dup2(os.open(device, os.O_WRONLY), 1) and None


def _ascii() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")  # pyright: ignore[reportAttributeAccessIssue]


def _outputs() -> list[Case]:
    commands = {"check": CHECK, "plugins": ("plugins",), "schema": ("schema",), "run": RUN, "help": ("--help",)}
    outputs = {"closed": _closed(1), "a broken pipe": _broken, "a full device": _to("/dev/full")}
    found = [
        _case(f"stdout is {what} in {name}", typed=typed, inside=inside, status=(0, 2), again=typed == RUN)
        for name, typed in commands.items()
        for what, inside in outputs.items()
    ]
    unicode = _prompted("ein rotes Quadrat, größer als 红色 \U0001f7e5")
    return [
        *found,
        _case("stdout and stderr are closed in run", inside=_closed(1, 2), status=(0, 2)),
        _case("stdin is closed in run", inside=_closed(0), status=(0,), equal=True),
        _case("all are closed in check", typed=CHECK, inside=_closed(0, 1, 2), status=(0, 2), again=False),
        _case("ASCII terminal, run", inside=_ascii, status=(0,), equal=True),
        _case("ASCII terminal, unicode prompts", spoil=unicode, inside=_ascii, status=(0,)),
        _case("ASCII terminal, unicode error", typed=(*CHECK, "--set", "stage.größe.steps=1"), inside=_ascii, again=False),
        _case("terminal one column wide", env={"COLUMNS": "1"}, status=(0,), equal=True),
        _case("terminal of nonsense", env={"COLUMNS": "wide", "LINES": "-1", "TERM": "nonsense"}, status=(0,), equal=True),
        _case("colors are forced", env={"FORCE_COLOR": "1", "TERM": "xterm"}, status=(0,), equal=True),
    ]


def _prompted(text: str) -> Callable[[Project], None]:
    return lambda project: project.replace("a red square", text, "heldout.jsonl")


# variables


def _variables() -> list[Case]:
    def of(name: str, *says: str, status: tuple[int, ...] = (0, 2), **env: str | None) -> Case:
        return _case(f"variable {name}", *says, env=env, status=status, equal=status != (2,))

    return [
        of("HOME is unset", HOME=None, status=(0,)),
        of("HOME is nowhere", HOME="/nowhere", status=(0,)),
        of("HOME is a file", HOME="/etc/hostname", status=(0,)),
        of("TMPDIR is nowhere", TMPDIR="/nowhere"),
        of("LANG is C", LANG="C", LC_ALL="C", status=(0,)),
        of("LANG is nonsense", LANG="xx_YY.nonsense", LC_ALL="xx_YY.nonsense", status=(0,)),
        of("PATH is empty", PATH="", status=(0,)),
        of("ACCELERATE_USE_DEEPSPEED", "deepspeed", status=(2,), ACCELERATE_USE_DEEPSPEED="true"),
        of("ACCELERATE_USE_FSDP of version 1", "fsdp", status=(2,), ACCELERATE_USE_FSDP="true"),
        of("ACCELERATE_USE_MEGATRON_LM", "megatron", status=(2,), ACCELERATE_USE_MEGATRON_LM="true"),
        of("ACCELERATE_MIXED_PRECISION of nonsense", ACCELERATE_MIXED_PRECISION="fp3"),
        of("ACCELERATE_MIXED_PRECISION is fp16", ACCELERATE_MIXED_PRECISION="fp16"),
        of("ACCELERATE_MIXED_PRECISION is fp8", ACCELERATE_MIXED_PRECISION="fp8"),
        of("ACCELERATE_DYNAMO_BACKEND of nonsense", ACCELERATE_DYNAMO_BACKEND="nonsense"),
        of("ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"),
        of("ACCELERATE_GRADIENT_ACCUMULATION_STEPS of text", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="many"),
        of("ACCELERATE_USE_PARALLELISM_CONFIG", ACCELERATE_USE_PARALLELISM_CONFIG="true"),
        of("RANK is text", RANK="first"),
        of("RANK without a world", RANK="1"),
        of("WORLD_SIZE without a rank", WORLD_SIZE="2"),
        of("WORLD_SIZE is zero", WORLD_SIZE="0", RANK="0", LOCAL_RANK="0"),
        of("LOCAL_RANK is text", LOCAL_RANK="first"),
        of("MASTER_PORT is text", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="port"),
        of("CUDA_VISIBLE_DEVICES of nonsense", CUDA_VISIBLE_DEVICES="nonsense", status=(0,)),
        of("COREFIT_DISABLE of nonsense", "COREFIT_DISABLE", status=(2,), COREFIT_DISABLE="nonsense"),
        of("COREFIT_DISABLE of what is used", "sft", status=(2,), COREFIT_DISABLE="sft"),
        of("COREFIT_DISABLE of an escape sequence", "COREFIT_DISABLE", status=(2,), COREFIT_DISABLE="\x1b[31mEVIL"),
        of("OMP_NUM_THREADS of nonsense", OMP_NUM_THREADS="nonsense"),
        of("HF_HOME is a file", HF_HOME="/etc/hostname", status=(0,)),
        of("MPLBACKEND of nonsense", MPLBACKEND="nonsense"),
        of("MPLCONFIGDIR is a file", MPLCONFIGDIR="/etc/hostname"),
    ]


# clocks, and folders that move


def _clock(now: float) -> Inside:
    def inside() -> None:
        time.time = lambda: now
        time.time_ns = lambda: int(now * 1e9)

    return inside


def _backwards() -> None:
    ticks = itertools.count(2_000_000_000, -1000)
    time.time = lambda: float(next(ticks))


def _touched(when: float) -> Callable[[Project], None]:
    def spoil(project: Project) -> None:
        for path in project.folder.rglob("*"):
            os.utime(path, (when, when))

    return spoil


def _gone() -> None:
    folder = Path("gone")
    folder.mkdir()
    os.chdir(folder)
    Path.rmdir(Path("../gone"))


def _clocks() -> list[Case]:
    return [
        _case("clock of 1970", inside=_clock(0.0), status=(0,), equal=True),
        _case("clock of 1960", inside=_clock(-3e8), status=(0,), equal=True),
        _case("clock of 2100", inside=_clock(4.1e9), status=(0,), equal=True),
        _case("clock runs backwards", inside=_backwards, status=(0,), equal=True),
        _case("files of 1970", spoil=_touched(0.0), status=(0,), equal=True),
        _case("files of the future", spoil=_touched(4.1e9), start="interrupted", status=(0,), equal=True),
        _case("finished files of the future", spoil=_touched(4.1e9), start="finished", status=(0,), equal=True),
        _case("the current folder is gone", typed=("run", "{folder}/pipeline.toml"), inside=_gone, status=(0, 2), equal=True),
        _case("the current folder is gone in check", typed=CHECK, inside=_gone, again=False),
    ]
