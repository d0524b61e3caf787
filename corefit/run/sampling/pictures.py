"""Pictures and clips as files, each of which says how it was made."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit import __version__
from corefit.errors import ConfigError
from corefit.run.report.sheets import pixels
from corefit.system.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".png", ".webp")
"""Of the files of a picture and of a clip."""
FPS = 16
LONGEST = 40
"""Characters of a prompt in the name of its file."""
DESCRIPTION = 0x010E
"""The tag ImageDescription of EXIF."""


def write(medium: Tensor, file: Path, facts: Mapping[str, Any]) -> None:
    """Write a picture [3, H, W] as PNG, or a clip [3, T, H, W] as animated WebP, in [0, 1], with its facts in it.

    A PNG has each fact as a text of its own, and a WebP all of them as JSON in the description of its EXIF.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    texts = {"Software": f"corefit {__version__}", **facts}
    data = io.BytesIO()
    if medium.ndim == 3:
        info = PngInfo()
        for key, value in texts.items():
            info.add_text(key, value if isinstance(value, str) else json.dumps(value))
        Image.fromarray(pixels(medium[None])[0]).save(data, "png", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[DESCRIPTION] = json.dumps(texts)
        first, *rest = (Image.fromarray(frame) for frame in pixels(medium.movedim(1, 0)))
        pause = round(1000 / FPS)
        first.save(data, "webp", save_all=True, append_images=rest, duration=pause, loop=0, quality=90, exif=exif)
    write_whole(file, data.getvalue())


def in_words(prompt: str) -> str:
    """Return the words of a prompt in the form that a file's name may have."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    while len(words.encode()) > LONGEST:
        words = words[:-1]
    return words.rstrip("-_") or "picture"


def place(out: Path | None, name: str, count: int) -> Path:
    """Return where so many pictures of the model `name` go: a file that is not there, or a new or empty folder.

    out  a .png or .webp file for one picture, or a folder; by default the next that is free of samples/NAME,
         samples/NAME-2, ...
    """
    if out is None:
        stem = Path("samples") / in_words(name)
        numbers = iter(range(2, 1_000_000))
        out = stem
        while out.exists():
            out = stem.with_name(f"{stem.name}-{next(numbers)}")
    elif out.suffix.lower() in ENDINGS:
        if count > 1:
            raise ConfigError(f"--out {out}: there are {count} pictures; name a folder")
        if out.exists():
            raise ConfigError(f"--out {out}: it exists, and nothing is overwritten; name another file")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: it exists and is not empty, and nothing is overwritten; name another folder")
    return out
