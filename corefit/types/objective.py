"""Objectives: their protocol, the context that they work with, and sums of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from attrs import evolve, field, frozen

from corefit.errors import ConfigError, near
from corefit.types.blame import require, require_result
from corefit.types.former import adopt
from corefit.types.protocols import Backbone, NoiseWeighting, Reward, Sampler
from corefit.types.scoring import Scoring, score_graph
from corefit.types.values import Batch, Condition, Moving, Scores, Term, Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from corefit.rng import Rng


USES = ("media", "media:NAME", "noise", "sampler", "stochastic", "reward", "reward_gradient", "reference")
"""What an objective's `uses` may hold; NAME is a name that the data give to a further medium."""


@frozen(eq=False)
class Context:
    """Everything that an objective may use. It holds no optimizer, rank, file or logger.

    reference    the policy as it was when the stage began, frozen; None unless "reference" is in `uses`
    first_batch  whether this is the first batch since the process started: the time for checks that make the host wait
    micro_batch  the number of rows of a forward; roll out in slices of it, so that rollout and training run the same
                 kernels
    gather       all_gather of a tensor [B] of this rank to [global B], in global row order
    copies       the moving copies that the objective declares, by name: frozen, and called like `reference`
    held_out     rewards that `score` and `scoring` report, and whose scores the objective never sees
    agree        the tensor [B] of the first of the processes that share these rows, on each of them
    scores       whether this is that process, whose rewards score
    decode       decodes latents without a graph, in parts that fit into memory; by default the backbone's `decode`
    report       receives the scores [B] of held-out rewards by their name in the log, for the trainer's metrics
    step, steps  the number of steps that the stage has finished, and of those that it has in all
    """

    backbone: Backbone
    sampler: Sampler
    noise: NoiseWeighting
    rng: Rng
    rewards: Sequence[Weighted[Reward]] = ()
    reference: Backbone | None = None
    first_batch: bool = field(default=False, alias="first")  # so that Context(first=True) goes on working
    micro_batch: int = 1 << 30
    gather: Callable[[Tensor], Tensor] = lambda x: x
    copies: Mapping[str, Backbone] = field(factory=dict[str, Backbone])
    step: int = 0
    steps: int = 1
    held_out: Sequence[Weighted[Reward]] = ()
    report: Callable[[str, Tensor], None] = lambda name, values: None
    agree: Callable[[Tensor], Tensor] = lambda x: x
    scores: bool = True
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def first(self) -> bool:
        """`first_batch`, under the name that it had in version 0.1."""
        return self.first_batch

    def at(self, rng: Rng) -> Context:
        """Return the same context with another `rng`."""
        return evolve(self, rng=rng)

    def rand(self, n: int) -> Tensor:
        """Draw keyed uniform numbers in [0, 1), [n]; n is the number of rows of this part."""
        return self.rng.rand(n)

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw keyed standard normal numbers, shaped like x [B, ...], float32, on x's device."""
        return self.rng.randn(tuple(x.shape)).to(x.device, non_blocking=True)

    def dropout(self, cond: Condition, share: float) -> Condition:
        """Return `cond` with a keyed random `share` of its rows replaced by the empty prompt's condition."""
        if not share:
            return cond
        device = next(iter(cond.tensors.values())).device
        keep = self.rng.rand(len(cond)).to(device, non_blocking=True) >= share
        return cond.where(keep, self.backbone.null(len(cond)))

    def sigma(self, x: Tensor) -> Tensor:
        """Draw noise levels [B] for x [B, ...] from the stage's noise weighting, with the backbone's shift.

        Raises PluginError if the weighting gives another number of levels, which would be broadcast.
        """
        shift = self.backbone.shift(tuple(x.shape[1:]))
        levels = self.noise.sample(len(x), shift, self.rng)
        shape = getattr(levels, "shape", None)
        require(shape == (len(x),), self.noise, f"gave {shape} noise levels for {len(x)} samples, not [{len(x)}]")
        return levels.to(x.device, non_blocking=True)

    def score(self, x0: Tensor, batch: Batch) -> Scores:
        """Decode clean latents x0 [B, ...] of the rows of `batch`, and score them with the stage's rewards.

        If x0 has a graph and gradients are enabled, so do the scores: that needs "reward_gradient" in `uses`, and is
        done in `terms`. Otherwise they are float64 on the CPU, computed in micro-batches; call it on all ranks then.

        Raises PluginError if a reward gives anything but one number a sample, and, without a graph, NonFinite on all
        ranks if a score on any rank is NaN or infinite.
        """
        import torch

        with self.scoring(batch) as scoring:
            if torch.is_grad_enabled() and x0.requires_grad:
                return score_graph(scoring, x0)
            for first in range(0, len(x0), self.micro_batch):
                scoring.add(x0[first : first + self.micro_batch])
            return scoring.result()

    def scoring(self, batch: Batch) -> Scoring:
        """Return what scores the rows of `batch` as they are sampled, to use in a `with` statement.

        Hand it to `sample` or `record`, or `add` the clean latents of each micro-batch in the order of the rows, then
        ask for its `result`. The scores are those of `score`; concurrent rewards score while the next rows are sampled.
        """
        return Scoring(
            backbone=self.backbone,
            decode=self.decode or self.backbone.decode,
            rewards=self.rewards,
            held_out=self.held_out,
            prompts=batch.prompts,
            meta=batch.meta,
            gather=self.gather,
            report=self.report,
            agree=self.agree,
            scores=self.scores,
        )


