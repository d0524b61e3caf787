"""What a stage holds of each kind, in bytes or in rows: what its keys and its objective say."""

from __future__ import annotations

from typing import Any

from attrs import evolve, has

from corefit.types import Offloading, SizedDecoder
from corefit.types.objective import Supervised, moving_copies, reads_media, weighted_objectives
from corefit.types.stage import Stage

MOMENT = 4
"""Bytes of a number of AdamW's moments."""


def weights(backbone: Any, gpu: bool) -> float:
    """Return the bytes of a blank backbone's weights that are on the device, buffers included.

    Weights that wait in main memory are on the device, too, where that is none but main memory.
    """
    if gpu and isinstance(backbone, Offloading) and backbone.offloads:
        return float(backbone.resident_bytes())
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


def copies_wait(stage: Stage, gpu: bool) -> bool:
    """Return whether the copies are in main memory, and not on the device."""
    return gpu and stage.copies == "cpu"


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


def graph_rows(objective: Any, backbone: Any) -> int:
    """Return how many rows a term's graph has for each row of a micro-batch; a distilled network is guided by one."""
    if backbone.distilled:
        return loss_rows(objective)
    return max(one.value.rows_per_graph for one in weighted_objectives(objective))


def loss_rows(objective: Any) -> int:
    """Return how many rows a term's loss has for each row of a micro-batch: guidance has none of its own."""
    each = [one.value for one in weighted_objectives(objective)]
    return max((evolve(one, guidance=1.0) if _is_guided(one) else one).rows_per_graph for one in each)


def _is_guided(objective: Any) -> bool:
    return has(type(objective)) and getattr(objective, "guidance", None) is not None


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
    every = blocks(network)
    inside = {id(p) for block in every for p in block.parameters()}
    rest = sum(_gathered(p) for p in network.parameters() if id(p) not in inside)
    return 2 * max((sum(map(_gathered, block.parameters())) for block in every), default=0.0) + rest


def blocks(network: Any) -> list[Any]:
    """Return the items of a network's outermost ModuleLists."""
    from torch import nn

    lists = {name: m for name, m in network.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for each in outer for block in each]


def _gathered(parameter: Any) -> float:
    return parameter.numel() * (parameter.element_size() + (MOMENT if parameter.requires_grad else 0))
