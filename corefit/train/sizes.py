"""How many rows a forward has, where the pipeline leaves that to the trainer: as many as memory allows.

The keys are `micro_batch` of the stage, and those that an objective names in `chunks`. The trainer begins with what it
expects to fit. Where memory runs out before a weight has changed, it halves one of them and takes the step again; draws
are keyed, so the step that is taken again draws the same numbers. What was found is in the checkpoints, and is used
again as long as devices, processes and keys stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import define, evolve, field, fields, has

from corefit.system import memory
from corefit.system.ranks import Ranks
from corefit.types import ROUNDING, Weighted
from corefit.types.objective import Objective, Sum, free_chunks, weighted_objectives
from corefit.types.scoring import is_concurrent
from corefit.types.stage import Stage

PROVEN = 2
"""A shape is taken to fit after so many steps: in the first one, the optimizer has no state yet."""
SLICES, LEAST = 4, 8
"""Where rewards score while a GPU samples the next rows, it samples in so many slices, of so many rows at least."""


@define(eq=False, kw_only=True)
class Sizes:
    """The rows of a forward of one stage.

    stage   the stage as the pipeline has it
    share   the rows of each process in a step
    rows    the rows of a micro-batch
    chunks  the values of keys of objectives: name of the objective ("" unless in a sum) -> key -> value
    proven  shape of latents -> number of steps that fitted with these sizes
    chosen  whether the trainer has chosen sizes, or a checkpoint had them
    on      what memory depends on, as `conditions` gives it; sizes that were found elsewhere are not taken over
    """

    stage: Stage
    share: int
    rows: int
    chunks: dict[str, dict[str, int]]
    proven: dict[str, int] = field(factory=dict[str, int])
    chosen: bool = False
    on: Mapping[str, str] = field(factory=dict[str, str])

    @staticmethod
    def of(stage: Stage, world: int, on: Mapping[str, str] | None = None) -> Sizes:
        """Return the sizes to begin with on a device of unknown memory: all rows at once, in the smallest chunks."""
        share = max(1, stage.rows // world)
        chunks = {each.name: dict.fromkeys(free_chunks(each.value), 1) for each in weighted_objectives(stage.objective)}
        chunks = {name: keys for name, keys in chunks.items() if keys}
        return Sizes(stage=stage, share=share, rows=stage.micro_batch or share, chunks=chunks, on=on or {})

    @property
    def objective(self) -> Objective[Any]:
        """The stage's objective with the chosen values of its keys."""
        whole = self.stage.objective
        if not self.chunks:
            return whole
        if isinstance(whole, Sum):
            return evolve(whole, of=tuple(self._sized(each) for each in whole.of))
        return self._sized(Weighted("", whole)).value

    @property
    def sized(self) -> Stage:
        """The stage as if the pipeline had the chosen values."""
        return evolve(self.stage, micro_batch=self.rows, objective=self.objective)

    @property
    def are_free(self) -> bool:
        """Whether the pipeline leaves any of them to the trainer."""
        return (self.stage.micro_batch is None and self.share > 1) or bool(self.chunks)

    @property
    def can_lower(self) -> bool:
        """Whether less would still be something; it is equal on all processes."""
        return (self.stage.micro_batch is None and self.rows > 1) or any(self._large())

    def lower(self) -> str:
        """Halve the chunks, or the rows of a micro-batch once there are none; return which keys have which values."""
        assert self.can_lower
        self.proven.clear()
        large = self._large()
        if not large:
            self.rows, before = -(-min(self.rows, self.share) // 2), self.rows
            return f"micro_batch = {self.rows} (before: {before})"
        for name, key in large:
            self.chunks[name][key] = -(-self.chunks[name][key] // 2)
        return ", ".join(f"{'.'.join(filter(None, (name, key)))} = {self.chunks[name][key]}" for name, key in large)

    def choose(self, most: int | None) -> None:
        """Choose the largest sizes whose graphs have at most `most` rows, or keep them if that is not known (None)."""
        self.chosen = True
        if most is None:
            return
        if self.stage.micro_batch is None:
            each = max(entry.value.rows_per_graph for entry in weighted_objectives(self.stage.objective))
            self.rows = max(1, min(self._overlapping(), most // each))
        for entry in weighted_objectives(self.stage.objective):
            for key, largest in free_chunks(entry.value).items():
                self.chunks[entry.name][key] = largest
                while self.chunks[entry.name][key] > 1 and self.rows * self._sized(entry).value.rows_per_graph > most:
                    self.chunks[entry.name][key] = -(-self.chunks[entry.name][key] // 2)

    def _overlapping(self) -> int:
        """Return the rows of a slice that is large enough for a GPU, and that leaves others to score meanwhile."""
        overlap = any(map(is_concurrent, self.stage.reward))
        return max(-(-self.share // SLICES), min(self.share, LEAST)) if overlap else self.share

    def is_proven(self, shape: object) -> bool:
        """Whether latents of `shape` are taken to fit."""
        return self.proven.get(str(shape), 0) >= PROVEN

    def fitted(self, shape: object) -> None:
        """Note that a step with latents of `shape` fitted."""
        self.proven[str(shape)] = min(PROVEN, self.proven.get(str(shape), 0) + 1)

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint keeps."""
        return {"rows": self.rows, "chunks": self.chunks, "proven": self.proven, "on": dict(self.on)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the sizes of a checkpoint if they were found under the same conditions; else begin anew."""
        if state.get("on") != self.on:
            return
        self.chosen = True
        self.rows = int(state["rows"])
        self.chunks = {name: dict(keys) for name, keys in state["chunks"].items()}
        self.proven = dict(state["proven"])

    def _sized(self, entry: Weighted[Objective[Any]]) -> Weighted[Objective[Any]]:
        keys = self.chunks.get(entry.name)
        value: Any = entry.value
        return evolve(entry, value=evolve(value, **keys)) if keys else entry

    def _large(self) -> list[tuple[str, str]]:
        """Return the keys of objectives that can be lowered, as (name of the objective, key)."""
        return [(name, key) for name, keys in self.chunks.items() for key, value in keys.items() if value > 1]


def conditions(stage: Stage, backbone: Any, ranks: Ranks) -> Mapping[str, str]:
    """Return what the memory of a step depends on and a checkpoint's identity does not, on all ranks alike.

    These are the devices, the processes and what they share, and the keys that change rounding alone, `micro_batch`
    among them.
    """
    held = {"stage": stage, "backbone": backbone, **{each.name: each.value for each in _objectives(stage)}}
    return {
        "devices": ", ".join(sorted({*ranks.all_gather_object(memory.described(ranks.device))})),
        "processes": f"{ranks.world}, sharded: {ranks.sharded}, {ranks.layout}",
        **{f"{name}.{key}": str(value) for name, plugin in held.items() for key, value in _rounding(plugin).items()},
    }


def _objectives(stage: Stage) -> Iterator[Weighted[Objective[Any]]]:
    """Yield the stage's objectives under the names that their keys have in a pipeline."""
    for each in weighted_objectives(stage.objective):
        yield evolve(each, name=".".join(filter(None, ("objective", each.name))))


def _rounding(plugin: Any) -> Mapping[str, Any]:
    """Return the keys of a plugin that change rounding alone, with their values."""
    every = fields(type(plugin)) if has(type(plugin)) else ()
    return {each.name: getattr(plugin, each.name) for each in every if each.metadata.items() >= ROUNDING.items()}
