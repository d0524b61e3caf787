"""Clips: video files (PyAV), folders of frames, arrays."""

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
ROUNDING = 0.001
"""Seconds by which a frame may be late and still count: mkv and webm write times in whole milliseconds."""
ALONE: Mapping[str, str] = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf",
}
"""FFmpeg opens this file and nothing else: a playlist under a video's name could fetch other files and addresses."""
BT601, FULL = 5, 2
"""FFmpeg's numbers of a colour matrix and a range."""


def moves(media: Path | ArchiveMember | Any) -> bool:
    """Whether it is a clip: a video file, a folder, an array [T, H, W, 3]."""
    if isinstance(media, (Path, ArchiveMember)):
        name = media if isinstance(media, Path) else Path(media.name)
        return name.suffix.lower() in VIDEOS or (isinstance(media, Path) and media.is_dir())
    return getattr(media, "ndim", 0) == 4


def frames(media: Path | ArchiveMember | Any, number: int, fps: float | None) -> Iterator[Image]:
    """The first `number` frames at `fps`, or at the clip's own rate, upright and in RGB, one at a time.

    ValueError, after the last, where there are not so many, and for `fps` where frames have no times.
    """
    found = 0
    for image in islice(_all(media, fps), number):
        yield image
        found += 1
    if found < number:
        at = f" at {fps:g} frames a second" if fps else ""
        raise ValueError(f"it has {found} frames{at}, and size asks for {number}; ask for fewer, or leave it out")


def dimensions(media: Path | ArchiveMember) -> tuple[int, int]:
    """Height and width, upright, of the first frame."""
    if isinstance(media, Path) and media.is_dir():
        return pictures.dimensions(_files(media)[0])
    with _stream(media) as stream:
        frame = next(stream.container.decode(stream), None)
        if frame is None:
            raise ValueError("it has no frames")
        return (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)


def _all(media: Path | ArchiveMember | Any, fps: float | None) -> Iterator[Image]:
    if isinstance(media, ArchiveMember) or (isinstance(media, Path) and not media.is_dir()):
        return _decoded(media, fps)
    if fps:
        where = "a folder" if isinstance(media, Path) else "memory"
        raise ValueError(f"frames in {where} have no rate, so fps says nothing; remove it")
    return map(pictures.upright, _files(media) if isinstance(media, Path) else media)


def _files(folder: Path) -> list[Path]:
    """Frames in the order of the numbers in their names: 9.png comes before 10.png."""
    found = (file for file in folder.iterdir() if file.suffix.lower() in pictures.PICTURES)
    files = sorted((file for file in found if not file.name.startswith(".")), key=_numbered)
    if not files:
        raise ValueError("a folder without frames")
    return files


def _numbered(file: Path) -> tuple[list[str | int], str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)], file.name


def _decoded(media: Path | ArchiveMember, fps: float | None) -> Iterator[Image]:
    with _stream(media) as stream:
        stream.thread_type = "AUTO"
        decoded = stream.container.decode(stream)
        yield from map(_image, decoded if fps is None else _sampled(decoded, fps))


def _sampled(decoded: Iterator[Any], fps: float) -> Iterator[Any]:
    """At every instant 0, 1 / fps, 2 / fps ... after the first frame, the frame that is shown then."""
    wanted, shown, start, at, end = 0, None, None, 0.0, 0.0
    for frame in decoded:
        if frame.time is None:
            raise ValueError("its frames have no times, so fps says nothing; remove it, or write the file anew")
        start = frame.time if start is None else start
        before, at = at, frame.time - start
        while shown is not None and at > wanted / fps + ROUNDING:
            yield shown
            wanted += 1
        end = at + (float(frame.duration * frame.time_base) if frame.duration else at - before)
        shown = frame
    while shown is not None and wanted / fps < end - ROUNDING:
        yield shown
        wanted += 1


def _image(frame: Any) -> Image:
    """In RGB by the matrix and range that the file says (most of HD is BT.709), and upright as a phone wrote it.

    Without a matrix to convert to, PyAV takes every clip for BT.601.
    """
    from PIL import Image

    shown = frame.reformat(
        format="rgb24",
        src_colorspace=frame.colorspace,
        dst_colorspace=BT601,
        src_color_range=frame.color_range,
        dst_color_range=FULL,
    )
    image, turns = Image.fromarray(shown.to_ndarray()), _turns(frame)
    return image.rotate(90 * turns, expand=True) if turns else image


def _turns(frame: Any) -> int:
    """Quarter turns to the left that make it upright."""
    return round(frame.rotation / 90)


@contextmanager
def _stream(media: Path | ArchiveMember) -> Generator[Any]:
    """The first video stream of a file; ValueError where there is none."""
    try:
        import av
    except ModuleNotFoundError:
        raise DataError("video files are read with PyAV: pip install 'corefit[video]'") from None
    opened = pictures.opened(media)
    place = f"file:{opened.absolute()}" if isinstance(opened, Path) else opened
    with av.open(place, options=dict(ALONE)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        yield container.streams.video[0]
