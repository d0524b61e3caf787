"""Trackers are sent everything once, also by a run that is killed and continued; notes arrive; failures cost no run."""

from __future__ import annotations

import http.server
import json
import struct
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from corefit import Observer
from corefit.errors import ConfigError
from corefit.testing import check_observer
from corefit.testing.observers import STEPS, Rehearsal
from corefit_trackers import Notify, OtherTracker, TensorBoard, Trackio, Wandb

LOST = 15
"""A step that is logged after the checkpoint of step 10, and lost when the run is killed."""


def tell(observer: Observer, events: Iterator[tuple[str, dict[str, Any]]]) -> None:
    for event, arguments in events:
        getattr(observer, event)(**arguments)


def killed_and_continued(observer: Observer, again: Observer, folder: Path) -> None:
    """Tell of a run that is killed at LOST, without a word; another process goes on from step 10 and tells LOST too."""
    run = Rehearsal(folder)
    first = [event for event in run.events() if event[0] != "run_finished"]
    start, second = (n for n, (name, _) in enumerate(first) if name == "stage_started")
    lost = step(run, LOST)
    tell(observer, iter([*first[: start + 3], lost]))
    resumed = next(n for n in range(second, 0, -1) if first[n][0] == "run_started")
    done = next(n for n in range(second, len(first)) if first[n][0] == "run_started")
    tell(again, iter([*first[resumed : second + 1], lost, *first[second + 1 : done]]))
    again.run_finished(run, folder, None)


def step(run: Rehearsal, number: int) -> tuple[str, dict[str, Any]]:
    name, arguments = next(event for event in run.events() if event[0] == "step_finished")
    state = SimpleNamespace(step=number, folder=arguments["state"].folder, grid=None)
    return name, {"stage": run.stage[0], "state": state, "metrics": {"loss": 1 / number, "odd": float("nan")}}


# TensorBoard


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(tag)]


