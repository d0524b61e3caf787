"""Raw data in an S3 store are encoded to the same bytes as files, and what goes wrong on the way is named."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
from stores import BUCKET

from corefit.data import cache
from corefit.data.sources import remote
from corefit.errors import Unreachable

pytest.importorskip("s3fs", reason="pip install 'corefit[remote]'")


def reading(project: Any, source: str) -> None:
    project.swap(('source = { use = "jsonl", path = "train.jsonl" }', f"source = {source}"))


def upload(project: Any, store: Any) -> str:
    """Put the raw data of a project into the store; their address."""
    store.client.upload_file(str(project.folder / "train.jsonl"), BUCKET, "raw/train.jsonl")
    return store.put(project.folder / "media", "raw/media").removesuffix("/media")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Connections are those of this test's environment."""
    remote._made.cache_clear()
    fsspec.filesystem("memory").store.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def encoded(project: Any) -> Mapping[str, bytes]:
    """What the caches of a project hold of examples."""
    root = project.folder / ".corefit" / "cache"
    return {str(file.relative_to(root).parts[1:]): file.read_bytes() for file in root.rglob("*.mds")}


def test_raw_data_in_a_bucket_are_encoded_as_files_are(project, store, monkeypatch):
    assert project.main("prepare", "pipeline.toml").status == 0
    local = encoded(project)
    cache_folder = project.folder / ".corefit"
    cache_folder.rename(project.folder / "former")
    reading(project, f'{{ use = "jsonl", path = "{upload(project, store)}/train.jsonl" }}')
    assert project.main("check", "pipeline.toml").status == 0
    assert project.main("prepare", "pipeline.toml").status == 0
    assert encoded(project) == local != {}
    monkeypatch.setattr(remote, "read", lambda *args: pytest.fail("media were read again"))
    assert project.main("prepare", "pipeline.toml").status == 0


def test_the_same_bytes_written_again_keep_the_cache(project, store):
    url = upload(project, store)
    reading(project, f'{{ use = "jsonl", path = "{url}/train.jsonl" }}')
    assert project.main("prepare", "pipeline.toml").status == 0
    made = {*(project.folder / ".corefit" / "cache").iterdir()}
    upload(project, store)
    assert project.main("prepare", "pipeline.toml").status == 0
    assert {*(project.folder / ".corefit" / "cache").iterdir()} == made


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (f"s3://{BUCKET}/none.jsonl", r"data: s3://corefit/none\.jsonl: no such file"),
        ("s3://corefit-none/a.jsonl", r"s3://corefit-none/a\.jsonl: no such file \(.*bucket does not exist\)"),
        ("s3://me:pass@b/a.jsonl", r"data\.source\.path: must be an address without keys and passwords"),
    ],
)
def test_what_is_wrong_with_an_address_is_said_by_check(project, store, path, said):
    reading(project, f'{{ use = "jsonl", path = "{path}" }}')
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert re.search(said, " ".join(ended.err.split())), ended.err
    assert "pass@" not in ended.err


def test_missing_credentials_are_named(project, store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    reading(project, f'{{ use = "jsonl", path = "s3://{BUCKET}/a.jsonl" }}')
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "may not be read with the credentials of this environment (NoCredentialsError" in " ".join(ended.err.split())
    assert "AWS_PROFILE" in ended.err


def test_a_run_goes_on_after_the_network_was_gone(project, monkeypatch):
    """Partitions that were encoded are kept, and no medium counts as unreadable."""
    memory = fsspec.filesystem("memory")
    for file in [project.folder / "train.jsonl", *(project.folder / "media").iterdir()]:
        memory.pipe(f"/raw/{file.relative_to(project.folder)}", file.read_bytes())
    reading(project, '{ use = "jsonl", path = "memory://raw/train.jsonl" }\nskip = 8')
    monkeypatch.setattr(cache, "PARTITION", 2)
    read, calls = remote.read, list[str]()

    def fail(url: Any, *args: Any) -> bytes:
        calls.append(url)
        if len(calls) == 5:
            raise Unreachable(f"{url} cannot be read")
        return read(url, *args)

    monkeypatch.setattr(remote, "read", fail)
    ended = project.main("prepare", "pipeline.toml")
    assert (ended.status, "cannot be read" in ended.err) == (2, True)
    calls[:] = [""] * 5
    assert project.main("prepare", "pipeline.toml").status == 0
    assert len(calls) == 5 + 8 - 4
    manifests = [json.loads(file.read_text()) for file in Path(project.folder).glob(".corefit/cache/*/done.json")]
    assert [(each["count"], each["skipped"]) for each in manifests if each["media"]] == [(8, 0)]
