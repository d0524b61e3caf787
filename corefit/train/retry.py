"""Taking a step again in smaller pieces where memory ran out, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from attrs import define

from corefit.errors import OutOfMemory
from corefit.system import memory
from corefit.system.ranks import Ranks
from corefit.train.gradients import Gradients
from corefit.train.state import State
from corefit.types.objective import term_names

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class _Elsewhere(OutOfMemory):
    """Memory ran out on another rank."""


@define(eq=False)
class Retry:
    """Tries what may run out of memory again, after it has lowered the sizes of `state`.

    A rank that ran out never comes to the exchange in which the others wait. So with DDP the ranks agree before each
    exchange that none of them did, as long as the shape of the latents is new; gradients are exchanged after that, and
    not in a backward. With FSDP2, and where ranks share samples, there are exchanges in each forward; memory that runs
    out then ends the run.
    """

    ranks: Ranks
    state: State
    gradients: Gradients
    agrees: bool = False
    """Whether the ranks agree before each exchange of the step in progress."""

    def begin(self, shape: object) -> None:
        """Begin a step with latents of `shape`."""
        able = self.ranks.world > 1 and not self.ranks.sharded and self.ranks.layout.context == 1
        self.agrees = able and self.state.sizes.can_lower and not self.state.sizes.is_proven(shape)

    def until_it_fits(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns; where memory runs out on any rank, all of them try again in smaller pieces.

        Raises OutOfMemory where nothing can be lowered, or where the ranks cannot agree. No weight may change in
        `attempt`; gradients, metrics and faults that it leaves are taken back.
        """
        sizes, undo = self.state.sizes, self.state.undoable()
        while True:
            try:
                return attempt()
            except OutOfMemory as error:
                if not (sizes.can_lower and (self.agrees or self.ranks.world == 1)):
                    raise
                if self.agrees and not isinstance(error, _Elsewhere):
                    self.ranks.any(True)
            # only here the error is gone, and with it the graphs that its traceback held
            undo()
            self.gradients.drop()
            memory.give_back(self.ranks.device)
            now = sizes.lower()
            self.state.guard.terms = term_names(sizes.objective)
            where = f"stage {self.state.stage}, step {self.state.step + 1}"
            self.ranks.accelerator.print(f"{where}: out of memory; from here on {now}")

    def gather(self, x: Tensor) -> Tensor:
        """Gather rows [B, ...] of all ranks, once they have agreed."""
        self._agree()
        return self.ranks.all_gather(x)

    def exchange(self) -> None:
        """Exchange gradients, once the ranks have agreed; nothing where a backward has done it."""
        if self.agrees:
            self.gradients.complete()
            self._agree()
            self.gradients.average()

    def _agree(self) -> None:
        """Raise on all ranks where one of them ran out of memory since they last agreed."""
        if self.agrees and self.ranks.any(False):
            raise _Elsewhere("another process ran out of memory")