def test_tensorboard_has_metrics_grids_and_tables(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_observer(TensorBoard(), tmp_path)
    stage = EventAccumulator(str(tmp_path / "tensorboard" / "01-toy")).Reload()
    assert {"loss", "grad_norm", "lr", "eval/toy"} <= {*stage.Tags()["scalars"]}
    assert [image.step for image in stage.Images("samples")] == [10, STEPS]
    (table,) = stage.Tensors("eval/text_summary")
    assert b"| toy | all | 0.5 | 0.25 | 0.75 | 2 |" in table.tensor_proto.string_val[0]
    assert scalars(tmp_path / "tensorboard" / "00-base", "eval/toy") == [(0, 0.5)]


def test_tensorboard_shows_no_point_twice_after_a_kill(tmp_path: Path):
    killed_and_continued(TensorBoard(), TensorBoard(), tmp_path)
    stage = tmp_path / "tensorboard" / "01-toy"
    assert len([*stage.iterdir()]) == 2, "a file of each process"
    assert scalars(stage, "loss") == [(10, 0.1), (LOST, round(1 / LOST, 6)), (STEPS, 0.05)]
    assert scalars(stage, "eval/toy") == [(STEPS, 0.5)]
    assert scalars(tmp_path / "tensorboard" / "00-base", "eval/toy") == [(0, 0.5)]


def test_tensorboard_writes_where_it_is_told(tmp_path: Path):
    tell(TensorBoard(folder=tmp_path / "all"), Rehearsal(tmp_path / "run").events())
    assert {file.name for file in (tmp_path / "all" / "run").iterdir()} == {"00-base", "01-toy"}
    assert not (tmp_path / "run" / "tensorboard").exists()


# Weights & Biases


def history(folder: Path) -> list[dict[str, Any]]:
    """What all offline runs in the folder would send: numbers and kinds by name, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: list[dict[str, Any]] = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        for data in records(file):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def records(file: Path) -> Iterator[bytes]:
    """Read the records of LevelDB's log format, in blocks of 32 KiB, after wandb's header of 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder; nothing of wandb goes elsewhere."""
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


def test_wandb_is_sent_everything_once(offline: Path):
    """Of a run that is stopped, continued in another run of wandb's process, and started again."""
    check_observer(Wandb(mode="offline"), offline)
    sent = history(offline)
    assert [line["toy/step"] for line in sent if "toy/loss" in line] == [10, STEPS]
    assert [line["base/eval/toy"] for line in sent if "base/eval/toy" in line] == [0.5]
    assert [line["toy/eval/toy"] for line in sent if "toy/eval/toy" in line] == [0.5]
    assert [line["_step"] for line in sent] == [1, 20, 40, 41]
    assert [line["_step"] for line in sent if line.get("toy/samples/_type")] == [20, 41]
    assert sent[0]["base/table/nrows"] == 1
    runs = [file.stem for file in offline.glob("wandb/offline-run-*/*.wandb")]
    assert runs == [f"run-{json.loads((offline / 'wandb.json').read_text())['id']}"] * 2, "one run, continued"


def test_wandb_without_a_key_is_refused(offline: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NETRC", str(offline / "netrc"))
    with pytest.raises(ConfigError, match=r"run `wandb login`, set WANDB_API_KEY, or write mode = \"offline\""):
        Wandb().check()
    Wandb(mode="offline").check()
    monkeypatch.setenv("WANDB_MODE", "offline")
    Wandb().check()
    monkeypatch.delenv("WANDB_MODE")
    (offline / "netrc").write_text("machine api.wandb.ai login user password key\n")
    Wandb().check()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ConfigError, match="no key"):
        Wandb().check()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    Wandb().check()


# trackers that cannot be installed here


class Kept:
    """Stands in for a package: keeps what it is sent."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.config: dict[str, Any] = {}
        self.ended = 0

    def init(self, **keys: Any) -> Kept:
        self.started.append(keys)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.ended += 1


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Put a module in the place of a package."""
    kept, module = Kept(), ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    members = {"init": kept.init, "config": kept.config, "Image": lambda file: ("image", file)}
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return kept


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Kept:
    return stand_in("trackio", monkeypatch)


def test_trackio_goes_on_in_the_same_run(trackio: Kept, tmp_path: Path):
    killed_and_continued(Trackio(space="user/name"), Trackio(space="user/name"), tmp_path)
    one, other = trackio.started
    assert one == other
    assert (one["project"], one["resume"], one["space_id"]) == ("corefit", "allow", "user/name")
    assert one["name"].startswith("rehearsal-")
    assert [step for step, _ in trackio.lines] == [0, 10, LOST, STEPS, STEPS]
    assert trackio.lines[1][1]["toy/samples"][1].endswith("01-toy/samples/step-000010.png")
    assert trackio.config["stage.toy.steps"] == STEPS
    assert trackio.ended == 1


def test_a_stage_that_is_another_one_begins_another_run(trackio: Kept, tmp_path: Path):
    tell(Trackio(), Rehearsal(tmp_path).events())
    (tmp_path / "01-toy").rename(tmp_path / "superseded")
    tell(Trackio(), Rehearsal(tmp_path).events())
    one, again, other, last = (keys["name"] for keys in trackio.started)
    assert one == again != other == last
    assert [step for step, _ in trackio.lines] == [0, 10, STEPS, STEPS, 10, 0, STEPS, STEPS]


def test_another_tracker_of_accelerate_gets_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    kept = stand_in("swanlab", monkeypatch)
    tell(OtherTracker(tracker="swanlab", project="mine"), Rehearsal(tmp_path).events())
    assert [keys["project"] for keys in kept.started] == ["mine", "mine"], "a run for each process that trained"
    assert [(step, values.get("toy/loss")) for step, values in kept.lines] == [
        (0, None),
        (10, 0.1),
        (STEPS, 0.05),
        (STEPS, None),
    ]


@pytest.mark.parametrize(
    ("observer", "package", "how"),
    [
        (TensorBoard(), "tensorboard", r"pip install 'corefit\[trackers\]'"),
        (Wandb(mode="offline"), "wandb", r"pip install 'corefit\[trackers\]'"),
        (Notify(), "apprise", r"pip install 'corefit\[trackers\]'"),
        (Trackio(), "trackio", "pip install trackio"),
        (OtherTracker(tracker="mlflow"), "mlflow", "pip install mlflow"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, observer: Observer, package: str, how: str):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"the package {package} is missing; install it: {how}"):
        observer.check()


# notes


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What arrives at a local address that the environment names."""
    heard: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("APPRISE_URLS", f"json://127.0.0.1:{server.server_address[1]}/secret")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield heard
        server.shutdown()


def test_notes_tell_how_a_run_ends(webhook: list[dict[str, Any]], tmp_path: Path):
    check_observer(Notify(), tmp_path)
    assert [note["title"].partition("rehearsal ")[2] for note in webhook] == [
        "was stopped",
        "is finished",
        "is finished",
    ]
    assert [note["type"] for note in webhook] == ["failure", "success", "success"]
    assert webhook[1]["message"].splitlines()[1:] == ["base: toy 0.5", "toy: toy 0.5"]


def test_only_failures(webhook: list[dict[str, Any]], tmp_path: Path):
    observer, run = Notify(only_failures=True), Rehearsal(tmp_path)
    check_observer(observer, tmp_path)
    assert webhook == []
    observer.run_finished(run, tmp_path, RuntimeError("the disk is on fire"))
    assert [note["title"] for note in webhook] == ["corefit: rehearsal has failed"]
    assert "RuntimeError: the disk is on fire" in webhook[0]["message"]


def test_a_note_that_does_not_arrive_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("APPRISE_URLS", "json://127.0.0.1:9/secret")
    with pytest.raises(RuntimeError, match="the note that rehearsal is finished did not arrive everywhere") as raised:
        Notify().run_finished(Rehearsal(tmp_path), tmp_path, None)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("value", ["", "nonsense://there"])
def test_addresses_are_checked_and_not_told(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("MINE", value)
    with pytest.raises(ConfigError, match="MINE") as raised:
        Notify(env="MINE").check()
    assert "nonsense" not in str(raised.value)


def test_addresses_with_secrets_are_refused_in_a_file():
    with pytest.raises(ValueError, match=r"address that begins with slack:// into the .* variable APPRISE_URLS"):
        Notify(urls=("slack://token-a/token-b",))
    Notify(urls=("gnome://",))
