"""Buckets: each aspect ratio gets a size of the same area that the model accepts, and media go to the nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from corefit.data.buckets import nearest, sizes
from corefit.errors import ConfigError


class Model:
    """A model that accepts multiples of 16, up to 1024."""

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        if any(n % 16 or n > 1024 for n in size[-2:]):
            raise ConfigError(f"size = {list(size)}: multiples of 16 up to 1024")
        return (4, *(n // 8 for n in size[-2:]))


def bucket_sizes(size: Sequence[int], *aspects: str) -> Any:
    return sizes(tuple(size), aspects, Model())  # type: ignore[arg-type]


def test_without_aspects_there_is_one_bucket() -> None:
    assert bucket_sizes([512, 512]) == ((512, 512),)


def test_aspects_keep_the_area_in_steps_that_the_model_accepts() -> None:
    found = bucket_sizes([512, 512], "1:1", "4:3", "3:4", "16:9")
    assert found == ((512, 512), (448, 592), (592, 448), (384, 688))
    assert all(abs(h * w / 512**2 - 1) < 0.05 for h, w in found)
    assert bucket_sizes([9, 512, 512], "4:3") == ((9, 448, 592),)
    assert bucket_sizes([512, 1024], "1:1", "2:1", "1:2") == ((720, 720), (512, 1024), (1024, 512))


@pytest.mark.parametrize(
    ("size", "aspects", "message"),
    [
        ([512, 512], ("4:3", "27:20"), "'4:3' and '27:20' are both 592 x 448 pixels"),
        ([1024, 1024], ("4:1",), "multiples of 16 up to 1024"),
        ([500, 512], ("1:1",), "multiples of 16"),
    ],
)
def test_sizes_that_the_model_does_not_accept_are_refused(
    size: Sequence[int], aspects: Sequence[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bucket_sizes(size, *aspects)


def test_media_go_to_the_nearest_aspect_on_a_logarithmic_scale() -> None:
    found = bucket_sizes([512, 512], "1:1", "2:1", "1:2")
    assert [nearest(h, w, found) for h, w in [(100, 100), (100, 139), (100, 141), (142, 100), (30, 900)]] == [
        0,
        0,
        1,
        2,
        1,
    ]
