"""A bucket of an S3 server on this machine, for tests of what is read from stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

KEYS: Mapping[str, str] = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
BUCKET = "corefit"


@frozen
class Store:
    """A bucket of an S3 server on this machine."""

    client: Any

    def put(self, folder: Path, prefix: str) -> str:
        """Upload a folder as `aws s3 sync` does; its URL."""
        for file in (file for file in folder.rglob("*") if file.is_file()):
            self.client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(folder)}")
        return f"s3://{BUCKET}/{prefix}"

    def change(self, url: str, change: Callable[[bytes], bytes]) -> None:
        key = url.removeprefix(f"s3://{BUCKET}/")
        body = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        self.client.put_object(Bucket=BUCKET, Key=key, Body=change(body))


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty bucket, and the environment that S3 users have."""
    import boto3

    for name, value in (*KEYS.items(), ("S3_ENDPOINT_URL", endpoint)):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])
    return Store(client)
