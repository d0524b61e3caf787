"""The optimizer of a running stage: its steps, on whole weights or on shards, and its state in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import define

from corefit.errors import ConfigError, TrainingError
from corefit.train import weights
from corefit.types.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

STATE, GROUP = "optimizer/", "optimizer_group/"
"""What names in a checkpoint begin with: of the state of one weight, and of the state of the optimizer as a whole."""
Stored = Mapping[str, tuple[tuple[int, ...], "torch.dtype"]]
"""Maps the name of each tensor in a checkpoint to its shape and dtype."""


@define(eq=False)
class Steps:
    """Takes the optimizer's steps, and names the tensors of its state.

    keys       what the stage says of the optimizer
    trainable  the weights that train, by name
    seen       what the optimizer is given in their place: themselves, or where they are sharded, the local shards
    """

    keys: Optimizer
    trainable: weights.Trainable
    seen: Mapping[str, Parameter]
    made: torch.optim.Optimizer

    @staticmethod
    def of(keys: Optimizer, trainable: weights.Trainable) -> Steps:
        """Make the optimizer of the weights that train; ConfigError if they are sharded and it needs whole ones."""
        from torch.nn import Parameter

        if keys.shards == "no" and any(map(is_sharded, trainable.values())):
            raise ConfigError(f"optimizer: {type(keys).__name__} needs whole weights, and these are sharded")
        seen = {n: Parameter(weights.local([p])[0]) if is_sharded(p) else p for n, p in trainable.items()}
        return Steps(keys, trainable, seen, keys.make(seen))

    def set_rate(self, rate: float) -> None:
        """Give the optimizer the learning rate of the step that begins."""
        for group in self.made.param_groups:
            group["lr"] = rate

    def take(self, unchanged: Tensor) -> None:
        """Take a step with the gradients, and drop them; where `unchanged` (bool []), no weight changes."""
        for name, p in self.trainable.items():
            seen = self.seen[name]
            if seen is not p:
                seen.data = weights.local([p])[0]
                seen.grad = None if p.grad is None else weights.local([p.grad])[0]
        self.keys.step(self.made, unchanged)
        for p in (*self.trainable.values(), *self.seen.values()):
            p.grad = None

    def missing_bytes(self) -> float:
        """Return the bytes of state that the first step will allocate; nothing once it is there."""
        return 0.0 if self.made.state else sum(map(self.keys.state_bytes, self.seen.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by the names that it has in checkpoints; a number becomes a tensor [] of 64 bits."""
        of_weights = {
            self._name(key, name, value): self._whole(name, value)
            for name, seen in self.seen.items()
            for key, value in self.made.state[seen].items()
        }
        return {**of_weights, **{f"{GROUP}{number}/{key}": _tensor(v) for number, key, v in self._of_groups()}}

    def slots(self, stored: Stored) -> dict[str, Tensor]:
        """Return tensors into which a checkpoint's state is read; what torch would make in the first step is made.

        Raises TrainingError for a state that belongs to the shards of another number of processes.
        """
        self._refuse_other_shards(stored)
        found: dict[str, Tensor] = {}
        for full, (shape, dtype) in stored.items():
            place = self._place(full)
            if place is None:
                continue
            holder, key, name = place
            if not _is_number(shape, dtype) or _is_tensor(holder.get(key)):
                holder[key] = self._made(holder.get(key), name, shape, dtype)
                found[full] = self._whole(name, holder[key])
            else:
                found[full] = _tensor(0).to(dtype)
        return found

    def restore(self, slots: Mapping[str, Tensor]) -> None:
        """Put the numbers among the `slots`, which are filled by now, into the state."""
        for full, tensor in slots.items():
            place = self._place(full)
            assert place, "the slots are of this state"
            holder, key, _ = place
            if not _is_tensor(holder.get(key)):
                holder[key] = tensor.item()

    def _of_groups(self) -> Iterator[tuple[int, str, Any]]:
        """Yield (number of the group, key, value) of what steps change in `param_groups`, besides the learning rate."""
        for number, group in enumerate(self.made.param_groups):
            for key, value in group.items():
                changed = isinstance(value, (int, float)) and value != self.made.defaults.get(key, value)
                if key not in ("params", "lr") and (_is_tensor(value) or changed):
                    yield number, key, value

    def _place(self, full: str) -> tuple[dict[str, Any], str, str] | None:
        """Return the dict that holds what has this name in a checkpoint, its key there, and the name of the weight.

        None is returned for what is no state of the optimizer, and for a piece that belongs to another rank's shard.
        """
        if full.startswith(GROUP):
            number, _, key = full.removeprefix(GROUP).partition("/")
            return self.made.param_groups[int(number)], key, ""
        if not full.startswith(STATE):
            return None
        key, _, name = full.removeprefix(STATE).partition("/")
        key, _, piece = key.partition("@")
        if piece and piece != _piece(self.trainable[name]):
            return None
        return self.made.state[self.seen[name]], key, name

    def _name(self, key: str, name: str, value: Any) -> str:
        """Return the name of one value of the state; what belongs to a shard names it, as in absmax@0of2."""
        p = self.trainable[name]
        by_shard = self.keys.shards == "blocks" and is_sharded(p) and _is_tensor(value)
        return f"{STATE}{key}@{_piece(p)}/{name}" if by_shard else f"{STATE}{key}/{name}"

    def _whole(self, name: str, value: Any) -> Tensor:
        """Return a value of the state as a tensor; a shard's own numbers as a shard of the whole (DTensor)."""
        from torch.distributed.tensor import DTensor

        p: Any = self.trainable.get(name)
        tensor = _tensor(value)
        if p is None or not is_sharded(p) or self.keys.shards == "blocks" or not tensor.ndim:
            return tensor
        shape, stride = p.shape, p.stride()
        local = tensor.view(self.seen[name].shape)
        return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)

    def _made(self, held: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return what the state holds already, or a tensor for what is stored with this shape."""
        import torch

        if _is_tensor(held) or not name:
            return held
        p = self.seen[name]
        own = is_sharded(self.trainable[name]) and self.keys.shards == "numbers" and shape
        return torch.zeros(p.shape if own else shape, dtype=dtype, device=p.device)

    def _refuse_other_shards(self, stored: Stored) -> None:
        """Raise TrainingError where the state was stored by shards and there are now other ones, or none."""
        pieces = {n.partition("/")[2].partition("/")[0].partition("@")[2] for n in stored if n.startswith(STATE)}
        before = {int(piece.partition("of")[2]) for piece in pieces if piece}
        now = {int(_piece(p).partition("of")[2]) for p in self.trainable.values() if is_sharded(p)}
        if self.keys.shards == "blocks" and before != now:
            were, are = (f"{n.pop()} shards" if n else "whole weights" for n in (before, now))
            raise TrainingError(
                f"optimizer: the state of {type(self.keys).__name__} in the checkpoint is of {were}, and these are "
                f"{are}; its blocks of numbers cannot be cut anew: run with the 'shard' and the number of processes "
                "that the stage began with"
            )


def is_sharded(tensor: Any) -> bool:
    """Return whether each process holds a shard of a tensor (DTensor)."""
    return hasattr(tensor, "device_mesh")


def _piece(parameter: Any) -> str:
    """Return which of how many shards this process holds, such as "0of2"."""
    index, number = 0, 1
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            size = parameter.device_mesh.size(dim)
            index, number = index * size + parameter.device_mesh.get_local_rank(dim), number * size
    return f"{index}of{number}"


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _tensor(value: Any) -> Tensor:
    """Return a tensor itself, and a number as a tensor [] of 64 bits."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _is_number(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether what is stored like this was a number in the state."""
    import torch

    return not shape and dtype in (torch.int64, torch.float64)
