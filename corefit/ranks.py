"""The processes of one run: what they add up and agree on, and why one of them stopped.

accelerate says which process this is and torch carries what they exchange; nothing here is specific to a model.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import define

from corefit import memory
from corefit.errors import ConfigError, CorefitError, PluginError, RankError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long a process waits for one that lives, such as the first while it encodes; a dead one is noticed at once."""
GRACE = 5.0
"""Seconds to find out whose end broke a connection."""
NOTES = ".ranks"
"""Folder of a run in which its processes say who they are and why they stopped."""


@define(eq=False)
class Ranks:
    """This process among those of the run.

    sharded  whether weights, gradients and optimiser state are split over the processes (FSDP2) or each has all
    host     a group for what the hosts alone must know; it never waits for a GPU. None for a single process
    """

    accelerator: Accelerator
    sharded: bool = False
    host: ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def summed(self, x: Tensor) -> Tensor:
        """x added up over all ranks, on the device."""
        total: Any = self.accelerator.reduce(x, "sum") if self.world > 1 else x
        return total

    def gathered(self, x: Tensor) -> Tensor:
        """Rows [B, ...] of all ranks in global order [global B, ...]; ranks' shares are contiguous and equal."""
        if self.world == 1:
            return x
        every: Any = self.accelerator.gather(x.to(self.device))
        return every.to(x.device)

    def collected(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on each of them."""
        import torch.distributed as dist

        every: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(every, value, group=self.host)
        return every

    def refuse_same_noise(self, drawn: list[float], stage: str) -> None:
        """PluginError, on all ranks, if two of them drew the same noise: it would make their batches one."""
        every = self.collected(drawn)
        for rank, mine in enumerate(every):
            for other in range(rank):
                if set(mine) & set(every[other]):
                    raise PluginError(
                        f"stage {stage}: ranks {other} and {rank} draw the same noise; an objective must draw for the "
                        "rows of its part (ctx.rand, ctx.randn_like, ctx.rng), never for a row's place in the batch"
                    )

    def told(self, value: T) -> T:
        """The first rank's value, on every rank."""
        import torch.distributed as dist

        box: list[Any] = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether a rank says so; the same on all of them. Waits for the other hosts, not for a device."""
        import torch
        import torch.distributed as dist

        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, group=self.host)
        return bool(votes)

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    @contextmanager
    def first(self) -> Generator[None]:
        """The first rank does what follows before the others."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    @contextmanager
    def watched(self, folder: Path) -> Generator[None]:
        """Tell the others why this process stops, and say of a lost connection whose end it was.

        folder  of the run, seen by all. Raises RankError where another rank was the cause.
        """
        notes = folder / NOTES
        if self.world == 1:
            shutil.rmtree(notes, ignore_errors=True)
            yield
            return
        try:
            self._enter(notes)
            yield
        except CorefitError as error:
            self._note(notes, str(error))
            raise
        except BaseException as error:
            cause = self._cause(notes, 0 if isinstance(error, KeyboardInterrupt) else GRACE)
            if cause:
                raise RankError(cause) from None
            self._note(notes, "it was stopped" if isinstance(error, KeyboardInterrupt) else _described(error))
            raise
        self.wait()
        if self.main:
            shutil.rmtree(notes, ignore_errors=True)

    def _enter(self, notes: Path) -> None:
        """Every rank says who it is; what a former run said is gone."""
        if self.main:
            shutil.rmtree(notes, ignore_errors=True)
            notes.mkdir(parents=True)
        self.wait()
        self._note(notes, "")
        self.wait()

    def _note(self, notes: Path, reason: str) -> None:
        said = {"pid": os.getpid(), "host": socket.gethostname(), "reason": reason}
        temporary = notes / f"{self.rank}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(said))
            temporary.replace(notes / f"{self.rank}.json")
        except FileNotFoundError:  # the run has ended elsewhere and its folder of notes is gone
            return

    def _cause(self, notes: Path, patience: float) -> str:
        """What another rank said before it stopped, or that it is gone; nothing if all others live on."""
        until = time.monotonic() + patience
        while True:
            for rank in range(self.world):
                if rank != self.rank and (cause := _end(notes / f"{rank}.json", rank)):
                    return cause
            if time.monotonic() > until:
                return ""
            time.sleep(0.1)


def join(precision: str = "auto", *, shard: bool = False) -> Ranks:
    """This process's place in the run.

    precision  "fp32", "bf16", or "auto": bf16 where a GPU has it
    shard      FSDP2; `accelerate launch --use_fsdp` asks for it too
    """
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator, DistributedDataParallelKwargs

    shard = _asked_for_fsdp() or shard
    half = is_half(precision)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # without a GPU it takes a launcher's processes for one unless told
    bare = not torch.accelerator.is_available()
    made = Accelerator(cpu=bare, mixed_precision="bf16" if half else "no", kwargs_handlers=[ddp])
    if made.device.type == "cpu" and not shard:  # sharded weights come and go in all sizes, and would leave holes
        memory.keep_freed()
    if made.num_processes == 1:
        return Ranks(made)
    group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(made, shard, group)


def is_half(precision: str) -> bool:
    """Whether "fp32", "bf16" or "auto" is bfloat16 here."""
    import torch

    auto = precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bf16" or auto


def _asked_for_fsdp() -> bool:
    """Whether accelerate's launcher was told to shard; corefit then does it, with torch's fully_shard."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate is set to FSDP 1, which corefit does not use; launch with --fsdp_version 2")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True


def _end(note: Path, rank: int) -> str:
    """Why a rank stopped, or nothing if it has not."""
    try:
        said = json.loads(note.read_text())
    except (OSError, ValueError):
        return ""
    if said["reason"]:
        return f"rank {rank} stopped: {said['reason']}"
    if said["host"] != socket.gethostname() or alive(said["pid"]):
        return ""
    return f"rank {rank} (process {said['pid']}) died without a word: killed, perhaps for want of memory"


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
