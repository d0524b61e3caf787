"""`corefit watch`: the page alone, on this machine alone, of a run in any state."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import BASE, SOAR, Stage, write_run

from corefit.cli import main
from corefit.run import watch


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    stages = [BASE, SOAR, Stage("grpo", 0.7, 20, "soar", 120, 64)]
    return write_run(tmp_path_factory.mktemp("runs") / "trees", stages, "running")


@pytest.fixture(scope="module")
def port(run) -> Iterator[int]:
    server = watch.serve(run, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_it_serves_the_page_and_its_version(run, port):
    before = sorted(run.rglob("*"))
    status, html = get(port, "/")
    assert (status, get(port, "/version")[0]) == (200, 200)
    assert f'<meta name="version" content="{get(port, "/version")[1]}">' in html
    assert "step 64 of 120" in html
    assert "/version" in html, "it asks for the next one"
    assert sorted(run.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    "path", ["/run.json", "/../trees/run.json", "/report.html", "//etc/passwd", "/%2e%2e/", "/?", "*"]
)
def test_nothing_else_is_there(port, path):
    assert get(port, path)[0] == 404


def test_nothing_can_be_sent(port):
    assert get(port, "/", "POST")[0] == 501


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example:80", ""])
def test_a_page_elsewhere_cannot_read_it(port, host):
    """A name that an attacker lets point to 127.0.0.1 is another origin's."""
    assert get(port, "/", Host=host)[0] == 403


def test_other_machines_cannot_reach_it(run):
    server = watch.serve(run, 0)
    assert server.socket.getsockname()[0] == "127.0.0.1"
    server.server_close()


def test_the_version_changes_with_any_file_of_the_run(tmp_path):
    run = write_run(tmp_path / "trees", [BASE, SOAR])
    seen = {watch.fingerprint(run)}
    for file in ("run.json", "pipeline.toml", "results.json", "01-soar/metrics.jsonl", "01-soar/samples/new.png"):
        with (run / file).open("a") as opened:
            opened.write(" ")
        seen.add(watch.fingerprint(run))
    assert len(seen) == 6
    (run / "report.html").write_text("the run has written its page")
    assert watch.fingerprint(run) in seen


def refusal(monkeypatch, capsys, *arguments: str) -> str:
    """What `corefit watch` says of a mistake."""
    monkeypatch.setattr(sys, "argv", ["corefit", "watch", *arguments, "--no-browser"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_a_user_types_wrong(monkeypatch, capsys, run, tmp_path):
    for folder in (tmp_path / "none", tmp_path, run / "run.json"):
        said = refusal(monkeypatch, capsys, str(folder))
        assert "is not the folder of a run; name one such as runs/NAME" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refusal(monkeypatch, capsys, str(run), "--port", str(taken.getsockname()[1]))
    assert re.search(r"port \d+ cannot be used: .*; give another --port", said)


def test_it_says_where_and_ends_with_ctrl_c(run):
    """Of a killed run: its lock is free, and its run.json says that it goes on."""
    command = [str(Path(sys.executable).with_name("corefit")), "watch", str(run), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ shows .*; Ctrl-C ends this", process.stdout.readline())
        assert found
        assert "training grpo" in get(int(found[1]), "/")[1]
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
