"""A run whose reward is remote, and its service: both are killed in turn with SIGKILL, and started again.

Whatever was killed, the run must end in the bytes of one that nobody disturbed: metrics, checkpoints, weights, scores.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import served
from attrs import define, field, frozen
from harness import PATIENCE, Kill, Project, Whole, differences, watched
from served import Served

GIVES_UP = ("run the same command again, which continues", "start the service, or correct 'url'")
"""What a run without its service says last: in training or evaluation, and where it is checked before that."""
RUN, RESTARTED, DEAD = "run", "service, started again at once", "service, left dead until the run gives up"
TURNS = (RUN, RESTARTED, RUN, DEAD)


@frozen
class Played:
    """What came of the kills.

    kills     what was killed, in order; it ends where there were enough
    phases    in which phase of the run, for each kill
    survived  how many kills of the service, started again at once, the run has outlived
    rounds    how many runs have ended
    wrong     what differs from the undisturbed run, or what went wrong otherwise; empty if all is equal
    """

    kills: Sequence[str]
    phases: Sequence[str]
    survived: int
    rounds: int
    wrong: Sequence[str]


@define
class Series:
    """Rounds, each a fresh project, until there were enough kills."""

    whole: Whole
    fresh: Callable[[int], Project]
    service: Served
    rng: np.random.Generator
    kills: list[str] = field(factory=list[str])
    phases: list[str] = field(factory=list[str])
    survived: int = 0

    def play(self, wanted: int) -> Played:
        """Kill in turn until there were `wanted` kills, let the last round end, and compare every round."""
        turns = itertools.islice(itertools.cycle(TURNS), wanted)
        for number in itertools.count(1):
            project, before = self.fresh(number), len(self.kills)
            wrong = self._round(project, turns) or differences(project.outcome(), self.whole.outcome)
            if not wrong and len(self.kills) == before:
                wrong = ["a whole round passed without a kill"]
            if wrong or len(self.kills) == wanted:
                return Played(self.kills, self.phases, self.survived, number, wrong)
        raise AssertionError("the count does not end")

    def _round(self, project: Project, turns: Iterator[str]) -> list[str]:
        """Run a project to its end, with kills on the way; what went wrong, if something did."""
        while True:
            launched, process, before = time.time(), project.start(), len(self.kills)
            self._disturb(process, turns, lambda at=launched: Kill.read(project.run_folder, 0, at).phase)
            status = process.wait(PATIENCE * max(self.whole.seconds, 30))
            if self.service.process.poll() is not None:
                self._serve()
            gave_up = status == 2 and self.kills[-1:] == [RESTARTED]
            self.survived += self.kills[before:].count(RESTARTED) - gave_up
            said = (project.log.read_text().splitlines() or [""])[-1]
            if status not in (0, 2, -9) or (status == 2 and not any(words in said for words in GIVES_UP)):
                return [f"exit status {status}: {said}"]
            if status == 0:
                return []

    def _disturb(self, process: Any, turns: Iterator[str], phase: Callable[[], str]) -> None:
        """Kill in turn at random instants, until the run is killed, has no service, or has ended."""
        while self._is_alive_at_an_instant(process) and (turn := next(turns, None)):
            self.kills.append(turn)
            self.phases.append(phase())
            if turn == RUN:
                process.kill()
                return
            self.service.process.kill()
            self.service.process.wait()
            if turn == DEAD:
                return
            self._serve()

    def _is_alive_at_an_instant(self, process: Any) -> bool:
        """Wait until the run has spent a random amount of CPU time more; False if it ends before that."""
        more, began = self.rng.uniform(0, self.whole.work / 2), -1.0
        for spent in watched(process):
            began = spent if began < 0 else began
            if spent - began >= more:
                return True
        return False

    def _serve(self) -> None:
        self.service = served.start(self.service.log.parent, port=self.service.port)
