"""How the processes of a run share weights and samples."""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from corefit.errors import ConfigError


@frozen(kw_only=True)
class Layout:
    """How the processes of a run share weights and samples: keys of a pipeline.

    shard     whether weights are split over the processes (FSDP2)
    gather    how long gathered weights are kept: during a "step", during a "term", or by memory
    replicate number of groups of processes of which each holds all shards (HSDP)
    context   number of processes that share each sample, a part of its sequence each
    """

    shard: bool = False
    gather: Literal["auto", "step", "term"] = "auto"
    replicate: int = 1
    context: int = 1

    def check(self, world: int) -> None:
        """Raise ConfigError where `world` processes cannot be laid out so."""
        for key, number in (("replicate", self.replicate), ("context_parallel", self.context)):
            if world % number:
                raise ConfigError(
                    f"{key} = {number}: the number of processes, {world}, is no multiple of it; start a multiple, or "
                    "change the key"
                )


WHOLE = Layout()
"""Each process has all weights, and samples of its own."""
