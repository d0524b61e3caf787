"""Locks that go with their process, and file systems that refuse: a sentence, and no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from corefit.errors import DataError
from corefit.system import files

fcntl = pytest.importorskip("fcntl", reason="faults of flock are injected where there is one")


@pytest.fixture
def refusing(monkeypatch):
    """refusing(number): every flock fails so."""

    def refuse(number: int) -> None:
        def flock(fd: int, how: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


def test_a_lock_is_one_process_s(tmp_path):
    file = tmp_path / ".lock"
    with files.locked(file, wait=False) as mine, files.locked(file, wait=False) as other:
        assert (mine, other) == (True, False)
    with files.locked(file, wait=False) as again:
        assert again


HOLD = "import sys, time; from pathlib import Path; from corefit.system import files\n" + (
    "with files.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path):
    file = tmp_path / "a.lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"held\n"
    with files.locked(file, wait=False) as free:
        assert not free
    files.remove_stale_locks(tmp_path)
    assert file.exists()
    process.kill()
    process.wait()
    with files.locked(file, wait=False) as free:
        assert free
    files.remove_stale_locks(tmp_path)
    assert not file.exists()


def test_a_temporary_lock_leaves_no_file(tmp_path):
    with files.temporary_lock(tmp_path / "a.lock"):
        assert (tmp_path / "a.lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", sorted(files.NO_LOCKS), ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_refused(tmp_path, refusing, number):
    refusing(number)
    with pytest.raises(DataError, match=r"\.lock cannot be locked: .*put the folder on another one"):
        files.locked(tmp_path / ".lock").__enter__()


@pytest.mark.parametrize("number", sorted(files.REMEDIES), ids=errno.errorcode.get)
def test_what_a_file_system_refuses_is_said_with_the_file_and_a_remedy(tmp_path, number):
    with pytest.raises(DataError, match=r"results\.json cannot be written: .*; .+, and the same command"):
        refuse(tmp_path, OSError(number, os.strerror(number), "results.json"))
    with pytest.raises(DataError, match="run cannot be written"):
        refuse(Path("run"), OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    ],
)
def test_safetensors_says_it_in_its_own_way(tmp_path, text):
    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device.*; make room there"):
        refuse(tmp_path, SafetensorError(text))


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no such file"), SafetensorError("header"), KeyError()]
)
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)):
        refuse(tmp_path, error)


@pytest.fixture
def waited(monkeypatch) -> list[str]:
    """In order, the names of what reached the disk, and of what was renamed, after "to"."""
    done: list[str] = []

    def fsync(number: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)

    def counted(rename):
        return lambda source, target, **keys: (rename(source, target, **keys), done.append(f"to {Path(target).name}"))

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, waited):
    files.write_whole(tmp_path / "a.json", b"a")
    assert waited == [".a.json.part", "to a.json"]
    waited.clear()
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial/b").write_bytes(b"b")
    files.publish(tmp_path / "partial", tmp_path / "final")
    assert waited == ["b", "partial", "to final", tmp_path.name]


def refuse(folder: Path, error: Exception) -> None:
    with files.explain_write_errors(folder):
        raise error
