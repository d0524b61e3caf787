"""Folders, tars, saved datasets, clips and held-out prompts as the world has them."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable

from benchmarks.hostile.case import RUN, Case, Project
from benchmarks.hostile.data import Spoil, as_folder, line, spoiled

JSONL = 'source = { use = "jsonl", path = "train.jsonl" }'


def cases() -> list[Case]:
    """All of this file."""
    return [*_folders(), *_texts(), *_tars(), *_clips(), *_heldout()]


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
        return spoiled(f"folder {said}", _source(FOLDER, *more), *says, status=status)

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
        of("with a folder called .png", _captions(), as_folder("pictures/2.png"), status=(0, 2)),
        of("with a name that is not UTF-8", _captions(), _odd_name, says=(), status=(0, 2)),
        spoiled(
            "folder is empty",
            _source('use = "imagefolder", path = "empty"', lambda p: p.path("empty").mkdir()),
            "empty",
        ),
        spoiled("folder is a file", _source('use = "imagefolder", path = "mine.txt"'), "mine.txt"),
        spoiled("folder is missing", _source('use = "imagefolder", path = "nowhere"'), "nowhere"),
        spoiled(
            "folder with an odd class_prompt",
            _source(f'{FOLDER}, class_prompt = "{{folder.__class__}}"'),
            "class_prompt",
            status=(0, 2),
        ),
        spoiled(
            "folder with an unknown field",
            _source(f'{FOLDER}, class_prompt = "{{nothing}}"'),
            "class_prompt",
            status=(0, 2),
        ),
        spoiled("folder with an open brace", _source(f'{FOLDER}, class_prompt = "{{"'), "class_prompt", status=(0, 2)),
    ]


def _odd_name(project: Project) -> None:
    folder = os.fsencode(project.folder / "pictures")
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(project.path("pictures/2.png").read_bytes())
    with open(folder + b"/\xff.txt", "wb") as file:
        file.write(b"a red square")


def _texts() -> list[Case]:
    """Media are asked for by the first stage, and the text source has none; saved datasets."""
    saved = 'use = "hf_dataset", path = "saved"'
    return [
        spoiled("text source where media are needed", _source('use = "text", path = "heldout.jsonl"'), "media"),
        spoiled("text source that is a picture", _source('use = "text", path = "pictures/0.png"'), "0.png"),
        spoiled("saved dataset is missing", _source(saved), "saved"),
        spoiled("saved dataset is empty", _source(saved, lambda p: p.path("saved").mkdir()), "saved"),
        spoiled("saved dataset is nonsense", _source(saved, lambda p: p.write("saved/state.json", "x")), "saved"),
        spoiled("saved dataset lacks its arrow file", _source(saved, _hollow_dataset), "saved"),
        spoiled(
            "saved dataset has nonsense for arrow",
            _source(saved, _hollow_dataset, lambda p: p.write("saved/data-00000-of-00001.arrow", "x")),
            "saved",
        ),
    ]


def _hollow_dataset(project: Project) -> None:
    project.write(
        "saved/state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None})
    )
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    project.write("saved/dataset_info.json", json.dumps({"features": features}))


# tars


def _tar(members: dict[str, bytes] | None = None, change: Callable[[bytes], bytes] = lambda data: data) -> Spoil:
    def spoil(project: Project) -> None:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            png = project.path("pictures/0.png").read_bytes()
            usual = {
                f"{n}.{kind}": png if kind == "png" else b"a red square" for n in range(6) for kind in ("png", "txt")
            }
            for name, data in (usual if members is None else {**usual, **members}).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        project.write("data-0.tar", change(file.getvalue()))

    return spoil


def _tars() -> list[Case]:
    tar = 'use = "webdataset", path = "data-0.tar"'

    def of(said: str, *more: Spoil, says: tuple[str, ...] = ("data-0.tar",), status: tuple[int, ...] = (2,)) -> Case:
        return spoiled(f"tar {said}", _source(tar, *more), *says, status=status)

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
        spoiled(
            "tars of a pattern that matches none",
            _source('use = "webdataset", path = "no-{000..003}.tar"'),
            "no-000.tar",
        ),
        spoiled(
            "tars of a huge range", _source('use = "webdataset", path = "no-{0..99999999999}.tar"'), "no-", timeout=20
        ),
    ]


# clips


def _clips() -> list[Case]:
    """A video file among pictures: first by its name alone, then by what it plays."""

    def media(name: str, content: bytes, size: str = "[16, 16]") -> Spoil:
        def spoil(project: Project) -> None:
            project.write(f"pictures/{name}", content)
            line(f'{{"media": "pictures/{name}", "prompt": "a"}}')(project)
            project.replace("size = [16, 16]", f"size = {size}")

        return spoil

    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n"
    address = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
    return [
        spoiled("clip among pictures", media("2.mp4", b"x"), "2.mp4"),
        spoiled("clip is a local playlist", media("2.mp4", playlist), "2.mp4"),
        spoiled("clip is a remote playlist", media("2.mp4", address), "2.mp4"),
        spoiled("clip is a concat script", media("2.mkv", b"ffconcat version 1.0\nfile /etc/hostname\n"), "2.mkv"),
        spoiled("clip is empty", media("2.webm", b""), "2.webm"),
        spoiled("gif is cut", media("2.gif", b"GIF89a\x10\0\x10\0"), "2.gif"),
        spoiled("clips for a model of pictures", media("2.mp4", b"x", "[5, 16, 16]"), "size"),
    ]


def _heldout() -> list[Case]:
    file = "heldout.jsonl"
    return [
        spoiled("held-out prompts are empty", lambda p: p.write(file, ""), file, typed=RUN, again=True),
        spoiled("held-out prompts are pictures", lambda p: p.write(file, b"\x89PNG\r\n"), file, typed=RUN, again=True),
        spoiled(
            "held-out prompt has a surrogate",
            lambda p: p.append('{"prompt": "\\ud800"}\n', file),
            file,
            typed=RUN,
            again=True,
        ),
        spoiled(
            "held-out prompt is a list",
            lambda p: p.append('{"prompt": ["a", "b"]}\n', file),
            file,
            typed=RUN,
            status=(0, 2),
        ),
        spoiled(
            "held-out category is a number",
            lambda p: p.write(file, '{"prompt": "a", "category": 3}\n{"prompt": "a", "category": "x"}\n'),
            typed=RUN,
            status=(0, 2),
        ),
        spoiled(
            "held-out category has an escape sequence",
            lambda p: p.write(file, '{"prompt": "a", "category": "\\u001b[31mEVIL"}\n' * 2),
            typed=RUN,
            status=(0, 2),
            unsaid=("\x1b[31mEVIL",),
        ),
        spoiled(
            "held-out category is long",
            lambda p: p.write(file, json.dumps({"prompt": "a", "category": "c" * 5000}) + "\n"),
            typed=RUN,
            status=(0, 2),
        ),
        spoiled(
            "held-out prompt is HTML",
            lambda p: p.write(file, '{"prompt": "<script>alert(1)</script>"}\n' * 2),
            typed=RUN,
            status=(0, 2),
        ),
    ]
