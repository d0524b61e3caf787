"""deploy/: the launcher and the SLURM script with stand-ins for torchrun and SLURM, the image's and the Job's files."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LAUNCH, SBATCH = DEPLOY / "launch.sh", DEPLOY / "slurm/run.sbatch"
TORCHRUN = """\
#!/usr/bin/env bash
# torchrun as far as launch.sh knows it: a process below it, whose status is lost
echo "torchrun $*" >> told
python3 -S -c '
import os, signal, sys, time
def end(status):
    open(os.environ["COREFIT_STATUS"] + "/0", "w").write(f"{status}\\n")
    os._exit(status)
signal.signal(signal.SIGUSR1, lambda *_: end(130))
open("ready", "a").write("ready\\n")
time.sleep(float(os.environ.get("SECONDS_LEFT", 0)))
os._exit(1) if "BUG" in os.environ else end(int(os.environ.get("STATUS", 0)))
' || exit 1
"""
SCONTROL = """\
#!/usr/bin/env bash
[ "$1" = show ] && printf "127.0.0.1\\nother\\n" || echo "scontrol $*" >> told
"""
SRUN = """\
#!/usr/bin/env bash
# srun: the command once for each node, and a signal to all processes of every one of them
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node "$@" &
    nodes+=($!)
done
tree() { for child in $(pgrep -P "$1"); do tree "$child"; done; kill -USR1 "$1"; }
trap 'for node in "${nodes[@]}"; do tree "$node"; done' USR1
worst=0
for node in "${nodes[@]}"; do
    wait "$node"; status=$?
    while kill -0 "$node" 2>/dev/null; do wait "$node"; status=$?; done
    [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""


JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "COREFIT_LAUNCH": str(LAUNCH),
}


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """A folder that is first in PATH, with stand-ins."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"torchrun": TORCHRUN, "scontrol": SCONTROL, "srun": SRUN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def started(bin: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    path = f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", *command],
        cwd=bin.parent,
        env={**os.environ, "PATH": path, "TMPDIR": str(bin.parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that started these tests in the background has them ignore it, and bash cannot trap what is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until_ready(folder: Path, count: int = 1) -> None:
    """Wait for so many stand-ins of corefit."""
    until, ready = time.monotonic() + 60, folder / "ready"
    while not ready.exists() or len(ready.read_text().splitlines()) < count:
        assert time.monotonic() < until, "they do not begin"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("environment", "status"),
    [({}, 0), ({"STATUS": "2"}, 2), ({"STATUS": "130"}, 130), ({"BUG": "1"}, 1)],
    ids=["done", "to correct", "stopped", "a bug"],
)
def test_the_launcher_ends_as_corefit_ends(bin, environment, status):
    launched = started(bin, str(LAUNCH), "run", "a file.toml", **environment, PROCESSES="2", NODE="1", NODES="3")
    out, _ = launched.communicate(timeout=60)
    assert launched.returncode == status, out
    told = (bin.parent / "told").read_text()
    assert "--nnodes 3 --node-rank 1 --nproc-per-node 2" in told
    assert told.endswith("-m corefit run a file.toml\n")
    assert not [*bin.parent.glob("tmp.*")], "its notes are removed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_launcher_hands_a_signal_to_the_run(bin, number):
    launched = started(bin, str(LAUNCH), "run", SECONDS_LEFT="60")
    wait_until_ready(bin.parent)
    launched.send_signal(number)
    launched.communicate(timeout=60)
    assert launched.returncode == 130


@pytest.mark.parametrize(("status", "requeued"), [("0", False), ("2", False), ("130", True)])
def test_the_job_is_queued_again_after_a_stop_alone(bin, status, requeued):
    launched = started(bin, str(SBATCH), "run", "x.toml", **JOB, STATUS=status)
    out, _ = launched.communicate(timeout=60)
    assert launched.returncode == int(status), out
    told = (bin.parent / "told").read_text()
    assert ("scontrol requeue 7" in told) == requeued
    for node in range(2):
        assert f"--nnodes 2 --node-rank {node} --nproc-per-node gpu --master-addr 127.0.0.1 --master-port 20007" in told


def test_the_signal_before_the_limit_stops_all_nodes(bin):
    launched = started(bin, str(SBATCH), "run", "x.toml", **JOB, SECONDS_LEFT="60")
    wait_until_ready(bin.parent, 2)
    launched.send_signal(signal.SIGUSR1)
    out, _ = launched.communicate(timeout=60)
    assert launched.returncode == 130, out
    assert "scontrol requeue 7" in (bin.parent / "told").read_text()


SLOWLY = """\
import time

from corefit import hookimpl


@hookimpl
def corefit_step_finished(stage, state, metrics):
    time.sleep(0.5)
