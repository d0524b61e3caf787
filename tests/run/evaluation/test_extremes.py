from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from corefit.run.evaluation import extremes


def test_the_best_and_worst_of_each_reward_are_chosen_beside_those_shown():
    rising, falling = [float(n) for n in range(20)], [float(-n) for n in range(20)]
    assert extremes.choose({"a": rising}, shown=0) == [0, 1, 2, 3, 16, 17, 18, 19]
    assert extremes.choose({"a": rising, "b": falling}, shown=2) == [2, 3, 16, 17, 18, 19]
    assert extremes.choose({}, shown=0) == []


def test_equal_scores_choose_the_first_which_are_shown_anyway():
    hits = [1.0, 0.0] * 50
    assert extremes.choose({"a": hits}, shown=8) == []
    assert extremes.choose({"a": hits}, shown=0) == [*range(8)]


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 4, 8, 8)])
def test_what_is_written_is_the_same_each_time_and_goes_when_there_is_none(tmp_path: Path, shape):
    media = torch.rand(2, *shape)
    extremes.write(tmp_path, [5, 9], media)
    first = (tmp_path / extremes.EXTREMES).read_bytes()
    extremes.write(tmp_path, [5, 9], media)
    assert (tmp_path / extremes.EXTREMES).read_bytes() == first
    with safe_open(tmp_path / extremes.EXTREMES, "pt") as opened:
        assert opened.metadata() == {"rows": "[5, 9]"}
        assert torch.equal(opened.get_tensor("media"), (media * 255).round().byte())
    extremes.write(tmp_path, [], None)
    extremes.write(tmp_path, [], None)
    assert not list(tmp_path.iterdir())
