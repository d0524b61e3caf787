"""The process of a run: signals, terminals, variables, clocks, folders that go."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hostile.case import CHECK, RUN, Case, Project
from benchmarks.hostile.environment import PREPARE, Inside, surrounded


def cases() -> list[Case]:
    """All of this file."""
    return [*_signals(), *_outputs(), *_variables(), *_clocks()]


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
        surrounded(f"{name} while {phase}", "continue", env=env, inside=inside, status=(130,))
        for name, number in named.items()
        for phase, env, inside in (
            ("training", {"HOSTILE_STOP": "sft 2", "HOSTILE_SIGNAL": str(int(number))}, lambda: None),
            ("encoding", {}, _sent(number, "open", 3)),
        )
    ]
    found += [
        surrounded(f"SIGTERM at fsync {call}", inside=_sent(signal.SIGTERM, "fsync", call), status=(130,))
        for call in (2, 8, 14, 20, 26, 36)
    ]
    found += [
        surrounded(f"SIGKILL at fsync {call}", inside=_sent(signal.SIGKILL, "fsync", call), status=(-9,))
        for call in (2, 8, 14, 20, 26, 36)
    ]
    found += [
        surrounded(f"SIGKILL at rename {call}", inside=_sent(signal.SIGKILL, "rename", call), status=(-9,))
        for call in (1, 4, 7)
    ]
    return [
        *found,
        surrounded("SIGTERM twice at once", inside=_sent(signal.SIGTERM, "fsync", 12, 2), status=(130,)),
        surrounded("SIGTERM in the last stage", env={"HOSTILE_STOP": "grpo 1"}, status=(130,)),
        surrounded("SIGTERM at the last step", env={"HOSTILE_STOP": "grpo 2"}, status=(0, 130)),
        surrounded("SIGPIPE", inside=_sent(signal.SIGPIPE, "fsync", 5), status=(0,), equal=True),
        surrounded("SIGWINCH and SIGCONT", inside=_sent(signal.SIGWINCH, "fsync", 5), status=(0,), equal=True),
        surrounded("SIGINT in prepare", typed=PREPARE, inside=_sent(signal.SIGINT, "open", 3), status=(130,)),
        surrounded("SIGTERM in prepare", typed=PREPARE, inside=_sent(signal.SIGTERM, "open", 3), status=(-15, 130)),
        surrounded("SIGINT in check", typed=CHECK, inside=_interrupted, status=(130,), again=False),
    ]


def _interrupted() -> None:
    threading.Timer(0.03, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


# where output goes


def _closed(*numbers: int) -> Inside:
    """As a shell's >&- leaves them: Python has no stream there."""

    def inside() -> None:
        for number in numbers:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)

    return inside


def _broken() -> None:
    """A pipe that nobody reads: corefit ... | head -1."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def _to(device: str) -> Inside:
    return lambda: os.dup2(os.open(device, os.O_WRONLY), 1)


def _ascii() -> None:
    """As PYTHONIOENCODING=ascii: stdout refuses what it cannot write, stderr escapes it."""
    for stream, errors in ((sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        stream.reconfigure(encoding="ascii", errors=errors)  # pyright: ignore[reportAttributeAccessIssue]


def _outputs() -> list[Case]:
    commands = {"check": CHECK, "plugins": ("plugins",), "schema": ("schema",), "run": RUN, "help": ("--help",)}
    outputs = {"closed": _closed(1), "a broken pipe": _broken, "a full device": _to("/dev/full")}
    found = [
        surrounded(
            f"stdout is {what} in {name}",
            typed=typed,
            inside=inside,
            status=(0, 2) if typed == RUN else (0, 1, 2),
            again=typed == RUN,
        )
        for name, typed in commands.items()
        for what, inside in outputs.items()
    ]
    unicode = _prompted("ein rotes Quadrat, größer als 红色 \U0001f7e5")
    return [
        *found,
        surrounded("stdout and stderr are closed in run", inside=_closed(1, 2), status=(0, 2)),
        surrounded("stdin is closed in run", inside=_closed(0), status=(0,), equal=True),
        surrounded("all are closed in check", typed=CHECK, inside=_closed(0, 1, 2), status=(0, 2), again=False),
        surrounded("ASCII terminal, run", inside=_ascii, status=(0,), equal=True),
        surrounded("ASCII terminal, unicode prompts", spoil=unicode, inside=_ascii, status=(0,), again=False),
        surrounded(
            "ASCII terminal, unicode error", typed=(*CHECK, "--set", "stage.größe.steps=1"), inside=_ascii, again=False
        ),
        surrounded("terminal one column wide", env={"COLUMNS": "1"}, status=(0,), equal=True),
        surrounded(
            "terminal of nonsense", env={"COLUMNS": "wide", "LINES": "-1", "TERM": "nonsense"}, status=(0,), equal=True
        ),
        surrounded("colors are forced", env={"FORCE_COLOR": "1", "TERM": "xterm"}, status=(0,), equal=True),
    ]


def _prompted(text: str) -> Callable[[Project], None]:
    return lambda project: project.replace("a red square", text, "heldout.jsonl")


# variables


def _variables() -> list[Case]:
    def of(name: str, *says: str, status: tuple[int, ...] = (0, 2), **env: str | None) -> Case:
        return surrounded(f"variable {name}", *says, env=env, status=status, equal=status != (2,))

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
        of(
            "MASTER_PORT is text", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="port"
        ),
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
        surrounded("clock of 1970", inside=_clock(0.0), status=(0,), equal=True),
        surrounded("clock of 1960", inside=_clock(-3e8), status=(0,), equal=True),
        surrounded("clock of 2100", inside=_clock(4.1e9), status=(0,), equal=True),
        surrounded("clock runs backwards", inside=_backwards, status=(0,), equal=True),
        surrounded("files of 1970", spoil=_touched(0.0), status=(0,), equal=True),
        surrounded("files of the future", spoil=_touched(4.1e9), start="interrupted", status=(0,), equal=True),
        surrounded("finished files of the future", spoil=_touched(4.1e9), start="finished", status=(0,), equal=True),
        surrounded(
            "the current folder is gone",
            typed=("run", "{folder}/pipeline.toml"),
            inside=_gone,
            status=(0, 2),
            equal=True,
        ),
        surrounded("the current folder is gone in check", typed=CHECK, inside=_gone, again=False),
    ]