class Part(Protocol):
    """What one optimizer step trains on: rows that the trainer slices into micro-batches.

    All four members must be written. A `Batch` is a part.
    """

    @property
    @abstractmethod
    def rows(self) -> Sequence[int]:
        """The global sample number of each row, by which random draws are keyed."""
        ...

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Tensor]:
        """Names with values [n] that describe the experience as a whole, such as rewards; their means are logged."""
        ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, rows: slice, /) -> Any: ...


P = TypeVar("P", bound=Part)


class Objective(Protocol, Generic[P]):
    """Defines what is learned. It is an attrs class; its fields are the keys of an `objective` table.

    `uses`, `num_terms`, `experience` and `terms` are abstract and must be written. `num_updates`, `group_size` and
    `rows_per_graph` are 1, `copies` and `chunks` empty, by default in a class that derives from this one. `Supervised`
    also has `uses`, `num_terms` and `experience`, so that only `terms` is left to write.
    """

    if not TYPE_CHECKING:  # type checkers would demand it of classes that do not derive from this one

        def __init_subclass__(cls, **keys: Any) -> None:
            super().__init_subclass__(**keys)
            adopt(cls)

    @property
    @abstractmethod
    def uses(self) -> frozenset[str]:
        """The names of what the objective reads; a pipeline that gives it less, or what it does not read, is refused.

        media            clean latents, `batch.clean`
        media:NAME       latents of a further medium of each example, `batch.extra[NAME]`, such as "media:rejected"
        noise            noise levels, `ctx.sigma`, and their weights, `ctx.noise`
        sampler          any sampler, `ctx.sampler`; without one in the pipeline, the ODE's
        stochastic       a sampler that draws noise
        reward           scores, `ctx.score`
        reward_gradient  scores with a graph: every reward must be differentiable
        reference        the policy as it was when the stage began, `ctx.reference`
        """
        ...

    @property
    @abstractmethod
    def num_terms(self) -> int:
        """The number of terms that `terms` yields; it follows from the keys alone and is equal on every rank."""
        ...

    @property
    def num_updates(self) -> int:
        """The number of parts that `experience` yields, which is the number of optimizer steps on each batch."""
        return 1

    @property
    def group_size(self) -> int:
        """The number of consecutive rows that share a prompt and stay on one rank; 1 for no groups."""
        return 1

    @property
    def rows_per_prompt(self) -> int:
        """`group_size`, under the name that it had in version 0.1."""
        return self.group_size

    @property
    def copies(self) -> Mapping[str, Moving]:
        """Copies of the trained weights that follow them, by name: an old policy, a teacher. None by default.

        The trainer keeps them, in checkpoints too, and hands them to the objective as `ctx.copies[name]`.
        """
        return {}

    @property
    def rows_per_graph(self) -> int:
        """The number of rows in the graph of a term for each row of a micro-batch; memory is estimated from it."""
        return 1

    @property
    def chunks(self) -> Mapping[str, int]:
        """The keys whose value the trainer chooses by memory, with the largest of use, such as {"chunk": 6}.

        They are marked ROUNDING, and the pipeline left them unset (None), which must mean 1 where nobody chooses. The
        trainer gives the objective a value from 1 to the largest, which may lower while a stage is trained. A graph's
        rows, `rows_per_graph`, and `num_terms` may follow from it; results may not, except for rounding. None by
        default.
        """
        return {}

    @abstractmethod
    def experience(self, batch: Batch, ctx: Context, /) -> Iterable[P]:
        """Turn a batch into `num_updates` parts; the trainer disables gradients here.

        It is resumed after each optimizer step, so a later part can be made with the weights that the step left.
        """
        ...

    @abstractmethod
    def terms(self, part: P, ctx: Context, /) -> Iterator[Term]:
        """Yield `num_terms` terms; the trainer runs backward on each and frees its graph before it takes the next."""
        ...


