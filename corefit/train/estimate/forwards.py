"""What forwards of a stage's networks take, learned on fake tensors, each of them only once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from attrs import define, field

from corefit.train import fake
from corefit.train.estimate import depth
from corefit.train.frozen import Frozen

GRADIENT_FRAMES, FRAMES = 5, 3
"""From so many frames of latents on, each takes as much as the one before it: with a graph, and without."""
Memo = dict[Hashable, "int | None"]
"""What is known already: a network, what it computes, and a shape -> bytes."""


@define(eq=False, kw_only=True)
class Forwards:
    """Forwards and backwards of a blank backbone, in bytes beside weights and gradients; None where not known.

    Fake tensors are slow, so many rows are told by few: each further row takes as much as the last of those.

    key   what determines the backbone's networks
    half  whether they run under autocast to bfloat16
    gpu   whether it is to be as on a GPU
    most  bytes of a reward's gradient through the decoder beyond which nothing is counted
    """

    backbone: Any
    key: Hashable
    half: bool
    gpu: bool
    most: float
    memo: Memo = field(factory=dict[Hashable, "int | None"])

    def training(self, rows: int, each: int, shape: Sequence[int], scored: Frozen | None) -> int | None:
        """Return what a term's forward and backward take for `rows` rows of a micro-batch.

        each    rows of the graph for each of them
        scored  the networks that decode them with a graph and score them; None where there is no such graph
        """

        def measure(count: int) -> int | None:
            graph = (count * each, *shape)
            run = lambda: fake.peaks(self.backbone, graph, half=self.half, gpu=self.gpu)  # noqa: E731
            found = depth.told(self.backbone.routes(), run)
            decoded = self.gradient(count, shape, scored) if scored else 0
            if found is None or decoded is None:
                return None
            return max(*found.values(), found[fake.KEPT] + decoded)  # the decoder's backward comes first

        return self._told(("training", each, scored is not None), measure, rows, shape, len(self.backbone.routes()))

    def gradient(self, rows: int, shape: Sequence[int], beside: Frozen) -> int | None:
        """Return what decoding latents and scoring them takes with a graph and its backward."""

        def measure(count: int) -> int | None:
            run = lambda size: fake.gradient_peak(self.backbone, (count, *size), beside, self.most)  # noqa: E731
            return _by_frames(run, shape, GRADIENT_FRAMES, self.most)

        return self._told(("gradient",), measure, rows, shape)

    def sampling(self, rows: int, shape: Sequence[int]) -> int | None:
        """Return what a velocity without a graph takes."""

        def measure(count: int) -> int | None:
            first = self.backbone.routes()[:1]
            run = lambda: fake.sampling_peaks(self.backbone, (count, *shape), half=self.half, gpu=self.gpu)  # noqa: E731
            found = depth.told(first, run)
            return None if found is None else max(found.values())

        return self._told(("sampling",), measure, rows, shape)

    def decoding(self, rows: int, shape: Sequence[int], beside: Frozen) -> int | None:
        """Return what decoding latents without a graph takes, and scoring them."""

        def measure(count: int) -> int | None:
            decoder, scores = beside.decoder, beside.scores
            run = lambda size: fake.decoding_peak(self.backbone, decoder, (count, *size), scores)  # noqa: E731
            return _by_frames(run, shape, FRAMES)

        return self._told(("decoding", len(beside.scores)), measure, rows, shape)

    def encoding(self, rows: int, size: Sequence[int], network: Any) -> int | None:
        """Return what encoding media of `size` in pixels takes."""
        return self._told(
            ("encoding",),
            lambda count: fake.encoding_peak(self.backbone, network, (count, 3, *size)),
            rows,
            size,
        )

    def _told(
        self,
        what: tuple[Hashable, ...],
        measure: Callable[[int], int | None],
        rows: int,
        shape: Sequence[int],
        least: int = 1,
    ) -> int | None:
        """Return `measure(rows)`, told by `least` rows and one more where there are more than these."""

        def known(count: int) -> int | None:
            key = (self.key, what, count, tuple(shape))
            if key not in self.memo:
                self.memo[key] = measure(count)
            return self.memo[key]

        if rows <= least + 1:
            return known(rows)
        few, more = known(least), known(least + 1)
        return None if few is None or more is None else more + (rows - least - 1) * (more - few)


def _by_frames(
    measure: Callable[[Sequence[int]], int | None], shape: Sequence[int], least: int, most: float = math.inf
) -> int | None:
    """Return `measure(shape)` for latents [C, H, W] or [C, T, H, W], told by `least` frames and one more.

    What is more than `most` is not measured further.
    """
    channels, *frames, height, width = shape
    if not frames or frames[0] <= least + 1:
        return measure(shape)
    few = measure((channels, least, height, width))
    if few is None or few > most:
        return few
    more = measure((channels, least + 1, height, width))
    return None if more is None else more + (frames[0] - least - 1) * (more - few)
