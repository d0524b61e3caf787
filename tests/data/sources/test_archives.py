"""Media inside archives, and prompts in lists: webdataset tars, saved datasets, text, HY-SOAR's lines."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from PIL import Image

from corefit.data.sources import HfDataset, ImageFolder, Jsonl, Text, WebDataset, dimensions, prompt_source, view
from corefit.errors import DataError


def png(value: int, height: int = 6, width: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value,) * 3).save(file, "png")
    return file.getvalue()


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


# webdataset


def test_members_of_one_name_are_one_sample(tmp_path: Path) -> None:
    tar(tmp_path / "a-00.tar", {"x/1.png": png(1), "x/1.txt": b"one\n", "x/2.png": png(2), "x/2.txt": b"two"})
    more = {"prompt": ["three", "drei"], "aesthetic": 6.5}
    tar(tmp_path / "a-01.tar", {"3.json": json.dumps(more).encode(), "3.PNG": png(3, 10, 4)})
    for pattern in ("a-{00..01}.tar", "a-*.tar"):
        one, two, three = WebDataset(tmp_path / pattern).examples()
        assert [one.prompts, two.prompts, three.prompts] == [("one",), ("two",), ("three", "drei")]
        assert three.meta == {"aesthetic": 6.5}
        assert two.media is not None
        assert view(two.media, (6, 8)).pixels.max() == 2
        assert dimensions(three.media) == (10, 4)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": b"", "1.json": b'{"text": "x"}'}, r"a\.tar: 1: no .txt, and no 'prompt' .* has .png, .json, text"),
        ({"1.png": b"", "1.json": b"{"}, r"a\.tar: 1: its .json cannot be read"),
        ({"1.png": b"", "1.json": b"[1]", "1.txt": b"x"}, r"a\.tar: 1: its .json is a list, expected an object"),
        ({"1.png": b"", "1.json": b'{"prompt": null}'}, r"a\.tar: 1: 'prompt' of its .json is null, expected a string"),
        (
            {"1.png": b"", "1.json": b'{"prompt": []}'},
            r"a\.tar: 1: 'prompt' of its .json is \[\], expected one or more",
        ),
        ({"1.png": b"", "1.json": b'{"prompt": ["a", 1]}'}, r"a\.tar: 1: 'prompt' .* is \[\"a\", 1\], expected one or"),
        ({"1.png": b"", "1.txt": b"\xff"}, r"a\.tar: 1: its .txt is not UTF-8 text"),
        ({"1.png": b"", "1.jpg": b"", "1.txt": b"x"}, r"a\.tar: 1: has .png and .jpg"),
    ],
)
def test_malformed_samples_are_named(tmp_path: Path, members: Mapping[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(WebDataset(tar(tmp_path / "a.tar", members)).examples())


def test_tars_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    tar(tmp_path / "a-00.tar", {"1.txt": b"x"})
    with pytest.raises(DataError, match=r"a-01\.tar: no such tar file"):
        list(WebDataset(tmp_path / "a-{00..01}.tar").examples())
    (tmp_path / "b.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"b\.tar is damaged or no tar file"):
        list(WebDataset(tmp_path / "b.tar").examples())
    with pytest.raises(DataError, match="no such tar file"):
        list(WebDataset(tmp_path / "c-*.tar").examples())


def test_members_need_not_be_neighbors_and_hidden_ones_are_ignored(tmp_path: Path) -> None:
    members = {"._1.png": b"", "1.png": png(1), "2.png": png(2), "2.txt": b"two", "1.txt": "\ufeffone".encode()}
    one, two = WebDataset(tar(tmp_path / "a.tar", members)).examples()
    assert [one.prompt, two.prompt] == ["one", "two"]
    assert [view(e.media, (6, 8)).pixels.max() for e in (one, two)] == [1, 2]


def test_a_tar_that_is_not_whole_is_never_read_short(tmp_path: Path) -> None:
    """tarfile itself reads all of these as tars of 1 to 3 samples."""
    path = tar(tmp_path / "a.tar", {f"{n}.txt": bytes(600) for n in range(4)})
    whole, sample = path.read_bytes(), 3 * 512
    assert len(list(WebDataset(path).examples())) == 4
    for cut in (sample, sample + 100, 3 * sample, 4 * sample):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"a\.tar is damaged: it is cut off .* byte {cut // 512 * 512} on; fetch"):
            list(WebDataset(path).examples())
    path.write_bytes(whole[: 2 * sample] + b"\xff" * 20 + whole[2 * sample + 20 :])
    with pytest.raises(DataError, match=rf"a\.tar is damaged: .* byte {2 * sample} on"):
        list(WebDataset(path).examples())
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"a\.tar has data after its end: .* name them separately"):
        list(WebDataset(path).examples())


def test_compressed_tars_links_and_duplicate_names_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "z.tar", "w:gz") as file:
        file.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(DataError, match=r"z\.tar is damaged or no tar file: .* unpack it if it is compressed"):
        list(WebDataset(tmp_path / "z.tar").examples())
    with tarfile.open(tmp_path / "l.tar", "w") as file:
        file.addfile(tarfile.TarInfo("1.txt"))
        link = tarfile.TarInfo("2.txt")
        link.type, link.linkname = tarfile.LNKTYPE, "1.txt"
        file.addfile(link)
    with pytest.raises(DataError, match=r"l\.tar: 2\.txt is not a regular file; write the tar with copies, not links"):
        list(WebDataset(tmp_path / "l.tar").examples())
    with tarfile.open(tmp_path / "d.tar", "w") as file:
        file.addfile(tarfile.TarInfo("1.txt"))
        file.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(DataError, match=r"d\.tar: 1\.txt is in it twice"):
        list(WebDataset(tmp_path / "d.tar").examples())


def test_a_member_that_is_cut_off_is_named(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", {"1.txt": b"x", "1.png": png(1)}).read_bytes()
    (example,) = WebDataset(tmp_path / "a.tar").examples()
    (tmp_path / "a.tar").write_bytes(whole[:1600])
    with pytest.raises(DataError, match=r"1\.png is cut off"):
        view(example.media, (4, 4))


# saved datasets


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (8, 6), (n,) * 3) for n in range(3)]
    table = datasets.Dataset.from_dict(
        {"image": images, "text": ["a", "b", "c"], "captions": [["x", "y"]] * 3, "score": [1.0, 2.0, 3.0]},
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "text": datasets.Value("string"),
                "captions": datasets.Sequence(datasets.Value("string")),
                "score": datasets.Value("float32"),
            }
        ),
    )
    table.save_to_disk(tmp_path / "d")
    found = list(HfDataset(tmp_path / "d").examples())
    assert [example.prompts for example in found] == [("a",), ("b",), ("c",)]
    assert found[2].meta == {"captions": ["x", "y"], "score": 3.0}
    assert view(found[2].media, (6, 8)).pixels.max() == 2
    assert next(HfDataset(tmp_path / "d", prompt="captions", media=None).examples()).prompts == ("x", "y")
    with pytest.raises(DataError, match="no column 'prompt'; it has image, text, captions, score"):
        list(HfDataset(tmp_path / "d", prompt="prompt").examples())
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "s")
    with pytest.raises(DataError, match=r"several splits; name one: .*train"):
        list(HfDataset(tmp_path / "s").examples())
    with pytest.raises(DataError, match="not a complete dataset that save_to_disk wrote"):
        list(HfDataset(tmp_path).examples())


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"text": ["a", None]}, {"media": None}, r"row 1: 'text' is null, expected a string"),
        ({"text": [1]}, {"media": None}, r"row 0: 'text' is 1, expected a string"),
        ({"text": [["a"], []]}, {"media": None}, r"row 1: 'text' is \[\], expected one or more strings"),
        ({"text": ["a"], "image": [3]}, {}, r"column 'image' is .*int64.*, expected images"),
        (
            {"text": ["a"], "day": [date(2026, 1, 2)]},
            {"media": None},
            r"column 'day' has values of type date, .* meta = \[\]",
        ),
        ({"text": ["a"]}, {"media": None, "meta": ("score",)}, r"no column 'score'; it has text"),
    ],
)
def test_columns_of_the_wrong_type_are_named(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    pytest.importorskip("datasets").Dataset.from_dict(columns).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=message):
        list(HfDataset(tmp_path / "d", **settings).examples())


def test_missing_images_name_their_row(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "image": [None, str(tmp_path / "gone.png")], "mask": [Image.new("L", (4, 4))] * 2}
    )
    table.save_to_disk(tmp_path / "d")
    none, gone = HfDataset(tmp_path / "d").examples()
    assert none.meta == {}
    with pytest.raises(DataError, match=r"row 0: there is no 'image'; give the row one"):
        view(none.media, (4, 4))
    with pytest.raises(DataError, match=r"row 1: .*gone\.png cannot be read: No such file"):
        view(gone.media, (4, 4))
    with pytest.raises(DataError, match="column 'mask' has values of type Image"):
        list(HfDataset(tmp_path / "d", meta=("mask",)).examples())


def test_a_damaged_dataset_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets").Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    (tmp_path / "d/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"d: not a complete dataset that save_to_disk wrote \(KeyError"):
        list(HfDataset(tmp_path / "d", media=None).examples())


# prompts


def test_text_files_and_jsonl_are_told_apart_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n two \n", "utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "three"}')
    assert [e.prompt for e in prompt_source(tmp_path / "p.txt").examples()] == ["one", "two"]
    assert [e.prompt for e in prompt_source(tmp_path / "p.jsonl").examples()] == ["three"]
    (tmp_path / "u.txt").write_text("one\u2028line\x0c, still\r\ntwo\n", "utf-8", newline="")
    assert [e.prompt for e in Text(tmp_path / "u.txt").examples()] == ["one\u2028line\x0c, still", "two"]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        list(Text(tmp_path / "empty.txt").examples())
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        list(Text(tmp_path / "none.txt").examples())


def test_several_captions(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": ["one", "two"]}\n{"prompt": "three"}')
    assert [e.prompts for e in Jsonl(tmp_path / "a.jsonl").examples()] == [("one", "two"), ("three",)]
    (tmp_path / "b.jsonl").write_text('{"prompt": []}')
    with pytest.raises(DataError, match=r"b\.jsonl:1: 'prompt' is \[\], expected one or more strings"):
        list(Jsonl(tmp_path / "b.jsonl").examples())
    (tmp_path / "x.png").write_bytes(png(1))
    (tmp_path / "x.txt").write_text("a dog\n\nit runs\n")
    (example,) = ImageFolder(tmp_path, captions="lines").examples()
    assert example.prompts == ("a dog", "it runs")
    (tmp_path / "x.txt").write_text("\n \n")
    with pytest.raises(
        DataError, match=r"x\.txt is empty: with captions = \"lines\" it must have at least one caption"
    ):
        list(ImageFolder(tmp_path, captions="lines").examples())


def test_json_lines_of_hy_soar(tmp_path: Path) -> None:
    row = {"md5": "0cc1", "caption_en": "a fox", "bw": 8, "bh": 6}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0cc1.png").write_bytes(png(7))
    source = Jsonl(tmp_path / "train.jsonl", media="{md5}.png", prompt="caption_en", root=tmp_path / "images")
    (example,) = source.examples()
    assert (example.prompt, example.media) == ("a fox", tmp_path / "images/0cc1.png")
    assert example.meta == {"md5": "0cc1", "bw": 8, "bh": 6}
    (example,) = attrs.evolve(source, media="{bw}/{md5}.{bh}.png").examples()
    assert example.media == tmp_path / "images/8/0cc1.6.png"
    for media, key in (("{MD5}.png", "MD5"), ("{md5[0]}.png", "md5[0]"), ("{md5.png", "{md5.png"), ("image", "image")):
        with pytest.raises(DataError) as error:
            list(attrs.evolve(source, media=media).examples())
        assert f"train.jsonl:1: there is no {key!r}; the line has 'md5', 'caption_en'" in str(error.value)


# crops and dimensions


@pytest.mark.parametrize(
    ("source", "size", "crop"),
    [((10, 40), (5, 5), (15, 0, 25, 10)), ((40, 10), (4, 8), (0, 17.5, 10, 22.5)), ((8, 8), (8, 8), (0, 0, 8, 8))],
)
def test_the_center_crop_is_returned(source: tuple[int, int], size: tuple[int, int], crop: tuple[float, ...]) -> None:
    seen = view(np.zeros((*source, 3), np.uint8), size)
    assert (seen.source, seen.crop) == (source, crop)


def test_dimensions_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert dimensions(tmp_path / "a.jpg") == (8, 4)
    assert view(tmp_path / "a.jpg", (8, 4)).source == (8, 4)


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "behind them"])
def test_dimensions_of_a_png_are_upright_and_cost_no_decoding(tmp_path: Path, late: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png", exif=exif)
    Image.new("RGB", (8, 4)).save(tmp_path / "plain.png")
    file = (tmp_path / "a.png").read_bytes()
    start = file.index(b"eXIf") - 4
    chunk = file[start : start + 12 + int.from_bytes(file[start : start + 4], "big")]
    rest = file.replace(chunk, b"")
    end = rest.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(rest[:end] + chunk + rest[end:] if late else file)
    assert dimensions(tmp_path / "a.png") == view(tmp_path / "a.png", (8, 4)).source == (8, 4)
    for name, shape in (("plain.png", (4, 8)), ("a.png", (8, 4)))[: 1 if late else 2]:
        whole = (tmp_path / name).read_bytes()
        pixels = whole.index(b"IDAT") + 4
        (tmp_path / name).write_bytes(whole[:pixels] + b"\xff" * 8 + whole[pixels + 8 :])
        assert dimensions(tmp_path / name) == shape
        with pytest.raises(OSError, match=r"decoding error|broken|truncated|PNG"):
            view(tmp_path / name, (4, 4))
