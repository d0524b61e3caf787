"""Data encoded elsewhere, in a folder or an S3 store, train to the same bytes, and damage to them is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import forks
import pytest
from conftest import Project, fill
from safetensors.torch import load_file
from stores import BUCKET

from corefit.data import mds
from corefit.pipeline import read
from corefit.run.run import run

SHARD = "part-00000/shard.00000.mds"
PLAIN = ("--set", "precision='fp32'", "--set", "stage.soar.log_every=1")


@pytest.fixture(scope="module")
def source(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline of which a run, named "source", has ended; not to be changed by tests."""
    folder = tmp_path_factory.mktemp("source")
    run(read(fill(folder, checkpoint, pictures), ["name='source'", *PLAIN[1::2]]))
    return folder


@pytest.fixture
def encoded(project: Project, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of `project`, encoded by a run of it (named "source"), moved elsewhere; no raw data remain."""
    for name in ("runs", ".corefit"):
        shutil.copytree(source / name, project.folder / name)
    root = project.folder / ".corefit" / "cache"
    (found,) = [f.parent for f in root.glob("*/done.json") if json.loads(f.read_text())["media"]]
    moved = shutil.move(found, tmp_path_factory.mktemp("encoded") / found.name)
    (project.folder / "train.jsonl").unlink()
    (project.folder / "media").unlink()
    return Path(moved)


def reading(project: Project, place: Path | str) -> None:
    """Let the pipeline read what is encoded at `place`."""
    project.swap(('source = { use = "jsonl", path = "train.jsonl" }', f'encoded = "{place}"'))


def left(project: Project, name: str) -> dict[str, bytes]:
    """The bytes of all weights of a run, without the headers of their files, which name the run."""
    files = (project.folder / "runs" / name).glob("*/model/*.safetensors")
    return {str(f.relative_to(project.folder / "runs" / name)): tensors(f.read_bytes()) for f in files}


def tensors(content: bytes) -> bytes:
    """What follows the header of a safetensors file."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_an_encoded_folder_trains_to_the_same_weights_as_its_source(project, encoded):
    reading(project, encoded)
    before = sorted(encoded.rglob("*"))
    assert project.main("run", "pipeline.toml", *PLAIN).status == 0
    assert left(project, "tiny") == left(project, "source") != {}
    assert sorted(encoded.rglob("*")) == before
    assert "8 examples, encoded before" in project.main("run", "--dry-run", "pipeline.toml", *PLAIN).out


def test_an_encoded_store_trains_to_the_same_weights_as_its_source(project, encoded, store):
    reading(project, store.put(encoded, "caches/abc"))
    assert project.main("check", "pipeline.toml").status == 0
    assert project.main("run", "pipeline.toml", *PLAIN).status == 0
    assert left(project, "tiny") == left(project, "source") != {}
    # fetched once: a local copy is used as long as it is undamaged
    (copy,) = (project.folder / ".corefit" / "cache").glob("remote-*")
    fetched = {f.name: f.stat().st_mtime_ns for f in copy.rglob("*.mds")}
    assert fetched
    assert project.main("run", "pipeline.toml", *PLAIN, "--set", "name='again'").status == 0
    assert {f.name: f.stat().st_mtime_ns for f in copy.rglob("*.mds")} == fetched
    assert left(project, "again") == left(project, "source")


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


HARM: Mapping[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped bit": (SHARD, lambda f: f.write_bytes(flip(f.read_bytes())), "its xxh64 does not match index.json"),
    "missing shard": (SHARD, lambda f: f.unlink(), "it is missing"),
    "truncated shard": (SHARD, lambda f: f.write_bytes(f.read_bytes()[:-7]), r"it has \d+ bytes instead"),
    "flipped null": ("null.safetensors", lambda f: f.write_bytes(flip(f.read_bytes())), "its sha256 is not the one"),
    "index of others": ("index.json", lambda f: f.write_text('{"version": 2, "shards": []}'), "its sha256 is not"),
    "half a manifest": ("done.json", lambda f: f.write_bytes(f.read_bytes()[:50]), "it cannot be read"),
}


@pytest.mark.parametrize("harm", HARM)
def test_damage_is_named_and_not_trained_on(project, encoded, harm):
    name, do, message = HARM[harm]
    do(encoded / name)
    reading(project, encoded)
    refused(project, name, message)


def refused(project: Project, name: str, message: str) -> None:
    import re

    ended = project.main("run", "pipeline.toml", *PLAIN)
    assert ended.status == 2
    assert re.search(rf"error: .*{re.escape(name)} .*{message}", ended.err), ended.err
    assert "Traceback" not in ended.err
    stage = project.folder / "runs" / "tiny" / "01-soar"
    assert not (stage / "metrics.jsonl").exists()
    assert not (stage / "model").exists()


@pytest.mark.parametrize("harm", ["flipped bit", "missing shard", "flipped null", "half a manifest"])
def test_damage_in_a_store_is_named_and_not_trained_on(project, encoded, store, harm):
    name, do, message = HARM[harm]
    url = store.put(encoded, "caches/bad")
    if harm == "missing shard":
        store.client.delete_object(Bucket=BUCKET, Key=f"caches/bad/{name}")
        message = "cannot be fetched"
    else:
        do(encoded / name)
        store.client.upload_file(str(encoded / name), BUCKET, f"caches/bad/{name}")
    reading(project, url)
    refused(project, name, message)


def test_a_damaged_copy_is_fetched_again(project, encoded, store):
    reading(project, store.put(encoded, "caches/abc"))
    assert project.main("run", "pipeline.toml", *PLAIN).status == 0
    (copy,) = (project.folder / ".corefit" / "cache").glob("remote-*")
    for file in (copy / SHARD, copy / "null.safetensors"):
        file.write_bytes(flip(file.read_bytes()))
    assert project.main("run", "pipeline.toml", *PLAIN, "--set", "name='again'").status == 0
    assert left(project, "again") == left(project, "source")


def test_a_store_that_cannot_be_reached_is_named(project, encoded, store, monkeypatch):
    url = store.put(encoded, "caches/abc")
    reading(project, "s3://nobody/caches/abc")
    refused(project, "s3://nobody/caches/abc/done.json", "cannot be fetched")
    reading_again = project.text.replace("s3://nobody/caches/abc", url)
    project.write(reading_again)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    refused(project, f"{url}/done.json", "cannot be fetched: EndpointConnectionError")
    project.write(reading_again.replace("s3://", "floppy://"))
    refused(project, "floppy://corefit/caches/abc/done.json", "Unsupported remote path")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.size=[32, 32]",), "was encoded with another size than this pipeline has"),
        (("backbone.max_sequence_length=12",), "was encoded with another text_length"),
    ],
    ids=["size", "text length"],
)
def test_encoded_data_must_fit(project, encoded, settings, message):
    reading(project, encoded)
    ended = project.main("run", "pipeline.toml", *PLAIN, *(w for key in settings for w in ("--set", key)))
    assert ended.status == 2
    assert message in ended.err
    assert "encode its data again" in ended.err


