"""A folder of media with their prompts beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from attrs import frozen

from corefit.data.sources.media import MEDIA
from corefit.data.sources.messages import listed
from corefit.data.sources.text import lines
from corefit.errors import DataError
from corefit.types import Example, Source


@frozen
class ImageFolder(Source):
    """Pictures and videos of a folder and its subfolders, each with a text file beside it."""

    path: Path
    """The folder; names that start with a dot are skipped."""
    prompt_suffix: str = ".txt"
    """cat.png's prompt is in cat.txt."""
    captions: Literal["whole", "lines"] = "whole"
    """Whether a text file is one prompt, or has several, one a line, of which each time one is drawn."""
    class_prompt: str | None = None
    """Prompt of pictures without a text file, such as "a photo of a {folder}"."""

    def examples(self) -> Iterator[Example]:
        """All of them, sorted by path; DataError lists those that have no prompt."""
        files = self._files()
        prompts = [self._prompts(file) for file in files]
        bare = [str(file) for file, prompt in zip(files, prompts, strict=True) if prompt is None]
        if bare:
            raise DataError(
                f"{len(bare)} of {len(files)} media have no {self.prompt_suffix} file beside them; write the "
                f'prompts, or set class_prompt = "a photo of a {{folder}}":\n{listed(bare)}'
            )
        for file, prompt in zip(files, prompts, strict=True):
            yield Example("" if prompt is None else prompt, file)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            raise DataError(
                f"{self.path} does not exist or is not a folder: `path` must name one with pictures or videos"
            )
        found = (f for f in self.path.rglob("*") if f.suffix.lower() in MEDIA and f.is_file())
        files = sorted(f for f in found if not any(p.startswith(".") for p in f.relative_to(self.path).parts))
        if not files:
            raise DataError(f"{self.path} holds no media ({', '.join(sorted(MEDIA))})")
        return files

    def _prompts(self, file: Path) -> str | tuple[str, ...] | None:
        text = file.with_suffix(self.prompt_suffix)
        try:
            said = text.read_text("utf-8-sig").strip()
        except FileNotFoundError:
            return None if self.class_prompt is None else self.class_prompt.replace("{folder}", file.parent.name)
        except UnicodeDecodeError as error:
            raise DataError(f"{text} is not UTF-8 text ({error})") from None
        except IsADirectoryError:
            raise DataError(f"{text} is a folder, where the prompt of {file.name} is looked for; rename one") from None
        if self.captions == "whole":
            return said
        if not said:
            raise DataError(f'{text} is empty: with captions = "lines" it has one or more')
        return tuple(lines(said))
