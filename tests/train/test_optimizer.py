"""Optimizers: as their libraries step, left out on the device, and continued to the bit, sharded or not."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import bitsandbytes
import forks
import prodigyopt
import pytest
import torch
from attrs import evolve
from processes import ended
from torch import Tensor, nn
from training import Heard, trained, worst
from transformers.optimization import Adafactor as TransformersAdafactor

from corefit.errors import Stopped, TrainingError
from corefit.train.optimizer import Steps
from corefit.types import AdamW, Optimizer
from corefit.types.stage import Full, Lora
from corefit_optimizers import Adafactor, AdamW8bit, Muon, PagedAdamW8bit, Prodigy

GO = torch.tensor(False)


def network() -> nn.Sequential:
    """Matrices with moments in 8 bits and in float32, biases, and a convolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 72), nn.Tanh(), nn.Linear(72, 12), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 2, 2)
    )


def backward(net: nn.Module, step: int) -> None:
    torch.manual_seed(100 + step)
    (net(torch.randn(16, 64)) - 3).square().mean().backward()


def steps_of(keys: Optimizer, net: nn.Module) -> Steps:
    return Steps.of(keys, dict(net.named_parameters()))


def two_kinds(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    shared = {"lr": 1e-2, "weight_decay": 0.1}
    matrices, rest = [p for p in weights if p.ndim == 2], [p for p in weights if p.ndim != 2]
    return [
        torch.optim.Muon(matrices, **shared, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, **shared, fused=True),
    ]


PRODIGY: Mapping[str, Any] = {"weight_decay": 0.1, "d0": 1e-3, "d_coef": 0.5}
LIBRARIES: Mapping[str, tuple[Optimizer, Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]]] = {
    "adamw": (AdamW(lr=1e-2), lambda w: [torch.optim.AdamW(w, 1e-2, weight_decay=1e-2, fused=True)]),
    "adamw8bit": (
        AdamW8bit(lr=1e-2, betas=(0.8, 0.95)),
        lambda w: [bitsandbytes.optim.AdamW8bit(w, 1e-2, (0.8, 0.95), weight_decay=1e-2)],
    ),
    "paged_adamw8bit": (
        PagedAdamW8bit(lr=1e-2),
        lambda w: [bitsandbytes.optim.PagedAdamW8bit(w, 1e-2, weight_decay=1e-2)],
    ),
    "adafactor": (
        Adafactor(lr=1e-2, beta1=0.5, weight_decay=0.1),
        lambda w: [
            TransformersAdafactor(w, 1e-2, beta1=0.5, weight_decay=0.1, scale_parameter=False, relative_step=False)
        ],
    ),
    "muon": (Muon(lr=1e-2, momentum=0.9, weight_decay=0.1), two_kinds),
    "prodigy": (Prodigy(**PRODIGY), lambda w: [prodigyopt.Prodigy(w, **PRODIGY)]),
    "prodigy as Adam": (
        Prodigy(**PRODIGY, use_bias_correction=True, safeguard_warmup=True, growth_rate=1.5),
        lambda w: [prodigyopt.Prodigy(w, **PRODIGY, use_bias_correction=True, safeguard_warmup=True, growth_rate=1.5)],
    ),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", LIBRARIES)
def test_it_steps_as_its_library_does(name: str) -> None:
    keys, library = LIBRARIES[name]
    ours, theirs = network(), network()
    steps = steps_of(keys, ours)
    with redirect_stdout(io.StringIO()):  # prodigyopt prints that it decays weights
        made = library(list(theirs.parameters()))
    for step in range(6):
        backward(ours, step)
        backward(theirs, step)
        steps.take(GO)
        for each in made:
            each.step()
            each.zero_grad()
    found, expected, start = (dict(net.named_parameters()) for net in (ours, theirs, network()))
    assert worst(found, expected) <= (1e-6 if "prodigy" in name else 0)
    assert min(float((p - start[n]).detach().abs().max()) for n, p in found.items()) > 1e-3


@pytest.mark.parametrize("keys", [AdamW(lr=1e-2), AdamW8bit(lr=1e-2), Muon(lr=1e-2), Prodigy()], ids=type)
def test_a_step_that_is_left_out_leaves_the_state_too(keys: Optimizer) -> None:
    net = network()
    steps = steps_of(keys, net)
    for step in range(3):
        backward(net, step)
        before = {name: t.clone() for name, t in steps.tensors().items() if "/step/" not in name}
        next(net.parameters()).grad[0] = float("nan")  # pyright: ignore[reportOptionalSubscript]
        steps.take(torch.tensor(True))
        assert all(torch.equal(before[name], t) for name, t in steps.tensors().items() if name in before)
        backward(net, step)
        steps.take(GO)


STAGES = [(AdamW8bit(lr=1e-3, smallest=256), Full()), (Prodigy(), Lora(rank=2))]


@pytest.mark.parametrize(("keys", "mode"), STAGES, ids=["adamw8bit", "prodigy"])
def test_a_stopped_stage_ends_in_the_same_bits(job: Any, keys: Optimizer, mode: Any) -> None:
    whole, parts = (job(None, mode, steps=4, optimizer=keys) for _ in range(2))
    expected = trained(whole)
    stops = iter([False, True])
    with pytest.raises(Stopped):
        trained(evolve(parts, listener=Heard(asked=lambda: next(stops))))
    assert worst(expected, trained(parts)) == 0


SHARDS = """
import sys
from pathlib import Path

import torch
from torch import nn

from corefit.system.ranks import Layout, join
from corefit.train import checkpoint, sharding
from corefit.train.optimizer import Steps
from corefit.types import AdamW
from corefit_optimizers import AdamW8bit

ranks = join("fp32", Layout(shard=True))
keys = {"AdamW": AdamW(lr=1e-2), "AdamW8bit": AdamW8bit(lr=1e-2, smallest=256)}[sys.argv[1]]

def started():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 73), nn.Linear(73, 1), nn.Linear(1, 3))
    sharding.shard(net, ranks.device)
    return net, Steps.of(keys, dict(net.named_parameters()))

def train(net, steps, numbers):
    for number in numbers:
        torch.manual_seed(number)
        net(torch.randn(8, 64)).square().mean().backward()
        steps.take(torch.tensor(number == 1))

def tensors(net, steps):
    return {**{f"weights/{name}": p for name, p in net.named_parameters()}, **steps.tensors()}

whole, before, after = started(), started(), started()
train(*whole, range(4))
train(*before, range(2))
checkpoint.save(Path("."), 2, tensors(*before), {}, 2, ranks)
found, damaged = checkpoint.latest(Path("."), ranks)
net, steps = after
slots = steps.slots(found.stored())
found.read({**{f"weights/{name}": p for name, p in net.named_parameters()}, **slots})
steps.restore(slots)
train(net, steps, range(2, 4))
one, other = tensors(*whole), tensors(*after)
same = one.keys() == other.keys() and all(torch.equal(*sharding.local([one[name], other[name]])) for name in one)
moved = not torch.equal(*sharding.local([next(before[0].parameters()), next(net.parameters())]))
print("the same" if same and moved else [same, moved])
"""


@pytest.mark.parametrize("keys", [AdamW(), AdamW8bit(smallest=256)], ids=["numbers", "blocks"])
def test_shards_end_in_the_same_bits(keys: Optimizer, tmp_path: Path) -> None:
    """Two processes with shards of the weights, some of them empty."""
    (tmp_path / "shards.py").write_text(SHARDS)
    done = ended(*forks.ranks(*[("shards.py", type(keys).__name__)] * 2, cwd=tmp_path))
    assert done.status == 0, done.err
    assert done.out.count("the same") == 2, done.out
    if keys.shards == "blocks":
        with pytest.raises(TrainingError, match="is of 2 shards, and these are whole weights"):
            steps_of(keys, network()).slots({"optimizer/absmax1@0of2/0.weight": ((1,), torch.float32)})


WHOLE = """
from pathlib import Path

import torch
from torch import nn

from corefit.system.ranks import join
from corefit.train import checkpoint
from corefit.train.optimizer import Steps
from corefit_optimizers import Adafactor, AdamW8bit

ranks = join("fp32")
every = {"AdamW8bit": AdamW8bit(lr=1e-2, smallest=256), "Adafactor": Adafactor(lr=1e-2)}

def started(keys):
    torch.manual_seed(ranks.rank)  # DDP takes the weights of rank 0
    net = nn.Sequential(nn.Linear(64, 73), nn.Linear(73, 3))
    return ranks.accelerator.prepare_model(net), Steps.of(keys, dict(net.named_parameters()))

def train(net, steps, numbers):
    for number in numbers:
        torch.manual_seed(10 * number + ranks.rank)
        net(torch.randn(8, 64)).square().mean().backward()
        steps.take(torch.tensor(number == 1))

def tensors(net, steps):
    return {**{f"weights/{name}": p for name, p in net.module.named_parameters()}, **steps.tensors()}

for name, keys in every.items():
    whole, before, after = started(keys), started(keys), started(keys)
    train(*whole, range(4))
    train(*before, range(2))
    if ranks.main:
        checkpoint.save(Path(name), 2, tensors(*before), {}, 2)
    ranks.barrier()
    found, damaged = checkpoint.latest(Path(name), ranks)
    net, steps = after
    slots = steps.slots(found.stored())
    found.read({**{f"weights/{name}": p for name, p in net.module.named_parameters()}, **slots})
    steps.restore(slots)
    train(net, steps, range(2, 4))
    one, other = tensors(*whole), tensors(*after)
    same = one.keys() == other.keys() and all(torch.equal(one[each], other[each]) for each in one)
    sums = ranks.all_gather_object([p.detach().double().sum().item() for p in net.module.parameters()])
    moved = not torch.equal(*(next(each.parameters()) for each in (before[0], net)))
    print(name, "the same" if same and moved and sums[0] == sums[1] else [same, moved, sums])
"""


def test_whole_weights_end_in_the_same_bits_on_two_processes(tmp_path: Path) -> None:
    """With DDP: weights are equal on both, and what goes on from a checkpoint ends as what went on by itself."""
    (tmp_path / "whole.py").write_text(WHOLE)
    done = ended(*forks.ranks(("whole.py",), ("whole.py",), cwd=tmp_path))
    assert done.status == 0, done.err
    for name in ("AdamW8bit", "Adafactor"):
        assert done.out.count(f"{name} the same") == 2, done.out


def test_in_bf16_each_gradient_is_rounded_and_their_sum_is_not() -> None:
    """What a term adds to a weight's gradient is in bfloat16, so there is nothing for a key to save."""
    layer, added = nn.Linear(64, 64), list[Tensor]()
    layer.weight.register_hook(added.append)
    for term in range(3):
        torch.manual_seed(term)
        with torch.autocast("cpu", torch.bfloat16):
            total = layer(torch.randn(32, 64)).square().mean()
        total.backward()
    assert all(torch.equal(each, each.bfloat16().float()) for each in added)
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.stack(added).sum(0))
    assert not torch.equal(layer.weight.grad, layer.weight.grad.bfloat16().float())
