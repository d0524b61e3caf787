"""Two processes (gloo, CPU) do what one does: the same global batch, the same weights, whoever holds them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Project
from processes import TORCHRUN, as_one, environment, metrics, processes, settings, two, worst

from corefit.system import ranks as ranks_of_corefit
from corefit.system.ranks import NOTES

SHARD = [pytest.param("false", id="ddp", marks=pytest.mark.slow), pytest.param("true", id="fsdp")]
"""DDP takes the same way through signals and faults, with less to agree on: `pytest -m slow` runs it too."""
FULL = ("backbone.train={use='full'}", "stage.soar.ema=0.9", "stage.soar.micro_batch=1")
SOAR_SDE = ("stage.soar.objective.paths=3", "stage.soar.sampler={use='cps'}")
SFT = ("stage.soar.objective={use='sft'}",)
GRPO = (
    "stage.grpo.objective={use='flow_grpo', group=2, steps=4, beta=50.0, updates=2}",
    "stage.grpo.batch=8",
    "stage.grpo.steps=3",
    "stage.grpo.optimizer.lr=1e-2",
)
"""With a KL that is felt: a reference that is not the policy as the stage found it must show."""

ANCHOR = "{use='soar', points=2, weight=0.5}"
SUM = (
    f"stage.grpo.objective={{use='sum', of=[{{use='flow_grpo', group=2, steps=4, updates=2}}, {ANCHOR}]}}",
    *GRPO[1:],
)


PIECEMEAL = """
import weakref

from torch.distributed.tensor import DTensor

from corefit_backbones.backbone import Diffusers


def refused(*args, **keys):
    raise AssertionError("a whole network was read or saved")


gathered, gather = [], DTensor.full_tensor


def full_tensor(tensor, **keys):
    alive = sum(t.nbytes for t in (each() for each in gathered) if t is not None)
    assert alive < 200_000, f"{alive} bytes of gathered weights are held"
    made = gather(tensor, **keys)
    gathered.append(weakref.ref(made))
    return made


Diffusers.load = Diffusers.save = refused
DTensor.full_tensor = full_tensor
"""


def grid(png: Path) -> np.ndarray:
    """Its pixels, [H, W, 3]."""
    from PIL import Image

    return np.asarray(Image.open(png).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "keys",
    [
        (*FULL, *SOAR_SDE, *GRPO),
        (*SFT, *SUM),
        (*FULL, *SOAR_SDE, *GRPO, "shard=true"),
        ("shard=true", "stage.soar.optimizer.lr=1e-2", *SUM),
    ],
    ids=["ddp full, 3 paths, kl", "ddp lora, sft, sum", "fsdp full, 3 paths, kl, ema", "fsdp lora, 1 path, sum"],
)
def test_two_processes_train_as_one_does(project, keys):
    """Sharded, neither reads, gathers or saves a network as a whole."""
    sharded = "shard=true" in keys
    (project.folder / "piecemeal.py").write_text(PIECEMEAL if sharded else "")
    more = ("name='two'", 'plugins=["bright.py", "piecemeal.py"]', *keys)
    as_one(project, keys, two(project, "run", "pipeline.toml", *settings(*more)))


def test_accelerate_is_asked_for_fsdp(project, monkeypatch):
    """`accelerate launch --use_fsdp --fsdp_version 2` sets these variables; then it is as with `shard = true`."""
    project.write(project.text.rpartition("[[stage]]")[0])
    command = ("run", "pipeline.toml", "--set", "precision='fp32'", "--set", "stage.soar.checkpoint_every=1")
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = processes(project, *command, launcher=TORCHRUN, **fsdp)
    assert done.status == 0, done.err
    written = project.folder / "runs" / "tiny" / "01-soar" / "checkpoints" / "step-000001"
    assert [p.name[:11] for p in sorted(written.glob("*.safetensors"))] == ["shard-00001", "shard-00002"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    done = project.main(*command)
    assert done.status == 2
    assert "error: accelerate is set to FSDP 1" in done.err


def test_accelerates_variables_do_not_change_what_is_trained(monkeypatch):
    """Its gradient accumulation would divide every loss, and its compiler be in each network's way."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    accelerator = ranks_of_corefit.join("fp32").accelerator
    loss = torch.ones((), requires_grad=True)
    accelerator.backward(loss)
    assert float(loss.grad) == 1
    network = torch.nn.Identity()
    assert accelerator.prepare_model(network) is network


