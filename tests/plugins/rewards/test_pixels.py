"""`jpeg_size` and `sharpness`, and the bytes of pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from corefit.testing import check_reward
from corefit_rewards.jpeg_size import JpegSize
from corefit_rewards.pixels import encoded, pixels
from corefit_rewards.sharpness import Sharpness

PROMPTS, META = ["one", "other"], [{}, {}]


@pytest.fixture
def media() -> torch.Tensor:
    """A smooth picture and a noisy one [2, 3, 48, 40]."""
    smooth = torch.linspace(0, 1, 40).expand(3, 48, 40)
    noisy = torch.from_numpy(np.random.default_rng(0).random((3, 48, 40), dtype=np.float32))
    return torch.stack([smooth, noisy])


@pytest.mark.parametrize("reward", [JpegSize(), JpegSize(wanted="large"), Sharpness()], ids=repr)
def test_keeps_the_rules_of_rewards(reward, media):
    check_reward(reward, media, PROMPTS, META)


# jpeg_size


def test_size_is_that_of_the_file(media):
    """DDPO's: kilobytes of 1000 bytes at quality 95, from pixels rounded to 8 bits."""
    sizes = JpegSize(wanted="large").score(media, PROMPTS, META)
    for size, picture in zip(sizes, media, strict=True):
        file = io.BytesIO()
        array = (picture * 255).round().byte().movedim(0, -1).numpy()
        Image.fromarray(array).save(file, format="JPEG", quality=95)
        assert float(size) == pytest.approx(file.tell() / 1000)
    assert torch.equal(JpegSize().score(media, PROMPTS, META), -sizes)
    assert torch.all(JpegSize(wanted="large", quality=50).score(media, PROMPTS, META) < sizes)


def test_small_files_are_wanted_by_default(media):
    smooth, noisy = JpegSize().score(media, PROMPTS, META).tolist()
    assert noisy < smooth < 0


@pytest.mark.parametrize("quality", [0, 101])
def test_quality_has_bounds(quality):
    with pytest.raises(ValueError, match="quality"):
        JpegSize(quality=quality)


# sharpness


def test_sharpness_is_opencvs(media):
    cv2 = pytest.importorskip("cv2")
    scores = Sharpness().score(media, PROMPTS, META)
    exact = media.movedim(1, -1).numpy()
    for score, picture in zip(scores, exact, strict=True):
        gray = cv2.cvtColor(255 * np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
        assert float(score) == pytest.approx(cv2.Laplacian(gray, cv2.CV_32F).var(), rel=1e-4)


def test_blurred_pictures_are_less_sharp(media):
    picture = Image.fromarray(pixels(media)[1])
    arrays = [np.array(picture.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2)]
    blurred = torch.from_numpy(np.stack(arrays)).movedim(-1, 1) / 255
    sharp, less, least = Sharpness().score(blurred, ["a"] * 3, [{}] * 3).tolist()
    assert sharp > less > least > 0


def test_flat_pictures_score_nothing():
    assert Sharpness().score(torch.full((1, 3, 9, 9), 0.3), ["a"], [{}]).tolist() == pytest.approx([0], abs=1e-6)


def test_sharpness_is_float32_for_half_precision(media):
    scores = Sharpness().score(media.bfloat16(), PROMPTS, META)
    assert scores.dtype == torch.float32


def test_clips_have_gradients_through_frames(media):
    clips = torch.stack([media, media.flip(0)], dim=2).requires_grad_(True)  # [2, 3, 2, H, W]
    scores = Sharpness().score(clips, PROMPTS, META)
    assert scores[0].item() == pytest.approx(scores[1].item())
    scores.sum().backward()
    assert clips.grad is not None
    assert clips.grad.flatten(3).abs().sum(-1).gt(0).all()


# bytes


def test_pixels_are_rounded_to_the_nearest(media):
    assert pixels(torch.tensor([[[[0.0, 1.0]], [[0.499, 0.501]], [[-0.2, 1.2]]]])).tolist() == [
        [[[0, 127, 0], [255, 128, 255]]]
    ]
    found = pixels(media)
    assert found.shape == (2, 48, 40, 3)
    assert found.dtype == np.uint8


def test_png_is_lossless_and_jpeg_is_not(media):
    array = pixels(media)[1]
    for form, same in (("png", True), ("jpeg", False)):
        opened = Image.open(io.BytesIO(encoded(array, form)))
        assert opened.format == form.upper()
        assert np.array_equal(np.array(opened), array) is same
