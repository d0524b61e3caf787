"""Clips from files, folders of frames and arrays, at their own frame rate or another; short ones are refused."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corefit.data.sources import dimensions, pictures, view
from corefit.errors import DataError
from corefit.types import ArchiveMember

SHADES = [20 * n for n in range(12)]


@pytest.fixture(params=["mp4", "folder", "array"])
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """A clip of 12 frames of 32 x 48 pixels, each of a single gray, at 12 frames per second."""
    frames = np.stack([np.full((32, 48, 3), shade, np.uint8) for shade in SHADES])
    if request.param == "array":
        return frames
    if request.param == "folder":
        (tmp_path / "clip").mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / f"clip/{number:03d}.png")
        return tmp_path / "clip"
    return encoded(tmp_path / "clip.mp4", frames)


def encoded(path: Path, frames: np.ndarray, rate: int = 12, start: int = 0, codec: str = "mpeg4") -> Path:
    """Write frames [T, H, W, 3] to a video file; the first is shown `start` frames after its beginning."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.bit_rate = 4_000_000
        for number, pixels in enumerate(frames, start):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shades(pixels: np.ndarray) -> list[int]:
    return pixels.reshape(len(pixels), -1).mean(1).round().astype(int).tolist()


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile other.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("stored", [False, True])
def test_a_playlist_under_the_name_of_a_clip_opens_no_other_file(kind: str, stored: bool, tmp_path: Path) -> None:
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    assert dimensions(encoded(tmp_path / "other.mp4", frames)) == (32, 32)
    (tmp_path / "list.mp4").write_text(PLAYLISTS[kind])
    media: object = tmp_path / "list.mp4"
    if stored:
        media = ArchiveMember("list.mp4", (tmp_path / "list.mp4").read_bytes, tmp_path / "list.mp4")
    with pytest.raises((ValueError, OSError), match="Invalid"):
        dimensions(media)


@pytest.mark.parametrize("name", ["a:b.mp4", "concat:a|b.mp4", "%d?#é.mp4"])
def test_a_file_name_is_not_taken_for_an_address(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(tmp_path / "clip.mp4", np.zeros((4, 32, 32, 3), np.uint8)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert dimensions(Path(name)) == (32, 32)


def test_a_clip_gives_its_first_frames_at_the_requested_size(clip: object) -> None:
    seen = view(clip, (5, 16, 16))
    assert seen.pixels.shape == (5, 16, 16, 3)
    assert seen.pixels.dtype == np.uint8
    assert np.abs(np.array(shades(seen.pixels)) - SHADES[:5]).max() <= 3
    assert (seen.source, seen.crop, seen.enlarged) == ((32, 48), (8, 0, 40, 32), False)
    assert dimensions(clip) == (32, 48)


@pytest.mark.parametrize(
    ("fps", "expected"), [(12, SHADES), (6, SHADES[::2]), (4, SHADES[::3]), (24, np.repeat(SHADES, 2))]
)
@pytest.mark.parametrize(
    ("name", "start"), [("a.mp4", 0), ("a.mp4", 18), ("a.mkv", 0), ("a.mkv", 18), ("a.mov", 0), ("a.avi", 0)]
)
def test_another_rate_takes_the_frame_on_screen_at_each_time(
    tmp_path: Path, name: str, start: int, fps: float, expected: list[int]
) -> None:
    """This holds wherever a clip's times begin, and although mkv rounds them to milliseconds."""
    frames = np.stack([np.full((32, 48, 3), shade, np.uint8) for shade in SHADES])
    clip = encoded(tmp_path / name, frames, start=start)
    found = shades(view(clip, (len(expected), 32, 48), fps).pixels)
    assert np.abs(np.array(found) - expected).max() <= 3
    with pytest.raises(ValueError, match=rf"it has {len(expected)} frames at {fps} frames a second, and size asks"):
        view(clip, (len(expected) + 1, 32, 48), fps)


def test_a_gif_keeps_its_colors_and_times(tmp_path: Path) -> None:
    pytest.importorskip("av")
    colors = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    first, *rest = [Image.new("RGB", (8, 6), color) for color in colors]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=100)
    seen = view(tmp_path / "a.gif", (6, 6, 8), 20).pixels
    assert np.abs(seen[:, 3, 3].astype(int) - np.repeat(colors, 2, 0)).max() <= 4
    assert dimensions(tmp_path / "a.gif") == (6, 8)


@pytest.mark.parametrize(
    ("matrix", "weights"),
    [(1, (0.2126, 0.0722)), (6, (0.299, 0.114)), (9, (0.2627, 0.0593))],
    ids=["709", "601", "2020"],
)
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_colors_are_converted_as_the_file_declares(
    tmp_path: Path, matrix: int, weights: tuple[float, float], full: bool
) -> None:
    """The declared matrix and range convert a file back to RGB, whichever it was written with."""
    av = pytest.importorskip("av")
    red, green, blue = rgb = (200, 40, 90)
    kr, kb = weights
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    scale, offset, chroma_scale = (1, 0, 1) if full else (219 / 255, 16, 224 / 255)
    planes = [luma * scale + offset, *(128 + c * chroma_scale for c in chroma)]
    raw = np.repeat(np.round(planes).astype(np.uint8), [64 * 96, 16 * 96, 16 * 96]).reshape(96, 96)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=12)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame.from_ndarray(raw, format="yuv420p")
        frame.colorspace, frame.color_range, frame.pts, frame.time_base = matrix, 2 if full else 1, 0, Fraction(1, 12)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.abs(view(tmp_path / "a.mkv", (1, 64, 96)).pixels.astype(int) - rgb).max() <= 2


