"""A large file is hashed by one process of a machine, and again only when it has changed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from corefit_backbones import folder, hashes

CONTENT = b"weights" * 100


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were hashed; all are large, and none is too new."""
    found: list[Path] = []

    def compute(file: Path) -> str:
        found.append(file)
        time.sleep(0.05)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashes, "SMALL", 0)
    monkeypatch.setattr(hashes, "SETTLED", -1)
    monkeypatch.setattr(hashes, "_computed", compute)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(CONTENT)
    return file


def expected(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_who_waits_for_another_does_not_compute(computed: list[Path], file: Path) -> None:
    with ThreadPoolExecutor(4) as ranks:
        assert {*ranks.map(hashes.digest, [file] * 8)} == {expected(file)}
    assert computed == [file]


def test_a_change_that_keeps_size_and_time_is_noticed(computed: list[Path], file: Path) -> None:
    was = file.stat()
    assert hashes.digest(file) == expected(file)
    while file.stat().st_ctime_ns == was.st_ctime_ns:  # a file system's clock has steps
        time.sleep(0.01)
        file.write_bytes(CONTENT[::-1])
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert hashes.digest(file) == expected(file) != hashlib.sha256(CONTENT).hexdigest()
    assert len(computed) == 2


def test_a_link_to_the_file_has_its_hash(computed: list[Path], file: Path) -> None:
    link = file.with_name("snapshot.safetensors")
    link.symlink_to(file)
    assert hashes.digest(file) == hashes.digest(link)
    assert computed == [file]


def test_what_was_written_just_now_is_not_kept(
    computed: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 60)
    assert hashes.digest(file) == hashes.digest(file)
    assert len(computed) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"stamp": 1}', b'{"stamp": [1, 2, 3, 4], "sha256": "x"}'])
def test_a_damaged_note_is_not_believed(computed: list[Path], file: Path, tmp_path: Path, content: bytes) -> None:
    hashes.digest(file)
    (kept,) = (tmp_path / "home").rglob("*.json")
    kept.write_bytes(content)
    assert hashes.digest(file) == expected(file)
    assert len(computed) == 2


def test_a_home_that_cannot_be_written_is_no_obstacle(computed: list[Path], file: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    assert hashes.digest(file) == hashes.digest(file) == expected(file)
    assert len(computed) == 2


def test_only_so_many_are_kept(computed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "LIMIT", 3)
    for number in range(5):
        one = tmp_path / f"{number}.safetensors"
        one.write_bytes(b"x" * number)
        hashes.digest(one)
        time.sleep(0.01)
    assert len([*(tmp_path / "home").rglob("*.json")]) == 3
    hashes.digest(tmp_path / "4.safetensors")
    assert len(computed) == 5


def test_threads_hash_large_files_of_a_folder_as_one_hashes_small_ones(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text(name)
    alone = folder.fingerprint(tmp_path, ["b", "a"])
    hashing: list[threading.Thread] = []
    plain = folder.digest
    monkeypatch.setattr(folder, "digest", lambda file: (hashing.append(threading.current_thread()), plain(file))[1])
    monkeypatch.setattr(folder, "SMALL", 0)
    assert folder.fingerprint(tmp_path, ["a", "b"]) == alone
    assert len(hashing) == 2
    assert threading.main_thread() not in hashing
