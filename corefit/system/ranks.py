"""The processes of one run: what they add up and agree on, and why one of them stopped.

accelerate says which process this is and torch carries what they exchange; nothing here is specific to a model.
"""

from __future__ import annotations

import json
import os
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

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator, PartialState
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long a process waits for one that lives, such as the first while it encodes; a dead one is noticed at once."""
GRACE = 5.0
"""Seconds to find out whose end broke a connection."""
NOTES = ".ranks"
"""Folder of a run in which its processes say who they are and why they stopped."""
STOPPED = "stopped by a signal"
"""The reason of a rank that was asked to stop: no fault, and the others stop as it does."""
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
"""What `accelerate launch` may be set to use, and corefit does not."""


@define(eq=False)
class Ranks:
    """This process among those of the run.

    By default it is alone, and has no accelerator: enough to write checkpoints and caches, not to train.

    rank     its number, from 0, and how many there are (world)
    sharded  whether weights, gradients and optimizer state are split over the processes (FSDP2) or each has all
    host     a group for what the hosts alone must know; it never waits for a GPU. None for a single process
    """

    rank: int = 0
    world: int = 1
    sharded: bool = False
    host: ProcessGroup | None = None
    joined: Accelerator | None = None

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

    def all_reduce(self, x: Tensor) -> Tensor:
        """x added up over all ranks, on the device."""
        total: Any = self.accelerator.reduce(x, "sum") if self.world > 1 else x
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """Rows [B, ...] of all ranks in global order [global B, ...]; ranks' shares are contiguous and equal."""
        if self.world == 1:
            return x
        every: Any = self.accelerator.gather(x.to(self.device))
        return every.to(x.device)

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on each of them."""
        return _gathered(value, self.world, self.host)

    def all_or_none(self, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, once it has given something on all ranks; where it fails on one, it fails on all."""
        return _all_or_none(attempt, self.world, self.host)

    def refuse_same_noise(self, drawn: list[float], stage: str) -> None:
        """PluginError, on all ranks, if two of them drew the same noise: it would make their batches one."""
        every = self.all_gather_object(drawn)
        for rank, mine in enumerate(every):
            for other in range(rank):
                if set(mine) & set(every[other]):
                    raise PluginError(
                        f"stage {stage}: ranks {other} and {rank} draw the same noise; an objective must draw for the "
                        "rows of its part (ctx.rand, ctx.randn_like, ctx.rng), never for a row's place in the batch"
                    )

    def broadcast_object(self, value: T) -> T:
        """The first rank's value, on every rank."""
        import torch.distributed as dist

        box: list[Any] = [value]
        if self.world > 1:
            self.barrier()
            dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def from_main(self, find: Callable[[], T]) -> T:
        """What `find` gives on the first rank, on every rank; the others must not look while it may be writing."""
        found: Any = find() if self.main else None
        return self.broadcast_object(found)

    def any(self, flag: bool) -> bool:
        """Whether a rank says so; the same on all of them. Waits for the other hosts, not for a device."""
        return _any(flag, self.host) if self.world > 1 else flag

    def barrier(self) -> None:
        """Until every rank is here."""
        self.any(False)

    @contextmanager
    def main_first(self) -> Generator[None]:
        """The first rank does what follows before the others."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()

    @contextmanager
    def watched(self, folder: Path) -> Generator[None]:
        """Tell the others why this process stops, and say of a lost connection whose end it was.

        folder  of the run, seen by all. Raises RankError where a fault of another rank was the cause, and
                KeyboardInterrupt where a signal stopped another one: a stop of one is a stop of all.
        """
        notes = folder / NOTES
        if self.world == 1:
            shutil.rmtree(notes, ignore_errors=True)
            yield
            return
        self._enter(notes)
        try:
            yield
        except CorefitError as error:
            self._note(notes, self._stopped(str(error)))
            raise
        except KeyboardInterrupt:
            # one that is gone without a word was sent the same signal, where no handler waited for it
            cause = self._cause(notes, 0, said=True)
            self._note(notes, cause or STOPPED)
            if cause not in ("", STOPPED):
                raise RankError(cause) from None
            raise
        except BaseException as error:
            cause = self._cause(notes, GRACE)
            self._note(notes, cause or self._stopped(_described(error)))
            if cause == STOPPED:
                raise KeyboardInterrupt from None
            if cause:
                raise RankError(cause) from None
            raise
        self.barrier()
        if self.main:
            shutil.rmtree(notes, ignore_errors=True)

    def _enter(self, notes: Path) -> None:
        """Every rank says who it is; what a former run said is gone."""

        def cleared() -> None:
            if self.main:
                shutil.rmtree(notes, ignore_errors=True)
                notes.mkdir(parents=True)

        self.all_or_none(cleared)
        self._note(notes, "")
        self.barrier()

    def _stopped(self, reason: str) -> str:
        return f"rank {self.rank} stopped: {reason}"

    def _note(self, notes: Path, reason: str) -> None:
        said = {"pid": os.getpid(), "host": socket.gethostname(), "reason": reason}
        temporary = notes / f"{self.rank}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(said))
            temporary.replace(notes / f"{self.rank}.json")
        except OSError:  # the run has ended elsewhere and its folder of notes is gone, or the disk takes no more:
            return  # why this rank stops is more than that it cannot tell the others

    def _cause(self, notes: Path, patience: float, *, said: bool = False) -> str:
        """What another rank said before it stopped, or that it is gone; nothing if all others live on.

        A fault comes before a signal, which may have been sent because of it. said=True leaves out those that are
        gone without a word.
        """
        until = time.monotonic() + patience
        others = [rank for rank in range(self.world) if rank != self.rank]
        while True:
            causes = [cause for rank in others if (cause := _end(notes / f"{rank}.json", rank, said=said))]
            if causes or time.monotonic() > until:
                return next((cause for cause in causes if cause != STOPPED), causes[0] if causes else "")
            time.sleep(0.1)


SINGLE = Ranks()
"""A process by itself: what it writes, it writes alone."""


def join(precision: str = "auto", *, shard: bool = False) -> Ranks:
    """This process's place in the run.

    precision  "fp32", "bf16", or "auto": bf16 where a GPU has it
    shard      FSDP2; `accelerate launch --use_fsdp` asks for it too
    """
    with memory.uncollected("accelerate"):
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
        from accelerate.utils import GradientAccumulationPlugin

    check_launch()
    shard = _asked_for_fsdp() or shard
    half = is_half(precision)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # a pipeline before this one, in a notebook, may have had another precision
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    made = Accelerator(
        cpu=_bare(),
        mixed_precision="bf16" if half else "no",
        kwargs_handlers=[ddp],
        # else ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides losses, and ACCELERATE_DYNAMO_BACKEND compiles networks
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )
    if made.device.type == "cpu" and not shard:  # sharded weights come and go in all sizes, and would leave holes
        memory.keep_freed()
    several = made.num_processes > 1
    return Ranks(
        rank=made.process_index,
        world=made.num_processes,
        sharded=several and shard,
        host=_hosts() if several else None,
        joined=made,
    )


def all_or_none(attempt: Callable[[], T]) -> T:
    """What `attempt` gives, once it has given something on all processes of the launch.

    They meet before `join`, for what it takes to join: so none waits for one whose pipeline cannot be read. Raises
    what `attempt` raises, RankError where another's failed, KeyboardInterrupt where another was stopped.
    """
    _check_variables()
    if not _several():
        return attempt()
    state = _connected()

    def checked() -> T:
        check_launch()
        return attempt()

    return _all_or_none(checked, state.num_processes, _hosts() if state.num_processes > 1 else None)


def _check_variables() -> None:
    """ConfigError where what a launcher has put into the environment cannot be, or is not all there."""
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
    """ConfigError where the launcher was told to use an engine that corefit does not use."""
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


def _asked_for_fsdp() -> bool:
    """Whether accelerate's launcher was told to shard; corefit then does it, with torch's fully_shard."""
    asked = _is_set("ACCELERATE_USE_FSDP")
    if asked:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    return asked


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _several() -> bool:
    """Whether a launcher says that this is one of several processes."""
    return any(os.environ.get(name, "") not in ("", "0", "1") for name in SIZES)


def _bare() -> bool:
    """Whether there is no GPU: accelerate then takes a launcher's processes for one unless told."""
    import torch

    return not torch.accelerator.is_available()