class Supervised(Objective[Batch]):
    """Base of objectives whose experience is the batch itself.

    `terms` is abstract and must be written. By default `uses` is {"media", "noise"} and `num_terms` is 1; a subclass
    writes them where it differs.
    """

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"media", "noise"})

    @property
    def num_terms(self) -> int:
        return 1

    def experience(self, batch: Batch, ctx: Context, /) -> Iterable[Batch]:
        yield batch


def _can_be_added(_: Any, __: Any, of: tuple[Weighted[Objective[Any]], ...]) -> None:
    """Raise ConfigError if the objectives cannot be summed."""
    if not of:
        raise ConfigError('\'of\' must list the objectives, such as [{ use = "soar" }, { use = "sft" }]')
    names = [each.name for each in of]
    for name in sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"'of' must list {name!r} once; its loss counts as often as its weight says")
    if any(isinstance(each.value, Sum) for each in of):
        raise ConfigError("'of' must list objectives that are not sums; list that sum's objectives here instead")
    for each in of:
        if not 0 < each.weight < math.inf:
            raise ConfigError(f"'of' must give {each.name!r} a weight above 0, not {each.weight}")
    copies = [(name, each.name) for each in of for name in moving_copies(each.value)]
    for name in sorted({name for name, _ in copies if [n for n, _ in copies].count(name) > 1}):
        both = " and ".join(repr(owner) for copy, owner in copies if copy == name)
        raise ConfigError(f"'of' must not list {both} together: each keeps a copy of the weights named {name!r}")
    for what, unit in (("group_size", "samples a prompt"), ("num_updates", "optimizer steps a batch")):
        numbers = {each.name: int(getattr(each.value, what)) for each in of}
        if len(set(numbers.values()) - {1}) > 1:
            listed = ", ".join(f"{name} takes {number}" for name, number in numbers.items())
            raise ConfigError(f"'of' must list objectives with the same number of {unit}, or with 1: {listed}")


