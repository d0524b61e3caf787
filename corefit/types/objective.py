"""What is learned: the protocol of objectives, and the context that is all they may touch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from attrs import evolve, field, frozen

from corefit.errors import ConfigError
from corefit.types.blame import expect, returned
from corefit.types.former import adopt
from corefit.types.protocols import Backbone, NoiseWeighting, Reward, Sampler
from corefit.types.values import Batch, Condition, Term, Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.rng import Rng


@frozen(eq=False)
class Context:
    """All that an objective may touch. No optimiser, rank, file or logger.

    reference    the policy as the stage found it, frozen; None unless "reference" is in `uses`
    first        whether this is the first batch since the process started: the moment for checks that sync
    micro_batch  rows a forward may hold; roll out in slices of it, so that training sees the same kernels
    gather       [B] of this rank -> [global B], in global row order
    """

    backbone: Backbone
    sampler: Sampler
    noise: NoiseWeighting
    rng: Rng
    rewards: Sequence[Weighted[Reward]] = ()
    reference: Backbone | None = None
    first: bool = False
    micro_batch: int = 1 << 30
    gather: Callable[[Tensor], Tensor] = lambda x: x

    def at(self, rng: Rng) -> Context:
        """The same context with other randomness."""
        return evolve(self, rng=rng)

    def rand(self, n: int) -> Tensor:
        """Keyed uniform draws in [0, 1), [n]; n is the number of rows of this part."""
        return self.rng.rand(n)

    def randn_like(self, x: Tensor) -> Tensor:
        """Keyed standard normal draws, shaped like x [B, ...], float32, on x's device."""
        return self.rng.randn(tuple(x.shape)).to(x.device, non_blocking=True)

    def dropout(self, cond: Condition, share: float) -> Condition:
        """`cond` with a keyed `share` of its rows replaced by the empty prompt's condition."""
        if not share:
            return cond
        device = next(iter(cond.tensors.values())).device
        keep = self.rng.rand(len(cond)).to(device, non_blocking=True) >= share
        return cond.where(keep, self.backbone.null(len(cond)))

    def sigma(self, x: Tensor) -> Tensor:
        """Noise levels [B] for x [B, ...], from the stage's noise weighting and the backbone's shift.

        Raises PluginError where the weighting gives another number of levels, which would be broadcast.
        """
        shift = self.backbone.shift(tuple(x.shape[1:]))
        levels = self.noise.sample(len(x), shift, self.rng)
        shape = getattr(levels, "shape", None)
        expect(shape == (len(x),), self.noise, f"gave {shape} noise levels for {len(x)} samples, not [{len(x)}]")
        return levels.to(x.device, non_blocking=True)