def _connected() -> PartialState:
    """Connect the launcher's processes; `join` finds them connected."""
    from accelerate import PartialState

    asked = os.environ.pop(DEEPSPEED, None)  # accelerate would start it here; it is refused in a sentence later
    state = PartialState(cpu=_bare())
    if asked is not None:
        os.environ[DEEPSPEED] = asked
    return state


def _hosts() -> Any:
    """A group of all processes that needs no GPU."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _any(flag: bool, group: Any) -> bool:
    """Whether a rank of `group` says so. Signals are heard meanwhile; while torch waits itself, they are not."""
    import torch
    import torch.distributed as dist

    votes, pause = torch.tensor(int(flag)), 1e-4
    work: Any = dist.all_reduce(votes, group=group, async_op=True)
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    work.wait()
    return bool(votes)


def _gathered(value: T, world: int, group: Any) -> list[T]:
    """The values of all ranks, by rank."""
    import torch.distributed as dist

    every: list[Any] = [value] * world
    if world > 1:
        _any(False, group)
        dist.all_gather_object(every, value, group=group)
    return every


def _all_or_none(attempt: Callable[[], T], world: int, group: Any) -> T:
    """As `all_or_none`, among `world` ranks that are connected by `group`."""
    if world == 1:
        return attempt()
    value: Any = None
    failure: BaseException | None = None
    try:
        value = attempt()
    except BaseException as error:
        failure = error
    try:
        reasons = _gathered(_reason(failure), world, group)
    except RuntimeError as error:
        lost = RankError("another process of the run is gone; what it printed last says why")
        raise failure or lost from error
    if failure:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason == STOPPED:
            raise KeyboardInterrupt
        if reason:
            raise RankError(f"rank {rank} stopped: {reason}")
    return value


def _reason(failure: BaseException | None) -> str:
    """Why a rank goes no further, in its own words; nothing if it does."""
    if isinstance(failure, KeyboardInterrupt):
        return STOPPED
    if isinstance(failure, CorefitError):
        return str(failure)
    return _described(failure) if failure else ""


def _end(note: Path, rank: int, *, said: bool = False) -> str:
    """Why a rank stopped, or nothing if it has not; said=True counts only what it said itself."""
    try:
        told = json.loads(note.read_text())
    except (OSError, ValueError):
        return ""
    if told["reason"] or said or told["host"] != socket.gethostname() or alive(told["pid"]):
        return str(told["reason"])
    return f"rank {rank} (process {told['pid']}) died without a word: killed, perhaps for want of memory"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def alive(pid: int) -> bool:
    """Whether a process of this machine has the number `pid`, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
