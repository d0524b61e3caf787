"""Look at a folder of pictures or clips: how many, how large, with which captions. Only headers are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.data.sources import MEDIA, ImageFolder, Jsonl, clip_shape, dimensions, is_clip, listed
from corefit.errors import DataError, counted
from corefit.types import Example, Source

LEAST = 5
"""Fewer pictures than this are refused: whatever is trained on them repeats them."""
LONGEST_RATIO = 4.0
"""Pictures that are longer than this times their shorter side would lose most of themselves by cropping."""
PROMPTS = ("prompt", "text", "caption", "prompts", "captions")
FILES = ("media", "file_name", "image", "file", "path", "filename", "video")
"""Keys under which the lines of a .jsonl file have their captions and media, the most likely first."""
SUFFIXES = (".txt", ".caption")
"""Suffixes of the files beside pictures that hold captions."""
OTHERS = frozenset({".avif", ".cr2", ".dng", ".heic", ".heif", ".jfif", ".jxl", ".nef", ".psd", ".tif", ".tiff"})
"""Suffixes of pictures that corefit does not read."""


@frozen(kw_only=True)
class Survey:
    """What a folder holds.

    source    the table of `[data] source`, with the path that was given
    sizes     (height, width) of each picture, or of each clip's frames
    captions  the captions of each, as far as it has any that is not blank
    frames    the frames of each clip and how many it has a second; empty for pictures
    notes     what a reader of the pipeline file should know of the source
    """

    source: Mapping[str, Any]
    sizes: Sequence[tuple[int, int]]
    captions: Sequence[tuple[str, ...]]
    frames: Sequence[tuple[int, float]] = ()
    notes: Sequence[str] = ()

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def noun(self) -> str:
        return "clip" if self.frames else "picture"

    @property
    def bare(self) -> int:
        """How many have no caption."""
        return sum(not texts for texts in self.captions)


def survey(path: Path, trigger: str | None) -> Survey:
    """Look at a folder, or at a .jsonl file that names pictures; DataError for what cannot be trained on.

    trigger  the word that is the prompt of pictures without a caption, which are refused without it
    """
    table, source, notes = _source(path)
    examples = list(source.examples())
    files = [_file(example) for example in examples]
    clips = _one_kind(files)
    measured = _measured(files, clip_shape if clips else dimensions)
    captions = [tuple(text for text in example.prompts if text.strip()) for example in examples]
    _refuse_without_captions(files, captions, trigger)
    sizes = [(each[0], each[1]) for each in measured]
    _refuse_few(files, clips)
    _refuse_long(files, sizes)
    return Survey(
        source=table,
        sizes=sizes,
        captions=captions,
        frames=[(each[2], each[3]) for each in measured] if clips else [],
        notes=[*notes, *_notes(path, files)],
    )


def _source(path: Path) -> tuple[Mapping[str, Any], Source, Sequence[str]]:
    """Return the table of the source that reads `path`, the source itself, and what is to be said about it."""
    if path.is_file() and path.suffix.lower() == ".jsonl":
        return _jsonl(path)
    if not path.is_dir():
        raise DataError(
            f"--from-folder {path}: no such folder; name one with pictures, or a .jsonl file that names them"
        )
    lists = [file for file in sorted(path.glob("*.jsonl")) if not file.name.startswith(".") and _keys(file)]
    beside = {suffix: _captioned(path, suffix) for suffix in SUFFIXES}
    suffix = max(SUFFIXES, key=lambda each: beside[each])
    if lists and (len(lists) > 1 or beside[suffix]):
        more = [f"{counted(beside[suffix], suffix + ' file')} beside pictures"] if beside[suffix] else []
        found = " and ".join([*(file.name for file in lists), *more])
        raise DataError(
            f"{path} has captions in {found}; name the one that counts, such as --from-folder {lists[0]}, or move the "
            "others away"
        )
    if lists:
        return _jsonl(lists[0])
    return _folder(path, suffix, beside[suffix])


def _captioned(path: Path, suffix: str) -> int:
    """Count the pictures and clips that have a file with this suffix beside them."""
    texts = {file.with_suffix("") for file in path.rglob(f"*{suffix}")}
    return sum(file.with_suffix("") in texts for file in path.rglob("*") if file.suffix.lower() in MEDIA)


def _folder(path: Path, suffix: str, captioned: int) -> tuple[Mapping[str, Any], Source, Sequence[str]]:
    keys: dict[str, Any] = {} if suffix == SUFFIXES[0] else {"prompt_suffix": suffix}
    source = ImageFolder(path, class_prompt="", **keys)
    try:
        texts = [example.prompts[0] for example in source.examples()]
    except DataError as error:
        if others := [file.name for file in sorted(path.rglob("*")) if file.suffix.lower() in OTHERS]:
            raise DataError(f"{error}; convert these to PNG or JPEG:\n{listed(others)}") from None
        raise
    several = sum("\n" in text for text in texts)
    if captioned and 2 * several > len(texts) and all(texts):
        note = 'most text files have several lines: each is a caption, and one is drawn each time; "whole" joins them'
        keys["captions"] = "lines"
        return {"use": "imagefolder", "path": path, **keys}, ImageFolder(path, **keys), [note]
    return {"use": "imagefolder", "path": path, **keys}, source, []


def _jsonl(path: Path) -> tuple[Mapping[str, Any], Source, Sequence[str]]:
    found = _keys(path)
    if found is None:
        raise DataError(
            f"{path}: its first line must be an object with a media file and a prompt, such as "
            '{"media": "1.png", "prompt": "a red bus"}'
        )
    named = {"media": found[0], "prompt": found[1]}
    keys: dict[str, Any] = {key: name for key, name in named.items() if key != name}
    return {"use": "jsonl", "path": path, **keys}, Jsonl(path, **keys), []


def _keys(file: Path) -> tuple[str, str] | None:
    """Return the keys of media and prompt in the first line of a .jsonl file; None if it lacks one of them."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            row: Any = json.loads(next((line for line in lines if line.strip()), "null"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    media, prompt = (next((key for key in keys if key in row), None) for keys in (FILES, PROMPTS))
    return (media, prompt) if media and prompt else None


