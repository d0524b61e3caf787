"""A cache is encoded once, keyed by everything that determines it, never half-written, never silently short."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from corefit.data import cache, mds, scan
from corefit.data.cache import check, exists, key, prepare
from corefit.data.dataset import Dataset, Manifest
from corefit.data.filter import Filter
from corefit.data.settings import Data
from corefit.data.sources import Jsonl
from corefit.errors import ConfigError, DataError
from corefit.types import Condition, Example, Weighted

LENGTH = 5


@attrs.define
class Toy:
    """A backbone with a mean-pooling "VAE" and a hashing "text encoder"; it counts what it encodes."""

    name: str = "toy"
    length: int = LENGTH
    prompts: list[str] = attrs.field(factory=list)
    pictures: int = 0
    batches: int = 0
    releases: int = 0
    on_encode: Callable[[int], None] = lambda n: None

    def encoding_key(self) -> Mapping[str, str]:
        return {"vae": self.name, "length": str(self.length)}

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        self.prompts += prompts
        return self._embed(prompts)

    def null(self, n: int) -> Condition:
        return self._embed([""] * n)

    def _embed(self, prompts: Sequence[str]) -> Condition:
        seeds = [int(hashlib.sha256(p.encode()).hexdigest()[:8], 16) for p in prompts]
        rows = [torch.randn(self.length, 3, generator=torch.Generator().manual_seed(s)) for s in seeds]
        mask = torch.tensor([[i < len(p) for i in range(self.length)] for p in prompts])
        return Condition({"text": torch.stack(rows).bfloat16(), "mask": mask, "size": torch.tensor(seeds) % 7})

    def encode(self, media: Tensor) -> Tensor:
        self.on_encode(self.batches)
        self.batches += 1
        self.pictures += len(media)
        assert media.dtype == torch.float32
        return torch.nn.functional.avg_pool2d(media, 4) * 2 - 1

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        return (3, size[0] // 4, size[1] // 4)

    def release(self) -> None:
        self.releases += 1


@attrs.frozen
class Memory:
    """A source in memory."""

    items: tuple[Example, ...]

    def examples(self) -> Any:
        return iter(self.items)


def image(seed: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(folder: Path, prompts: Sequence[str]) -> Data:
    rows: list[dict[str, Any]] = []
    for n, prompt in enumerate(prompts):
        Image.fromarray(image(n)).save(folder / f"{n}.png")
        rows.append({"media": f"{n}.png", "prompt": prompt, "n": n})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Data(Jsonl(folder / "train.jsonl"), size=(16, 24), encode_batch=2)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return write(tmp_path, ["a red 3", "a blue 7", "a red 3", "two 5s", "a green 1", "a red 3", "nothing"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def made(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name != cache.HASHES) if root.exists() else []


# encoding


def test_everything_is_encoded_once_and_read_back(data: Data, root: Path) -> None:
    toy, seen = Toy(), list[tuple[int, int]]()
    assert not exists(data, toy, root, media=True)
    folder = prepare(data, toy, root, media=True, progress=lambda done, total: seen.append((done, total)))
    assert sorted(toy.prompts) == sorted({"a red 3", "a blue 7", "two 5s", "a green 1", "nothing"})
    assert (toy.pictures, toy.batches, toy.releases) == (7, 4, 1)
    assert seen[-1] == (7, 7)

    dataset = Dataset.open(folder)
    batch = dataset.batch(range(7), range(7))
    assert (len(dataset), dataset.shape, dataset.has_media) == (7, (3, 4, 6), True)
    pixels = torch.stack([torch.from_numpy(image(n)).permute(2, 0, 1) for n in range(7)]).float() / 255
    assert batch.x0 is not None
    assert batch.x0.equal(Toy().encode(pixels))
    for found, expected in ((batch.cond, Toy().encode_text(batch.prompts)), (dataset.null, Toy().null(1))):
        for name, tensor in expected.tensors.items():
            assert found.tensors[name].dtype == tensor.dtype
            assert found.tensors[name].equal(tensor)
    assert batch.prompts[1] == "a blue 7"
    assert batch.meta[4] == {"n": 4}


def test_a_second_run_reads_no_picture_and_encodes_nothing(data: Data, root: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(scan, "SETTLED", -1)
    folder = prepare(data, Toy(), root, media=True)
    monkeypatch.setattr(scan, "sha256", lambda file: pytest.fail(f"{file} was read again"))
    toy = Toy(on_encode=lambda n: pytest.fail("encoded again"))
    assert prepare(data, toy, root, media=True) == folder
    assert exists(data, toy, root, media=True)
    assert (toy.prompts, toy.releases) == ([], 0)


def test_digests_of_very_new_files_are_not_remembered(data: Data, root: Path) -> None:
    prepare(data, Toy(), root, media=True)
    assert not (root / cache.HASHES).exists()


def test_prompts_can_be_encoded_without_media(data: Data, root: Path, tmp_path: Path) -> None:
    for file in tmp_path.glob("*.png"):
        file.unlink()
    toy = Toy(on_encode=lambda n: pytest.fail("encoded"))
    dataset = Dataset.open(prepare(data, toy, root, media=False))
    assert (len(dataset), dataset.shape, dataset.has_media) == (7, (3, 4, 6), False)
    assert dataset.batch([0, 0], [0, 1]).x0 is None


def test_sources_in_memory(root: Path) -> None:
    items = tuple(Example(f"p{n}", image(n), {"n": n}) for n in range(5))
    data = Data(Memory(items), size=(16, 24))
    folder = prepare(data, Toy(), root, media=True)
    other = Data(Memory((*items[:4], Example("p4", image(99), {"n": 4}))), size=(16, 24))
    assert prepare(other, Toy(), root, media=True) != folder
    assert Manifest.read(folder).enlarged == 0
    assert Manifest.read(prepare(attrs.evolve(data, size=(32, 48)), Toy(), root, media=True)).enlarged == 5


def test_the_same_input_gives_the_same_bytes(data: Data, root: Path, tmp_path: Path) -> None:
    one, two = (prepare(data, Toy(), r, media=True) for r in (root, tmp_path / "other"))
    files = [file.relative_to(one) for file in one.rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()


# buckets, captions, scores


def mixed(n: int = 12) -> Data:
    """Square, wide and tall pictures in turn, each of a single gray."""
    shapes = [(16, 16), (12, 24), (24, 12)]
    items = [Example(f"p{i}", np.full((*shapes[i % 3], 3), 10 * i, np.uint8), {"n": i}) for i in range(n)]
    return Data(Memory(tuple(items)), size=(16, 16), aspects=("1:1", "2:1", "1:2"), encode_batch=3)


class Steps(Toy):
    """A backbone that accepts multiples of 4."""

    def latent_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        if size[0] % 4 or size[1] % 4:
            raise ConfigError("multiples of 4")
        return super().latent_shape(size)


def test_pictures_of_mixed_sizes_go_to_buckets(root: Path) -> None:
    toy = Steps()
    dataset = Dataset.open(prepare(mixed(), toy, root, media=True))
    assert dataset.manifest.sizes == ((16, 16), (12, 24), (24, 12))
    assert dataset.manifest.shapes == ((3, 4, 4), (3, 3, 6), (3, 6, 3))
    assert {n: rows.tolist() for n, rows in dataset.buckets.items()} == {
        0: [0, 3, 6, 9],
        1: [1, 4, 7, 10],
        2: [2, 5, 8, 11],
    }
    assert (toy.pictures, toy.batches) == (12, 6)
    batch = dataset.batch([4, 1, 10, 4], range(4))
    assert batch.clean.shape == (4, 3, 3, 6)
    assert batch.shape == (3, 3, 6)
    assert [m["n"] for m in batch.meta] == [4, 1, 10, 4]
    assert ((batch.clean[:, 0, 0, 0] + 1) / 2 * 255).round().tolist() == [40, 10, 100, 40]
    assert dataset.view(1) == {"size": [12, 24], "source": [12, 24], "crop": [0, 0, 24, 12]}


@pytest.mark.parametrize("part", [2, 5, 512])
def test_partitions_do_not_change_what_is_read(root: Path, monkeypatch: Any, part: int) -> None:
    whole = Dataset.open(prepare(mixed(), Steps(), root / "whole", media=True))
    monkeypatch.setattr(cache, "PARTITION", part)
    parts = Dataset.open(prepare(mixed(), Steps(), root / "parts", media=True))
    assert parts.manifest.parts == -(-12 // part)
    for n in range(12):
        one, other = whole.batch([n], [0]), parts.batch([n], [0])
        assert one.clean.equal(other.clean)
        assert one.cond.tensors["text"].equal(other.cond.tensors["text"])
        assert (one.prompts, one.meta) == (other.prompts, other.meta)


def test_of_several_captions_one_is_drawn(root: Path) -> None:
    items = (Example(("one", "two", "three"), image(0)), Example("four", image(1)))
    dataset = Dataset.open(prepare(Data(Memory(items), size=(16, 24)), Toy(), root, media=True))
    batch = dataset.batch([0, 0, 0, 1], range(4), [0.0, 0.5, 0.99, 0.99])
    assert batch.prompts == ["one", "two", "three", "four"]
    for name, tensor in Toy().encode_text(batch.prompts).tensors.items():
        assert batch.cond.tensors[name].equal(tensor)
    assert dataset.batch([0], [0]).prompts == ["one"]


@attrs.frozen
class Bright:
    """The mean of all pixels; it records the sizes of the batches that it scores."""

    batches: list[int] = attrs.field(factory=list, eq=False, repr=False)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Mapping[str, Any]]) -> Tensor:
        self.batches.append(len(media))
        return media.mean(dim=tuple(range(1, media.ndim)))


def test_scores_are_metadata_by_which_examples_are_kept(root: Path) -> None:
    reward = Bright()
    data = attrs.evolve(mixed(), score=(Weighted("bright", reward),))
    folder = prepare(data, Steps(), root, media=True)
    assert sum(reward.batches) == 12
    everything = Dataset.open(folder)
    assert everything.batch([3], [0]).meta[0]["bright"] == pytest.approx(30 / 255)
    dataset = Dataset.open(folder, keep=Filter.parse("bright > 0.2 and n != 9"))
    assert {n: rows.tolist() for n, rows in dataset.buckets.items()} == {0: [6], 1: [7, 10], 2: [8, 11]}
    assert len(dataset) == 5
    assert dataset.key not in (everything.key, Dataset.open(folder, keep=Filter.parse("n > 3")).key)
    assert [column.name for column in dataset.columns] == ["bright", "n"]
    with pytest.raises(DataError, match=r"keeps none of 12 examples: n is 0 to 11"):
        Dataset.open(folder, keep=Filter.parse("n > 11"))
    with pytest.raises(DataError, match=r"'n' is already metadata of"):
        prepare(attrs.evolve(data, score=(Weighted("n", reward),)), Steps(), root, media=True)


# the key


def retouch(data: Data) -> Data:
    Image.fromarray(image(100)).save(data.source.path.parent / "0.png")  # type: ignore[attr-defined]
    return data


def recaption(data: Data) -> Data:
    path = data.source.path  # type: ignore[attr-defined]
    path.write_text(path.read_text().replace("two 5s", "two 6s"))
    return data


def reannotate(data: Data) -> Data:
    path = data.source.path  # type: ignore[attr-defined]
    path.write_text(path.read_text().replace('"n": 3', '"n": 4'))
    return data


@pytest.mark.parametrize(
    ("change", "toy", "media"),
    [
        (retouch, Toy(), True),
        (recaption, Toy(), True),
        (reannotate, Toy(), True),
        (lambda data: attrs.evolve(data, size=(16, 16)), Toy(), True),
        (lambda data: data, Toy(name="other VAE"), True),
        (lambda data: data, Toy(length=6), True),
        (lambda data: data, Toy(), False),
    ],
    ids=["media", "caption", "meta", "size", "vae", "length", "prompts alone"],
)
def test_a_change_makes_another_cache(data: Data, root: Path, change: Any, toy: Toy, media: bool) -> None:
    folder = prepare(data, Toy(), root, media=True)
    changed = change(data)
    assert not exists(changed, toy, root, media=media)
    assert prepare(changed, toy, root, media=media) != folder
    assert len(made(root)) == 2


def test_the_rate_of_clips_is_part_of_the_key(root: Path) -> None:
    clips = Memory((Example("a red sky", np.zeros((4, 16, 24, 3), np.uint8)),))
    keys = {key(Data(clips, size=(4, 16, 24), fps=fps), Toy(), root, media=True) for fps in (None, 8, 16)}
    assert len(keys) == 3


def test_a_change_that_keeps_size_and_mtime_is_noticed(
    data: Data, root: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """`cp -p`, `rsync -t` and `touch -r` leave files like this; only the ctime differs."""
    monkeypatch.setattr(scan, "SETTLED", -1)
    folder = prepare(data, Toy(), root, media=True)
    file = tmp_path / "0.png"
    was, whole = file.stat(), file.read_bytes()
    while file.stat().st_ctime_ns == was.st_ctime_ns:  # a file system's clock has steps
        time.sleep(0.01)
        file.write_bytes(whole[:-20] + bytes(255 - byte for byte in whole[-20:]))
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert key(data, Toy(), root, media=True) != Manifest.read(folder).key


def test_keys_that_do_not_change_the_cache_are_not_in_its_key(data: Data, root: Path, tmp_path: Path) -> None:
    before = key(data, Toy(), root, media=True)
    (tmp_path / "moved").mkdir()
    for file in [*tmp_path.glob("*.png"), tmp_path / "train.jsonl"]:
        shutil.copy(file, tmp_path / "moved")
    source = Jsonl(tmp_path / "moved/train.jsonl")
    moved = attrs.evolve(data, source=source, skip=3, encode_batch=5, order="independent")
    assert key(moved, Toy(), root, media=True) == before
    assert not root.exists()


# missing and unreadable media


def spoil(folder: Path) -> None:
    (folder / "1.png").unlink()
    (folder / "3.png").write_bytes(b"not a picture")
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("skip", [1, 2])
def test_all_unreadable_media_are_listed(data: Data, root: Path, tmp_path: Path, skip: int) -> None:
    spoil(tmp_path)
    toy = Toy()
    with pytest.raises(DataError, match="3 of 7 media are missing or unreadable") as error:
        prepare(attrs.evolve(data, skip=skip), toy, root, media=True)
    assert all(str(tmp_path / f"{n}.png") in str(error.value) for n in (1, 3, 4))
    assert "set skip = 3 under [data]" in str(error.value)
    assert not root.exists()
    assert toy.releases == 1


def test_up_to_skip_unreadable_media_are_left_out_and_counted(data: Data, root: Path, tmp_path: Path) -> None:
    spoil(tmp_path)
    folder = prepare(attrs.evolve(data, skip=3), Toy(), root, media=True)
    manifest = Manifest.read(folder)
    assert (manifest.count, manifest.skipped) == (4, 3)
    assert len(json.loads((folder / cache.SKIPPED).read_text())) == 3
    assert [m["n"] for m in Dataset.open(folder).batch(range(4), range(4)).meta] == [0, 2, 5, 6]
    with pytest.raises(DataError, match="3 of 7 media"):
        prepare(attrs.evolve(data, skip=2), Toy(), root, media=True)


def test_missing_media_are_found_before_any_are_decoded(data: Data, root: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 7 media .*and 0 may be skipped(.|\n)*1\.png: no such file"):
        check(data, media=True)
    assert check(data, media=False) == 7
    assert check(attrs.evolve(data, skip=1), media=True) == 7


def test_long_lists_are_cut(root: Path) -> None:
    data = Data(Memory(tuple(Example("p", Path(f"/nowhere/{n}.png")) for n in range(30))))
    with pytest.raises(DataError, match=r"/19\.png(.|\n)*and 10 more"):
        check(data, media=True)
    with pytest.raises(DataError, match="none of the 30 media can be read"):
        check(attrs.evolve(data, skip=30), media=True)


def test_examples_without_media_are_named(root: Path) -> None:
    data = Data(Memory((Example("p", image(0)), Example("bare"))))
    with pytest.raises(DataError, match=r"1 of 2 examples have no media(.|\n)*example 2: 'bare'"):
        prepare(data, Toy(), root, media=True)
    with pytest.raises(DataError, match="Memory has no examples"):
        check(Data(Memory(())), media=False)


def test_meta_that_is_not_json_is_named(root: Path) -> None:
    data = Data(Memory((Example("fine"), Example("odd", meta={"x": {1, 2}}))))
    with pytest.raises(DataError, match=r"meta of example 2 \('odd'\) is not JSON"):
        check(data, media=False)


def test_values_that_are_not_finite_are_named(data: Data, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def encode(self: Toy, media: Tensor) -> Tensor:
        x0 = torch.zeros(len(media), 3, 4, 6)
        x0[-1, 0, 0, 0] = torch.nan
        return x0

    monkeypatch.setattr(Toy, "encode", encode)
    with pytest.raises(DataError, match="encode gave NaN") as error:
        prepare(data, Toy(), root, media=True)
    assert str(tmp_path / "1.png") in str(error.value)
    assert not root.exists()


@attrs.define
class Shrinking:
    """A source that has seven examples when first read, and three later."""

    source: Any
    times: int = 0

    def examples(self) -> Any:
        self.times += 1
        return iter(list(self.source.examples())[: 7 if self.times == 1 else 3])


def test_a_source_that_changes_during_encoding_is_refused(data: Data, root: Path) -> None:
    with pytest.raises(DataError, match="7 examples, then 3"):
        prepare(attrs.evolve(data, source=Shrinking(data.source)), Toy(), root, media=True)
    assert not root.exists()


@pytest.mark.parametrize("wrong", [{"size": (0, 4)}, {"size": (4,)}, {"skip": -1}, {"encode_batch": 0}])
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Data(Memory(()), **wrong)


# killed, raced and damaged


def run(work: Callable[[], Any]) -> multiprocessing.process.BaseProcess:
    """Start `work` in a forked process, with one thread, because OpenMP's threads do not survive a fork."""

    def alone() -> None:
        torch.set_num_threads(1)
        work()

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


