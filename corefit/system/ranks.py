"""The processes of one run: how they join, what they exchange and agree on, and why one of them stopped.

accelerate says which process this is, and torch carries what they exchange; nothing here depends on a model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import define

from corefit.errors import ConfigError, CorefitError, PluginError, RankError
from corefit.system import cuda, memory
from corefit.system.layout import WHOLE, Layout

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator, PartialState
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long a process waits for one that lives, such as rank 0 while it encodes; a dead one is noticed at once."""
GRACE = 5.0
"""Seconds in which a process looks for the one whose end broke a connection."""
NOTES = ".ranks"
"""Folder of a run in which its processes say who they are and why they stopped."""
STOPPED = "stopped by a signal"
"""The reason of a rank that a signal stopped. That is no failure, and the other ranks stop as it does."""
GONE = "another process of the run is gone; what it printed last says why"
LOST = re.compile(r"Connection (closed|reset)|Broken pipe|gloo|NCCL|TCPStore", re.IGNORECASE)
"""How torch says that it lost the connection to another process."""
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers say how many processes they start."""
DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables in which torch's launchers say which process this is and where it finds the others."""
ENGINES = {
    DEEPSPEED: "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""Engines that `accelerate launch` may be set to use and that corefit does not."""


@define(eq=False)
class Ranks:
    """This process among those of the run.

    By default it is alone and has no accelerator, which is enough to write checkpoints and caches, but not to train.

    rank     this process's number, from 0
    world    number of processes
    sharded  whether weights, gradients and optimizer state are split over the processes (FSDP2), or whole on each
    host     gloo's group of all processes, for objects on the CPU; it never waits for a GPU. None for a single process
    joined   the accelerator that `join` made
    layout   how the processes share weights and samples
    """

    rank: int = 0
    world: int = 1
    sharded: bool = False
    host: ProcessGroup | None = None
    joined: Accelerator | None = None
    layout: Layout = WHOLE

    @property
    def accelerator(self) -> Accelerator:
        assert self.joined, "a process that did not join a run has no accelerator"
        return self.joined

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def data_rank(self) -> int:
        """The number of this process's share of each batch; processes that share samples have the same one."""
        return self.rank // self.layout.context

    @property
    def data_world(self) -> int:
        """The number of shares that each batch is split into."""
        return self.world // self.layout.context

    @property
    def leads(self) -> bool:
        """Whether this is the first of the processes that share its samples."""
        return self.rank % self.layout.context == 0

    @property
    def forwards_together(self) -> bool:
        """Whether a forward needs all processes, or all that share a sample: no process may call the network alone."""
        return self.sharded or self.layout.context > 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add up x over all ranks, on the device."""
        total: Any = self.accelerator.reduce(x, "sum") if self.world > 1 else x
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather rows [B, ...] of all shares of the batch, which are of one size, in their order: [global B, ...]."""
        if self.world == 1:
            return x
        every: Any = self.accelerator.gather(x.to(self.device))
        shares = every.unflatten(0, (self.world, len(x)))[:: self.layout.context]
        return shares.flatten(0, 1).to(x.device)

    def agree(self, x: Tensor) -> Tensor:
        """Return rows [B, ...] of the first of the processes that share this one's samples."""
        if self.layout.context == 1:
            return x
        every: Any = self.accelerator.gather(x.to(self.device))
        first = self.data_rank * self.layout.context
        return every.unflatten(0, (self.world, len(x)))[first].to(x.device)

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on each of them."""
        return _all_gather_object(value, self.world, self.host)

    def all_or_none(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns here, once it has succeeded on all ranks; where it fails on one, all fail."""
        return _all_or_none(attempt, self.world, self.host)

    def refuse_same_noise(self, drawn: list[float], stage: str) -> None:
        """Raise PluginError, on all ranks, where two of them drew the same noise, as if they shared one batch."""
        every = self.all_gather_object(drawn)
        step = self.layout.context  # those that share samples draw the same
        for rank, mine in list(enumerate(every))[::step]:
            for other in range(0, rank, step):
                if set(mine) & set(every[other]):
                    raise PluginError(
                        f"stage {stage}: ranks {other} and {rank} draw the same noise; an objective must draw for the "
                        "rows of its part (ctx.rand, ctx.randn_like, ctx.rng), never for a row's place in the batch"
                    )

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        import torch.distributed as dist

        box: list[Any] = [value]
        if self.world > 1:
            self.barrier()
            dist.broadcast_object_list(box, group_src=0, group=self.host)
        return box[0]

    def from_main(self, find: Callable[[], T]) -> T:
        """Call `find` on rank 0 alone and return its result on every rank: for files that rank 0 may be writing."""
        found: Any = find() if self.main else None
        return self.broadcast_object(found)

    def any(self, flag: bool) -> bool:
        """Return, on all ranks alike, whether `flag` is set on any of them. Waits for the processes, not for a GPU."""
        return _any(flag, self.host) if self.world > 1 else flag

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.any(False)

    @contextmanager
    def main_first(self) -> Generator[None]:
        """Let rank 0 run the block before the others do."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()

    @contextmanager
    def share_failures(self, folder: Path, *, keeper: bool | None = None) -> Generator[None]:
        """Within, a rank that fails or is stopped leaves a note that says why, and the others raise for that reason.

        Raises RankError where another rank failed, in place of the lost connection that this rank saw, and
        KeyboardInterrupt where a signal stopped another rank, since a stop of one is a stop of all.

        folder  the run's folder; the notes lie in it, and ranks of machines that do not share it say what they can
        keeper  whether this rank clears the notes; by default rank 0 does, where all share the folder
        """
        keeper = self.main if keeper is None else keeper
        notes = folder / NOTES
        if self.world == 1:
            shutil.rmtree(notes, ignore_errors=True)
            yield
            return
        self._start_notes(notes, keeper)
        try:
            yield
        except CorefitError as error:
            self._write_note(notes, self._stopped(str(error)))
            raise
        except KeyboardInterrupt:
            # a rank that is gone without a note got the same signal, before it had a handler for it
            cause = self._find_cause(notes, 0, noted_only=True)
            self._write_note(notes, cause or STOPPED)
            if cause not in ("", STOPPED):
                raise RankError(cause) from None
            raise
        except BaseException as error:
            cause = self._find_cause(notes, GRACE)
            self._write_note(notes, cause or self._stopped(_describe(error)))
            if cause == STOPPED:
                raise KeyboardInterrupt from None
            if cause:
                raise RankError(cause) from None
            if isinstance(error, RuntimeError) and LOST.search(str(error)):  # its note is on another machine
                raise RankError(GONE) from error
            raise
        self.barrier()
        if keeper:
            shutil.rmtree(notes, ignore_errors=True)

    def _start_notes(self, notes: Path, keeper: bool) -> None:
        """Remove the notes of an earlier run, and write one for each rank with its process and no reason."""

        def clear() -> None:
            if keeper:
                shutil.rmtree(notes, ignore_errors=True)
                notes.mkdir(parents=True)

        self.all_or_none(clear)
        self._write_note(notes, "")
        self.barrier()

    def _stopped(self, reason: str) -> str:
        return f"rank {self.rank} stopped: {reason}"

    def _write_note(self, notes: Path, reason: str) -> None:
        """Write this rank's note: its process, and why it stops, or nothing as long as it does not."""
        note = {"pid": os.getpid(), "host": socket.gethostname(), "reason": reason}
        temporary = notes / f"{self.rank}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(note))
            temporary.replace(notes / f"{self.rank}.json")
        except OSError:  # the run has ended on other ranks, which removed the folder, or the disk is full:
            return  # an error here would hide the one that this rank stops for

    def _find_cause(self, notes: Path, patience: float, *, noted_only: bool = False) -> str:
        """Return why another rank stopped, waiting up to `patience` seconds for it; nothing if all others run on.

        A failure comes before a signal, which may have been sent because of it. noted_only=True leaves out ranks that
        are gone without a note.
        """
        until = time.monotonic() + patience
        others = [rank for rank in range(self.world) if rank != self.rank]
        while True:
            ends = (_end(notes / f"{rank}.json", rank, noted_only=noted_only) for rank in others)
            causes = [cause for cause in ends if cause]
            if causes or time.monotonic() > until:
                return next((cause for cause in causes if cause != STOPPED), causes[0] if causes else "")
            time.sleep(0.1)


SINGLE = Ranks()
"""A process that writes by itself, with no other rank to take part."""


def join(precision: str = "auto", layout: Layout = WHOLE) -> Ranks:
    """Join the run, and return this process's place in it; ConfigError where the processes do not fit the layout.

    precision  "fp32", "bf16", or "auto": bf16 where a GPU has it
    layout     how processes share weights and samples; `accelerate launch --use_fsdp` asks for sharding too
    """
    with memory.uncollected("accelerate"):
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
        from accelerate.utils import GradientAccumulationPlugin

    check_launch()
    shard = _is_set_to_fsdp() or layout.shard
    half = is_half(precision)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # a pipeline before this one, in a notebook, may have had another precision
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    made = Accelerator(
        cpu=_no_gpu(),
        mixed_precision="bf16" if half else "no",
        kwargs_handlers=[ddp],
        # else ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides losses, and ACCELERATE_DYNAMO_BACKEND compiles networks
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )
    if made.device.type == "cpu" and not shard:  # sharded weights come and go in all sizes, and would leave holes
        memory.keep_freed()
    several = made.num_processes > 1
    layout.check(made.num_processes)
    return Ranks(
        rank=made.process_index,
        world=made.num_processes,
        sharded=several and shard,
        host=_gloo_group() if several else None,
        joined=made,
        layout=layout,
    )


def all_or_none(attempt: Callable[[], T]) -> T:
    """Return what `attempt` returns here, once it has succeeded on all processes of the launch.

    It is for what must succeed before `join`, such as reading the pipeline: no process then waits in `join` for one
    that has failed. Raises what `attempt` raises here, RankError where it failed in another process, and
    KeyboardInterrupt where another one was stopped.
    """
    _check_variables()
    if not _is_distributed():
        return attempt()
    state = _connect()

    def checked() -> T:
        check_launch()
        return attempt()

    return _all_or_none(checked, state.num_processes, _gloo_group() if state.num_processes > 1 else None)


def _check_variables() -> None:
    """Raise ConfigError where a launcher's variables in the environment have impossible values, or some are missing."""
    given = {name: os.environ[name] for name in LAUNCHED if os.environ.get(name)}
    remedy = "unset them, or start with torchrun or accelerate launch"
    for name, value in given.items():
        least = int(name == "WORLD_SIZE")
        if name != "MASTER_ADDR" and not (value.isdecimal() and int(value) >= least):
            raise ConfigError(f"{name} = {value!r} in the environment, where a launcher sets a number; {remedy}")
    missing = [name for name in LAUNCHED if name not in given]
    if given.get("WORLD_SIZE", "1") != "1" and missing:
        raise ConfigError(f"WORLD_SIZE is set in the environment, and {', '.join(missing)} not; {remedy}")


def check_launch() -> None:
    """Raise ConfigError where the launcher is set to an engine that corefit does not use."""
    for name, engine in ENGINES.items():
        if _is_set(name):
            raise ConfigError(
                f"accelerate is set to {engine} ({name}), which corefit does not use; launch without it, and say "
                "shard = true in the pipeline to split weights over GPUs"
            )
    if _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate is set to FSDP 1, which corefit does not use; launch with --fsdp_version 2")


def is_half(precision: str) -> bool:
    """Whether "fp32", "bf16" or "auto" is bfloat16 here."""
    if precision != "auto" or not cuda.may_be_there():
        return precision == "bf16"
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _is_set_to_fsdp() -> bool:
    """Return whether accelerate's launcher is set to FSDP; corefit then shards by itself, with torch's fully_shard."""
    asked = _is_set("ACCELERATE_USE_FSDP")
    if asked:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    return asked


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _is_distributed() -> bool:
    """Return whether a launcher has started several processes, of which this is one."""
    return any(os.environ.get(name, "") not in ("", "0", "1") for name in SIZES)


def _no_gpu() -> bool:
    """Return whether there is no GPU; accelerate has to be given that, or it takes several processes for one."""
    import torch

    return not torch.accelerator.is_available()


def _connect() -> PartialState:
    """Connect the launcher's processes, before `join`."""
    from accelerate import PartialState

    asked = os.environ.pop(DEEPSPEED, None)  # accelerate would start DeepSpeed here; `check_launch` refuses it
    state = PartialState(cpu=_no_gpu())
    if asked is not None:
        os.environ[DEEPSPEED] = asked
    return state


def _gloo_group() -> Any:
    """Make a group of all processes that needs no GPU."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _any(flag: bool, group: Any) -> bool:
    """Return whether `flag` is set on any rank of `group`.

    It polls, because Python handles no signal while torch itself waits.
    """
    import torch
    import torch.distributed as dist

    votes, pause = torch.tensor(int(flag)), 1e-4
    work: Any = dist.all_reduce(votes, group=group, async_op=True)
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    work.wait()
    return bool(votes)


def _all_gather_object(value: T, world: int, group: Any) -> list[T]:
    """Return the values of all ranks, by rank."""
    import torch.distributed as dist

    every: list[Any] = [value] * world
    if world > 1:
        _any(False, group)
        dist.all_gather_object(every, value, group=group)
    return every


def _all_or_none(attempt: Callable[[], T], world: int, group: Any) -> T:
    """Do what `all_or_none` does among `world` ranks, which `group` connects."""
    if world == 1:
        return attempt()
    value: Any = None
    failure: BaseException | None = None
    try:
        value = attempt()
    except BaseException as error:
        failure = error
    try:
        reasons = _all_gather_object(_reason(failure), world, group)
    except RuntimeError as error:
        raise failure or RankError(GONE) from error
    if failure:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason == STOPPED:
            raise KeyboardInterrupt
        if reason:
            raise RankError(f"rank {rank} stopped: {reason}")
    return value


def _reason(failure: BaseException | None) -> str:
    """Return why a rank goes no further, in its own words; nothing where it does."""
    if isinstance(failure, KeyboardInterrupt):
        return STOPPED
    if isinstance(failure, CorefitError):
        return str(failure)
    return _describe(failure) if failure else ""


def _end(note: Path, rank: int, *, noted_only: bool = False) -> str:
    """Return why a rank stopped, or nothing if it has not; noted_only=True counts only the reason in its note."""
    try:
        content = json.loads(note.read_text())
    except (OSError, ValueError):
        return ""
    if content["reason"] or noted_only or content["host"] != socket.gethostname() or alive(content["pid"]):
        return str(content["reason"])
    return f"rank {rank} (process {content['pid']}) died without a word: killed, perhaps for want of memory"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def alive(pid: int) -> bool:
    """Return whether this machine has a process `pid`, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