@pytest.mark.parametrize(
    ("matrix", "white"),
    [((0, 1, -1, 0), "top"), ((-1, 0, 0, -1), "right"), ((0, -1, 1, 0), "bottom")],
    ids=["right", "over", "left"],
)
def test_clips_are_turned_upright(tmp_path: Path, matrix: tuple[int, ...], white: str) -> None:
    """A clip with a white left half whose header asks to be turned, as phones write it."""
    pixels = np.zeros((2, 32, 48, 3), np.uint8)
    pixels[:, :, :24] = 255
    clip = encoded(tmp_path / "a.mp4", pixels)
    data = bytearray(clip.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(data)
    height, width = (32, 48) if white == "right" else (48, 32)
    seen = view(clip, (2, height, width))
    assert seen.source == dimensions(clip) == (height, width)
    sides = {"top": seen.pixels[:, :8], "bottom": seen.pixels[:, -8:], "right": seen.pixels[:, :, -8:]}
    assert sides.pop(white).min() > 200
    assert seen.pixels.mean() == pytest.approx(127.5, abs=5)
    assert all(side.min() < 50 for side in sides.values())


# folders and arrays


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, shade in enumerate(SHADES):
        Image.new("RGB", (8, 6), (shade,) * 3).save(tmp_path / f"f{number}.png")
    (tmp_path / "._f0.png").write_bytes(b"a Mac's hidden file")
    assert shades(view(tmp_path, (12, 6, 8)).pixels) == SHADES


@pytest.mark.parametrize("size", [(4, 4), (40, 40)])
def test_frames_of_a_folder_have_one_size(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    Image.new("RGB", size).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=rf"frame 2 has {size[0]} x {size[1]} pixels, the first 8 x 6"):
        view(tmp_path, (2, 6, 6))


def test_a_rate_of_frames_without_times_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    for clip, where in ((tmp_path, "a folder"), (np.zeros((3, 6, 8, 3), np.uint8), "memory")):
        with pytest.raises(ValueError, match=f"frames in {where} have no frame rate, so fps cannot be applied"):
            view(clip, (1, 6, 8), 12)


@pytest.mark.parametrize("wrong", [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4, 4), np.uint8)])
def test_clips_in_memory_must_be_uint8_rgb(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
        view(wrong, (2, 4, 4))


def test_each_frame_is_scaled_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holding all frames of a clip at their original size would take gigabytes."""
    seen: list[str] = []
    read, scaled = pictures.upright, Image.Image.resize
    monkeypatch.setattr(pictures, "upright", lambda file: seen.append("read") or read(file))
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **keys: seen.append("scaled") or scaled(*args, **keys))
    for number in range(3):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{number}.png")
    view(tmp_path, (3, 6, 8))
    assert seen == ["read", "scaled"] * 3


# what is wrong


def test_a_file_without_a_video_stream_is_refused(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for read in (dimensions, lambda clip: view(clip, (1, 4, 4))):
        with pytest.raises(ValueError, match="it has no video stream"):
            read(tmp_path / "a.mp4")


def test_a_missing_decoder_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'corefit\[video\]'"):
        view(tmp_path / "a.mp4", (1, 4, 4))


def test_a_clip_that_is_too_short_is_refused(clip: object) -> None:
    with pytest.raises(ValueError, match="it has 12 frames, and size asks for 13"):
        view(clip, (13, 16, 16))


def test_pictures_and_clips_are_not_mistaken_for_each_other(clip: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this is a clip.*give \[frames, height, width\]"):
        view(clip, (16, 16))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"this is a picture.*give \[height, width\]"):
        view(tmp_path / "a.png", (5, 8, 8))
