"""The checks that every reward must pass, and tests of this one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corefit.testing import check_reward
from corefit_plugin_name import PluginName

RED, GREEN, GRAY = (torch.tensor(color).reshape(3, 1, 1) for color in ([1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0.5]))


def picture(*halves: Tensor) -> Tensor:
    """[1, 3, 8, 8]: as many vertical stripes of equal width."""
    return torch.cat([color.expand(3, 8, 8 // len(halves)) for color in halves], 2)[None]


def score(media: Tensor, **keys: float) -> float:
    return float(PluginName(**keys).score(media, ["a picture"], [{}]))


def test_it_is_a_reward():
    check_reward(PluginName())


def test_gray_scores_nothing_and_colors_score():
    assert score(picture(GRAY)) == 0
    assert score(picture(RED, GREEN)) > score(picture(RED, GRAY)) > score(picture(RED)) > 0


def test_one_color_scores_by_its_mean_alone():
    assert score(picture(RED), mean=0) == pytest.approx(0, abs=1e-4)
    assert score(picture(RED), mean=1) == pytest.approx(1.25**0.5, rel=1e-4)


def test_a_clip_scores_as_its_frames_do():
    frame = picture(RED, GREEN)
    assert score(frame[:, :, None].expand(1, 3, 5, 8, 8)) == pytest.approx(score(frame))