@pytest.mark.parametrize(("at", "parts"), [(0, 0), (1, 1), (3, 3)])
def test_complete_partitions_survive_a_kill(data: Data, root: Path, monkeypatch: Any, at: int, parts: int) -> None:
    monkeypatch.setattr(cache, "PARTITION", 2)

    def die(n: int) -> None:
        if n == at:
            os.kill(os.getpid(), signal.SIGKILL)

    process = run(lambda: prepare(data, Toy(on_encode=die), root, media=True))
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(root.glob("*.parts/part-*"))) == parts
    assert not exists(data, Toy(), root, media=True)
    toy = Toy()
    folder = prepare(data, toy, root, media=True)
    assert toy.batches == 4 - parts
    assert made(root) == [folder.name]
    assert len(Dataset.open(folder)) == 7
    whole = prepare(data, Toy(), root / "whole", media=True)
    assert contents(folder) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_kill_between_the_last_byte_and_the_rename_costs_no_encoding(
    data: Data, root: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cache.CacheBuilder, "publish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    process = run(lambda: prepare(data, Toy(), root, media=True))
    process.join(200)
    monkeypatch.undo()
    assert not exists(data, Toy(), root, media=True)
    folder = prepare(data, Toy(on_encode=lambda n: pytest.fail("encoded again")), root, media=True)
    assert made(root) == [folder.name]


def test_abandoned_caches_are_removed(data: Data, root: Path) -> None:
    for name in ("0123456789abcdef.parts", "00000000ffffffff.parts", "mine.parts"):
        (root / name).mkdir(parents=True)
        (root / name / "shard.00000.mds").write_bytes(b"half")
    for name in ("0123456789abcdef.parts", "mine.parts"):
        os.utime(root / name, (0, 0))
    folder = prepare(data, Toy(), root, media=True)
    assert made(root) == sorted(["00000000ffffffff.parts", "mine.parts", folder.name])


def test_only_one_of_two_processes_encodes(data: Data, root: Path, tmp_path: Path) -> None:
    def slow(n: int) -> None:
        time.sleep(0.2)
        (tmp_path / f"{os.getpid()}.{n}").touch()

    both = [run(lambda: prepare(data, Toy(on_encode=slow), root, media=True)) for _ in "12"]
    for process in both:
        process.join(200)
    assert [process.exitcode for process in both] == [0, 0]
    assert len({f.stem for f in tmp_path.glob("*.[0-9]")}) == 1
    assert made(root) == [prepare(data, Toy(on_encode=lambda n: pytest.fail("again")), root, media=True).name]


def test_a_folder_without_done_is_rebuilt(data: Data, root: Path) -> None:
    folder = prepare(data, Toy(), root, media=True)
    (folder / "done.json").unlink()
    with pytest.raises(DataError, match=r"holds no encoded data: there is no done\.json"):
        Dataset.open(folder)
    assert prepare(data, Toy(), root, media=True) == folder
    assert len(Dataset.open(folder)) == 7


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda f: os.truncate(f, 100)], ids=["flip", "missing", "short"])
@pytest.mark.parametrize(
    "name",
    [
        *("part-00000/shard.00000.mds", "part-00000/texts/shard.00000.mds", "part-00000/rows.jsonl"),
        *("index.json", "texts.json", "null.safetensors", "done.json"),
    ],
)
def test_damage_is_named(data: Data, root: Path, name: str, harm: Any) -> None:
    folder = prepare(data, Toy(), root, media=True)
    harm(folder / name)
    with pytest.raises(DataError, match="is damaged") as error:
        Dataset.open(folder, rebuildable=True).batch([0], [0])
    assert str(folder / name) in str(error.value)
    assert f"Delete {folder}; it is then encoded again from the source" in str(error.value)


