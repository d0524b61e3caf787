"""Media, prompts and metadata as the world has them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

from benchmarks.hostile.case import PIPELINE, RUN, Case, Project

PREPARE = ("prepare", PIPELINE)
JSONL = 'source = { use = "jsonl", path = "train.jsonl" }'
Spoil = Callable[[Project], Any]


def cases() -> list[Case]:
    """All of this area."""
    return [*_pictures(), *_lines(), *_keeps(), *_folders(), *_texts(), *_tars(), *_clips(), *_heldout()]


def _case(
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
        return _case(f"picture {said}", _picture(content), name, typed=RUN, again=True)

    def any_way(said: str, content: Callable[[], bytes]) -> Case:
        return _case(f"picture {said}", _picture(content), name, status=(0, 2))

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
        _case("picture is cut", _cut_picture, name, typed=RUN, again=True),
        _case("picture is flipped", _flipped_picture, name, status=(0, 2)),
        _case("picture is gone", lambda p: p.remove("pictures/2.png"), name, typed=RUN, again=True),
        _case("picture is a folder", _as_folder("pictures/2.png"), name, status=(2,)),
        _case("picture is a link to itself", _as_loop, name, typed=RUN, again=True),
        _case("picture is /dev/zero", _as_device, name),
        _case("picture changes between survey and reading", lambda p: p.write("pictures/2.png", b"x" * 900), name, start="encoded"),
        _case("all pictures are gone", lambda p: p.remove("pictures"), "png", typed=RUN, again=True),
        _case("pictures are gone, all is encoded", lambda p: p.remove("pictures"), "png", start="encoded", status=(0, 2)),
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


def _as_folder(name: str) -> Spoil:
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


def _line(text: str | bytes) -> Spoil:
    """In place of the third line."""

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
        return _case(f"line {said}", _line(text), *(says or (file,)))

    def any_way(said: str, text: str | bytes) -> Case:
        return _case(f"line {said}", _line(text), file, typed=RUN, status=(0, 2))

    return [
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
        bad("has media of 5000 letters", f'{{"media": "{"m" * 5000}.png", "prompt": "a"}}'),
        bad("has a surrogate in media", '{"media": "pictures/\\ud800.png", "prompt": "a"}', "ud800"),
        _case("line has an escape sequence in media", _line('{"media": "\\u001b[31mEVIL.png", "prompt": "a"}'), "EVIL", unsaid=("\x1b[31mEVIL",)),
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
        _case("file has BOM", _all_lines(lambda data: b"\xef\xbb\xbf" + data), file, typed=RUN, status=(0,)),
        _case("file has CRLF", _all_lines(lambda data: data.replace(b"\n", b"\r\n")), file, typed=RUN, status=(0,)),
        _case("file is UTF-16", _all_lines(lambda data: data.decode().encode("utf-16")), file),
        _case("file is empty", _all_lines(lambda data: b""), file, typed=RUN, again=True),
        _case("file is blank lines", _all_lines(lambda data: b"\n \n\n"), file),
        _case("file is one JSON array", _all_lines(lambda data: b"[" + data.replace(b"\n", b",")[:-1] + b"]"), file),
        _case("file is a folder", _as_folder(file), file),
        _case("file is gone", lambda p: p.remove(file), file, typed=RUN, again=True),
        _case("file is compressed", _all_lines(lambda data: zlib.compress(data)), file),
    ]


# keep, over metadata


def _kept(condition: str, *lines: str) -> Spoil:
    def spoil(project: Project) -> None:
        project.replace("size = [16, 16]", f"size = [16, 16]\nkeep = {json.dumps(condition)}")
        for line in lines:
            _line(line)(project)

    return spoil


def _keeps() -> list[Case]:
    keep = "keep"
    either = (0, 2)
    return [
        _case("keep of none", _kept("rating > 99"), keep, typed=RUN, again=False),
        _case("keep of mixed types", _kept("rating > 2", _with('"rating": "high"')), keep),
        _case("keep of none of mixed types", _kept("rating == 'x'", _with('"rating": "high"')), keep),
        _case("keep of a missing key", _kept("rating > 2", _with("")), "rating"),
        _case("keep of an unknown key", _kept("ratign > 2"), "ratign"),
        _case("keep of a list", _kept("rating > 2", _with('"rating": [1]')), keep),
        _case("keep of null", _kept("rating > 2", _with('"rating": null')), keep),
        _case("keep of NaN", _kept("rating > 2", _with('"rating": NaN')), keep, status=either),
        _case("keep of none with NaN", _kept("rating > 99", _with('"rating": NaN')), keep),
        _case("keep of none with inf", _kept("rating < -99", _with('"rating": Infinity')), keep),
        _case("keep of none with 10**400", _kept("rating < -99", _with(f'"rating": 1{"0" * 400}')), keep),
        _case("keep with 10**400", _kept("rating > 2", _with(f'"rating": 1{"0" * 400}')), keep, status=either),
        _case("keep of fewer than a batch", _kept("rating == 3"), status=either, typed=RUN),
        _case("keep calls", _kept("rating.__class__ == 1"), keep),
        _case("keep is empty", _kept(""), keep),
        _case("keep chains", _kept("0 < rating < 4 and not rating == 3"), keep, status=either),
        _case("keep of a surrogate", _kept("note == 'x'", _with('"note": "\\udc80"')), keep),
    ]


# other sources


def _source(toml: str, *more: Spoil) -> Spoil:
    def spoil(project: Project) -> None:
        project.replace(JSONL, f"source = {{ {toml} }}")
        for one in more:
            one(project)

    return spoil


def _captions(**captions: bytes | None) -> Spoil:
    """pictures/0.txt and so on."""

    def spoil(project: Project) -> None:
        for number in range(6):
            content = captions.get(f"c{number}", b"a red square")
            if content is not None:
                project.write(f"pictures/{number}.txt", content)

    return spoil


FOLDER = 'use = "imagefolder", path = "pictures"'


def _folders() -> list[Case]:
    def of(said: str, *more: Spoil, says: tuple[str, ...] = ("2.",), status: tuple[int, ...] = (2,)) -> Case:
        return _case(f"folder {said}", _source(FOLDER, *more), *says, status=status)

    def caption_folder(project: Project) -> None:
        (project.folder / "pictures" / "2.txt").mkdir()

    def loop(project: Project) -> None:
        (project.folder / "pictures" / "loop").symlink_to(".", target_is_directory=True)

    return [
        of("with captions", _captions(), status=(0,)),
        of("without a caption", _captions(c2=None)),
        of("without captions", says=("txt",)),
        of("with a folder for a caption", _captions(c2=None), caption_folder),
        of("with a caption that is not UTF-8", _captions(c2=b"\xff\xfe")),
        of("with an empty caption", _captions(c2=b""), status=(0, 2)),
        of("with a caption of NUL", _captions(c2=b"\0"), status=(0, 2)),
        of("with a BOM in a caption", _captions(c2=b"\xef\xbb\xbfa red square"), status=(0,)),
        of("with a link to itself", _captions(), loop, status=(0, 2)),
        of("with a text called .png", _captions(), lambda p: p.write("pictures/2.png", "text")),
        of("with a folder called .png", _captions(), _as_folder("pictures/2.png"), status=(0, 2)),
        of("with a name that is not UTF-8", _captions(), _odd_name, says=(), status=(0, 2)),
        _case("folder is empty", _source('use = "imagefolder", path = "empty"', lambda p: p.path("empty").mkdir()), "empty"),
        _case("folder is a file", _source('use = "imagefolder", path = "mine.txt"'), "mine.txt"),
        _case("folder is missing", _source('use = "imagefolder", path = "nowhere"'), "nowhere"),
        _case("folder with an odd class_prompt", _source(f'{FOLDER}, class_prompt = "{{folder.__class__}}"'), "class_prompt", status=(0, 2)),
        _case("folder with an unknown field", _source(f'{FOLDER}, class_prompt = "{{nothing}}"'), "class_prompt", status=(0, 2)),
        _case("folder with an open brace", _source(f'{FOLDER}, class_prompt = "{{"'), "class_prompt", status=(0, 2)),
    ]


def _odd_name(project: Project) -> None:
    import os

    folder = os.fsencode(project.folder / "pictures")
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(project.path("pictures/2.png").read_bytes())
    with open(folder + b"/\xff.txt", "wb") as file:
        file.write(b"a red square")


def _texts() -> list[Case]:
    """Media are asked for by the first stage, and the text source has none; saved datasets."""
    saved = 'use = "hf_dataset", path = "saved"'
    return [
        _case("text source where media are needed", _source('use = "text", path = "heldout.jsonl"'), "media"),
        _case("text source that is a picture", _source('use = "text", path = "pictures/0.png"'), "0.png"),
        _case("saved dataset is missing", _source(saved), "saved"),
        _case("saved dataset is empty", _source(saved, lambda p: p.path("saved").mkdir()), "saved"),
        _case("saved dataset is nonsense", _source(saved, lambda p: p.write("saved/state.json", "x")), "saved"),
        _case("saved dataset lacks its arrow file", _source(saved, _hollow_dataset), "saved"),
        _case("saved dataset has nonsense for arrow", _source(saved, _hollow_dataset, lambda p: p.write("saved/data-00000-of-00001.arrow", "x")), "saved"),
    ]


def _hollow_dataset(project: Project) -> None:
    project.write("saved/state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}))
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    project.write("saved/dataset_info.json", json.dumps({"features": features}))


# tars


def _tar(members: dict[str, bytes] | None = None, change: Callable[[bytes], bytes] = lambda data: data) -> Spoil:
    def spoil(project: Project) -> None:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            png = project.path("pictures/0.png").read_bytes()
            usual = {f"{n}.{kind}": png if kind == "png" else b"a red square" for n in range(6) for kind in ("png", "txt")}
            for name, data in (usual if members is None else {**usual, **members}).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        project.write("data-0.tar", change(file.getvalue()))

    return spoil


def _tars() -> list[Case]:
    tar = 'use = "webdataset", path = "data-0.tar"'

    def of(said: str, *more: Spoil, says: tuple[str, ...] = ("data-0.tar",), status: tuple[int, ...] = (2,)) -> Case:
        return _case(f"tar {said}", _source(tar, *more), *says, status=status)

    return [
        of("is whole", _tar(), status=(0,)),
        of("is missing"),
        of("is empty", lambda p: p.write("data-0.tar", b"")),
        of("is text", lambda p: p.write("data-0.tar", "no tar")),
        of("is cut", _tar(change=lambda data: data[:9000])),
        of("is cut in a header", _tar(change=lambda data: data[:700])),
        of("has a flipped header", _tar(change=lambda data: data[:2050] + b"\xff" + data[2051:])),
        of("is compressed", _tar(change=lambda data: zlib.compress(data))),
        of("climbs out", _tar({"../../outside/evil.png": b"x", "../../outside/evil.txt": b"x"}), status=(2,)),
        of("has absolute names", _tar({"/tmp/evil.png": b"x", "/tmp/evil.txt": b"x"}), status=(2,)),
        of("has JSON that is an array", _tar({"6.png": b"", "6.json": b"[1]"})),
        of("has JSON of NaN", _tar({"0.json": b'{"x": NaN}'}), status=(0, 2)),
        of("has a picture without text", _tar({"6.png": b"x"})),
        of("has text without a picture", _tar({"6.txt": b"x"}), says=("example",)),
        of("has two pictures of one name", _tar({"0.jpg": b"x"})),
        of("has a text that is not UTF-8", _tar({"0.txt": b"\xff"})),
        of("is joined of two", _tar(change=lambda data: data + data)),
        _case("tars of a pattern that matches none", _source('use = "webdataset", path = "no-{000..003}.tar"'), "no-000.tar"),
        _case("tars of a huge range", _source('use = "webdataset", path = "no-{0..99999999999}.tar"'), "no-", timeout=20),
    ]


# clips


def _clips() -> list[Case]:
    """A video file among pictures: first by its name alone, then by what it plays."""

    def media(name: str, content: bytes, size: str = "[16, 16]") -> Spoil:
        def spoil(project: Project) -> None:
            project.write(f"pictures/{name}", content)
            _line(f'{{"media": "pictures/{name}", "prompt": "a"}}')(project)
            project.replace("size = [16, 16]", f"size = {size}")

        return spoil

    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n"
    address = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
    return [
        _case("clip among pictures", media("2.mp4", b"x"), "2.mp4"),
        _case("clip is a local playlist", media("2.mp4", playlist), "2.mp4"),
        _case("clip is a remote playlist", media("2.mp4", address), "2.mp4"),
        _case("clip is a concat script", media("2.mkv", b"ffconcat version 1.0\nfile /etc/hostname\n"), "2.mkv"),
        _case("clip is empty", media("2.webm", b""), "2.webm"),
        _case("gif is cut", media("2.gif", b"GIF89a\x10\0\x10\0"), "2.gif"),
        _case("clips for a model of pictures", media("2.mp4", b"x", "[5, 16, 16]"), "size"),
    ]


def _heldout() -> list[Case]:
    file = "heldout.jsonl"
    return [
        _case("held-out prompts are empty", lambda p: p.write(file, ""), file, typed=RUN, again=True),
        _case("held-out prompts are pictures", lambda p: p.write(file, b"\x89PNG\r\n"), file, typed=RUN, again=True),
        _case("held-out prompt has a surrogate", lambda p: p.append('{"prompt": "\\ud800"}\n', file), file, typed=RUN, again=True),
        _case("held-out prompt is a list", lambda p: p.append('{"prompt": ["a", "b"]}\n', file), file, typed=RUN, status=(0, 2)),
        _case("held-out category is a number", lambda p: p.write(file, '{"prompt": "a", "category": 3}\n{"prompt": "a", "category": "x"}\n'), typed=RUN, status=(0, 2)),
        _case("held-out category has an escape sequence", lambda p: p.write(file, '{"prompt": "a", "category": "\\u001b[31mEVIL"}\n' * 2), typed=RUN, status=(0, 2), unsaid=("\x1b[31mEVIL",)),
        _case("held-out category is long", lambda p: p.write(file, json.dumps({"prompt": "a", "category": "c" * 5000}) + "\n"), typed=RUN, status=(0, 2)),
        _case("held-out prompt is HTML", lambda p: p.write(file, '{"prompt": "<script>alert(1)</script>"}\n' * 2), typed=RUN, status=(0, 2)),
    ]
