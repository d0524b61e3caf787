"""Four processes in two groups that hold all shards (HSDP): what a step gathers, exchanges and leaves."""

from __future__ import annotations

from pathlib import Path

import forks
import pytest
import torch
from processes import ended
from torch import nn

from corefit.train import sharding

RANKS = '''
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from benchmarks.communication import counted
from corefit.system.layout import Layout
from corefit.system.ranks import join
from corefit.train import checkpoint, sharding, weights
from corefit.train.gradients import Gradients

DEVICE = torch.device("cpu")
TERMS = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.blocks[1].requires_grad_(False)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.out(x)


class Held:
    """What `called_with` needs of a backbone."""

    def __init__(self, transformer):
        self.transformer = transformer


def terms(network, x):
    yield from (network(x + term).square().mean() for term in range(TERMS))


def step(network, held, x):
    for number, loss in enumerate(terms(network, x)):
        held.exchange(number == TERMS - 1)
        loss.backward()


ranks = join("fp32", Layout(shard=True, gather="step", replicate=2))
rank = ranks.rank
alone, shared = Net(), Net()
every = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1))
sharding.shard(shared, DEVICE, 2)

# the network of a later stage is sharded over the same groups of processes
before = len(dist.distributed_c10d._world.pg_map)
sharding.shard(Net(), DEVICE, 2)
assert len(dist.distributed_c10d._world.pg_map) == before

# each group holds all rows, in the order of its ranks
for name, tensor in shared.state_dict().items():
    whole = alone.state_dict()[name]
    assert torch.equal(tensor.to_local(), whole[sharding.local_rows(tensor)]), name
    assert len(tensor.to_local()) < len(whole), name

# a checkpoint holds each shard once, and one process can read it
path = checkpoint.save(Path("checkpoints"), 1, dict(shared.state_dict()), {}, 1, ranks)
ranks.barrier()
stored = sum(len(load_file(file)[name].flatten()) for file in path.glob("*.safetensors") for name in load_file(file))
assert stored == sum(p.numel() for p in alone.parameters())
read = {name: torch.zeros_like(t) for name, t in alone.state_dict().items()}
checkpoint.latest(Path("checkpoints"))[0].read(read)
assert all(torch.equal(t, alone.state_dict()[name]) for name, t in read.items())

# one step: gathered once, exchanged once, the gradient and its norm those of one process
held = sharding.Sharding.of(shared, ranks)
assert held.kept
with counted() as found, held.step():
    step(shared, held, every[rank])
    held.release()
for x in every:
    sum(terms(alone, x)).backward()
trained = weights.trainable(shared)
for name, p in alone.named_parameters():
    if p.requires_grad:
        got = trained[name].grad.full_tensor()
        assert torch.allclose(got, p.grad / 4, atol=1e-6), name
    else:
        assert shared.get_parameter(name).grad is None
norm = torch.nn.utils.get_total_norm([p.grad / 4 for p in alone.parameters() if p.grad is not None])
assert torch.allclose(Gradients(trained, ranks).norm(), norm)
size = sum(2 * -(-len(p) // 2) * p[0].numel() * 4 for p in alone.parameters())  # shards are padded to one size
moving = sum(2 * -(-len(p) // 2) * p[0].numel() * 4 for p in alone.parameters() if p.requires_grad)
assert found.gathered == size, (found, size)
assert found.reduced == moving + moving / 2, (found, moving)  # in the group, then a shard of it between groups

# nothing stays gathered
assert all(isinstance(p, DTensor) for p in shared.parameters())

# another copy of the weights is called without moving those that train, and they are what is called after it
other = {name: 2 * p.detach() for name, p in trained.items()}
twice = weights.called_with(Held(shared), trained, other, held)
with torch.no_grad():
    before = alone(every[0])
    doubled = Net()
    for name, p in doubled.named_parameters():
        p.mul_(2 if p.requires_grad else 1)
    for number in range(2):
        with held.step():
            assert torch.allclose(twice.transformer(every[0]), doubled(every[0]), atol=1e-6)
            assert torch.allclose(shared(every[0]), before, atol=1e-6)
            with counted() as again:
                twice.transformer(every[0])
            assert again.gathered == 0
    assert torch.allclose(twice.transformer(every[0]), doubled(every[0]), atol=1e-6)  # outside of a step, too
    assert torch.allclose(shared(every[0]), before, atol=1e-6)
    assert all(isinstance(p, DTensor) for name, p in shared.named_parameters() if name.startswith("blocks"))
ranks.barrier()
'''


def test_a_step_gathers_once_and_exchanges_once_in_both_groups(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    done = ended(*forks.ranks(*[("ranks.py",)] * 4, cwd=tmp_path))
    assert done.status == 0, done.err


@pytest.fixture
def network() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False, dtype=torch.bfloat16))
    made[1].requires_grad_(False)
    return made


def test_what_stays_gathered_is_weights_gradients_and_copies(network):
    weights, trained = 16 * 4 + 32 * 2, 16 * 4
    assert sharding.kept_bytes(network) == weights + trained
    assert sharding.kept_bytes(network, copies=2) == weights + 3 * trained
    assert sharding.kept_bytes(network.to("meta")) == weights + trained


@pytest.mark.parametrize(
    ("gather", "kept", "free", "expected"),
    [("auto", 4, 8, True), ("auto", 5, 8, False), ("step", 9, 8, True), ("term", 1, 8, False)],
)
def test_memory_decides_unless_a_key_does(gather, kept, free, expected):
    assert sharding.keeps(gather, kept, free) is expected


def test_a_network_that_is_whole_is_left_alone(network):
    held = sharding.Sharding(network)
    with held.step():
        held.exchange(False)
        assert held.gathered({}) is None
    held.release()
    assert not held.kept