@pytest.mark.parametrize("name", ["part-00000/shard.00000.mds", "part-00000/rows.jsonl", "index.json", "done.json"])
def test_no_message_advises_to_delete_what_cannot_be_encoded_again(data: Data, root: Path, name: str) -> None:
    folder = prepare(data, Toy(), root, media=True)
    flip(folder / name)
    with pytest.raises(DataError, match=r"is damaged: .* Copy the whole cache there again, or give its source"):
        Dataset.open(folder).batch([0], [0])
    flip(folder / name)
    mine = folder.rename(root / "mine")
    flip(mine / name)
    with pytest.raises(DataError, match="is damaged") as error:
        Dataset.open(mine, rebuildable=True).batch([0], [0])
    assert "elete" not in str(error.value), "it has not the name of a folder that corefit makes"


@pytest.mark.parametrize("place", [".", "/etc"])
def test_a_folder_without_a_cache_is_named_as_such(tmp_path: Path, monkeypatch: Any, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"holds no encoded data") as error:
        cache.check(Data(encoded=place, size=(16, 24)), media=True)  # type: ignore[arg-type]
    assert "elete" not in str(error.value)


def test_a_manifest_of_version_0_1_is_read(data: Data, root: Path) -> None:
    done = prepare(data, Toy(), root, media=True) / "done.json"
    body = json.loads(done.read_text())
    digest = body.pop("digest")
    done.write_text(json.dumps({"sha256": digest, "manifest": body}))
    assert len(Dataset.open(done.parent)) == 7
    done.write_text(json.dumps({"sha256": digest, "manifest": body | {"count": 6}}))
    with pytest.raises(DataError, match="its sha256 is not the one in it"):
        Dataset.open(done.parent)


