"""A forward and backward on fake tensors, which have a shape and no memory, to learn what a real one would hold."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from corefit.system import memory
from corefit.system.fakes import faked, materialize
from corefit.train import blocks
from corefit.types import Condition, Offloading, Sized, SizedScore
from corefit.types.rewards import decode_with_graph

if TYPE_CHECKING:
    from torch import Tensor, nn

    from corefit.train.frozen import Frozen


KEPT = "kept"
"""The place of what stays from a forward to its backward."""
Scores = Sequence[tuple[SizedScore, Any]]
"""Rewards that say what a score takes, each with its blank network."""


def peaks(backbone: Sized, shape: tuple[int, ...], *, half: bool, gpu: bool) -> Mapping[Hashable, int] | None:
    """Return the most bytes that velocity and its backward hold for latents of `shape` [B, ...], by kind of block.

    A block's are those from its beginning to the next one's; KEPT are those between forward and backward. Weights and
    gradients are not counted, but for those blocks whose weights wait in main memory and are on the device, where that
    is the CPU. None is returned where the computation depends on values, which fake tensors do not have.

    backbone  has a blank network, which gets fake tensors for weights. Where it routes rows to several networks, one
              row goes through each of them and all others through the first: what backward needs of a network's
              weights may take more than the activations of a row
    half      whether it runs under autocast to bfloat16, on a GPU or the CPU
    gpu       whether it is to be as on a GPU
    """
    rows, *one = shape
    first, *others = backbone.routes()[:rows]

    def run() -> Mapping[Hashable, int]:
        kept = sum(_step(backbone, network, (1, *one), half, gpu).kept for network in others)
        held = _step(backbone, first, (rows - len(others), *one), half, gpu)
        return {place: kept + count for place, count in (*held.peaks.items(), (KEPT, held.kept))}

    return faked(run)


def sampling_peaks(backbone: Sized, shape: tuple[int, ...], *, half: bool, gpu: bool) -> Mapping[Hashable, int] | None:
    """Return the most bytes that velocity holds without a graph, as in `peaks`.

    All rows go through the first network where there are several.
    """
    return faked(lambda: _forward(backbone, backbone.routes()[0], shape, half, gpu))


def decoding_peak(backbone: Any, decoder: Any, shape: tuple[int, ...], scores: Scores = ()) -> int | None:
    """Return the most bytes that decoding latents of `shape` [B, ...] holds, and then scoring; None as in `peaks`.

    decoder  the blank network that `load_blank_decoder` gave
    scores   rewards that say what a score takes, each with its network
    """
    import torch

    def run() -> int:
        for network in (decoder, *(network for _, network in scores)):
            materialize(network)
        x0 = torch.empty(shape)
        with torch.no_grad(), memory.track_live_bytes() as held:
            media = backbone.decode(x0)
            for reward, network in scores:
                reward.score_blank(network, media)
        return held.peak

    return faked(run)


@contextmanager
def _left_halfway() -> Generator[None]:
    """End quietly with TooMany: torch prints a complaint where a checkpoint is not left in order."""
    try:
        yield
    except memory.TooMany as error:
        said, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            traceback.clear_frames(error.__traceback__)
        finally:
            sys.unraisablehook = said


def gradient_peak(backbone: Any, shape: tuple[int, ...], beside: Frozen, limit: float) -> int | None:
    """Return the most bytes that decoding and scoring with a graph and its backward hold; None as in `peaks`.

    shape   that of latents [B, ...]
    beside  the frozen networks of the stage, with the rewards whose graphs are counted besides the decoder's
    limit   bytes beyond which nothing is counted: what is returned is a little more than these, then
    """
    import torch

    if beside.decoder is None:
        return 0

    def run() -> int:
        for network in (beside.decoder, *(network for _, network in beside.graphs)):
            materialize(network)
        x0 = torch.empty(shape, requires_grad=True)
        with _left_halfway(), memory.track_live_bytes() as held:
            held.limit = limit
            media = decode_with_graph(backbone, x0)
            scores = [reward.score_blank(network, media).sum() for reward, network in beside.graphs]
            sum(scores, start=media.new_zeros(()) if scores else media.mean()).backward()
        return held.peak

    return faked(run)


def encoding_peak(backbone: Any, decoder: Any, shape: tuple[int, ...]) -> int | None:
    """Return the most bytes that encoding media of `shape` [B, 3, ...] holds; None as in `peaks`."""
    import torch

    def run() -> int:
        materialize(decoder)
        with torch.no_grad(), memory.track_live_bytes() as held:
            media = torch.empty(shape)
            backbone.encode(media)
        return held.peak

    return faked(run)


def _step(backbone: Any, network: Any, shape: tuple[int, ...], half: bool, gpu: bool) -> memory.LiveBytes:
    with (
        _called(backbone, network, shape, half, gpu) as velocity,
        memory.track_live_bytes() as held,
        _by_block(backbone, network, held, gpu),
    ):
        v = velocity()
        held.kept = held.now
        v.square().mean().backward()
    return held


def _forward(backbone: Any, network: Any, shape: tuple[int, ...], half: bool, gpu: bool) -> Mapping[Hashable, int]:
    import torch

    with (
        torch.no_grad(),
        _called(backbone, network, shape, half, gpu) as velocity,
        memory.track_live_bytes() as held,
        _by_block(backbone, network, held, gpu),
    ):
        velocity()
    return held.peaks


@contextmanager
def _by_block(backbone: Any, network: Any, held: memory.LiveBytes, gpu: bool) -> Generator[None]:
    """Count what each kind of block holds, and on a CPU the weights that are fetched for it.

    On a GPU these have memory of their own, which is counted as weights.
    """
    import torch

    fetches = not gpu and isinstance(backbone, Offloading) and backbone.offloads
    here: list[Tensor] = []

    def note(place: Hashable, fetched: float) -> None:
        held.place = place
        if fetches:
            here.clear()
            here.append(torch.empty(int(fetched), dtype=torch.uint8))

    with blocks.noted(network, note):
        yield


@contextmanager
def _called(
    backbone: Any, network: Any, shape: tuple[int, ...], half: bool, gpu: bool
) -> Generator[Callable[[], Tensor]]:
    """Give what calls the velocity of latents of `shape` with `network`, all of them made of fake tensors."""
    import torch
    from torch import nn

    if half and gpu:
        for norm in (m for m in network.modules() if type(m) in (nn.LayerNorm, nn.GroupNorm)):
            _norm_like_a_gpu(norm)
    materialize(network)
    x, sigma = torch.empty(shape), torch.empty(shape[0])
    cond = Condition({name: torch.empty(shape[0], *one) for name, one in backbone.condition_shapes().items()})
    whole, backbone.transformer = backbone.transformer, network

    def velocity() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            return backbone.velocity(x, sigma, cond)

    try:
        yield velocity
    finally:
        backbone.transformer = whole


def _norm_like_a_gpu(norm: nn.Module) -> None:
    """Let a norm compute in float32, and keep its results so, as autocast does on a GPU and not on the CPU."""
    norm.float()
    norm.register_forward_pre_hook(_in_float)


def _in_float(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() for x in args)
