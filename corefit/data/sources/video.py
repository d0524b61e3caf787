"""Decode clips: video files (with PyAV), folders of frames, and arrays."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.data.sources import pictures
from corefit.errors import DataError
from corefit.types import ArchiveMember

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEOS = frozenset({".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"})
TOLERANCE = 0.001
"""Seconds by which a frame may be late and still count, because mkv and webm round times to milliseconds."""
FFMPEG_OPTIONS: Mapping[str, str] = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf",
}
"""Options that let FFmpeg open one file only: a playlist under a video's name could fetch other files or addresses."""
BT601, FULL_RANGE = 5, 2
"""FFmpeg's numbers of a color matrix and of the full color range."""


def is_clip(media: Path | ArchiveMember | Any) -> bool:
    """Return whether media are a clip: a video file, a folder or an array [T, H, W, 3]."""
    if isinstance(media, (Path, ArchiveMember)):
        name = media if isinstance(media, Path) else Path(media.name)
        return name.suffix.lower() in VIDEOS or (isinstance(media, Path) and media.is_dir())
    return getattr(media, "ndim", 0) == 4


def frames(media: Path | ArchiveMember | Any, number: int, fps: float | None) -> Iterator[Image]:
    """Yield the first `number` frames at `fps`, or at the clip's own rate, upright and in RGB.

    ValueError after the last frame if there are fewer, and if `fps` is set but the frames have no times.
    """
    found = 0
    for image in islice(_all_frames(media, fps), number):
        yield image
        found += 1
    if found < number:
        at = f" at {fps:g} frames a second" if fps else ""
        raise ValueError(f"it has {found} frames{at}, and size asks for {number}; ask for fewer, or leave the clip out")


def dimensions(media: Path | ArchiveMember) -> tuple[int, int]:
    """Return the upright height and width of the first frame."""
    if isinstance(media, Path) and media.is_dir():
        return pictures.dimensions(_frame_files(media)[0])
    with _stream(media) as stream:
        frame = next(stream.container.decode(stream), None)
        if frame is None:
            raise ValueError("it has no frames")
        return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)


def clip_shape(media: Path) -> tuple[int, int, int, float]:
    """Return the upright height and width of a clip, its number of frames, and how many it has a second.

    A file says so in its header, or its frames are counted. Frames in a folder have no rate: 0.
    """
    height, width = dimensions(media)
    if media.is_dir():
        return height, width, len(_frame_files(media)), 0.0
    with _stream(media) as stream:
        rate = float(stream.average_rate or 0)
        return height, width, stream.frames or sum(1 for _ in stream.container.decode(stream)), rate


def _all_frames(media: Path | ArchiveMember | Any, fps: float | None) -> Iterator[Image]:
    if isinstance(media, ArchiveMember) or (isinstance(media, Path) and not media.is_dir()):
        return _decoded(media, fps)
    if fps:
        where = "a folder" if isinstance(media, Path) else "memory"
        raise ValueError(f"frames in {where} have no frame rate, so fps cannot be applied; remove fps")
    return map(pictures.upright, _frame_files(media) if isinstance(media, Path) else media)


def _frame_files(folder: Path) -> list[Path]:
    """Return the frames in the order of the numbers in their names: 9.png comes before 10.png."""
    found = (file for file in folder.iterdir() if file.suffix.lower() in pictures.PICTURES)
    files = sorted((file for file in found if not file.name.startswith(".")), key=_natural_order)
    if not files:
        raise ValueError("the folder has no frames")
    return files


def _natural_order(file: Path) -> tuple[list[str | int], str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)], file.name


def _decoded(media: Path | ArchiveMember, fps: float | None) -> Iterator[Image]:
    with _stream(media) as stream:
        stream.thread_type = "AUTO"
        decoded = stream.container.decode(stream)
        yield from map(_image, decoded if fps is None else _sampled(decoded, fps))


def _sampled(decoded: Iterator[Any], fps: float) -> Iterator[Any]:
    """Yield the frame that is on screen at each of the times 0, 1 / fps, 2 / fps ... after the first frame."""
    count, current, start, time, end = 0, None, None, 0.0, 0.0
    for frame in decoded:
        if frame.time is None:
            raise ValueError("its frames have no times, so fps cannot be applied; remove fps, or convert the file")
        start = frame.time if start is None else start
        before, time = time, frame.time - start
        while current is not None and time > count / fps + TOLERANCE:
            yield current
            count += 1
        end = time + (float(frame.duration * frame.time_base) if frame.duration else time - before)
        current = frame
    while current is not None and count / fps < end - TOLERANCE:
        yield current
        count += 1


def _image(frame: Any) -> Image:
    """Return a frame in RGB, converted with the file's color matrix and range (HD is mostly BT.709), and upright.

    Unless a matrix to convert to is given, PyAV treats every clip as BT.601.
    """
    from PIL import Image

    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=frame.colorspace,
        dst_colorspace=BT601,
        src_color_range=frame.color_range,
        dst_color_range=FULL_RANGE,
    )
    image, turns = Image.fromarray(rgb.to_ndarray()), _quarter_turns(frame)
    return image.rotate(90 * turns, expand=True) if turns else image


def _quarter_turns(frame: Any) -> int:
    """Return how many quarter turns to the left make a frame upright."""
    return round(frame.rotation / 90)


@contextmanager
def _stream(media: Path | ArchiveMember) -> Generator[Any]:
    """Open the first video stream of a file; ValueError if there is none."""
    try:
        import av
    except ModuleNotFoundError:
        raise DataError("video files are read with PyAV: pip install 'corefit[video]'") from None
    opened = pictures.decoder_input(media)
    address = f"file:{opened.absolute()}" if isinstance(opened, Path) else opened
    with av.open(address, options=dict(FFMPEG_OPTIONS)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        yield container.streams.video[0]
