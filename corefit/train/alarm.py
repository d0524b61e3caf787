"""The alarm: it sounds where the reward that a stage learns from rises while a held-out one falls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from attrs import define, field

from corefit.errors import PluginError
from corefit.types.stage import Alarm

RISE = 2.0
"""The z above which the trained reward counts as rising: without a trend, one window in 44 has a larger one."""

Line = tuple[int, float, float]
"""A logged step: its number, the trained reward and a held-out one."""


@define(eq=False)
class Watch:
    """Watches the logged rewards of a stage, and keeps what a checkpoint needs to continue.

    settings  the keys of `[stage.alarm]`
    lines     the newest logged steps of each held-out reward, at most `window`; none are left after its alarm
    ended     the alarm that ended the stage, "" if none did
    """

    settings: Alarm
    lines: dict[str, list[Line]] = field(factory=dict[str, "list[Line]"])
    ended: str = ""

    def see(self, step: int, metrics: Mapping[str, float]) -> str:
        """Add the metrics of a logged step; return what the alarm says, or "" if it does not sound.

        Raises PluginError if a held-out reward is not finite, or if the trained one is not logged.
        """
        alarms = [text for name, trained in _pairs(metrics) if (text := self._see(step, metrics, name, trained))]
        text = "; ".join(alarms)
        if text and self.settings.stop:
            self.ended = text
        return text

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint holds, as JSON."""
        return {"lines": self.lines, "ended": self.ended}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.lines = {name: [(line[0], line[1], line[2]) for line in lines] for name, lines in state["lines"].items()}
        self.ended = state["ended"]

    def _see(self, step: int, metrics: Mapping[str, float], name: str, trained: str) -> str:
        window = self.settings.window
        lines = [*self.lines.get(name, []), (step, metrics[trained], metrics[name])][-window:]
        self.lines[name] = lines
        if len(lines) < window:
            return ""
        _, rising, falling = zip(*lines, strict=True)
        rise, fall = trend(rising), trend(falling)
        if rise <= RISE or fall >= -self.settings.threshold:
            return ""
        self.lines[name] = []
        return (
            f"{name} fell from {_start(falling):.3g} to {_end(falling):.3g} (z = {fall:.1f}) in the {window} logged "
            f"steps from {lines[0][0]} to {step}, while {trained} rose from {_start(rising):.3g} to {_end(rising):.3g} "
            f"(z = {rise:.1f})"
        )


def trend(values: Sequence[float]) -> float:
    """Return Mann and Kendall's z: the pairs that rise minus those that fall, in standard deviations of no trend.

    Equal values count as neither. The sum moves towards 0 by 1, because it is a whole number (continuity correction).
    """
    n = len(values)
    rising = sum((later > earlier) - (later < earlier) for earlier, later in combinations(values, 2))
    return (rising - math.copysign(min(abs(rising), 1), rising)) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def refuse_non_finite(name: str, value: float) -> None:
    """Raise PluginError if a mean or a sum of held-out scores is NaN or infinite."""
    if not math.isfinite(value):
        raise PluginError(f"{name} is not finite; raise an error in score() instead")


def _pairs(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the names of each held-out metric and of the trained one beside it, also among those of a sum."""
    for name in metrics:
        prefix, held_out, _ = name.partition("held_out/")
        if not held_out or (prefix and not prefix.endswith("/")):
            continue
        refuse_non_finite(name, metrics[name])
        if f"{prefix}reward" not in metrics:
            raise PluginError(
                f"{name} is logged and {prefix}reward is not, so no alarm could sound: the objective must log the "
                "scores that it learns from, such as `metrics = scores.metrics` in its parts"
            )
        yield name, f"{prefix}reward"


def _start(values: Sequence[float]) -> float:
    """Return the mean of the first quarter."""
    quarter = len(values) // 4
    return math.fsum(values[:quarter]) / quarter


def _end(values: Sequence[float]) -> float:
    """Return the mean of the last quarter."""
    return _start(values[::-1])
