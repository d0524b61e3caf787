"""Calling rewards, and checking the scores that they return; training, evaluation and filtering all do it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from corefit.errors import NonFinite, PluginError, short_repr
from corefit.types.blame import place
from corefit.types.protocols import Backbone, Reward
from corefit.types.values import Meta, Weighted

if TYPE_CHECKING:
    from torch import Tensor


def score(
    entry: Weighted[Reward], media: Tensor, prompts: Sequence[str], meta: Sequence[Meta], *, host: bool = True
) -> Tensor:
    """Score media [B, 3, H, W], or clips [B, 3, T, H, W], in [0, 1]; return [B] in float64, detached.

    Raises PluginError, with the reward's name and file, unless there is one real number for each sample. Scores may be
    NaN or infinite; `refuse_non_finite`, which needs all ranks, checks that.

    host  whether the scores are moved to the CPU, which waits for the device; or else stay where the reward left them
    """
    scores = _checked(entry, media, prompts, meta).detach()
    return (scores.cpu() if host else scores).double()


def score_with_graph(entry: Weighted[Reward], media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
    """Score media that have a graph; return [B] in float32 with a graph, on the device of the media.

    Raises PluginError like `score`, and if the scores have no graph.
    """
    scores = _checked(entry, media, prompts, meta)
    if not scores.requires_grad:
        raise PluginError(
            f"reward {entry.name!r}, {place(type(entry.value))}: score() gave scores without a graph for media that "
            "have one, so no gradient would reach the model; stay in torch, without no_grad, detach, item or numpy, "
            "or do not declare it `differentiable`"
        )
    return scores.to(media.device).float()


def decode_with_graph(backbone: Backbone, x0: Tensor) -> Tensor:
    """Decode x0 [B, ...] with a graph, and let the backbone recompute it in the backward pass if it can.

    A backbone that was written for version 0.1 takes x0 alone, and keeps the activations.
    """
    try:
        signature(backbone.decode).bind(x0, checkpoint=True)
    except TypeError:
        return backbone.decode(x0)
    return backbone.decode(x0, checkpoint=True)


def _checked(entry: Weighted[Reward], media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
    """Call a reward, and raise PluginError unless it gives one real number for each sample."""
    import torch

    found: Any = entry.value.score(media, prompts, meta)
    try:
        scores = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise _wrong(entry, short_repr(found), len(prompts)) from None
    readable = not scores.is_meta and scores.layout == torch.strided
    if not readable or scores.is_complex() or scores.shape != (len(prompts),):
        kind = str(scores.dtype if readable else "meta" if scores.is_meta else scores.layout).removeprefix("torch.")
        raise _wrong(entry, f"{kind} {list(scores.shape)}", len(prompts))
    return scores


def _wrong(entry: Weighted[Reward], found: str, number: int) -> PluginError:
    return PluginError(
        f"reward {entry.name!r}, {place(type(entry.value))}: score() gave {found} for {number} samples; it must "
        f"return one real number a sample, a tensor [{number}]"
    )


def refuse_non_finite(
    scores: Mapping[str, Tensor], names: Sequence[str], gather: Callable[[Tensor], Tensor] = lambda x: x
) -> None:
    """Raise NonFinite on every rank if a reward's scores [B] contain NaN or infinity on any rank.

    names   the samples' names in messages, B of them
    gather  all_gather of a tensor [B] over the ranks; without it, this rank's scores alone are checked
    """
    import torch

    if not scores:
        return
    fine = torch.stack([values.isfinite() for values in scores.values()])
    if gather(fine.all(0)).all():
        return
    rewards = ", ".join(repr(name) for name, row in zip(scores, fine, strict=True) if not row.all())
    wrong = [names[index] for index in (~fine.all(0)).nonzero().flatten().tolist()]
    what = f"reward {rewards} is not finite for {wrong[:3]}" if wrong else "a reward on another rank is not finite"
    raise NonFinite(f"{what}; raise an error in score() instead")