@pytest.mark.parametrize("name", sorted(ranks_of_corefit.ENGINES))
def test_other_engines_are_refused(project, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    ended = project.main("run", "pipeline.toml")
    assert ended.status == 2
    assert re.match(
        rf"error: accelerate is set to .* \({name}\), which corefit does not use; launch without", ended.err
    )


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
        loss = per_sample((ctx.backbone.velocity(mix(x0, noise, sigma), sigma, batch.cond) - noise + x0) ** 2)
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


def going_on(project: Project, worlds: Sequence[int], keys: Sequence[str]) -> None:
    """Run `r` in so many processes, each stopped at the next of STOPS, until it ends."""
    for world, stop in zip(worlds, (*STOPS, "never"), strict=True):
        launcher = TORCHRUN if world == 2 else ()
        done = processes(project, "run", "pipeline.toml", *settings("name='r'", *keys), launcher=launcher, STOP=stop)
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
        env=environment(),
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
    ranks = started(*[(str(folder / "steps.py"), str(folder), where)] * 2, folder=folder)
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


def by_hand(
    project: Project, keys: Sequence[str], *own: Sequence[str], command: str = "run"
) -> list[subprocess.Popen[str]]:
    """Two processes without a launcher that would end one when the other is gone, as a cluster starts them.

    own  keys that only the first, only the second process is given
    """
    keys = ("name='hand'", *keys)
    each = [("-m", "corefit", command, "pipeline.toml", *settings(*keys, *more)) for more in own or ((), ())]
    return started(*each, folder=project.folder)


def started(*commands: Sequence[str], folder: Path) -> list[subprocess.Popen[str]]:
    """A Python process of each command, a rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **where),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


@pytest.mark.parametrize(
    ("command", "key", "said"),
    [
        ("run", "stage.soar.steps=9", "rank 1 has stage.soar.steps = 9, rank 0 has 2: all processes"),
        ("prepare", "data.size=[8, 8]", "rank 1 has data.size = [8, 8], rank 0 has [16, 16]: all processes"),
        ("run", "stage.soar.stepz=9", "stage.soar.stepz is not a key (did you mean 'steps'?)"),
    ],
    ids=["other steps", "other size", "an error on reading"],
)
def test_ranks_that_differ_are_refused_before_anything_is_done(project, command, key, said):
    before = project.tree()
    ranks = by_hand(project, (), (), (key,), command=command)
    ends = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], ends
    assert all(said in end and "Traceback" not in end for end in ends), ends
    assert project.tree() == before


def test_two_processes_share_the_encoding(odd):
    """A part each, and the bytes of one process's cache."""
    from PIL import Image

    rows = []
    for n in range(520):
        Image.new("RGB", (16, 16), (n % 256, 0, 0)).save(odd.folder / f"{n}.png")
        rows.append({"media": f"{n}.png", "prompt": "a red sky"})
    (odd.folder / "train.jsonl").unlink()
    odd.lines("train.jsonl", *rows)
    cache = odd.folder / ".corefit" / "cache"

    def prepared(*launcher: str) -> tuple[str, dict[str, str]]:
        """What it said, and hashes of what it wrote; as many threads a process in both cases."""
        command = [sys.executable, *launcher, "-m", "corefit", "prepare", "pipeline.toml"]
        done = subprocess.run(command, cwd=odd.folder, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        files = [f for f in cache.rglob("*") if f.is_file()]
        return done.stdout, {str(f.relative_to(cache)): sha256(f.read_bytes()).hexdigest() for f in files}

    said, two = prepared(*TORCHRUN)
    assert "encoding data: 512/512" in said  # the first rank's share
    shutil.rmtree(odd.folder / ".corefit")
    assert prepared()[1] == two
    assert sum("part-00001" in name for name in two) > 1
