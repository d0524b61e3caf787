"""Two processes (gloo, CPU) do what one does: the same global batch, the same weights, whoever holds them."""

from __future__ import annotations

import re
import shutil
from hashlib import sha256

import forks
import pytest
import torch
from conftest import BRIGHT
from processes import FULL, GRPO, as_one, by_torchrun, ended, settings, two

from corefit.system import ranks as ranks_of_corefit

SOAR_SDE = ("stage.soar.objective.paths=3", "stage.soar.sampler={use='cps'}")
SFT = ("stage.soar.objective={use='sft'}",)
ANCHOR = "{use='soar', points=2, weight=0.5}"
SUM = (
    f"stage.grpo.objective={{use='sum', of=[{{use='flow_grpo', group=2, steps=4, updates=2}}, {ANCHOR}]}}",
    *GRPO[1:],
)
KL = f"stage.grpo.objective={{use='sum', of=[{{use='flow_grpo', group=2, steps=4, updates=2, beta=50.0}}, {ANCHOR}]}}"


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


@pytest.mark.parametrize(
    ("started", "keys"),
    [
        (two, (*FULL, *SOAR_SDE, *GRPO)),
        (two, (*SFT, *SUM)),
        (by_torchrun, (*FULL, *SOAR_SDE, *GRPO, "shard=true")),
        (two, ("shard=true", "gather='term'", "stage.soar.optimizer.lr=1e-2", *SUM, KL)),
    ],
    ids=[
        "ddp full, 3 paths, kl",
        "ddp lora, sft, sum",
        "fsdp full, 3 paths, kl, ema, gathered a step",
        "fsdp lora, 1 path, sum, kl, gathered a term",
    ],
)
def test_two_processes_train_as_one_does(project, started, keys):
    """Sharded, neither reads, gathers or saves a network as a whole. Forks share hashes; torchrun's ranks do not."""
    sharded = "shard=true" in keys
    (project.folder / "piecemeal.py").write_text(PIECEMEAL if sharded else "")
    more = ("name='two'", 'plugins=["bright.py", "piecemeal.py"]', *keys)
    as_one(project, keys, started(project, "run", "pipeline.toml", *settings(*more)))


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(
            (
                "backbone.train={use='full'}",
                "stage.grpo.objective={use='reward_gradient', method='draft', truncation=3}",
            ),
            marks=pytest.mark.slow,
        ),
        ("stage.grpo.objective={use='reward_gradient', method='leap_align'}", "backbone.gradient_checkpointing=true"),
        pytest.param(
            ("shard=true", "stage.grpo.objective={use='reward_gradient', method='leap_align'}"), marks=pytest.mark.slow
        ),
        (
            "shard=true",
            "backbone.train={use='full'}",
            "backbone.gradient_checkpointing=true",
            "stage.grpo.objective={use='reward_gradient', method='draft', truncation=3}",
        ),
    ],
    ids=["ddp full, 3 steps", "ddp lora, leaps, recomputed", "fsdp lora, leaps", "fsdp full, 3 steps, recomputed"],
)
def test_gradients_of_rewards_are_those_of_one_process(project, keys):
    """A term calls the network several times before its backward, in a graph through its own results."""
    bright = BRIGHT.replace("    gain:", "    differentiable = True\n    gain:", 1)
    (project.folder / "bright.py").write_text(bright)
    project.swap(('sampler = { use = "flow_sde", noise = 0.7 }\n', ""))
    steps = ("stage.grpo.objective.steps=4", "stage.grpo.objective.guidance=2.0", "stage.grpo.micro_batch=1")
    keys = (*keys, *steps, "stage.grpo.steps=3", "stage.grpo.optimizer.lr=1e-2", "stage.soar.objective={use='sft'}")
    as_one(project, keys, two(project, "run", "pipeline.toml", *settings("name='two'", *keys)))


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["step", "term"])
def test_two_groups_of_processes_that_hold_all_shards_train_as_one_process_does(project, gather):
    """HSDP on four processes: weights are gathered in a pair, gradients and their norm are those of all."""
    keys = (*FULL, *GRPO, "shard=true", "stage.soar.max_grad_norm=0.01", f"gather='{gather}'")
    done = two(project, "run", "pipeline.toml", *settings("name='two'", "replicate=2", *keys), number=4)
    as_one(project, keys, done)


def test_accelerate_is_asked_for_fsdp(project, monkeypatch):
    """`accelerate launch --use_fsdp --fsdp_version 2` sets these variables; then it is as with `shard = true`."""
    project.write(project.text.rpartition("[[stage]]")[0])
    command = ("run", "pipeline.toml", "--set", "precision='fp32'", "--set", "stage.soar.checkpoint_every=1")
    done = two(project, *command, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
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
    commands = [("-m", "corefit", command, "pipeline.toml", *settings(*keys)) for keys in ((), (key,))]
    ranks = forks.ranks(*commands, cwd=project.folder)
    ends = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], ends
    assert all(said in end and "Traceback" not in end for end in ends), ends
    assert project.tree() == before


def test_two_processes_share_the_encoding(project):
    """A part each, and the bytes of one process's cache."""
    from PIL import Image

    rows = []
    for n in range(520):
        Image.new("RGB", (16, 16), (n % 256, 0, 0)).save(project.folder / f"{n}.png")
        rows.append({"media": f"{n}.png", "prompt": "a red sky"})
    project.own("train.jsonl")
    project.lines("train.jsonl", *rows)
    cache = project.folder / ".corefit" / "cache"

    def prepared(number: int) -> tuple[str, dict[str, str]]:
        """What so many processes said, and hashes of what they wrote."""
        done = ended(*forks.ranks(*[("-m", "corefit", "prepare", "pipeline.toml")] * number, cwd=project.folder))
        assert done.status == 0, done.err
        files = [f for f in cache.rglob("*") if f.is_file() and f.name != "media.json"]  # this has stamps of time
        return done.out, {str(f.relative_to(cache)): sha256(f.read_bytes()).hexdigest() for f in files}

    said, two = prepared(2)
    assert "encoding data: 512/512" in said  # the first rank's share
    shutil.rmtree(project.folder / ".corefit")
    assert prepared(1)[1] == two
    assert sum("part-00001" in name for name in two) > 1
