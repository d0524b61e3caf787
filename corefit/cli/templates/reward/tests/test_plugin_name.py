"""What every reward must hold, and what this one says of itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corefit.testing import check_reward
from corefit_plugin_name import PluginName

RED, GREEN, GREY = (torch.tensor(colour).reshape(3, 1, 1) for colour in ([1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0.5]))


def picture(*halves: Tensor) -> Tensor:
    """[1, 3, 8, 8]: its columns in equal parts."""
    return torch.cat([colour.expand(3, 8, 8 // len(halves)) for colour in halves], 2)[None]


def score(media: Tensor, **keys: float) -> float:
    return float(PluginName(**keys).score(media, ["a picture"], [{}]))


def test_it_is_a_reward():
    check_reward(PluginName())


def test_grey_scores_nothing_and_colours_score():
    assert score(picture(GREY)) == 0
    assert score(picture(RED, GREEN)) > score(picture(RED, GREY)) > score(picture(RED)) > 0


def test_one_colour_scores_by_its_mean_alone():
    assert score(picture(RED), mean=0) == pytest.approx(0, abs=1e-4)
    assert score(picture(RED), mean=1) == pytest.approx(1.25**0.5, rel=1e-4)


def test_a_clip_scores_as_its_frames_do():
    frame = picture(RED, GREEN)
    assert score(frame[:, :, None].expand(1, 3, 5, 8, 8)) == pytest.approx(score(frame))