"""
KEYS = ("precision='fp32'", "plugins=['bright.py', 'slowly.py']", "stage.soar.steps=12", "stage.soar.log_every=1")


@pytest.mark.slow
def test_a_job_that_is_queued_again_ends_in_the_bytes_of_one_that_was_not(bin, project):
    """Two nodes with a process each, started by torchrun; SLURM alone is a stand-in."""
    (bin / "torchrun").unlink()
    (project.folder / "slowly.py").write_text(SLOWLY)

    def submitted(name: str) -> subprocess.Popen[str]:
        settings = [word for key in (*KEYS, f"name='{name}'") for word in ("--set", key)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return started(bin, str(SBATCH), "run", "pipeline.toml", *settings, **JOB, PROCESSES="1", PORT=port)

    first = submitted("stopped")
    metrics = project.folder / "runs/stopped/01-soar/metrics.jsonl"
    until = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < until, "training does not begin"
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    first.send_signal(signal.SIGUSR1)
    out, _ = first.communicate(timeout=200)
    assert first.returncode == 130, out
    assert out.count("stopped; the same command continues") == 2
    assert "scontrol requeue 7" in (project.folder / "told").read_text()
    (checkpoint,) = (project.folder / "runs/stopped/01-soar/checkpoints").iterdir()
    assert 3 <= int(checkpoint.name.removeprefix("step-")) < 12
    for name in ("stopped", "whole"):
        again = submitted(name)
        out, _ = again.communicate(timeout=400)
        assert again.returncode == 0, out
    assert (project.folder / "told").read_text().count("requeue") == 1
    stopped, whole = (project.folder / "runs" / name for name in ("stopped", "whole"))
    for stage in ("01-soar", "02-grpo"):
        (file,) = (stopped / stage / "model").glob("*.safetensors")
        assert file.read_bytes() == (whole / stage / "model" / file.name).read_bytes()
    assert (stopped / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_the_command_line_notes_its_status(project, monkeypatch, tmp_path):
    monkeypatch.setenv("COREFIT_STATUS", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    assert project.main("plugins").status == 0
    assert (tmp_path / "3").read_text() == "0\n"
    assert project.main("check", "none.toml").status == 2
    assert (tmp_path / "3").read_text() == "2\n"


def directives(name: str) -> list[str]:
    """The instructions of a Dockerfile, each on one line."""
    joined = re.sub(r"\\\n\s*", "", (DEPLOY / name).read_text())
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def test_the_image_is_built_from_what_is_there():
    """Each source of a COPY is in the repository and in what is sent to the builder, and each extra is declared."""
    lines = directives("Dockerfile")
    sent = [line[1:] for line in directives("Dockerfile.dockerignore") if line.startswith("!")]
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1] if word[0] != "-"]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, each) for each in sent), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages: list[str] = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {each.partition("/")[0] for each in packages} <= {*sources}, "the wheel needs more than is copied"
    readme = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["fragments"][0]["path"]
    assert {readme, *project["project"]["license-files"], "pyproject.toml"} <= {*sources}
    (extras,) = (line.partition("=")[2].strip('"').split(",") for line in lines if line.startswith("ARG EXTRAS"))
    assert {*extras} <= project["project"]["optional-dependencies"].keys()
    (python,) = (line.partition("=")[2] for line in lines if line.startswith("ARG PYTHON"))
    assert f"Programming Language :: Python :: {python}" in project["project"]["classifiers"]


def resources() -> Mapping[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes/job.yaml").read_text())}


def test_the_pods_of_the_job_find_each_other():
    job, service, claim = (resources()[kind] for kind in ("Job", "Service", "PersistentVolumeClaim"))
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    told = {each["name"]: each.get("value") for each in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(told["NODES"])
    assert told["HEAD"] == f"{name}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    launch = LAUNCH.read_text()
    assert str(service["spec"]["ports"][0]["port"]) in launch
    assert all(f"${{{variable}:-" in launch for variable in told)
    assert any(line.endswith(f"/{container['command'][0]}") for line in directives("Dockerfile"))
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}
    assert claim["metadata"]["name"] in str(pod["volumes"])
    rules = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert [130 in rule["values"] and rule["containerName"] == container["name"] for rule in rules] == [True]
    assert pod["restartPolicy"] == "Never", "a policy of failures needs it"


def test_the_job_fits_the_published_schema():
    validate = pytest.importorskip("kubernetes_validate")
    for resource in resources().values():
        validate.validate(resource, "1.31", strict=True)


def test_the_scripts_pass_shellcheck():
    """Where shellcheck is installed; bash itself parses them in any case."""
    for script in (LAUNCH, SBATCH):
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK)
    if not (found := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    subprocess.run([found, "--exclude", "SC1091,SC2016", LAUNCH, SBATCH], check=True)
