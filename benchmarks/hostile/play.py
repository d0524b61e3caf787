"""Plays a case: fork, so that torch is imported once; the command in a process of its own, watched, then judged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from benchmarks.hostile import seed
from benchmarks.hostile.case import OURS, Case, Project, changed, digests, precious, undisturbed
from benchmarks.hostile.seed import Slot

TRACES = ("Traceback (most recent call last)", "Exception ignored in", "Fatal Python error", "Exception in thread")
ADVICE = re.compile(r"(?:\b[Dd]elete\s+(\S+)|\b[Rr]emove\s+(/\S+))")
WARM = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "streaming", "matplotlib", "PIL")
WARM_MORE = ("rich", "attrs", "cattrs", "numpy", "tokenizers", "tomli_w", "datasets", "av", "corefit", "pluggy")


@frozen
class Verdict:
    """How a case ended: `wrong` is empty where all that must hold did."""

    name: str
    area: str
    status: int
    seconds: float
    wrong: Sequence[str]
    said: str
    """The end of what the command said."""
    skipped: str = ""
    """Why the case could not be played here."""


# processes


def forked(work: Callable[[], int], log: Path | None = None) -> int:
    """The number of a process, in a session of its own, that ends with what `work` returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 99
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the harness runs in the background
        if log:
            _redirect(log)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _redirect(log: Path) -> None:
    empty, file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((empty, 0), (file, 1), (file, 2)):
        os.dup2(source, target)


def waited(pid: int, timeout: float) -> int | None:
    """Its exit status, negative for a signal; None, and it and all that it started are killed, after `timeout` [s]."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            _end_group(pid)
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _all_waited(pids: Sequence[int], timeout: float) -> dict[int, int | None]:
    """The exit status of each, collected as they end: one that waits for a dead one must not find a zombie."""
    ended: dict[int, int | None] = {}
    until = time.monotonic() + timeout
    while len(ended) < len(pids) and time.monotonic() < until:
        for pid in (pid for pid in pids if pid not in ended):
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(code)
        time.sleep(0.01)
    return ended | {pid: waited(pid, 0) for pid in pids if pid not in ended}


def _end_group(pid: int) -> None:
    """Processes that it has left behind in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def corefit_in_this_process(
    typed: Sequence[str], folder: Path, env: Mapping[str, str | None], inside: Callable[[], object] = undisturbed
) -> int:
    """What `corefit TYPED` in `folder` ends with, its traceback printed as Python's own would be."""
    os.chdir(folder)
    for key, value in env.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    sys.argv = ["corefit", *(text.replace("{folder}", str(folder)) for text in typed)]
    inside()
    from corefit.cli import main

    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    return _ended(status)


