"""`corefit` that kills itself: `python armed.py POINT ARGUMENTS...`, POINT as JSON."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys

from attrs import frozen
from quick import named


@frozen
class Point:
    """Where a process kills itself: as it calls `target` ("module:name") for the `call`th time, or just `after` that.

    Calls count that are made, at any depth, `inside` a function of that name. Each point is reached by the start that
    follows the kill at the point before it.
    """

    where: str
    target: str
    call: int = 1
    inside: str = ""
    after: bool = False

    def arm(self) -> None:
        """Patch the target in this process."""
        owner, name = named(self.target)
        real, calls = getattr(owner, name), 0

        @functools.wraps(real)
        def counted(*args, **kwargs):
            nonlocal calls
            calls += self._counts()
            if calls == self.call and self._counts() and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if calls == self.call and self._counts():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)

    def _counts(self) -> bool:
        frame = sys._getframe(2) if self.inside else None
        while frame and frame.f_code.co_name != self.inside:
            frame = frame.f_back
        return frame is not None or not self.inside


if __name__ == "__main__":
    from corefit.cli import main

    Point(**json.loads(sys.argv.pop(1))).arm()
    main()