def _file(example: Example) -> Path:
    if not isinstance(example.media, Path):
        raise DataError(f"{example.prompts[0]!r} has no media file, and every line needs one")
    return example.media


def _one_kind(files: Sequence[Path]) -> bool:
    """Return whether the files are clips; DataError if some are pictures."""
    clips = [file for file in files if is_clip(file)]
    if clips and len(clips) < len(files):
        raise DataError(
            f"there are {counted(len(files) - len(clips), 'picture')} and {counted(len(clips), 'clip')}, and a model "
            f"is trained on one kind; move the fewer ones into a folder of their own, such as:\n"
            f"{listed([str(file) for file in min(clips, [f for f in files if f not in {*clips}], key=len)], 5)}"
        )
    return bool(clips)


def _measured(files: Sequence[Path], measure: Callable[[Path], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return what `measure` says of each file; DataError lists those that it cannot read."""
    found, failed = list[tuple[Any, ...]](), list[str]()
    for file in files:
        try:
            found.append(measure(file))
        except DataError:  # PyAV is missing
            raise
        except FileNotFoundError:
            failed.append(f"{file}: no such file")
        except Exception as error:  # decoders raise exceptions of all kinds, and each is reported
            failed.append(f"{file}: {type(error).__name__}: {error}")
    if failed:
        raise DataError(
            f"{len(failed)} of {len(files)} media cannot be read; repair them, or remove them from the folder:\n"
            f"{listed(failed)}"
        )
    return found


def _refuse_without_captions(files: Sequence[Path], captions: Sequence[Sequence[str]], trigger: str | None) -> None:
    bare = [str(file) for file, texts in zip(files, captions, strict=True) if not texts]
    if bare and trigger is None:
        which = "none of the media has" if len(bare) == len(files) else f"{len(bare)} of {len(files)} media have"
        raise DataError(
            f"{which} {'a' if len(bare) == len(files) else 'no'} caption: write each in a text file, 1.txt beside "
            f"1.png; or give the word that stands for what is learned, and it is the prompt of media without a "
            f"caption: --trigger ohwx\n{listed(bare, 5)}"
        )


def _refuse_few(files: Sequence[Path], clips: bool) -> None:
    if len(files) < LEAST:
        raise DataError(
            f"there {'is' if len(files) == 1 else 'are'} only {counted(len(files), 'clip' if clips else 'picture')}, "
            f"which a model would learn by heart; {LEAST} is the least, and 20 or more are better"
        )


def _refuse_long(files: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> None:
    long = [
        f"{file}: {width} x {height}"
        for file, (height, width) in zip(files, sizes, strict=True)
        if max(height, width) > LONGEST_RATIO * min(height, width)
    ]
    if long:
        raise DataError(
            f"{len(long)} of {len(files)} are more than {LONGEST_RATIO:g} times as long as wide, and half of each or "
            f"more would be cropped away; cut them into parts, or remove them:\n{listed(long)}"
        )


def _notes(path: Path, files: Sequence[Path]) -> list[str]:
    """Say what may surprise: files in several folders, and pictures that are not read."""
    notes = list[str]()
    folders = Counter(file.parent for file in files)
    if len(folders) > 1:
        named = ", ".join(
            f"{folder.relative_to(path) if folder.is_relative_to(path) else folder}: {count}"
            for folder, count in sorted(folders.items())[:5]
        )
        more = f", and {len(folders) - 5} more" if len(folders) > 5 else ""
        notes.append(f"they are in {len(folders)} folders, and all are read ({named}{more})")
    root = path if path.is_dir() else path.parent
    if others := Counter(suffix for file in root.rglob("*") if (suffix := file.suffix.lower()) in OTHERS):
        named = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        notes.append(f"not read: {named}; convert them to PNG or JPEG")
    return notes
