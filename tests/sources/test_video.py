"""Clips: files, folders of frames, arrays; at their own rate or another; too short is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corefit.sources import dimensions, view

SHADES = [20 * n for n in range(12)]


@pytest.fixture(params=["mp4", "folder", "array"])
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """12 frames of 32 x 48 pixels, each of one shade, at 12 a second."""
    frames = np.stack([np.full((32, 48, 3), shade, np.uint8) for shade in SHADES])
    if request.param == "array":
        return frames
    if request.param == "folder":
        (tmp_path / "clip").mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / f"clip/{number:03d}.png")
        return tmp_path / "clip"
    return encoded(tmp_path / "clip.mp4", frames)


def encoded(path: Path, frames: np.ndarray, rate: int = 12) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def shades(pixels: np.ndarray) -> list[int]:
    return pixels.reshape(len(pixels), -1).mean(1).round().astype(int).tolist()


def test_the_first_frames_of_the_size_asked_for(clip: object) -> None:
    seen = view(clip, (5, 16, 16))
    assert seen.pixels.shape == (5, 16, 16, 3)
    assert seen.pixels.dtype == np.uint8
    assert np.abs(np.array(shades(seen.pixels)) - SHADES[:5]).max() <= 3
    assert (seen.source, seen.crop, seen.enlarged) == ((32, 48), (8, 0, 40, 32), False)
    assert dimensions(clip) == (32, 48)


@pytest.mark.parametrize(
    ("fps", "expected"), [(12, SHADES), (6, SHADES[::2]), (4, SHADES[::3]), (24, np.repeat(SHADES, 2))]
)
def test_another_rate_takes_what_is_shown_at_each_instant(tmp_path: Path, fps: float, expected: list[int]) -> None:
    clip = encoded(tmp_path / "a.mp4", np.stack([np.full((32, 48, 3), shade, np.uint8) for shade in SHADES]))
    found = shades(view(clip, (len(expected), 32, 48), fps).pixels)
    assert np.abs(np.array(found) - expected).max() <= 3


def test_what_is_too_short_is_said(clip: object) -> None:
    with pytest.raises(ValueError, match="it has 12 frames, and size asks for 13"):
        view(clip, (13, 16, 16))


def test_pictures_are_no_clips_nor_the_reverse(clip: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this is a clip.*give \[frames, height, width\]"):
        view(clip, (16, 16))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"this is a picture.*give \[height, width\]"):
        view(tmp_path / "a.png", (5, 8, 8))
