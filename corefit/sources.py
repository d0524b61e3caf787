"""Where raw examples come from, and how one picture is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attrs import frozen

from corefit.errors import DataError
from corefit.types import Example, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Pixels = NDArray[np.uint8]

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
SHOWN = 20


@frozen
class Jsonl(Source):
    """One JSON object a line: a prompt, a media file if there is one, and anything else, which becomes `meta`."""

    path: Path
    """The file; blank lines in it are skipped."""
    media: str = "media"
    """The key that holds the media file; either every line has it or none (prompts alone)."""
    prompt: str = "prompt"
    """The key that holds the prompt."""
    root: Path | None = None
    """Folder that media files are relative to; that of the file itself unless set."""

    def examples(self) -> Iterator[Example]:
        """All lines in order; DataError names the file and the line."""
        first: tuple[int, bool] | None = None
        for number, row in self._rows():
            has = self.media in row
            first = first or (number, has)
            if has != first[1]:
                raise self._wrong(number, _mixed(self.media, has, first[0]))
            yield self._example(number, row)
        if first is None:
            raise DataError(f"{self.path} is empty: expected one JSON object a line with a {self.prompt!r}")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist or is not a file: `path` must name a JSON Lines file")
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, self._object(number, line)

    def _object(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row: Any = json.loads(line.decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._wrong(number, f"this is not JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise self._wrong(number, f"found a {type(row).__name__}, expected an object such as {{...}}")
        return cast(dict[str, Any], row)

    def _example(self, number: int, row: dict[str, Any]) -> Example:
        prompt = self._text(number, row, self.prompt)
        media = self._text(number, row, self.media) if self.media in row else None
        meta = {key: value for key, value in row.items() if key not in (self.prompt, self.media)}
        return Example(prompt, None if media is None else (self.root or self.path.parent) / media, meta)

    def _text(self, number: int, row: dict[str, Any], key: str) -> str:
        if key not in row:
            raise self._wrong(number, f"there is no {key!r}; the line has {', '.join(map(repr, row)) or 'no keys'}")
        if not isinstance(row[key], str):
            raise self._wrong(number, f"{key!r} is {json.dumps(row[key])[:60]}, expected a string")
        return row[key]

    def _wrong(self, number: int, what: str) -> DataError:
        return DataError(f"{self.path}:{number}: {what}")


@frozen
class ImageFolder(Source):
    """Pictures (png, jpg, jpeg, webp, bmp) of a folder and its subfolders, each with a text file beside it."""

    path: Path
    """The folder; names that start with a dot are skipped."""
    prompt_suffix: str = ".txt"
    """cat.png's prompt is in cat.txt."""
    class_prompt: str | None = None
    """Prompt of pictures without a text file, such as "a photo of a {folder}"."""

    def examples(self) -> Iterator[Example]:
        """All pictures, sorted by path; DataError lists those that have no prompt."""
        files = self._files()
        prompts = [self._prompt(file) for file in files]
        bare = [str(file) for file, prompt in zip(files, prompts, strict=True) if prompt is None]
        if bare:
            raise DataError(
                f"{len(bare)} of {len(files)} pictures have no {self.prompt_suffix} file beside them; write the "
                f'prompts, or set class_prompt = "a photo of a {{folder}}":\n{listed(bare)}'
            )
        for file, prompt in zip(files, prompts, strict=True):
            yield Example(prompt or "", file)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            raise DataError(f"{self.path} does not exist or is not a folder: `path` must name one with pictures")
        found = (f for f in self.path.rglob("*") if f.suffix.lower() in PICTURES and f.is_file())
        files = sorted(f for f in found if not any(p.startswith(".") for p in f.relative_to(self.path).parts))
        if not files:
            raise DataError(f"{self.path} holds no picture ({', '.join(sorted(PICTURES))})")
        return files

    def _prompt(self, file: Path) -> str | None:
        text = file.with_suffix(self.prompt_suffix)
        try:
            return text.read_text("utf-8-sig").strip()
        except FileNotFoundError:
            return None if self.class_prompt is None else self.class_prompt.replace("{folder}", file.parent.name)
        except UnicodeDecodeError as error:
            raise DataError(f"{text} is not UTF-8 text ({error})") from None


def listed(lines: Sequence[str], shown: int = SHOWN) -> str:
    """The first lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
    return "\n".join(f"  {line}" for line in [*lines[:shown], *more])


def picture(media: Path | Any, size: Sequence[int]) -> tuple[Pixels, bool]:
    """A file, or uint8 [H, W, 3], as uint8 [height, width, 3] of `size`; and whether it had to be enlarged.

    Upright (EXIF), transparency over white, 16-bit grey scaled; the shortest side is resized (Lanczos,
    antialiased) and the centre is kept. Raises whatever Pillow finds wrong with it.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(media) if isinstance(media, Path) else _in_memory(media) as opened:
        image = _rgb(ImageOps.exif_transpose(opened))
    height, width = size
    enlarged = image.width < width or image.height < height
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted), enlarged


def _in_memory(media: Any) -> Image:
    import numpy as np
    from PIL import Image

    array = np.asarray(media)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image in memory is {array.dtype} {array.shape}, expected uint8 [H, W, 3]")
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):
        return _eight_bit(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image) -> Image:
    """16-bit grey, also as Pillow's 32-bit mode, in 8 bits; plain conversion would clip it to white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit grey pixels have no agreed range; save 8 or 16 bits a channel")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _mixed(key: str, has: bool, first: int) -> str:
    found, before = ("has a", "has none") if has else ("has no", "has one")
    return f"this line {found} {key!r} but line {first} {before}; give every line media, or none"
