"""Pictures, lines of JSON and their metadata as the world has them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

from benchmarks.hostile.case import PIPELINE, RUN, Case, Project

PREPARE = ("prepare", PIPELINE)
Spoil = Callable[[Project], object]


def cases() -> list[Case]:
    """All of this file."""
    return [*_pictures(), *_lines(), *_keeps()]


def spoiled(
    name: str,
    spoil: Spoil,
    *says: str,
    typed: tuple[str, ...] = PREPARE,
    status: tuple[int, ...] = (2,),
    again: bool = False,
    **rest: Any,
) -> Case:
    return Case(name=name, area="data", spoil=spoil, says=says, typed=typed, status=status, again=again, **rest)


# pictures


def _picture(content: Callable[[], bytes]) -> Spoil:
    return lambda project: project.write("pictures/2.png", content())


def _saved(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _image(mode: str, size: tuple[int, int] = (16, 16)) -> Any:
    from PIL import Image

    return Image.new(mode, size)


def _animated() -> bytes:
    frames = [_image("RGB"), _image("RGB")]
    return _saved(frames[0], "PNG", save_all=True, append_images=frames[1:])


def _declared(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _pictures() -> list[Case]:
    name = "2.png"

    def bad(said: str, content: Callable[[], bytes]) -> Case:
        return spoiled(f"picture {said}", _picture(content), name, typed=RUN, again=True)

    def any_way(said: str, content: Callable[[], bytes]) -> Case:
        return spoiled(f"picture {said}", _picture(content), name, status=(0, 2))

    return [
        bad("is empty", lambda: b""),
        bad("is text", lambda: b"no picture at all"),
        bad("is HTML", lambda: b"<html><body>404 Not Found</body></html>"),
        bad("declares 60000 x 60000", lambda: _declared(60000, 60000)),
        bad("declares 2**31 x 1", lambda: _declared(2**31 - 1, 1)),
        bad("declares 0 x 0", lambda: _declared(0, 0)),
        bad("holds less than it declares", lambda: _declared(64, 64)),
        bad("is SVG", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        bad("is a zip", lambda: b"PK\3\4" + b"\0" * 100),
        any_way("is animated", _animated),
        any_way("is CMYK", lambda: _saved(_image("CMYK"), "JPEG")),
        any_way("has 16 bits", lambda: _saved(_image("I;16"))),
        any_way("has one bit", lambda: _saved(_image("1"))),
        any_way("has a palette and transparency", lambda: _saved(_image("P"), transparency=0)),
        any_way("has floats", lambda: _saved(_image("F"), "TIFF")),
        any_way("is a JPEG called PNG", lambda: _saved(_image("RGB"), "JPEG")),
        any_way("is 1 x 1", lambda: _saved(_image("RGB", (1, 1)))),
        any_way("is 1 x 20000", lambda: _saved(_image("RGB", (1, 20000)))),
        any_way("has broken EXIF", lambda: _saved(_image("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")),
        any_way("has a broken colour profile", lambda: _saved(_image("RGB"), icc_profile=b"nonsense")),
        any_way("has 2 MB of text", lambda: _with_text()),
        spoiled("picture is cut", _cut_picture, name, typed=RUN, again=True),
        spoiled("picture is flipped", _flipped_picture, name, status=(0, 2)),
        spoiled("picture is gone", lambda p: p.remove("pictures/2.png"), name, typed=RUN, again=True),
        spoiled("picture is a folder", as_folder("pictures/2.png"), name, status=(2,)),
        spoiled("picture is a link to itself", _as_loop, name, typed=RUN, again=True),
        spoiled("picture is /dev/zero", _as_device, name),
        spoiled(
            "picture changes between survey and reading",
            lambda p: p.write("pictures/2.png", b"x" * 900),
            name,
            start="encoded",
        ),
        spoiled("all pictures are gone", lambda p: p.remove("pictures"), "png", typed=RUN, again=True),
        spoiled(
            "pictures are gone, all is encoded", lambda p: p.remove("pictures"), "png", start="encoded", status=(0, 2)
        ),
    ]


def _with_text() -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    return _saved(_image("RGB"), pnginfo=info)


def _cut_picture(project: Project) -> None:
    path = project.path("pictures/2.png")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped_picture(project: Project) -> None:
    path = project.path("pictures/2.png")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def as_folder(name: str) -> Spoil:
    def spoil(project: Project) -> None:
        project.remove(name)
        project.path(name).mkdir()

    return spoil


def _as_loop(project: Project) -> None:
    project.remove("pictures/2.png")
    project.path("pictures/2.png").symlink_to("2.png")


def _as_device(project: Project) -> None:
    project.remove("pictures/2.png")
    project.path("pictures/2.png").symlink_to("/dev/full")


# lines of train.jsonl


def line(text: str | bytes) -> Spoil:
    """Replace the third line."""

    def spoil(project: Project) -> None:
        lines = project.path("train.jsonl").read_bytes().splitlines(keepends=True)
        lines[2] = (text.encode() if isinstance(text, str) else text) + b"\n"
        project.write("train.jsonl", b"".join(lines))

    return spoil


def _with(raw: str, prompt: str = '"a red square"') -> str:
    return f'{{"media": "pictures/2.png", "prompt": {prompt}{", " + raw if raw else ""}}}'


def _all_lines(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda project: project.write("train.jsonl", change(project.path("train.jsonl").read_bytes()))


def _lines() -> list[Case]:
    file = "train.jsonl"

    def bad(said: str, text: str | bytes, *says: str) -> Case:
        return spoiled(f"line {said}", line(text), *(says or (file,)))

    def any_way(said: str, text: str | bytes) -> Case:
        return spoiled(f"line {said}", line(text), file, typed=RUN, status=(0, 2))

    return [
        spoiled("line has media of 5000 letters", line(f'{{"media": "{"m" * 5000}.png", "prompt": "a"}}'), "mmmm"),
        bad("is cut", '{"media": "pictures/2.png", "pro'),
        bad("is an array", '["pictures/2.png", "a red square"]'),
        bad("is a number", "3"),
        bad("is null", "null"),
        bad("is not UTF-8", b'{"media": "pictures/2.png", "prompt": "\xff\xfe"}'),
        bad("is 20000 deep", _with(f'"x": {"[" * 20000}{"]" * 20000}')),
        bad("has no prompt", '{"media": "pictures/2.png"}', "prompt"),
        bad("has no media", '{"prompt": "a red square"}', "media"),
        bad("has a number for a prompt", _with("", "3"), "prompt"),
        bad("has null for a prompt", _with("", "null"), "prompt"),
        bad("has an empty list for a prompt", _with("", "[]"), "prompt"),
        bad("has a number in a list of prompts", _with("", '["a", 3]'), "prompt"),
        bad("has a number for media", '{"media": 3, "prompt": "a"}', "media"),
        bad("has a list for media", '{"media": ["pictures/2.png"], "prompt": "a"}', "media"),
        bad("has NUL in media", '{"media": "pictures/\\u0000.png", "prompt": "a"}', "media"),
        bad("has a surrogate in media", '{"media": "pictures/\\ud800.png", "prompt": "a"}', "ud800"),
        spoiled(
            "line has an escape sequence in media",
            line('{"media": "\\u001b[31mEVIL.png", "prompt": "a"}'),
            "EVIL",
            unsaid=("\x1b[31mEVIL",),
        ),
        bad("has media without a suffix", '{"media": "mine", "prompt": "a"}', "mine"),
        bad("has media of an unknown suffix", '{"media": "mine.txt", "prompt": "a"}', "mine.txt"),
        bad("has media outside", '{"media": "/etc/hostname", "prompt": "a"}', "hostname"),
        bad("has a lone surrogate in its prompt", _with("", '"a \\ud83d square"')),
        any_way("has NUL in its prompt", _with("", '"a \\u0000 square"')),
        any_way("has an escape sequence in its prompt", _with("", '"\\u001b[31mEVIL"')),
        any_way("has a prompt of 100000 letters", _with("", f'"{"a " * 50000}"')),
        any_way("has an empty prompt", _with("", '""')),
        any_way("has a prompt of right-to-left text", _with("", '"\\u202e\\u05d0\\u05d1"')),
        any_way("has a key twice", _with('"prompt": "other"')),
        any_way("has NaN in metadata", _with('"rating": NaN')),
        any_way("has inf in metadata", _with('"rating": Infinity')),
        any_way("has 10**400 in metadata", _with(f'"rating": 1{"0" * 400}')),
        any_way("has 5000 digits in metadata", _with(f'"rating": {"9" * 5000}')),
        any_way("has a surrogate in metadata", _with('"note": "\\udc80"')),
        any_way("has a surrogate in a key", _with('"\\udc80": 1')),
        any_way("has 1 MB of metadata", _with(f'"note": "{"n" * 1_000_000}"')),
        any_way("has bright in metadata", _with('"bright": "the name of a reward"')),
        any_way("is there 1000 times", "\n".join([_with("")] * 1000)),
        spoiled("file has BOM", _all_lines(lambda data: b"\xef\xbb\xbf" + data), file, typed=RUN, status=(0,)),
        spoiled("file has CRLF", _all_lines(lambda data: data.replace(b"\n", b"\r\n")), file, typed=RUN, status=(0,)),
        spoiled("file is UTF-16", _all_lines(lambda data: data.decode().encode("utf-16")), file),
        spoiled("file is empty", _all_lines(lambda data: b""), file, typed=RUN, again=True),
        spoiled("file is blank lines", _all_lines(lambda data: b"\n \n\n"), file),
        spoiled("file is one JSON array", _all_lines(lambda data: b"[" + data.replace(b"\n", b",")[:-1] + b"]"), file),
        spoiled("file is a folder", as_folder(file), file),
        spoiled("file is gone", lambda p: p.remove(file), file, typed=RUN, again=True),
        spoiled("file is compressed", _all_lines(lambda data: zlib.compress(data)), file),
    ]


# keep, over metadata


def _kept(condition: str, *lines: str) -> Spoil:
    def spoil(project: Project) -> None:
        project.replace("size = [16, 16]", f"size = [16, 16]\nkeep = {json.dumps(condition)}")
        for text in lines:
            line(text)(project)

    return spoil


def _keeps() -> list[Case]:
    keep = "keep"
    either = (0, 2)
    return [
        spoiled("keep of none", _kept("rating > 99"), keep, typed=RUN, again=False),
        spoiled("keep of mixed types", _kept("rating > 2", _with('"rating": "high"')), keep),
        spoiled("keep of none of mixed types", _kept("rating == 'x'", _with('"rating": "high"')), keep),
        spoiled("keep of a missing key", _kept("rating > 2", _with("")), "rating"),
        spoiled("keep of an unknown key", _kept("ratign > 2"), "ratign"),
        spoiled("keep of a list", _kept("rating > 2", _with('"rating": [1]')), keep),
        spoiled("keep of null", _kept("rating > 2", _with('"rating": null')), keep),
        spoiled("keep of NaN", _kept("rating > 2", _with('"rating": NaN')), keep, status=either),
        spoiled("keep of none with NaN", _kept("rating > 99", _with('"rating": NaN')), keep),
        spoiled("keep of none with inf", _kept("rating < -99", _with('"rating": Infinity')), keep),
        spoiled("keep of none with 10**400", _kept("rating < -99", _with(f'"rating": 1{"0" * 400}')), keep),
        spoiled("keep with 10**400", _kept("rating > 2", _with(f'"rating": 1{"0" * 400}')), keep, status=either),
        spoiled("keep of fewer than a batch", _kept("rating == 3"), status=either, typed=RUN),
        spoiled("keep calls", _kept("rating.__class__ == 1"), keep),
        spoiled("keep is empty", _kept(""), keep),
        spoiled("keep chains", _kept("0 < rating < 4 and not rating == 3"), keep, status=either),
        spoiled("keep of a surrogate", _kept("note == 'x'", _with('"note": "\\udc80"')), keep),
    ]
