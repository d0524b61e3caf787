"""Diversity of the samples that a model generates for one prompt: the Vendi score, and their mean distance.

Both are computed from the cosine similarities of the samples' features. The features are those of a reward's image
encoder, or else downscaled pixels, which see layout and color, but not what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from corefit.errors import PluginError
from corefit.types import Featured
from corefit.types.blame import place

if TYPE_CHECKING:
    from torch import Tensor

METRICS = ("vendi", "distance")
SIDE, FRAMES = 16, 4
"""Pixels a side, and frames of a clip, that downscaled media have at most."""


def spread(prompts: Sequence[str], count: int) -> list[int]:
    """Return the rows of `count` distinct prompts, or of all if there are fewer, evenly spread over the list."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        first.setdefault(prompt, row)
    rows, count = list(first.values()), min(count, len(first))
    return [rows[number * len(rows) // count] for number in range(count)]


def features(media: Tensor, source: Featured | None) -> NDArray[np.float64]:
    """Return features [B, D] of media [B, 3, H, W], or clips [B, 3, T, H, W]: of `source`, or downscaled pixels.

    Raises PluginError if `source` returns something else.
    """
    import torch
    import torch.nn.functional as F

    if source is None:
        if media.ndim == 4:
            media = media.unsqueeze(2)
        frames, height, width = (min(most, n) for most, n in zip((FRAMES, SIDE, SIDE), media.shape[2:], strict=True))
        return F.adaptive_avg_pool3d(media.float(), (frames, height, width)).flatten(1).double().cpu().numpy()
    with torch.no_grad():
        found = source.features(media)
    if found.ndim != 2 or len(found) != len(media) or not found.isfinite().all():
        raise PluginError(
            f"{place(type(source))}: features() gave {list(found.shape)} for {len(media)} samples; it must return a "
            f"tensor [{len(media)}, D] of finite numbers"
        )
    return found.detach().double().cpu().numpy()


def measure(samples: NDArray[np.float64]) -> Mapping[str, float]:
    """Return the metrics of the samples of one prompt, from their features [n, D].

    vendi     the Vendi score, an effective number of different samples, from 1 to n
    distance  the mean of 1 - cosine similarity over all pairs of samples
    """
    similarity = _similarity(samples)
    return {"vendi": vendi(similarity), "distance": distance(similarity)}


def vendi(similarity: NDArray[np.float64]) -> float:
    """Return the Vendi score: the exponential of the entropy of the eigenvalues of similarity / n.

    Friedman and Dieng, 2022 (arXiv 2210.02410), definition 3.1.

    similarity  [n, n], positive semidefinite, 1 on the diagonal
    """
    values = np.linalg.eigvalsh(similarity / len(similarity))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def distance(similarity: NDArray[np.float64]) -> float:
    """Return the mean of 1 - similarity [n, n] over all pairs of different samples."""
    n = len(similarity)
    return float((1 - similarity).sum() / (n * (n - 1)))


def _similarity(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine similarities [n, n] of features [n, D]; rows of zeros are similar to each other alone."""
    norms = np.linalg.norm(samples, axis=1, keepdims=True)
    unit = np.hstack([samples / np.where(norms > 0, norms, 1), norms == 0])
    return unit @ unit.T
