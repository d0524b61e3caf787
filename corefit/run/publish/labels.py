"""What an exported file says of itself in its header, in the terms of ModelSpec."""

from __future__ import annotations

from pathlib import Path

from corefit.run.publish import metadata
from corefit.run.publish.metadata import SPEC
from corefit.run.publish.names import name_of_base
from corefit.run.publish.output import Output
from corefit.types import Backbone, Specified

ALPHA = frozenset({"lora_adapter_metadata", f"{SPEC}usage_hint", "ss_network_alpha"})
"""What no longer holds once alpha is in the weights."""


def of_model(output: Output, backbone: Backbone) -> dict[str, str]:
    """Return the metadata of a file with the whole transformer, in the names of the original code."""
    found = {
        f"{SPEC}sai_model_spec": metadata.VERSION,
        f"{SPEC}architecture": _architecture(backbone),
        f"{SPEC}description": f"{name_of_base(output.tables)}, trained by corefit",
        **_described(output),
    }
    return {key: str(value) for key, value in found.items() if value}


def of_difference(output: Output, backbone: Backbone, rank: int) -> dict[str, str]:
    """Return the metadata of a LoRA that approximates what training changed."""
    architecture = _architecture(backbone)
    found = {
        f"{SPEC}sai_model_spec": metadata.VERSION,
        f"{SPEC}architecture": architecture and f"{architecture}/lora",
        f"{SPEC}description": f"The difference of weights trained by corefit from {name_of_base(output.tables)}",
        "ss_network_module": "peft",
        "ss_network_dim": rank,
        "ss_network_alpha": float(rank),
        **_described(output),
    }
    return {key: str(value) for key, value in found.items() if value}


def of_lora(output: Output, *, folded: bool) -> dict[str, str]:
    """Return the metadata of the file in which the stage saved its LoRA.

    folded  whether alpha is in the weights now
    """
    assert output.lora, "the stage trained all weights"
    saved = metadata.read(next(iter(sorted(output.lora.glob("*.safetensors")))))
    if not folded:
        return saved
    rank = {"ss_network_alpha": f"{float(saved['ss_network_dim'])}"} if "ss_network_dim" in saved else {}
    trigger = saved.get(f"{SPEC}trigger_phrase")
    hint = {f"{SPEC}usage_hint": f"Trigger word: {trigger}"} if trigger else {}
    return {key: value for key, value in saved.items() if key not in ALPHA} | rank | hint


def stamp(file: Path, found: dict[str, str]) -> None:
    """Add metadata to a file that nobody reads yet, and a hash of its tensors."""
    part = file.with_name(f".{file.name}.stamped")
    metadata.write(file, part, {**metadata.read(file), **found})
    part.replace(file)


def _described(output: Output) -> dict[str, object]:
    return metadata.described(output.tables, output.stage) if "size" in output.tables.get("data", {}) else {}


def _architecture(backbone: Backbone) -> str | None:
    return backbone.model_spec().get(f"{SPEC}architecture") if isinstance(backbone, Specified) else None
