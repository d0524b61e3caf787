"""Scoring the samples of a batch while they are made: what `Context.scoring` and `Context.score` do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from attrs import define, field

from corefit.errors import NonFinite, PluginError
from corefit.types.protocols import Backbone, Reward
from corefit.types.rewards import decode_with_graph, refuse_non_finite, score, score_with_graph
from corefit.types.values import Meta, Scores, Weighted

if TYPE_CHECKING:
    from torch import Tensor

MOST_WAITING = 2
"""How many micro-batches may wait for a concurrent reward; their media are kept until it has scored them."""
EPSILON = 1e-4
"""Added to the standard deviation that scores are divided by."""


def _nowhere(name: str, values: Tensor) -> None:
    """Report nothing."""


@define(eq=False, kw_only=True)
class Scoring:
    """Scores clean latents of the rows of a batch as they are sampled; use it in a `with` statement.

    `add` takes the next rows, micro-batch by micro-batch; `result` waits for all scores. A reward that is `concurrent`
    scores in a thread of its own while the model samples the next rows. No thread outlives the `with` statement, and
    an error of a thread is raised by the next `add` or by `result`.

    rewards   the rewards to learn from
    decode    decodes latents without a graph
    held_out  rewards that are reported, and never handed to the objective
    prompts   the prompts of all rows, and `meta` their metadata
    gather    all_gather of a tensor [B] over the ranks
    agree     the tensor [B] of the first of the processes that share these rows, on each of them
    scores    whether this is that process; the others neither decode nor score, and take its scores
    report    receives the scores [B] of each held-out reward as "held_out/NAME"
    """

    backbone: Backbone
    rewards: Sequence[Weighted[Reward]]
    prompts: Sequence[str]
    meta: Sequence[Meta]
    held_out: Sequence[Weighted[Reward]] = ()
    decode: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor] = lambda x: x
    report: Callable[[str, Tensor], None] = _nowhere
    agree: Callable[[Tensor], Tensor] = lambda x: x
    scores: bool = True
    _added: int = field(init=False, default=0)
    _scorers: Sequence[_Scorer] = field(init=False)

    def __attrs_post_init__(self) -> None:
        entries = [*self.rewards, *self.held_out]
        self._scorers = [_Threaded(each) if is_concurrent(each) else _Scorer(each) for each in entries]

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        for scorer in self._scorers:
            scorer.close()

    def add(self, x0: Tensor) -> None:
        """Decode x0 [n, ...], the next n rows of the batch, and have them scored."""
        import torch

        rows = slice(self._added, self._added + len(x0))
        self._added = rows.stop
        if not self.scores:
            return
        prompts, meta = self.prompts[rows], self.meta[rows]
        with torch.no_grad():
            media = self.decode(x0)
            copied = _HostCopy.of(media) if any(isinstance(each, _Threaded) for each in self._scorers) else None
            for scorer in sorted(self._scorers, key=lambda each: not isinstance(each, _Threaded)):
                scorer.add(media, copied, prompts, meta)

    def result(self) -> Scores:
        """Return the scores of all rows, float64 on the CPU; call it on all ranks, after all rows were added.

        Raises NonFinite on all ranks if a score to learn from is NaN or infinite on any, and PluginError if a held-out
        one is: skipping the step for it would let it decide on the weights.
        """
        import torch

        assert self._added == len(self.prompts), f"{self._added} of {len(self.prompts)} rows were added"
        none = torch.zeros(self._added, dtype=torch.float64)
        found = [self.agree(torch.cat(scorer.scores()) if self.scores else none) for scorer in self._scorers]
        count = len(self.rewards)
        each = {entry.name: values for entry, values in zip(self.rewards, found[:count], strict=True)}
        held = {entry.name: values for entry, values in zip(self.held_out, found[count:], strict=True)}
        refuse_non_finite(each, self.prompts, self.gather)
        try:
            refuse_non_finite(held, self.prompts, self.gather)
        except NonFinite as error:
            raise PluginError(f"held out: {error}") from None
        for name, values in held.items():
            self.report(f"held_out/{name}", values)
        return weighted_sum(self.rewards, each, self.gather)


def score_graph(scoring: Scoring, x0: Tensor) -> Scores:
    """Decode latents x0 [B, ...] that have a graph, all at once, and score them with a graph, without a wait.

    Held-out rewards score the same media without a graph. Where one gives NaN or infinity, the mean that is logged is
    not finite either, and the trainer refuses it there.
    """
    import torch

    media, prompts, meta = decode_with_graph(scoring.backbone, x0), scoring.prompts, scoring.meta
    each = {entry.name: score_with_graph(entry, media, prompts, meta) for entry in scoring.rewards}
    with torch.no_grad():
        for entry in scoring.held_out:
            scoring.report(f"held_out/{entry.name}", score(entry, media.detach(), prompts, meta, host=False))
    return weighted_sum(scoring.rewards, each, scoring.gather)


def weighted_sum(
    entries: Sequence[Weighted[Reward]], each: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]
) -> Scores:
    """Add up the scores [B] of each reward, normalized and weighted as its entry says."""
    import torch

    raw = torch.stack([each[entry.name] * entry.weight for entry in entries]).sum(0)
    if all(entry.normalize == "none" for entry in entries):
        return Scores(raw, each)
    used = [normalized(each[e.name], gather) if e.normalize == "batch" else each[e.name] for e in entries]
    total = torch.stack([values * entry.weight for entry, values in zip(entries, used, strict=True)]).sum(0)
    return Scores(total, each, raw)


def normalized(scores: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (scores - mean) / (std + 1e-4), [B], with mean and std over the rows of all ranks; 0 where all are equal.

    std is the population standard deviation. Call it on all ranks.
    """
    every = gather(scores)
    std = every.std(correction=0)
    if std <= 1e-6 * every.abs().max():  # equal up to rounding
        return scores * 0
    return (scores - every.mean()) / (std + EPSILON)


