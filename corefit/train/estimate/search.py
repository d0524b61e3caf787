"""The cheapest keys with which a pipeline fits into the memory of its devices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from attrs import field, frozen

from corefit.errors import CorefitError
from corefit.pipeline.pipeline import Pipeline
from corefit.train import remedies
from corefit.train.estimate.device import Device
from corefit.train.estimate.forwards import Memo
from corefit.train.estimate.phases import Estimate
from corefit.train.estimate.stages import estimates
from corefit.train.remedies import Remedy

ROOM = 0.9
"""Share of a device that a phase may take by the estimate; CUDA itself and fragments of free memory take the rest."""
NOTICED = 0.002
"""A key is of use if it takes off this share of what is too much, at least."""
MOST = 60
"""Keys that are tried on top of each other, at most: each halves or changes one."""
DROPPED = (
    *("train", "shard", "offload", "gradient_checkpointing", "gather", "text_encoders", "frozen", "copies"),
    *("chunk", "optimizer", "tile", "micro_batch", "batch"),
)
"""Last names of keys from the most to the least that they cost: in this order it is tried to do without."""


def _dropped(key: str) -> int:
    """Return the place of a key among those that are tried to be left out; keys of plugins come last."""
    name = remedies.last_name(key)
    return DROPPED.index(name) if name in DROPPED else len(DROPPED)


@frozen(kw_only=True)
class Fit:
    """What was found.

    chosen  the keys to set -> what they are set to
    before  the estimates without them, and `found` with them
    saved   the keys -> bytes that the largest phase takes less because of each
    room    bytes that a phase may take
    """

    chosen: Mapping[str, Remedy]
    before: Sequence[Estimate]
    found: Sequence[Estimate]
    saved: Mapping[str, float]
    room: float

    @property
    def fits(self) -> bool:
        """Whether all phases fit, as far as what they take is known."""
        return not excess(self.found, self.room)

    @property
    def settings(self) -> list[str]:
        """The keys as `--set` takes them."""
        return [each.setting for each in self.chosen.values()]


def excess(found: Sequence[Estimate], room: float) -> float:
    """Return by how many bytes the phases of all stages are too large."""
    return sum(max(0.0, phase.total - room) for e in found for phase in e.phases)


@frozen
class Search:
    """Looks for keys with which a pipeline fits.

    make  makes the pipeline with further settings, as `--set` has them
    """

    make: Callable[[Sequence[str]], Pipeline]
    device: Device
    world: int = 1
    room: float = ROOM
    memo: Memo = field(factory=dict[Hashable, "int | None"])
    _made: dict[frozenset[str], Sequence[Estimate]] = field(
        init=False, factory=dict[frozenset[str], Sequence[Estimate]]
    )

    def fit(self) -> Fit:
        """Return the cheapest keys with which all fits; where nothing does, those that come nearest."""
        chosen: dict[str, Remedy] = {}
        before = found = self._estimates(chosen)
        while excess(found, self._bytes) and len(chosen) < MOST:
            step = self._next(chosen, excess(found, self._bytes))
            if step is None:
                break
            remedy, found = step
            chosen = {**chosen, remedy.key: remedy}
        if not excess(found, self._bytes):
            chosen, found = self._without_unneeded(chosen, found)
        saved = {key: self._saved(chosen, key, found) for key in chosen}
        return Fit(chosen=chosen, before=before, found=found, saved=saved, room=self._bytes)

    @property
    def _bytes(self) -> float:
        return self.room * self.device.memory

    def _next(self, chosen: Mapping[str, Remedy], much: float) -> tuple[Remedy, Sequence[Estimate]] | None:
        """Return the cheapest further key that takes off some of what is too much, and the estimates with it."""
        for remedy in self._remedies(chosen):
            try:
                found = self._estimates({**chosen, remedy.key: remedy})
            except CorefitError:  # the key does not go with others
                continue
            if excess(found, self._bytes) <= (1 - NOTICED) * much:
                return remedy, found
        return None

    def _remedies(self, chosen: Mapping[str, Remedy]) -> Iterator[Remedy]:
        """Yield the keys of all stages that are not set yet, each once, in the order of what they cost."""
        pipeline = self.make([each.setting for each in chosen.values()])
        each = [
            list(remedies.pipeline_ladder(pipeline, stage, self.world, gpu=self.device.gpu)) for stage in pipeline.stage
        ]
        found = {remedy.setting: remedy for stage in each for remedy in stage}
        yield from sorted(found.values(), key=lambda remedy: remedies.place(remedy.key))

    def _without_unneeded(
        self, chosen: Mapping[str, Remedy], found: Sequence[Estimate]
    ) -> tuple[dict[str, Remedy], Sequence[Estimate]]:
        """Drop the keys without which all fits, those first that cost most."""
        kept = dict(chosen)
        for key in sorted(chosen, key=lambda each: _dropped(each)):
            fewer = {other: remedy for other, remedy in kept.items() if other != key}
            try:
                without = self._estimates(fewer)
            except CorefitError:
                continue
            if not excess(without, self._bytes):
                kept, found = fewer, without
        return kept, found

    def _saved(self, chosen: Mapping[str, Remedy], key: str, found: Sequence[Estimate]) -> float:
        """Return how much less the largest phase takes because of one of the keys."""
        fewer = {other: remedy for other, remedy in chosen.items() if other != key}
        try:
            without = self._estimates(fewer)
        except CorefitError:
            return 0.0
        return max(e.peak for e in without) - max(e.peak for e in found)

    def _estimates(self, chosen: Mapping[str, Remedy]) -> Sequence[Estimate]:
        key = frozenset(each.setting for each in chosen.values())
        if key not in self._made:
            pipeline = self.make([each.setting for each in chosen.values()])
            self._made[key] = estimates(pipeline, self.device, self.world, memo=self.memo)
        return self._made[key]


def toml(chosen: Mapping[str, Remedy]) -> Iterator[str]:
    """Yield lines of TOML, under the tables that they belong to, with what each costs as a comment."""
    tables: dict[str, list[tuple[str, str]]] = {}
    for remedy in chosen.values():
        names = remedy.key.split(".")
        depth = 2 if names[0] == "stage" else len(names) - 1
        heading = f"[[stage]] # {names[1]}" if names[0] == "stage" else "".join(f"[{n}]" for n in names[:depth])
        line = f"{'.'.join(names[depth:])} = {remedy.value}"
        tables.setdefault(heading, []).append((line, remedy.cost))
    for heading in sorted(tables, key=lambda each: (bool(each), each.startswith("[["))):
        if heading:
            yield heading
        yield from (f"{line}  # {cost}" if cost else line for line, cost in tables[heading])
