"""Clips: video files (PyAV), folders of frames, arrays."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.errors import DataError
from corefit.types import Stored

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEOS = frozenset({".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"})
FRAMES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def moves(media: Path | Stored | Any) -> bool:
    """Whether it is a clip: a video file, a folder, an array [T, H, W, 3]."""
    if isinstance(media, (Path, Stored)):
        name = media if isinstance(media, Path) else Path(media.name)
        return name.suffix.lower() in VIDEOS or (isinstance(media, Path) and media.is_dir())
    return getattr(media, "ndim", 0) == 4


def frames(media: Path | Stored | Any, number: int, fps: float | None) -> Sequence[Image]:
    """The first `number` frames at `fps`, or at the clip's own rate; ValueError where there are not so many."""
    from PIL import Image

    if not isinstance(media, (Path, Stored)):
        found = [Image.fromarray(frame) for frame in media[:number]]
    elif isinstance(media, Path) and media.is_dir():
        found = [Image.open(file).copy() for file in _files(media)[:number]]
    else:
        found = list(islice(_decoded(media, fps), number))
    if len(found) < number:
        at = f" at {fps:g} frames a second" if fps else ""
        raise ValueError(f"it has {len(found)} frames{at}, and size asks for {number}; lower one, or leave it out")
    return found


def dimensions(media: Path | Stored) -> tuple[int, int]:
    """Height and width, from the first frame of a folder, or the stream's header."""
    from PIL import Image

    if isinstance(media, Path) and media.is_dir():
        with Image.open(_files(media)[0]) as image:
            return image.height, image.width
    with _container(media) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in FRAMES)
    if not files:
        raise ValueError("a folder without frames")
    return files


def _decoded(media: Path | Stored, fps: float | None) -> Iterator[Image]:
    """Frames in order; at `fps`, for each instant the frame that is shown then."""
    with _container(media) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        wanted, shown = 0, None
        for frame in container.decode(stream):
            if fps is None:
                yield frame.to_image()
                continue
            while shown is not None and frame.time > wanted / fps + 1e-6:
                yield shown
                wanted += 1
            shown = frame.to_image()
        length = float(stream.duration * stream.time_base) if stream.duration else wanted / (fps or 1)
        while shown is not None and fps is not None and wanted / fps < length - 1e-6:
            yield shown
            wanted += 1


def _container(media: Path | Stored) -> Any:
    try:
        import av
    except ModuleNotFoundError:
        raise DataError("video files are read with PyAV: pip install 'corefit[video]'") from None
    return av.open(str(media) if isinstance(media, Path) else io.BytesIO(media.read()))
