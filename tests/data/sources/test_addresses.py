"""Raw data at addresses: the examples that files give, identified without being read, and errors with a remedy."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from corefit.data.scan import MediaHashes, find, scan
from corefit.data.settings import Data
from corefit.data.sources import Jsonl, Parquet, WebDataset, indexes, remote, view
from corefit.errors import DataError, Unreachable
from corefit.types import ArchiveMember, Example, Source, Url

HOME = "memory://bucket"


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value,) * 3).save(file, "png")
    return file.getvalue()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


@pytest.fixture
def reads(store: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of which bytes are read, in order."""
    made: list[str] = []
    cat, opened = type(store).cat_file, type(store)._open

    def cat_file(self: Any, path: str, **settings: Any) -> Any:
        made.append(path)
        return cat(self, path, **settings)

    def open_(self: Any, path: str, *args: Any, **settings: Any) -> Any:
        made.append(path)
        return opened(self, path, *args, **settings)

    monkeypatch.setattr(type(store), "cat_file", cat_file)
    monkeypatch.setattr(type(store), "_open", open_)
    return made


def lines(*rows: Mapping[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tar(members: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return made.getvalue()


def parquet(rows: list[dict[str, Any]], group: int = 2) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), made, row_group_size=group)
    return made.getvalue()


def shades(examples: list[Example], name: str = "") -> list[int]:
    return [int(view(one.extra[name] if name else one.media, (6, 8)).pixels.max()) for one in examples]


def put_jsonl(store: Any) -> Jsonl:
    rows = [{"media": f"pictures/{n}.png", "prompt": f"p{n}", "n": n} for n in range(3)]
    store.pipe({"/bucket/a.jsonl": lines(*rows), **{f"/bucket/pictures/{n}.png": png(n) for n in range(3)}})
    return Jsonl(Url(f"{HOME}/a.jsonl"))


def put_tars(store: Any) -> WebDataset:
    for shard, numbers in enumerate(((0, 1), (2,))):
        store.pipe(
            f"/bucket/a-{shard}.tar",
            tar({name: data for n in numbers for name, data in ((f"{n}.png", png(n)), (f"{n}.txt", b"p%d" % n))}),
        )
    return WebDataset(Url(f"{HOME}/a-{{0..1}}.tar"))


def put_parquet(store: Any) -> Parquet:
    rows = [{"image": {"bytes": png(n), "path": f"{n}.png"}, "text": f"p{n}", "n": n} for n in range(3)]
    store.pipe({"/bucket/data/0.parquet": parquet(rows[:2]), "/bucket/data/1.parquet": parquet(rows[2:])})
    return Parquet(Url(f"{HOME}/data"))


PUTS = (put_jsonl, put_tars, put_parquet)


@pytest.mark.parametrize("put", PUTS)
def test_examples_of_a_store(store: Any, put: Callable[[Any], Source]) -> None:
    examples = list(put(store).examples())
    assert [one.prompt for one in examples] == ["p0", "p1", "p2"]
    assert shades(examples) == [0, 1, 2]
    assert [one.meta for one in examples] == [{} if put is put_tars else {"n": n} for n in range(3)]


def key(source: Source, folder: Path) -> str:
    return scan(Data(source=source), True, MediaHashes(folder / "media.json").digest)[1]


@pytest.mark.parametrize("put", PUTS)
def test_media_are_identified_without_being_read(
    store: Any, reads: list[str], put: Callable[[Any], Source], tmp_path: Path
) -> None:
    source = put(store)
    reads.clear()
    before = key(source, tmp_path)
    assert reads
    assert not [path for path in reads if path.endswith(".png")]
    assert key(source, tmp_path) == before
    assert key(put(store), tmp_path) != before  # written anew, at another time


def test_a_change_of_one_file_is_noticed_by_the_same_source(store: Any, tmp_path: Path) -> None:
    source = put_jsonl(store)
    before = key(source, tmp_path)
    store.pipe("/bucket/pictures/1.png", png(9))
    assert key(source, tmp_path) != before


def test_an_etag_tells_contents_wherever_they_lie() -> None:
    found = [remote._version(Url(f"s3://{name}"), {"ETag": "x", "size": 3, "LastModified": name}) for name in "ab"]
    assert len({*found}) == 1
    assert len({remote._version(Url("a://b"), {"ETag": tag, "size": 3}) for tag in "xy"}) == 2
    assert remote._version(Url("a://b"), {"name": "b", "size": 3}) == ""


# webdataset


def test_captions_of_a_tar_are_read_in_passing(store: Any, reads: list[str]) -> None:
    """One opening a shard; a request for each caption would take minutes for thousands of them."""
    source = put_tars(store)
    reads.clear()
    examples = list(source.examples())
    assert reads == ["/bucket/a-0.tar", "/bucket/a-1.tar"]
    assert shades(examples) == [0, 1, 2]
    assert len(reads) == 4  # neighbors come together
    reads.clear()
    assert len(list(source.examples())) == 3
    assert reads == []
    store.pipe("/bucket/a-1.tar", tar({"7.png": png(7), "7.txt": b"seven"}))
    assert [one.prompt for one in source.examples()] == ["p0", "p1", "seven"]
    assert reads[-1] == "/bucket/a-1.tar"


def test_a_tar_of_a_store_is_read_once_on_a_machine(
    store: Any, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again only where it is another, the index is damaged, or the home cannot be written."""
    source, again = put_tars(store), WebDataset(Url(f"{HOME}/a-{{0..1}}.tar"))
    former = list(source.examples())
    reads.clear()
    found = list(again.examples())
    assert reads == []
    assert [(one.prompt, one.meta) for one in found] == [(one.prompt, one.meta) for one in former]
    assert shades(found) == [0, 1, 2]
    for file in indexes.folder().glob("*.json"):
        file.write_bytes(file.read_bytes()[:-9])
    reads.clear()
    assert len(list(WebDataset(again.path).examples())) == 3
    assert len(reads) == 2
    monkeypatch.setattr(indexes, "LIMIT", 1)
    store.pipe("/bucket/a-1.tar", tar({"7.png": png(7), "7.txt": b"\xc3\xa9"}))
    assert [one.prompt for one in WebDataset(again.path).examples()] == ["p0", "p1", "é"]
    assert len([*indexes.folder().iterdir()]) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(list(WebDataset(again.path).examples())) == 3


def test_neighbors_are_read_with_one_request(store: Any, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(200))
    store.pipe("/bucket/a", data)
    monkeypatch.setattr(remote, "NEAR", 50)
    monkeypatch.setattr(remote, "KEPT", 2)
    blocks, url = remote.Blocks(), Url(f"{HOME}/a")
    spans = [(0, 10), (10, 60), (40, 49), (190, 200), (120, 190), (0, 0)]
    reads.clear()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: blocks.read(url, "1", 3, 9), range(20))) == {data[3:9]}
    assert len(reads) == 1
    for start, end in spans:
        assert blocks.read(url, "1", start, end) == data[start:end]
    assert len(blocks.kept) == 2
    store.pipe("/bucket/a", data[::-1])
    assert blocks.read(url, "2", 190, 200) == data[::-1][190:]


def test_a_block_that_could_not_be_fetched_is_asked_for_again(store: Any) -> None:
    blocks, url = remote.Blocks(), Url(f"{HOME}/late")
    with pytest.raises(DataError, match=r"late: no such file"):
        blocks.read(url, "1", 0, 2)
    store.pipe("/bucket/late", b"abc")
    assert blocks.read(url, "1", 0, 2) == b"ab"


def test_wildcards_of_a_store(store: Any) -> None:
    put_tars(store)
    assert len(list(WebDataset(Url(f"{HOME}/a-*.tar")).examples())) == 3
    with pytest.raises(DataError, match=r"memory://bucket/b-\*\.tar: no such tar file"):
        list(WebDataset(Url(f"{HOME}/b-*.tar")).examples())


# places


def test_media_of_lines_are_relative_to_them_or_to_root_or_addresses(store: Any, tmp_path: Path) -> None:
    store.pipe({f"/bucket/{name}.png": png(n) for n, name in enumerate(("a", "x/b", "c"))})
    (tmp_path / "d.png").write_bytes(png(3))
    store.pipe("/bucket/y/a.jsonl", lines({"media": "../a.png", "prompt": ""}, {"media": "./../x/b.png", "prompt": ""}))
    assert shades(list(Jsonl(Url(f"{HOME}/y/a.jsonl")).examples())) == [0, 1]
    (tmp_path / "a.jsonl").write_bytes(
        lines({"media": f"{HOME}/c.png", "prompt": ""}, {"media": "d.png", "prompt": ""})
    )
    assert shades(list(Jsonl(tmp_path / "a.jsonl").examples())) == [2, 3]
    store.pipe("/bucket/y/b.jsonl", lines({"media": "d.png", "prompt": ""}))
    assert shades(list(Jsonl(Url(f"{HOME}/y/b.jsonl"), root=tmp_path).examples())) == [3]
    assert shades(list(Jsonl(Url((tmp_path / "a.jsonl").as_uri())).examples())) == [2, 3]


def test_missing_files_are_found_before_any_are_read(store: Any) -> None:
    source = put_jsonl(store)
    store.rm("/bucket/pictures/1.png")
    with pytest.raises(DataError, match=r"1 of 3 media .*\n  memory://bucket/pictures/1\.png: no such file\nrepair"):
        scan(Data(source=source), True, find)
    assert scan(Data(source=source, skip=1), True, find)[0] == 3
    with pytest.raises(DataError, match=r"memory://bucket/none\.jsonl: no such file$"):
        list(Jsonl(Url(f"{HOME}/none.jsonl")).examples())


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://a.org/a.jsonl?X-Amz-Signature=abc&x=1", r"a\.jsonl\?X-Amz-Signature=…&x=1; put them into"),
        ("s3://me:pass@bucket/a.jsonl", r"s3://bucket/a\.jsonl; .*AWS_ACCESS_KEY_ID"),
    ],
)
@pytest.mark.parametrize("kind", [Jsonl, Parquet, WebDataset])
def test_addresses_with_keys_are_refused(kind: Any, address: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"'path' must be an address without keys .*{said}") as refused:
        kind(Url(address))
    assert not {"abc", "pass@"} & {*str(refused.value).split("=")}


def test_protocols_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(DataError, match=r"no://a/b: no:// is no protocol that fsspec knows; s3://, gs:// and hf://"):
        remote.read(Url("no://a/b"))
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(DataError, match=r"s3://a/b: .* \(Install s3fs .*\): pip install 'corefit\[remote\]'"):
        remote.read(Url("s3://a/b"))


# errors of stores


class Status(Exception):
    status = 403


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("Forbidden"), r"may not be read with the credentials .* \(PermissionError: Forbidden\)"),
        (Status("no"), r"may not be read with the credentials"),
        (TimeoutError("slow"), r"cannot be read: TimeoutError: slow\. Check .* the same command goes on where it was"),
        (OSError("x?sig=abc"), r"cannot be read: OSError: x\?sig=…\."),
    ],
)
def test_a_store_that_does_not_answer_leaves_no_medium_out(
    store: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    from corefit.data.encode import Encoder

    source = put_jsonl(store)
    examples = list(source.examples())

    def refuse(self: Any, path: str, **settings: Any) -> bytes:
        raise error

    monkeypatch.setattr(type(store), "cat_file", refuse)
    encoder = Encoder(Data(source=source, skip=3, size=(6, 8)), None, True, [(6, 8)], [(6, 8)])  # type: ignore[arg-type]
    with pytest.raises(Unreachable, match=rf"memory://bucket/pictures/0\.png {said}"):
        encoder._decode(examples)
    assert encoder.failed == []


# parquet


def test_forms_of_media_in_a_parquet_file(store: Any, tmp_path: Path) -> None:
    store.pipe({f"/bucket/{n}.png": png(n) for n in range(5)})
    rows = [
        {
            "a": png(10 + n),
            "b": f"{n}.png",
            "c": {"bytes": None if n < 2 else png(30 + n), "path": f"{n}.png"},
            "text": ["x", "y"],
            "n": n,
        }
        for n in range(5)
    ]
    store.pipe("/bucket/a.parquet", parquet(rows))
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    for path, root in ((Url(f"{HOME}/a.parquet"), None), (tmp_path / "a.parquet", Url(HOME))):
        source = Parquet(path, media="a", extra={"b": "b", "c": "c"}, root=root)
        examples = list(source.examples())
        assert shades(examples) == [10, 11, 12, 13, 14]
        assert shades(examples, "b") == [0, 1, 2, 3, 4]
        assert shades(examples, "c") == [0, 1, 32, 33, 34]
        assert (examples[2].prompts, examples[2].meta) == (("x", "y"), {"n": 2})


def test_row_groups_are_read_when_needed_and_once(store: Any, reads: list[str]) -> None:
    rows = [{"image": png(n), "text": "x"} for n in range(20)]
    store.pipe("/bucket/a.parquet", parquet(rows, 5))
    examples = list(Parquet(Url(f"{HOME}/a.parquet")).examples())
    reads.clear()
    assert shades(examples[7:12]) == [7, 8, 9, 10, 11]
    assert len(reads) == 2
    assert shades(examples[:1]) == [0]
    assert len(reads) == 3


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"text": "x", "image": 3}, {}, r"column 'image' is int64, expected media: bytes, \{bytes, path\} or paths"),
        ({"prompt": "x"}, {"media": None}, r"has no column 'text'; it has prompt"),
        ({"text": None}, {"media": None}, r"row 0: 'text' is null, expected a string"),
        ({"text": "x", "b": b""}, {"media": None, "meta": ("b",)}, r"column 'b' has values of type binary, which JSON"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, row: Any, settings: Any, said: str) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([row]))
    with pytest.raises(DataError, match=rf"a\.parquet:? .*{said}"):
        list(Parquet(tmp_path / "a.parquet", **settings).examples())


def test_parquet_files_that_are_missing_or_damaged_are_named(tmp_path: Path, store: Any) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([{"text": "x"}])[:-3])
    store.pipe("/bucket/a.parquet", b"PAR1 no PAR1")
    for path in (tmp_path / "a.parquet", tmp_path, Url(f"{HOME}/a.parquet")):
        with pytest.raises(DataError, match=r"a\.parquet is damaged or no Parquet file"):
            list(Parquet(path).examples())
    with pytest.raises(DataError, match=r"b\.parquet does not exist: `path` must name a Parquet file"):
        list(Parquet(tmp_path / "b.parquet").examples())
    with pytest.raises(DataError, match=r"b-\*\.parquet names no Parquet files"):
        list(Parquet(tmp_path / "b-*.parquet").examples())


def test_a_row_without_media_says_so_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([{"text": "x", "image": png(1)}, {"text": "y", "image": None}]))
    one, two = Parquet(tmp_path / "a.parquet").examples()
    assert shades([one]) == [1]
    assert isinstance(two.media, ArchiveMember)
    with pytest.raises(DataError, match=r"a\.parquet: row 1, image: there is no 'image'; give the row one"):
        two.media.read()


def test_a_store_that_cannot_be_listed_is_no_list_of_missing_media(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, path: str, **settings: Any) -> Any:
        raise TimeoutError("slow")

    source = put_jsonl(store)
    monkeypatch.setattr(type(store), "ls", refuse)
    with pytest.raises(Unreachable, match=r"memory://bucket/pictures/0\.png cannot be read: TimeoutError"):
        scan(Data(source=source, skip=2), True, find)


def test_files_may_be_read_where_they_may_not_be_listed(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, path: str, **settings: Any) -> Any:
        raise PermissionError("ListBucket")

    source = put_jsonl(store)
    monkeypatch.setattr(type(store), "ls", refuse)
    assert scan(Data(source=source), True, find)[0] == 3
    store.rm_file("/bucket/pictures/2.png")
    with pytest.raises(DataError, match=r"pictures/2\.png: no such file"):
        scan(Data(source=source), True, find)