def killed_before_publishing(data: Data, root: Path, monkeypatch: Any) -> Path:
    """Encode all partitions of a cache, but do not merge them; return their folder."""

    def killed(work: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, "PARTITION", 3)
        patched.setattr(cache.CacheBuilder, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, Toy(), root, media=True)
    (parts,) = root.glob("*.parts")
    return parts


@pytest.mark.parametrize("name", ["part.json", "rows.jsonl", "index.json", "texts/index.json"])
def test_only_a_partition_with_a_damaged_small_file_is_encoded_again(
    data: Data, root: Path, monkeypatch: Any, name: str
) -> None:
    parts = killed_before_publishing(data, root, monkeypatch)
    file = parts / "part-00001" / name
    whole, others = file.read_bytes(), {p: p.stat().st_mtime_ns for p in parts.glob("part-0000[02]/*")}
    file.write_bytes(whole.replace(b"3", b"4", 1) if b"3" in whole else whole[:-2])
    monkeypatch.setattr(cache, "PARTITION", 3)
    folder = prepare(data, Toy(), root, media=True)
    assert {p: (folder / p.relative_to(parts)).stat().st_mtime_ns for p in others} == others
    assert (folder / "part-00001" / name).read_bytes() == whole
    assert len(Dataset.open(folder)) == 7


