"""Clips are scored by their frames: which are taken, and how their scores become one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from attrs import frozen
from torch import Tensor

from corefit.types import Meta
from corefit_rewards.frames import FrameReward


@frozen(slots=False)
class Level(FrameReward):
    """The brightness of a picture, where its prompt is its own."""

    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        assert [each["prompt"] for each in meta] == list(prompts)
        own = torch.tensor([float(prompt) for prompt in prompts])
        return pictures.mean((1, 2, 3)) + own


def clips(length: int) -> Tensor:
    """Two clips [2, 3, length, 4, 5] whose frames have the levels 0, 1, ... and, in the second, the squares."""
    numbers = torch.arange(float(length))
    return torch.stack([numbers, numbers**2])[:, None, :, None, None].expand(2, 3, length, 4, 5)


PROMPTS = ("100", "200")
META = [{"prompt": prompt} for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [100 + 3.5, 200 + 140 / 8]),
        ({"pool": "min"}, [100, 200]),
        ({"pool": "first"}, [100, 200]),
        ({"frames": 2}, [100 + 3.5, 200 + 24.5]),
        ({"frames": 3}, [100 + (0 + 4 + 7) / 3, 200 + (0 + 16 + 49) / 3]),
        ({"frames": 1}, [100, 200]),
        ({"frames": 100}, [100 + 3.5, 200 + 140 / 8]),
    ],
)
def test_scores_of_frames_become_one(keys: dict[str, object], expected: list[float]) -> None:
    assert Level(**keys).score(clips(8), PROMPTS, META).tolist() == pytest.approx(expected)


def test_the_lowest_frame_counts_wherever_it_is() -> None:
    turned = clips(8).flip(2)
    assert Level(pool="min").score(turned, PROMPTS, META).tolist() == [100, 200]
    assert Level(pool="first").score(turned, PROMPTS, META).tolist() == [107, 249]


def test_a_picture_is_one_frame() -> None:
    pictures = clips(8)[:, :, 2]
    for pool in ("mean", "min", "first"):
        assert Level(pool=pool).score(pictures, PROMPTS, META).tolist() == [102, 204]


def test_the_gradient_reaches_the_frames_that_are_scored() -> None:
    media = clips(8).clone().requires_grad_(True)
    Level(frames=2).score(media, PROMPTS, META).sum().backward()
    assert media.grad is not None
    assert media.grad.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist() == [0, 7]
