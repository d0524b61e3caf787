"""check_optimizer trains a few weights with an optimizer, without a network, as the trainer does."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from attrs import evolve

from corefit.testing.checks import expect, normal
from corefit.testing.keys import check_keys
from corefit.testing.syncs import watched
from corefit.train.optimizer import Steps
from corefit.types import Optimizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

SHAPES: Mapping[str, tuple[int, ...]] = {
    "matrix": (96, 80),
    "small": (6, 5),
    "vector": (7,),
    "convolution": (4, 3, 2, 2),
    "zeros": (8, 4),
}
"""Weights that train; the last one starts at 0, as the factor B of a LoRA does."""
RATE = 1e-2
FIXED = 8192
"""Bytes of the state that belong to no weight."""


def check_optimizer(optimizer: Optimizer, *, waits: bool = False) -> None:
    """Raise an AssertionError that names the problem unless `optimizer` does what `corefit.types.Optimizer` says.

    A step must go against the gradient, by the learning rate that the trainer sets; a step that is left out must change
    no weight; a stage that is stopped and continued must end in the same bits; the state must take as many bytes as
    `state_bytes` says.

    waits  whether `step` may make the host wait for the device, as the default does
    """
    with _named(optimizer):
        check_keys(type(optimizer), Optimizer)
        optimizer.check()
        shards = type(optimizer).shards
        expect(shards in ("no", "numbers", "blocks"), f'shards is {shards!r}; it is "no", "numbers" or "blocks"')
        tried = evolve(optimizer, lr=max(optimizer.lr, RATE))
        _check_direction(tried)
        _check_rate(tried)
        _check_left_out(tried)
        _check_continued(tried)
        _check_state(tried)
        if not waits:
            _check_syncs(tried)


@contextmanager
def _named(optimizer: Optimizer) -> Generator[None]:
    """Put the name of the optimizer's class before the message of an AssertionError."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{type(optimizer).__name__}: {error}") from error


def _started(optimizer: Optimizer) -> Steps:
    from torch.nn import Parameter

    weights: dict[str, Parameter] = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        drawn = normal(seed, shape).float()
        weights[name] = Parameter(drawn * 0 if name == "zeros" else drawn)
    steps = Steps.of(optimizer, weights)
    steps.set_rate(optimizer.lr)
    given = [id(p) for group in steps.made.param_groups for p in group["params"]]
    expect(
        sorted(given) == sorted(map(id, weights.values())),
        "make() returns an optimizer whose param_groups do not hold each parameter once; pass all of them on",
    )
    return steps


def _take(steps: Steps, number: int, *, unchanged: bool = False) -> None:
    """Take a step with gradients that depend on its number; NaN and infinite ones where no weight may change."""
    import torch

    for seed, parameter in enumerate(steps.trainable.values()):
        parameter.grad = normal(100 * number + seed, parameter.shape).float()
        if unchanged:
            parameter.grad[0], parameter.grad[-1] = float("nan"), float("inf")
    steps.take(torch.tensor(unchanged))


def _copied(steps: Steps) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in steps.trainable.items()}


def _check_direction(optimizer: Optimizer) -> None:
    """Check that a first step moves every weight, and against its gradient."""
    steps = _started(optimizer)
    before = _copied(steps)
    _take(steps, 1)
    for seed, (name, parameter) in enumerate(steps.trainable.items()):
        moved = parameter.detach() - before[name]
        shape = list(SHAPES[name])
        expect(bool(parameter.isfinite().all()), f"a step makes a weight of shape {shape} not finite")
        expect(bool(moved.any()), f"a step leaves a weight of shape {shape} as it is; train all parameters")
        along = float((moved * normal(100 + seed, parameter.shape)).sum())
        expect(along < 0, f"a step moves a weight of shape {shape} along its gradient, not against it")
        expect(parameter.grad is None, "a gradient is left after a step")


def _check_rate(optimizer: Optimizer) -> None:
    """Check that the learning rate that is set in `param_groups` is used."""
    steps = _started(optimizer)
    before = _copied(steps)
    steps.set_rate(0.0)
    _take(steps, 1)
    still = all(p.detach().equal(before[name]) for name, p in steps.trainable.items())
    expect(still, 'weights move where group["lr"] is 0: read it in each step, or the schedule has no effect')


def _check_left_out(optimizer: Optimizer) -> None:
    """Check that a step with gradients that are not finite changes no weight, now or later."""
    for first in (0, 2):
        steps = _started(optimizer)
        for number in range(first):
            _take(steps, number)
        before = _copied(steps)
        _take(steps, 7, unchanged=True)
        same = all(p.detach().equal(before[name]) for name, p in steps.trainable.items())
        expect(same, f"step {first + 1} changes weights although `unchanged` is true; see corefit.types.step_each")
        _take(steps, 8)
        finite = all(bool(p.isfinite().all()) for p in steps.trainable.values())
        expect(finite, "NaN of a step that was left out is in the state: a later step makes weights not finite")


def _check_continued(optimizer: Optimizer) -> None:
    """Check that what a checkpoint holds of the state is all of it."""
    whole, stopped, continued = (_started(optimizer) for _ in range(3))
    for number in range(4):
        _take(whole, number)
    for number in range(2):
        _take(stopped, number)
    stored = {name: tensor.clone() for name, tensor in stopped.tensors().items()}
    for name, parameter in continued.trainable.items():
        parameter.data.copy_(stopped.trainable[name].detach())
    slots = continued.slots({name: (tuple(t.shape), t.dtype) for name, t in stored.items()})
    for name, slot in slots.items():
        slot.copy_(stored[name])
    continued.restore(slots)
    for number in range(2, 4):
        _take(continued, number)
    same = all(p.equal(whole.trainable[name]) for name, p in continued.trainable.items())
    expect(
        same,
        "a stage that is stopped after two steps and continued ends in other weights: keep all state as tensors and "
        "numbers in `state` of each parameter and in `param_groups`",
    )


def _check_state(optimizer: Optimizer) -> None:
    """Check that `state_bytes` is what the state takes, and that a state by numbers has the shapes of its weights."""
    import torch

    steps = _started(optimizer)
    _take(steps, 1)
    held: dict[int, int] = {}
    for name, parameter in steps.trainable.items():
        for key, value in steps.made.state[parameter].items():
            if isinstance(value, torch.Tensor):
                held[value.data_ptr()] = value.nbytes
                expect(
                    type(optimizer).shards != "numbers" or not value.ndim or value.shape == parameter.shape,
                    f"the state {key!r} of a weight of shape {list(SHAPES[name])} has the shape {list(value.shape)}; "
                    'with shards = "numbers" it has a number for each of the weight',
                )
    found, said = sum(held.values()), sum(map(optimizer.state_bytes, steps.trainable.values()))
    expect(
        abs(found - said) <= 0.02 * found + FIXED,
        f"state_bytes says {said:.0f} bytes for weights whose state takes {found}; `corefit check` relies on it",
    )


def _check_syncs(optimizer: Optimizer) -> None:
    """Check that a step reads no gradient, weight or state on the host."""
    import torch

    steps, unchanged = _started(optimizer), torch.tensor(False)
    _take(steps, 1)
    for seed, parameter in enumerate(steps.trainable.values()):
        parameter.grad = normal(seed, parameter.shape).float()
    grads = [p.grad for p in steps.trainable.values()]
    with watched([grads, list(steps.trainable.values()), steps.tensors(), unchanged]) as reads:
        steps.take(unchanged)
    reads.expect_none(
        "Keep what is computed from gradients in tensors, and leave a step out with corefit.types.step_each or "
        "torch.where; pass waits=True if it is meant"
    )
