"""What happens to one of two processes happens to both: signals, faults, deaths, and going on after a stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import forks
import numpy as np
import pytest
from conftest import Project
from forks import Forked
from processes import FULL, GRPO, TORCHRUN, ended, metrics, settings, two, worst

from corefit.system.ranks import NOTES

SHARD = [pytest.param("false", id="ddp", marks=pytest.mark.slow), pytest.param("true", id="fsdp")]
"""DDP takes the same way through signals and faults, with less to agree on: `pytest -m slow` runs it too."""
ODD = '''\
"""What goes wrong on one rank of two, and a signal that only the first gets."""

import os
import signal

import torch
from attrs import frozen

from corefit import Supervised, Term, hookimpl
from corefit.flow import interpolate, per_sample


@frozen
class Odd(Supervised):
    """SFT of 4 rows a step. The last two, those of the second rank, go wrong in step `at`."""

    at: int = -1
    how: str = "nan"

    def terms(self, batch, ctx):
        x0, sigma = batch.clean, ctx.sigma(batch.clean)
        rng = ctx.rng.of("place", list(range(len(batch)))) if self.how == "placed" else ctx.rng
        noise = rng.randn(tuple(x0.shape))
        loss = per_sample((ctx.backbone.velocity(interpolate(x0, noise, sigma), sigma, batch.cond) - noise + x0) ** 2)
        wrong = torch.tensor([row // 4 == self.at and row % 4 >= 2 for row in batch.rows])
        if self.how == "raises" and wrong.any():
            raise RuntimeError("the disk of this rank is on fire")
        yield Term.of(loss + torch.where(wrong, float("nan"), 0.0) if self.how == "nan" else loss)


@hookimpl
def corefit_objectives():
    return {"odd": Odd}


@hookimpl
def corefit_step_finished(stage, state, metrics):
    if os.environ.get("STOP") == f"{stage.name} {state.step}":
        os.kill(os.getpid(), signal.SIGTERM)
'''
LONG = (
    "plugins=['bright.py', 'odd.py']",
    "stage.soar.steps=4",
    "stage.soar.log_every=1",
    "stage.soar.sample_every=2",
    "stage.grpo.log_every=1",
)
STOPS = ("soar 3", "grpo 1")


@pytest.fixture
def odd(project: Project) -> Project:
    (project.folder / "odd.py").write_text(ODD)
    return project


def grid(png: Path) -> np.ndarray:
    """Its pixels, [H, W, 3]."""
    from PIL import Image

    return np.asarray(Image.open(png).convert("RGB")).astype(int)


def going_on(project: Project, worlds: Sequence[int], keys: Sequence[str]) -> None:
    """Run `r` in so many processes, each stopped at the next of STOPS, until it ends."""
    for world, stop in zip(worlds, (*STOPS, "never"), strict=True):
        command = ("-m", "corefit", "run", "pipeline.toml", *settings("name='r'", *keys))
        done = ended(*forks.ranks(*[command] * world, cwd=project.folder, STOP=stop))
        if stop != "never":
            assert "the same command continues" in done.err
            number, name = {"soar": "01", "grpo": "02"}[stop.split()[0]], stop.split()[0]
            steps = project.folder / "runs" / "r" / f"{number}-{name}" / "checkpoints"
            assert [p.name for p in steps.iterdir()] == [f"step-{int(stop.split()[1]):06d}"]
        else:
            assert done.status == 0, done.err


@pytest.mark.parametrize("shard", SHARD)
def test_a_checkpoint_is_continued_by_any_number_of_processes(odd, shard):
    keys = (*FULL, *GRPO, *LONG, f"shard={shard}")
    assert odd.main("run", "pipeline.toml", *settings("name='one'", *keys)).status == 0
    going_on(odd, (2, 1, 2), keys)
    one, other = (odd.folder / "runs" / name for name in ("one", "r"))
    for stage in ("01-soar", "02-grpo"):
        assert worst(one / stage, other / stage) < 1e-5
        assert np.allclose(metrics(one / stage), metrics(other / stage), atol=1e-4)
    grids = [grid(folder / "01-soar" / "samples" / "step-000002.png") for folder in (one, other)]
    assert np.abs(grids[0] - grids[1]).max() <= 1  # of the average, sharded or not


@pytest.mark.parametrize("shard", SHARD)
def test_two_processes_stopped_by_one_signal_end_in_the_same_bytes(odd, shard):
    keys = (*FULL, *GRPO, *LONG, f"shard={shard}")
    assert two(odd, "run", "pipeline.toml", *settings("name='whole'", *keys)).status == 0
    going_on(odd, (2, 2, 2), keys)
    whole, other = (odd.folder / "runs" / name for name in ("whole", "r"))
    for stage in ("01-soar", "02-grpo"):
        assert worst(whole / stage, other / stage) == 0
        assert metrics(whole / stage) == metrics(other / stage)
    assert not (other / NOTES).exists()


@pytest.mark.parametrize("shard", SHARD)
def test_a_fault_of_one_rank_is_one_of_all(odd, shard):
    keys = (*LONG, "stage.soar.objective={use='odd', at=1}", f"shard={shard}")
    done = two(odd, "run", "pipeline.toml", *settings("name='stops'", *keys))
    assert done.err.count("error: stage soar, step 1: the loss of term 0 is not finite") == 2
    keys = (*keys, "stage.soar.on_nan='skip'")
    assert odd.main("run", "pipeline.toml", *settings("name='one'", *keys)).status == 0
    done = two(odd, "run", "pipeline.toml", *settings("name='two'", *keys))
    assert done.status == 0, done.err
    one, other = (odd.folder / "runs" / name / "01-soar" for name in ("one", "two"))
    assert worst(one, other) < 1e-5
    assert np.allclose(metrics(one), metrics(other), atol=1e-4)


def test_ranks_that_draw_the_same_noise_are_refused(odd):
    keys = (*LONG, "stage.soar.objective={use='odd', how='placed'}")
    assert odd.main("run", "pipeline.toml", *settings("name='one'", *keys)).status == 0
    done = two(odd, "run", "pipeline.toml", *settings("name='two'", *keys))
    assert done.status != 0
    assert "error: stage soar: ranks 0 and 1 draw the same noise" in done.err


def test_a_rank_that_fails_tells_the_others_why(odd):
    keys = (*LONG, "stage.soar.objective={use='odd', at=1, how='raises'}")
    ranks = by_hand(odd, keys)
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 1]
    assert "error: rank 1 stopped: RuntimeError: the disk of this rank is on fire" in said[0]
    assert "Traceback" not in said[0]
    assert "RuntimeError: the disk of this rank is on fire" in said[1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_does_not_leave_the_other_hanging(odd, victim):
    ranks = by_hand(odd, (*LONG, "stage.soar.steps=100000"))
    log = odd.folder / "runs" / "hand" / "01-soar" / "metrics.jsonl"
    while not log.exists():
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    ranks[victim].kill()
    ranks[victim].wait()
    other = ranks[1 - victim]
    said = other.communicate(timeout=20)[1]
    assert other.returncode == 2
    assert re.search(rf"error: rank {victim} \(process {ranks[victim].pid}\) died without a word", said)
    assert "Traceback" not in said


def test_an_interrupt_of_the_launcher_writes_a_checkpoint(odd):
    """A terminal's Ctrl-C reaches launcher and processes, and the launcher then signals its processes once more."""
    command = [sys.executable, *TORCHRUN, "-m", "corefit", "run", "pipeline.toml"]
    launched = subprocess.Popen(
        [*command, *settings(*LONG, "stage.soar.steps=100000")],
        cwd=odd.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stage = odd.folder / "runs" / "tiny" / "01-soar"
    while not (stage / "metrics.jsonl").exists():
        assert launched.poll() is None, launched.communicate()[1]
        time.sleep(0.05)
    os.killpg(launched.pid, signal.SIGINT)
    said = launched.communicate(timeout=200)[1]
    assert "the same command continues" in said, said
    (checkpoint,) = (stage / "checkpoints").iterdir()
    assert (checkpoint / "manifest.json").exists()


STOPPABLE = '''\
"""The command line, with a run that only steps: until it is stopped, or its second rank has a fault."""

import sys
import time
from pathlib import Path

import corefit.cli
from corefit.errors import DataError, Stopped
from corefit.system.ranks import join
from corefit.system.signals import ECHO, Signals

folder, where = Path(sys.argv[1]), sys.argv[2]


def run(standalone_mode):
    ranks = join("fp32")
    signals = Signals(print, ECHO)
    with signals.handled(), ranks.share_failures(folder):
        (folder / f"here-{ranks.rank}").touch()
        if where == "waiting" and ranks.main:
            time.sleep(2)
        if where == "fault" and not ranks.main:
            raise DataError("mine alone")
        with signals.training():
            while not ranks.any(signals.stop_requested):
                time.sleep(0.01)
            raise Stopped(3)


corefit.cli.commands.cli = run
corefit.cli.commands.main()
'''


def stoppable(folder: Path, where: str, *asked: int, number: int = signal.SIGTERM) -> tuple[list[int], list[str]]:
    """Two processes of STOPPABLE, of which `asked` get a signal when both are there; status and stderr of each."""
    (folder / "steps.py").write_text(STOPPABLE)
    ranks = forks.ranks(*[(str(folder / "steps.py"), str(folder), where)] * 2, cwd=folder)
    while not all((folder / f"here-{rank}").exists() for rank in range(2)):
        assert all(rank.poll() in (None, 2) for rank in ranks)
        time.sleep(0.01)
    for rank in asked:
        ranks[rank].send_signal(number)
    ends = [rank.communicate(timeout=100)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], ends


@pytest.mark.parametrize(
    ("where", "asked"),
    [("training", (0, 1)), ("training", (1,)), ("waiting", (1,))],
)
def test_a_stop_is_one_of_all_and_no_fault(tmp_path, where, asked):
    statuses, ends = stoppable(tmp_path, where, *asked)
    assert statuses == [130, 130], ends
    assert all("stopped; the same command continues" in end and "error" not in end for end in ends), ends


def test_a_fault_of_a_rank_is_none_of_a_stop(tmp_path):
    statuses, ends = stoppable(tmp_path, "fault")
    assert statuses == [2, 2], ends
    assert "error: rank 1 stopped: mine alone" in ends[0]


def by_hand(project: Project, keys: Sequence[str]) -> list[Forked]:
    """Two processes without a launcher that would end one when the other is gone, as a cluster starts them."""
    command = ("-m", "corefit", "run", "pipeline.toml", *settings("name='hand'", *keys))
    return forks.ranks(command, command, cwd=project.folder)
