"""Sources name what is wrong and where; pictures are decoded upright, in RGB, at the requested size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from corefit.data.sources import ImageFolder, Jsonl, listed, view
from corefit.errors import DataError
from corefit.types import Example


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def all_of(source: Jsonl | ImageFolder) -> list[Example]:
    return list(source.examples())


# jsonl


def test_jsonl_reads_media_prompt_and_other_keys_as_meta(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl", {"media": "x/1.png", "prompt": "one", "n": 1}, "", {"media": "2.png", "prompt": "two"}
    )
    first, second = all_of(Jsonl(file))
    assert (first.media, first.prompt, first.meta) == (tmp_path / "x/1.png", "one", {"n": 1})
    assert (second.media, second.prompt, second.meta) == (tmp_path / "2.png", "two", {})


def test_jsonl_other_keys_and_root(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"image": "1.png", "text": "one"}, {"image": "/abs/2.png", "text": "two"})
    found = all_of(Jsonl(file, media="image", prompt="text", root=tmp_path / "pictures"))
    assert [e.media for e in found] == [tmp_path / "pictures/1.png", Path("/abs/2.png")]


def test_jsonl_may_have_prompts_without_media(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "caf\xc3\xa9", "kind": "two"}\r\n')
    (example,) = all_of(Jsonl(file))
    assert (example.prompt, example.media, example.meta) == ("café", None, {"kind": "two"})


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        (['{"prompt": '], 1, "not JSON"),
        (['{"prompt": "a", "n": ' + "9" * 5000 + "}"], 1, "not JSON"),
        (['{"prompt": "a", "n": ' + "[" * 100_000], 1, "not JSON"),
        ([{"prompt": "a"}, "[1]"], 2, "found a list"),
        ([{"prompt": "a"}, {"promt": "b"}], 2, "no 'prompt'; the line has 'promt'"),
        ([{"prompt": "a"}, {"prompt": 3}], 2, "'prompt' is 3, expected a string"),
        ([{"prompt": "a", "media": None}], 1, "'media' is null"),
        ([{"prompt": "a"}, {"prompt": "b", "media": "b.png"}], 2, "has a 'media' but line 1 has none"),
        ([{"prompt": "a", "media": "a.png"}, {"prompt": "b"}], 2, "has no 'media' but line 1 has one"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, rows: list[Any], line: int, message: str) -> None:
    file = lines(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError) as error:
        all_of(Jsonl(file))
    assert f"{file}:{line}: " in str(error.value)
    assert message in str(error.value)


def test_jsonl_missing_empty_and_binary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl does not exist"):
        all_of(Jsonl(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="is empty"):
        all_of(Jsonl(lines(tmp_path / "e.jsonl", "", "")))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"b.jsonl:1: this is not JSON"):
        all_of(Jsonl(tmp_path / "b.jsonl"))


# imagefolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.PNG", "a/1.jpg", "a/3.webp", "c.bmp", ".hidden/4.png", "a/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("b/2", "a/1", "a/3", "c"):
        (tmp_path / f"{name}.txt").write_text(f"prompt of {name}\n")
    return tmp_path


def test_imagefolder_is_sorted_and_reads_prompts(folder: Path) -> None:
    found = all_of(ImageFolder(folder))
    assert [str(e.media.relative_to(folder)) for e in found] == ["a/1.jpg", "a/3.webp", "b/2.PNG", "c.bmp"]  # type: ignore[union-attr]
    assert [e.prompt for e in found] == ["prompt of a/1", "prompt of a/3", "prompt of b/2", "prompt of c"]


def test_imagefolder_lists_pictures_without_prompt(folder: Path) -> None:
    (folder / "a/1.txt").unlink()
    (folder / "c.txt").unlink()
    with pytest.raises(DataError, match=r"2 of 4 media have no \.txt") as error:
        all_of(ImageFolder(folder))
    assert str(folder / "a/1.jpg") in str(error.value)
    assert str(folder / "c.bmp") in str(error.value)
    assert all_of(ImageFolder(folder, class_prompt="a photo of a {folder}"))[0].prompt == "a photo of a a"


def test_imagefolder_missing_empty_and_not_text(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        all_of(ImageFolder(folder / "nowhere"))
    with pytest.raises(DataError, match="holds no media"):
        all_of(ImageFolder(tmp_path_factory.mktemp("empty")))
    (folder / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"c.txt is not UTF-8"):
        all_of(ImageFolder(folder))


def test_imagefolder_names_a_folder_in_place_of_a_prompt_file(folder: Path) -> None:
    (folder / "c.txt").unlink()
    (folder / "c.txt").mkdir()
    with pytest.raises(DataError, match=r"c\.txt is a folder, where the prompt of c.bmp is looked for; rename one"):
        all_of(ImageFolder(folder))


def test_lists_are_cut() -> None:
    assert listed(["a", "b", "c"], 2) == "  a\n  b\n  ... and 1 more"


# pictures


def picture(media: Any, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    seen = view(media, size)
    return seen.pixels, seen.enlarged


def test_a_picture_of_the_right_size_is_untouched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    same, enlarged = picture(pixels, (6, 8))
    assert (same == pixels).all()
    assert not enlarged


def test_pictures_are_resized_and_center_cropped() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 12:28] = 255
    fitted, enlarged = picture(wide, (5, 5))
    assert fitted.shape == (5, 5, 3)
    assert fitted.min() >= 250
    assert not enlarged
    assert picture(wide, (20, 20))[1]


def test_downscaling_is_antialiased() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255
    fitted, _ = picture(np.repeat(board[..., None], 3, 2).astype(np.uint8), (8, 8))
    assert abs(fitted.astype(float) - 127.5).max() < 4


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to look at it
    image.save(tmp_path / "a.png", exif=exif)
    upright, _ = picture(tmp_path / "a.png", (8, 4))
    assert upright[:4].min() == 255
    assert upright[4:].max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    name = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (4, 4), "white").convert(mode).save(name)
    pixels, _ = picture(name, (4, 4))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (4, 4, 3)
    assert pixels.min() >= 254


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert picture(tmp_path / "a.png", (4, 4))[0].min() == 255


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels, _ = picture(tmp_path / "a.png", (16, 16))
    assert abs(pixels[..., 0].astype(int).ravel() - np.arange(256)).max() <= 1


@pytest.mark.parametrize("wrong", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)])
def test_images_in_memory_must_be_uint8_rgb(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
        picture(wrong, (4, 4))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="no agreed range"):
        picture(tmp_path / "a.tiff", (4, 4))
