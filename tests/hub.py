"""A stand-in of the hub: the part of its HTTP interface by which huggingface_hub creates repositories and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from attrs import define, field

WRITES, READS = "may-write-0123456789", "may-read-0123456789"
"""Tokens."""
USER = "me"


@define
class Repo:
    """Branches of one repository: name -> (commit, files)."""

    private: bool
    branches: dict[str, tuple[str, dict[str, bytes]]] = field(factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        listing = json.dumps([branch, self.branches.get(branch, ("",))[0], sorted(files)])
        self.branches[branch] = hashlib.sha1(listing.encode()).hexdigest(), files
        return self.branches[branch][0]


@define(eq=False)
class Hub:
    """What the stand-in holds, and what it was asked.

    puts    the hashes of the large files that were sent to it, in order
    gets    the names of the files that were fetched from it, in order
    on_put  is called before a large file is stored, with its number; an exception refuses the file
    """

    url: str = ""
    repos: dict[str, Repo] = field(factory=dict)
    large: dict[str, bytes] = field(factory=dict)
    puts: list[str] = field(factory=list)
    gets: list[str] = field(factory=list)
    commits: int = 0
    on_put: Callable[[int], None] = lambda number: None
    lock: Any = field(factory=threading.Lock)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The content of a branch, without what the hub itself puts there."""
        return {name: data for name, data in self.repos[repo].branches[branch][1].items() if name != ".gitattributes"}

    def create(self, name: str, private: bool = True, **files: bytes) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"", **files})
        return repo


class Refused(Exception):
    """Raised with a status and a text."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: Any

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        body = self._body()
        try:
            status, headers, data = self._route(unquote(urlsplit(self.path).path), body)
        except Refused as refused:
            status, text = refused.args
            headers, data = {"X-Error-Message": text}, json.dumps({"error": text}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/large/"):
            self._put(path.removeprefix("/large/"), body)
            return 200, {}, b""
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITES, READS):
            raise Refused(401, "Invalid username or password.")
        if token == READS and self.command in ("POST", "PUT"):
            raise Refused(403, "You have read access but not the required permissions for this operation")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if "/resolve/" in path:
            return self._resolve(path)
        return self._api(path.removeprefix("/api/models/").split("/"), body)

    def _create(self, asked: Any) -> tuple[int, dict[str, str], bytes]:
        name = f"{asked['organization'] or USER}/{asked['name']}"
        known = name in self.hub.repos
        if not known:
            # huggingface_hub before 2 sends "private", later ones "visibility"
            self.hub.create(name, asked.get("private", False) or asked.get("visibility") == "private")
        return _json({"url": f"{self.hub.url}/{name}", "error": "exists" if known else None}, 409 if known else 200)

    def _batch(self, asked: Any) -> tuple[int, dict[str, str], bytes]:
        objects = [dict(each) for each in asked["objects"]]
        for each in objects:
            if each["oid"] not in self.hub.large:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}
        return _json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> None:
        with self.hub.lock:
            self.hub.on_put(len(self.hub.puts))
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.puts.append(oid)
            self.hub.large[oid] = body

    def _resolve(self, path: str) -> tuple[int, dict[str, str], bytes]:
        repo, _, rest = path.strip("/").partition("/resolve/")
        branch, _, name = rest.partition("/")
        commit, files = self._branch(repo, branch)
        if name not in files:
            status, headers, data = _json({"error": "Entry not found"}, 404)
            return status, {**headers, "X-Error-Code": "EntryNotFound"}, data
        if self.command == "GET":
            self.hub.gets.append(name)
        return 200, {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": commit}, files[name]

    def _branch(self, repo: str, branch: str) -> tuple[str, dict[str, bytes]]:
        branches = self.hub.repos[repo].branches
        return next(each for name, each in branches.items() if branch in (name, each[0]))

    def _api(self, parts: list[str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        name, what, branch = "/".join(parts[:2]), *[*parts[2:], "", ""][:2]
        if name not in self.hub.repos:
            raise Refused(404, "Repository not found")
        repo = self.hub.repos[name]
        if what in ("", "revision"):
            commit = self._branch(name, branch or "main")[0]
            return _json({"id": name, "private": repo.private, "sha": commit, "siblings": [], "tags": []})
        if what == "refs":
            heads = [{"name": n, "ref": n, "targetCommit": commit} for n, (commit, _) in repo.branches.items()]
            return _json({"branches": heads, "converts": [], "tags": []})
        if what == "branch":
            repo.branches[branch] = repo.branches["main"]
            return _json({})
        if what == "tree":
            return _json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                    for path, data in self._branch(name, branch)[1].items()
                ]
            )
        if what == "preupload":
            return _json({"files": [self._mode(name, branch, each["path"]) for each in json.loads(body)["files"]]})
        assert what == "commit", self.path
        return self._commit(name, branch, [json.loads(line) for line in body.splitlines() if line])

    def _mode(self, repo: str, branch: str, path: str) -> dict[str, Any]:
        there = self._branch(repo, branch)[1].get(path)
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        oid = there and (hashlib.sha256(there).hexdigest() if mode == "lfs" else _oid(there))
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _commit(self, repo: str, branch: str, lines: list[Any]) -> tuple[int, dict[str, str], bytes]:
        files = dict(self._branch(repo, branch)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits += 1
        commit = self.hub.repos[repo].commit(branch, files)
        return _json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})


def _oid(data: bytes) -> str:
    """The hash that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _json(content: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def take_for_the_hub(served: Hub, monkeypatch: pytest.MonkeyPatch, token: str = WRITES) -> Hub:
    """Empty the stand-in, and have huggingface_hub take it for the hub."""
    import huggingface_hub.constants
    import huggingface_hub.file_download
    import huggingface_hub.utils

    served.__init__(served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # where it is read since 1.0, and before
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    for name in ("reset_sessions", "close_session"):  # a session that began while a test was offline stays so
        getattr(huggingface_hub.utils, name, bool)()
    monkeypatch.setenv("HF_TOKEN", token)
    return served


@contextmanager
def serve() -> Generator[Hub]:
    """A hub that answers on a free port of this machine."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