def test_damaged_hashes_of_media_are_computed_again(data: Data, root: Path, monkeypatch: Any) -> None:
    """Otherwise one changed digit in media.json would change the key, and everything would be encoded again."""
    monkeypatch.setattr(scan, "SETTLED", -1)
    folder, file = prepare(data, Toy(), root, media=True), root / cache.HASHES
    content = json.loads(file.read_text())
    for entry in content["media"].values():
        entry[-1] = "0" * 64
    file.write_text(json.dumps(content))
    assert prepare(data, Toy(), root, media=True) == folder


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_of_a_cache_have_the_mode_that_the_umask_gives(data: Data, root: Path, umask: int) -> None:
    former = os.umask(umask)
    try:
        folder = prepare(data, Toy(), root, media=True)
    finally:
        os.umask(former)
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


def test_each_shard_is_hashed_once_when_first_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(mds, "SHARD_BYTES", 2000)
    with mds.open_writer(tmp_path / "s", {"n": "json", "raw": "bytes"}) as writer:
        for n in range(20):
            writer.append({"n": n, "raw": bytes(500)})
    shards = mds.Shards(tmp_path / "s")
    assert len(shards.shards) > 5
    assert [shards[i]["n"] for i in range(20)] == list(range(20))
    shards = mds.Shards(tmp_path / "s")
    flip(tmp_path / "s/shard.00003.mds")
    assert shards[0]["n"] == 0
    with pytest.raises(DataError, match=r"shard\.00003\.mds is damaged"):
        [shards[i] for i in range(20)]


def test_nothing_pickled_is_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="pickled"), mds.open_writer(tmp_path / "s", {"n": "pkl"}):
        pass
    with mds.open_writer(tmp_path / "t", {"n": "json"}) as writer:
        writer.append({"n": 1})
    index = tmp_path / "t/index.json"
    index.write_text(index.read_text().replace('"json"', '"pkl"'))
    with pytest.raises(DataError, match="unsafe type"):
        mds.Shards(tmp_path / "t")


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: Any) -> None:
    from streaming.base.format.mds.writer import MDSWriter

    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MDSWriter, "finish", full)
    with (
        pytest.raises(DataError, match="cannot be written: No space left"),
        mds.open_writer(tmp_path / "s", {"n": "json"}),
    ):
        pass