@frozen(kw_only=True, eq=False)
class Sum(Objective[Any]):
    """The weighted sum of objectives on the same batches: SOAR with an SFT anchor, GRPO with one on real data.

    Each loss is divided by its own count before it is weighted, so a weight does not depend on what the others count.
    The trainer runs the objectives one after the other; a sum has no experience and no terms of its own. If one of
    them needs groups, an objective without groups gets one row of each group. If one takes several optimizer steps on
    a batch, an objective that takes one joins in each of them, with new noise each time.
    """

    of: tuple[Weighted[Objective[Any]], ...] = field(validator=_can_be_added)
    """The tables of the objectives, each with a `weight`, 1 by default."""

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
    def copies(self) -> Mapping[str, Moving]:
        return {name: moving for each in self.of for name, moving in moving_copies(each.value).items()}

    @property
    def rows_per_graph(self) -> int:
        return max(each.value.rows_per_graph for each in self.of)

    def experience(self, batch: Batch, ctx: Context, /) -> Iterable[Any]:
        """Raise AssertionError: the trainer calls the objectives of the sum, never the sum."""
        raise AssertionError("a sum has no experience of its own")

    def terms(self, part: Any, ctx: Context, /) -> Iterator[Term]:
        """Raise AssertionError: the trainer calls the objectives of the sum, never the sum."""
        raise AssertionError("a sum has no terms of its own")


def weighted_objectives(objective: Objective[Any]) -> tuple[Weighted[Objective[Any]], ...]:
    """Return the objectives that the trainer runs: those of a sum, or the objective alone, without a name."""
    return objective.of if isinstance(objective, Sum) else (Weighted("", objective),)


def moving_copies(objective: Objective[Any]) -> Mapping[str, Moving]:
    """Return the copies of the weights that an objective declares; none for a class that was written without them."""
    return getattr(objective, "copies", {})


def free_chunks(objective: Objective[Any]) -> Mapping[str, int]:
    """Return the keys whose value the trainer chooses; none for a class that was written without them."""
    return getattr(objective, "chunks", {})


def further_media(objective: Objective[Any]) -> tuple[str, ...]:
    """Return the names of the further media that an objective reads: "rejected" for "media:rejected" in `uses`."""
    return tuple(sorted(name.removeprefix("media:") for name in objective.uses if name.startswith("media:")))


def unknown_uses(objective: Objective[Any]) -> Iterator[str]:
    """Yield a message for each name in `uses` that stands for nothing, such as "rewards"."""
    for name in sorted(objective.uses - {*USES}):
        prefix, _, medium = name.partition(":")
        if prefix != "media" or not medium:
            hint = near(name, [*USES, *([f"media:{medium}"] if medium else [])])
            yield f"has {name!r} in `uses`, which stands for nothing{hint}; it may hold {', '.join(USES)}"


def reads_media(objective: Objective[Any]) -> bool:
    """Return whether an objective trains on media, main or further ones; others train on prompts alone."""
    return "media" in objective.uses or bool(further_media(objective))


def term_names(objective: Objective[Any]) -> list[str]:
    """Return the names of a step's terms in messages, in order: "term 0", or "term 0 of soar" in a sum."""
    terms = [(each.name, index) for each in weighted_objectives(objective) for index in range(each.value.num_terms)]
    return [f"term {index}{f' of {name}' if name else ''}" for name, index in terms]


def _is_part(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("rows", "metrics", "__len__", "__getitem__"))


def checked_parts(objective: Objective[Any], batch: Batch, ctx: Context) -> Iterator[Part]:
    """Yield the parts of a batch's experience; raise PluginError unless there are exactly `num_updates`.

    The experience runs without gradients.
    """
    import torch

    number, experience = objective.num_updates, objective.experience(batch, ctx)
    require_result(experience, lambda it: isinstance(it, Iterable), objective, "experience()", "an iterable of parts")
    remaining = iter(experience)
    for index in range(number):
        with torch.no_grad():
            part = next(remaining, None)
        require(part is not None, objective, f"yielded {index} parts, not num_updates = {number}")
        require_result(part, _is_part, objective, "a part", "rows with metrics that can be counted and sliced")
        yield cast("Part", part)
    with torch.no_grad():
        require(next(remaining, None) is None, objective, f"yields more than num_updates = {number} parts")
