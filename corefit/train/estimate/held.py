"""What a stage holds of each kind, in bytes or in rows: what its keys and its objective say."""

from __future__ import annotations

from typing import Any

from corefit.types import Offloading, SizedDecoder
from corefit.types.objective import Supervised, moving_copies, reads_media
from corefit.types.stage import Stage

MOMENT = 4
"""Bytes of a number of AdamW's moments."""


def weights(backbone: Any) -> float:
    """Return the bytes of a blank backbone's weights that are on the device, buffers included."""
    if isinstance(backbone, Offloading) and backbone.offloads:
        return backbone.resident_bytes()
    return whole_weights(backbone)


def whole_weights(backbone: Any) -> float:
    """Return the bytes of all of a blank backbone's weights, buffers included."""
    network = backbone.transformer
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


def numbers(network: Any) -> int:
    """Return how many numbers a network has; weights in fewer bits are packed, and their layer says how many."""
    packed = {
        id(m.weight): m.out_features * m.in_features
        for m in network.modules()
        if hasattr(m, "bits") and hasattr(m, "out_features")
    }
    scales = {id(m.scale) for m in network.modules() if hasattr(m, "bits") and getattr(m, "scale", None) is not None}
    return sum(packed.get(id(p), p.numel()) for p in network.parameters() if id(p) not in scales)


def optimizer(stage: Stage, parameter: Any) -> float:
    """Return the bytes that a stage's optimizer keeps for a parameter."""
    state_bytes = getattr(stage.optimizer, "state_bytes", None)
    return state_bytes(parameter) if state_bytes else 2.0 * MOMENT * parameter.numel()


def copies(stage: Stage) -> int:
    """Return how many copies of the weights that train there are: an average, the reference, moving copies."""
    return (stage.ema is not None) + ("reference" in stage.objective.uses) + len(moving_copies(stage.objective))


def copies_on_cpu(stage: Stage) -> bool:
    """Return whether the copies are in main memory."""
    return getattr(stage, "copies", None) == "cpu"


def samples(objective: Any) -> bool:
    """Return whether an objective samples media while it trains."""
    return bool({"sampler", "stochastic", "reward", "reward_gradient"} & objective.uses)


def media(objective: Any) -> int:
    """Return how many latents a row of a batch has."""
    further = sum(name.startswith("media:") for name in objective.uses)
    return int(reads_media(objective)) + further


def rollout_latents(objective: Any) -> int:
    """Return how many latents an objective keeps of each row's rollout while it trains on a batch."""
    told = getattr(objective, "latents_per_row", None)
    return (0 if isinstance(objective, Supervised) else 2) if told is None else told


def copies_conditions(objective: Any) -> int:
    """Return how many times the conditions of a batch are copied into an objective's parts."""
    return 0 if isinstance(objective, Supervised) else 1


def guided_rows(objective: Any, backbone: Any) -> int:
    """Return how many rows a call of the network has for each row that an objective samples."""
    return 1 if backbone.distilled or getattr(objective, "guidance", 4.5) == 1 else 2


def decoder_of(backbone: Any) -> Any:
    """Return a blank VAE; None where the backbone does not say what it is."""
    return backbone.load_blank_decoder() if isinstance(backbone, SizedDecoder) else None


def two_blocks(network: Any) -> float:
    """Return the bytes of two of the largest blocks, gathered, and of all that is in no block.

    Of a block that computes its backward the gradients are whole, too.
    """
    from torch import nn

    lists = {name: m for name, m in network.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [block for each in outer for block in each]
    largest = max((_whole(block) for block in blocks), default=0.0)
    inside = {id(p) for block in blocks for p in block.parameters()}
    rest = sum(_gathered(p) for p in network.parameters() if id(p) not in inside)
    return 2 * largest + rest


def _whole(module: Any) -> float:
    return sum(_gathered(p) for p in module.parameters())


def _gathered(parameter: Any) -> float:
    return parameter.numel() * (parameter.element_size() + (MOMENT if parameter.requires_grad else 0))