def test_encoded_prompts_without_media_are_refused_where_a_stage_needs_media(project, encoded):
    (prompts,) = (f.parent for f in (project.folder / ".corefit" / "cache").glob("*/done.json"))
    reading(project, prompts)
    for command in ("check", "run"):
        ended = project.main(command, "pipeline.toml")
        assert ended.status == 2
        assert "has prompts without media, and a stage needs media" in ended.err


def test_exactly_one_of_source_and_encoded_must_be_set(project):
    project.swap(("[data]\n", '[data]\nencoded = "here"\n'))
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "data: set exactly one of 'source' (raw examples) and 'encoded'" in ended.err
    project.swap(('encoded = "here"\n', ""), ('source = { use = "jsonl", path = "train.jsonl" }\n', ""))
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "data: set exactly one of 'source' (raw examples) and 'encoded'" in ended.err


def test_the_file_of_a_killed_download_is_removed(tmp_path):
    child = os.fork()
    if child == 0:
        with mds.locked(tmp_path):
            import socket

            (tmp_path / f".shard.00000.mds.{socket.gethostname()}-{os.getpid()}").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".shard*"))) == 1
    with mds.locked(tmp_path):
        assert not list(tmp_path.glob(".shard*"))


def test_two_runs_start_after_a_killed_one(project):
    """streaming's own reader leaves shared memory behind, and the next run then fails."""
    shared = Path("/dev/shm")
    before = set(shared.iterdir())
    command = ("-m", "corefit", "run", "pipeline.toml", *PLAIN)
    killed = forks.start(*command, "--set", "stage.soar.steps=100000", cwd=project.folder)
    while not (project.folder / "runs" / "tiny" / "01-soar" / "metrics.jsonl").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    runs = [forks.start(*command, "--set", f"name='{name}'", cwd=project.folder) for name in ("one", "two")]
    for each in runs:
        assert each.wait() == 0, each.communicate()[1]
    assert left(project, "one") == left(project, "two") != {}
    assert all(load_file(f) for f in (project.folder / "runs" / "one").glob("*/model/*.safetensors"))
    assert set(shared.iterdir()) <= before