def _ended(status: int) -> int:
    """What Python's own end adds: buffers that cannot be written are told, with status 120."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        os.write(2, f"Exception ignored in: stdout\n{type(error).__name__}: {error}\n".encode())
        return 120
    return status


def together(case: Case, folder: Path, log: Path) -> int | None:
    """The statuses of several ranks, as a launcher starts them: the first that is not right, or else the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids: list[int] = []
    for rank in range(case.ranks):
        typed = [*case.typed, *(case.odd if rank == case.ranks - 1 else ())]
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
        env = {**case.env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {key: str(value) for key, value in places.items()}
        pids.append(forked(lambda typed=typed, env=env: corefit_in_this_process(typed, folder, env, case.inside), log))
    ended = _all_waited(pids, case.timeout)
    statuses = [ended[pid] for pid in pids]
    with log.open("a") as file:
        file.write(f"\n[statuses by rank: {statuses}]\n")
    return next((status for status in statuses if status not in case.status), statuses[0])


def warm(names: Sequence[str]) -> None:
    """Import what a run imports, once, for all that are forked; refuses threads, which a fork would lose."""
    import importlib
    import warnings

    import torch

    torch.set_num_threads(1)
    for name in names:
        if name.partition(".")[0] in (*WARM, *WARM_MORE, "encodings"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    importlib.import_module(name)
                except Exception:
                    continue
    assert threading.active_count() == 1, threading.enumerate()


# one case


def played(case: Case, slot: Slot) -> Verdict:
    """Prepare, type, judge; where told, mend and type again."""
    began, log = time.monotonic(), slot.folder / "log.txt"
    log.unlink(missing_ok=True)
    project = slot.begin(case.start)
    before = digests(project.folder)
    case.spoil(project)
    spoiled = _differing(before, digests(project.folder))
    mine, outside = digests(project.folder, without=OURS), digests(project.outside)
    kept = {digest: name for digest, name in precious(project).items() if name not in spoiled}
    status = _command(case, project, log)
    said = log.read_text(errors="replace") if log.exists() else ""
    wrong = [*ending(case, status, said), *advice(said, project)]
    wrong += changed(mine, digests(project.folder, without=OURS), case.makes)
    wrong += [f"outside/{what}" for what in changed(outside, digests(project.outside))]
    there = precious(project)
    wrong += [f"lost: {name}" for digest, name in kept.items() if digest not in there]
    if status == 0 and case.equal:
        wrong += _unequal(seed.outcome(project), slot.expected, spoiled)
    if status == 0:
        wrong += case.after(project)
    if case.again and not wrong and not (case.equal and status == 0):
        wrong += _again(case, slot, spoiled, log)
    return Verdict(
        case.name, case.area, -999 if status is None else status, time.monotonic() - began, wrong, said[-1500:]
    )


def _differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _command(case: Case, project: Project, log: Path) -> int | None:
    if case.ranks > 1:
        return together(case, project.folder, log)
    pid = forked(lambda: corefit_in_this_process(case.typed, project.folder, case.env, case.inside), log)
    return waited(pid, case.timeout)


def ending(case: Case, status: int | None, said: str) -> list[str]:
    """What is wrong with the exit status and the message."""
    if status is None:
        return [f"hangs: killed after {case.timeout:g} s"]
    wrong = [f"output has {mark!r}: {_fault(said)}" for mark in TRACES if mark in said and not case.theirs]
    if case.theirs and case.theirs not in said:
        wrong.append(f"does not name {case.theirs}: {_fault(said)}")
    if status not in case.status and not (case.theirs and status == 1):
        wrong.append(f"status {status}, not {' or '.join(map(str, sorted(case.status)))}: {_fault(said)}")
    if status:
        wrong += [f"does not say {word!r}: {_fault(said)}" for word in case.says if word.lower() not in said.lower()]
    return wrong + [f"says {word!r}" for word in case.unsaid if word in said]


def _fault(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if line.strip() and not line.startswith("[statuses")]
    return lines[-1][:300] if lines else "nothing was said"


def advice(said: str, project: Project) -> list[str]:
    """Advice to delete anything but a cache that corefit made."""
    named = [project.folder / "".join(found).rstrip(".,;:'\"") for found in ADVICE.findall(said)]
    return [f"advises to delete {path}" for path in named if project.cache not in path.parents]


def _unequal(found: Mapping[str, str], expected: Mapping[str, str], spoiled: Sequence[str] = ()) -> list[str]:
    """Names of differing results; a log or picture that was spoiled itself determines nothing and is not made again.

    Parts of the base that are not trained are copied into models as they are.
    """
    shown = {name.removeprefix("runs/demo/") for name in spoiled if name.endswith(("metrics.jsonl", ".png"))}
    copied = {name.removeprefix("base/") for name in spoiled if name.startswith("base/")}
    names = [name for name in _differing(found, expected) if name not in shown]
    names = [name for name in names if name.partition("/model/")[2] not in copied]
    return [f"ends in other results than an undisturbed run: {', '.join(names[:4])}"] if names else []


def _again(case: Case, slot: Slot, spoiled: Sequence[str], log: Path) -> list[str]:
    """Put back what was spoiled, run the pipeline: what is wrong with how that ends."""
    project, origin = slot.project, slot.folder / case.start / "project"
    seed.let_in(project.folder)
    for name in sorted(spoiled, reverse=True):
        _cleared(project.folder / name, origin / name)
    for name in sorted(spoiled):
        source, there = origin / name, project.folder / name
        if source.is_dir():
            there.mkdir(exist_ok=True)
        elif source.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, there)
    status = waited(
        forked(lambda: corefit_in_this_process(["run", "pipeline.toml"], project.folder, {}), log), case.timeout
    )
    if status != 0:
        return [f"mended, it ends with status {status}: {_fault(log.read_text(errors='replace'))}"]
    return [f"mended, it {what}" for what in _unequal(seed.outcome(project), slot.expected, spoiled)]


def _cleared(there: Path, source: Path) -> None:
    """Remove what a case put there, or put in place of something else; a folder that belongs there stays."""
    if there.is_symlink() or there.is_file():
        there.unlink()
    elif there.is_dir() and not source.is_dir():
        shutil.rmtree(there)


def judged(case: Case, slot: Slot) -> None:
    """Play a case and leave its verdict in the slot; a fault of the harness is a verdict too."""
    import attrs

    try:
        verdict = played(case, slot)
    except Exception as error:
        fault = f"the harness failed: {type(error).__name__}: {error}"
        verdict = Verdict(case.name, case.area, -998, 0.0, [fault], traceback.format_exc()[-1500:])
    found: dict[str, Any] = attrs.asdict(verdict)
    (slot.folder / "verdict.json").write_text(json.dumps(found))
