"""Media inside archives, and prompts in lists: webdataset tars, saved datasets, text, HY-SOAR's lines."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corefit.errors import DataError
from corefit.sources import HfDataset, ImageFolder, Jsonl, Text, WebDataset, dimensions, prompts, view


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
    ("members", "says"),
    [
        ({"1.png": b"", "1.json": b"{}"}, r"a\.tar: 1: no .txt, and no 'prompt'"),
        ({"1.png": b"", "1.json": b"{"}, r"a\.tar: 1: its .txt or .json cannot be read"),
        ({"1.png": b"", "1.txt": b"\xff"}, r"a\.tar: 1: its .txt or .json cannot be read"),
        ({"1.png": b"", "1.jpg": b"", "1.txt": b"x"}, r"a\.tar: 1: has .png and .jpg"),
    ],
)
def test_samples_that_are_none_are_named(tmp_path: Path, members: Mapping[str, bytes], says: str) -> None:
    with pytest.raises(DataError, match=says):
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
    with pytest.raises(DataError, match="no dataset that save_to_disk wrote"):
        list(HfDataset(tmp_path).examples())


# prompts


def test_text_files_and_jsonl_are_told_apart_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n two \n", "utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "three"}')
    assert [e.prompt for e in prompts(tmp_path / "p.txt").examples()] == ["one", "two"]
    assert [e.prompt for e in prompts(tmp_path / "p.jsonl").examples()] == ["three"]
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


def test_lines_as_hy_soar_has_them(tmp_path: Path) -> None:
    row = {"md5": "0cc1", "caption_en": "a fox", "bw": 8, "bh": 6}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0cc1.png").write_bytes(png(7))
    source = Jsonl(tmp_path / "train.jsonl", media="{md5}.png", prompt="caption_en", root=tmp_path / "images")
    (example,) = source.examples()
    assert (example.prompt, example.media) == ("a fox", tmp_path / "images/0cc1.png")
    assert example.meta == {"md5": "0cc1", "bw": 8, "bh": 6}


# what is kept of a picture


@pytest.mark.parametrize(
    ("source", "size", "crop"),
    [((10, 40), (5, 5), (15, 0, 25, 10)), ((40, 10), (4, 8), (0, 17.5, 10, 22.5)), ((8, 8), (8, 8), (0, 0, 8, 8))],
)
def test_the_middle_is_kept_and_said(source: tuple[int, int], size: tuple[int, int], crop: tuple[float, ...]) -> None:
    seen = view(np.zeros((*source, 3), np.uint8), size)
    assert (seen.source, seen.crop) == (source, crop)


def test_dimensions_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert dimensions(tmp_path / "a.jpg") == (8, 4)
    assert view(tmp_path / "a.jpg", (8, 4)).source == (8, 4)
