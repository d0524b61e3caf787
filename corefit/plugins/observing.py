"""Tells observers what happens in a run: the hooks of all plugins first, then the `[[observer]]`s of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import define, field

from corefit.plugins.host import Host
from corefit.types import Observer


@define(eq=False)
class Observers:
    """The observers of one run.

    named  the `[[observer]]`s of the pipeline
    say    prints a line
    """

    host: Host
    named: Sequence[Observer]
    say: Callable[[str], None]
    _left_out: set[int] = field(init=False, factory=set[int])
    """Which of `named` have failed; nothing more is told to them."""

    def tell(self, event: str, **arguments: Any) -> None:
        """Call the hook corefit_<event>, and then the method of that name of each `[[observer]]`.

        An exception ends the run, but for that of an observer that is optional: it is said once.
        """
        getattr(self.host.hook, f"corefit_{event}")(**arguments)
        for number, observer in enumerate(self.named):
            if number in self._left_out:
                continue
            name = self.host.name_of("observers", observer)
            self.host.trace_call(f"{event} of observer {name}", arguments)
            try:
                getattr(observer, event)(**arguments)
            except Exception as error:
                if not observer.optional:
                    raise
                self._left_out.add(number)
                problem = f"{type(error).__name__}: {error}".partition("\n")[0]
                self.say(f"observer {name}: {event} failed ({problem}); the run goes on without this observer")