class Part(Protocol):
    """What one optimiser step trains on: rows that the trainer slices into micro-batches."""

    @property
    def rows(self) -> Sequence[int]: ...

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """Name -> values [n], of the experience as a whole (rewards, for example); logged as means."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


P = TypeVar("P", bound=Part)


class Objective(Protocol, Generic[P]):
    """What is learned. An attrs class; its fields are the keys of an `objective` table.

    uses             of {"media", "noise", "sampler", "reward", "reference"}: what it reads; a pipeline that
                     gives it less, or something that it does not read, is refused
    num_terms        terms that `terms` yields, known from the configuration and equal on every rank
    num_updates      parts that `experience` yields: optimiser steps a batch
    group_size       consecutive rows that share a prompt and stay on one rank: 1, or a group's size
    rows_per_graph   rows that a term's graph holds for each row of a micro-batch; memory is estimated from it
    """

    if not TYPE_CHECKING:  # no member that a class must have to be one

        def __init_subclass__(cls, **keys: Any) -> None:
            super().__init_subclass__(**keys)
            adopt(cls)

    @property
    @abstractmethod
    def uses(self) -> frozenset[str]: ...

    @property
    @abstractmethod
    def num_terms(self) -> int: ...

    @property
    def num_updates(self) -> int:
        return 1

    @property
    def group_size(self) -> int:
        return 1

    @property
    def rows_per_prompt(self) -> int:
        """`group_size`, under the name that it had in version 0.1."""
        return self.group_size

    @property
    def rows_per_graph(self) -> int:
        return 1

    @abstractmethod
    def experience(self, batch: Batch, ctx: Context, /) -> Iterable[P]:
        """Turn a batch into `num_updates` parts; no gradient."""
        ...

    @abstractmethod
    def terms(self, part: P, ctx: Context, /) -> Iterator[Term]:
        """Yield `num_terms` terms; each is backpropagated and freed before the next is computed."""
        ...


class Supervised(Objective[Batch]):
    """Base of objectives whose experience is the batch itself; a subclass writes `terms` only."""

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"media", "noise"})

    @property
    def num_terms(self) -> int:
        return 1

    def experience(self, batch: Batch, ctx: Context, /) -> Iterable[Batch]:
        yield batch


def _can_be_added(_: Any, __: Any, of: tuple[Weighted[Objective[Any]], ...]) -> None:
    """ConfigError from what the objectives declare."""
    if not of:
        raise ConfigError('\'of\' must list the objectives, such as [{ use = "soar" }, { use = "sft" }]')
    names = [each.name for each in of]
    for name in sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"'of' must list {name!r} once; its loss counts as often as its weight says")
    if any(isinstance(each.value, Sum) for each in of):
        raise ConfigError("'of' must list objectives that are no sums; list the parts of that sum here")
    for each in of:
        if not 0 < each.weight < math.inf:
            raise ConfigError(f"'of' must give {each.name!r} a weight above 0, not {each.weight}")
    for what, says in (("group_size", "samples a prompt"), ("num_updates", "optimiser steps a batch")):
        told = {each.name: int(getattr(each.value, what)) for each in of}
        if len(set(told.values()) - {1}) > 1:
            both = ", ".join(f"{name} takes {number}" for name, number in told.items())
            raise ConfigError(f"'of' must list objectives of as many {says}, or of 1: {both}")


@frozen(kw_only=True, eq=False)
class Sum(Objective[Any]):
    """The weighted sum of objectives on the same batches: SOAR with an SFT anchor, GRPO with one on real data.

    Each loss is divided by its own count before it is weighted, so a weight means the same whatever the others count.
    The trainer runs them one after the other; a sum has no experience and no terms of its own. In groups, an objective
    that makes none gets one row of each group. One that takes a single optimiser step a batch takes part in each of
    the others' steps, with noise of its own in each.
    """

    of: tuple[Weighted[Objective[Any]], ...] = field(validator=_can_be_added)
    """The objectives' tables, each with its `weight`, 1 by default."""

    @property
    def uses(self) -> frozenset[str]:
        return frozenset[str]().union(*(each.value.uses for each in self.of))

    @property
    def num_terms(self) -> int:
        return sum(each.value.num_terms for each in self.of)

    @property
    def num_updates(self) -> int:
        return max(each.value.num_updates for each in self.of)

    @property
    def group_size(self) -> int:
        return max(each.value.group_size for each in self.of)

    @property
    def rows_per_graph(self) -> int:
        return max(each.value.rows_per_graph for each in self.of)

    def experience(self, batch: Batch, ctx: Context, /) -> Iterable[Any]:
        """The trainer asks the weighted_objectives (`weighted_objectives`), so it never comes here."""
        raise AssertionError("a sum has no experience of its own")

    def terms(self, part: Any, ctx: Context, /) -> Iterator[Term]:
        """The trainer asks the weighted_objectives (`weighted_objectives`), so it never comes here."""
        raise AssertionError("a sum has no terms of its own")


def weighted_objectives(objective: Objective[Any]) -> tuple[Weighted[Objective[Any]], ...]:
    """What the trainer runs for an objective: the parts of a sum, or the objective alone, without a name."""
    return objective.of if isinstance(objective, Sum) else (Weighted("", objective),)


def term_names(objective: Objective[Any]) -> list[str]:
    """What messages call the terms of a step, in order."""
    every = [(each.name, index) for each in weighted_objectives(objective) for index in range(each.value.num_terms)]
    return [f"term {index}{f' of {name}' if name else ''}" for name, index in every]


def _is_part(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("rows", "metrics", "__len__", "__getitem__"))


def checked_parts(objective: Objective[Any], batch: Batch, ctx: Context) -> Iterator[Part]:
    """What a batch's experience yields, part by part; PluginError unless they are `num_updates`."""
    number, every = objective.num_updates, objective.experience(batch, ctx)
    returned(every, lambda it: isinstance(it, Iterable), objective, "experience()", "an iterable of parts")
    made = iter(every)
    for index in range(number):
        part = next(made, None)
        expect(part is not None, objective, f"yielded {index} parts, not num_updates = {number}")
        returned(part, _is_part, objective, "a part", "rows with metrics that can be counted and sliced")
        yield cast("Part", part)
    expect(next(made, None) is None, objective, f"yields more than num_updates = {number} parts")