def is_concurrent(entry: Weighted[Reward]) -> bool:
    """Return whether a reward may score in a thread of its own; one of version 0.1 does not say so."""
    return bool(getattr(entry.value, "concurrent", False))


@define(eq=False)
class _Scorer:
    """Scores the micro-batches of one reward, one after the other."""

    entry: Weighted[Reward]
    found: list[Tensor] = field(factory=list["Tensor"])

    def add(self, media: Tensor, copied: _HostCopy | None, prompts: Sequence[str], meta: Sequence[Meta]) -> None:
        """Score media [n, ...]; `copied` are the same on the CPU, where any reward needs that."""
        self.found.append(score(self.entry, media, prompts, meta))

    def scores(self) -> list[Tensor]:
        """Return the scores of each micro-batch, in order, once all are there."""
        return self.found

    def close(self) -> None:
        """End what the scorer has started."""


@define(eq=False)
class _Threaded(_Scorer):
    """Scores the micro-batches of one concurrent reward in a thread; few may wait, as their media are in memory."""

    _thread: ThreadPoolExecutor | None = field(init=False, default=None)
    _waiting: deque[Future[Tensor]] = field(init=False, factory=deque["Future[Tensor]"])

    def add(self, media: Tensor, copied: _HostCopy | None, prompts: Sequence[str], meta: Sequence[Meta]) -> None:
        assert copied is not None
        self._collect(MOST_WAITING - 1)
        self._thread = self._thread or ThreadPoolExecutor(1, f"reward {self.entry.name}")
        self._waiting.append(self._thread.submit(_score_copy, self.entry, copied, prompts, meta))

    def scores(self) -> list[Tensor]:
        self._collect(0)
        return self.found

    def close(self) -> None:
        """Drop what waits, and wait for what the reward is scoring."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _collect(self, most: int) -> None:
        """Take the scores that are there, and wait until no more than `most` micro-batches are without."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self.found.append(self._waiting.popleft().result())


def _score_copy(entry: Weighted[Reward], copied: _HostCopy, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
    """Score media on the CPU, in a thread: whether gradients are computed is a setting of each thread."""
    import torch

    with torch.no_grad():
        return score(entry, copied.wait(), prompts, meta)


@define(eq=False)
class _HostCopy:
    """Media on the CPU, copied from a GPU without a wait; a thread waits for the copy alone, not for what follows."""

    media: Tensor
    event: Any = None

    @staticmethod
    def of(media: Tensor) -> _HostCopy:
        import torch

        if media.device.type != "cuda":
            return _HostCopy(media.cpu())
        pinned = torch.empty(media.shape, dtype=media.dtype, pin_memory=True)
        pinned.copy_(media, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _HostCopy(pinned, event)

    def wait(self) -> Tensor:
        """Return the media once the copy is complete."""
        if self.event is not None:
            self.event.synchronize()
        return self.media
