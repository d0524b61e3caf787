"""What the file of a LoRA says of itself: the metadata that diffusers, ComfyUI's front ends and kohya's tools read.

diffusers reads `lora_adapter_metadata`, which the backbone has written. The keys `modelspec.*` are those of Stability
AI's ModelSpec 1.0.1, and `ss_*` those of kohya's sd-scripts. A date is left out, so that a stage that was killed and
trained on leaves the same bytes; so is `prediction_type`, whose values "epsilon" and "v" are not what a flow model
predicts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corefit.run.publish.names import mode_of, name_of_base, objectives_of, stage_table, title_of
from corefit.types import Backbone, Specified

SPEC, VERSION = "modelspec.", "1.0.1"
HASH = f"{SPEC}hash_sha256"
LENGTH = struct.Struct("<Q")
"""The first bytes of a safetensors file: the length of its JSON header."""
ALIGNED = 8
Tables = Mapping[str, Any]


def of_lora(tables: Tables, stage: str, backbone: Backbone, *, steps: int, examples: int) -> dict[str, str]:
    """Return the metadata of the LoRA of a stage, beside what the backbone has written.

    tables    the pipeline's, as Pipeline.record gives them
    steps     number of steps that the stage has taken
    examples  number of examples that it trained on
    """
    known = dict(backbone.model_spec()) if isinstance(backbone, Specified) else {}
    architecture = known.pop(f"{SPEC}architecture", None)
    found = {
        "format": "pt",
        f"{SPEC}sai_model_spec": VERSION,
        f"{SPEC}architecture": f"{architecture}/lora" if architecture else None,
        **known,
        **described(tables, stage),
        **_used(tables, stage),
        **_trained(tables, stage, examples),
        "ss_steps": steps,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items() if value}


def described(tables: Tables, stage: str) -> dict[str, Any]:
    """Return what ModelSpec has of a title, a license and a size; a value that is not known is None."""
    card, (height, width) = tables.get("card", {}), tables["data"]["size"][-2:]
    return {
        f"{SPEC}title": title_of(tables, stage),
        f"{SPEC}author": card.get("author"),
        f"{SPEC}license": card.get("license"),
        f"{SPEC}tags": ", ".join(card.get("tags", ())),
        f"{SPEC}resolution": f"{width}x{height}",
        f"{SPEC}trigger_phrase": tables["data"].get("trigger"),
    }


def _used(tables: Tables, stage: str) -> dict[str, Any]:
    """Return what ModelSpec has of the use of a LoRA."""
    trigger, mode = tables["data"].get("trigger"), mode_of(tables, stage)
    hints = [f"Trigger word: {trigger}"] if trigger else []
    if strength := strength_of(mode):
        hints.append(f"Set the strength to {strength:g} in programs that do not read lora_alpha, such as ComfyUI")
    objective = " + ".join(objectives_of(tables, stage))
    return {
        f"{SPEC}description": f"LoRA of {name_of_base(tables)}, trained by corefit with {objective}",
        f"{SPEC}usage_hint": "; ".join(hints),
    }


def strength_of(mode: Tables) -> float | None:
    """Return the strength at which a program that ignores alpha must apply a LoRA, None where that is 1."""
    scale = (mode.get("alpha") or mode["rank"]) / mode["rank"]
    return None if scale == 1 else scale


def _trained(tables: Tables, stage: str, examples: int) -> dict[str, Any]:
    """Return what kohya's tools show of training. Keys that change speed and rounding alone are left out."""
    settings, mode, trigger = stage_table(tables, stage), mode_of(tables, stage), tables["data"].get("trigger")
    optimizer, (height, width) = settings["optimizer"], tables["data"]["size"][-2:]
    return {
        "ss_network_module": "peft",
        "ss_network_dim": mode["rank"],
        "ss_network_alpha": float(mode.get("alpha") or mode["rank"]),
        "ss_network_args": {"target_modules": list(mode["targets"])} if mode.get("targets") else None,
        "ss_output_name": f"{tables['name']}-{stage}",
        "ss_sd_model_name": name_of_base(tables),
        "ss_num_train_images": examples,
        "ss_max_train_steps": settings["steps"],
        "ss_total_batch_size": settings.get("batch"),
        "ss_learning_rate": optimizer["lr"],
        "ss_optimizer": optimizer.get("use", "AdamW"),
        "ss_lr_scheduler": optimizer["schedule"],
        "ss_lr_warmup_steps": optimizer["warmup"],
        "ss_max_grad_norm": settings["max_grad_norm"],
        "ss_resolution": f"({width}, {height})",
        "ss_seed": str(tables["seed"]),
        "ss_tag_frequency": {"corefit": {trigger: examples}} if trigger else None,
    }


# safetensors files


def read(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    with file.open("rb") as opened:
        return _header(opened).get("__metadata__", {})


def is_ours(key: str) -> bool:
    """Return whether `of_lora` writes a key of metadata, or would if it were known."""
    return key.startswith((SPEC, "ss_")) or key == "format"


def stamp(folder: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata to the safetensors files of a folder that nobody reads yet, and a hash of the tensors to each."""
    for file in sorted(folder.glob("*.safetensors")):
        part = file.with_name(f".{file.name}.part")
        write(file, part, {**read(file), **metadata})
        part.replace(file)


def write(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with other metadata, sorted by key, so that equal tensors give equal bytes."""
    with source.open("rb") as opened, target.open("wb") as written:
        header = _header(opened)
        start = opened.tell()
        digest = hashlib.file_digest(opened, "sha256").hexdigest()  # of the rest of the file: all tensors
        header["__metadata__"] = dict(sorted({**metadata, HASH: f"0x{digest}"}.items()))
        text = json.dumps({"__metadata__": header.pop("__metadata__"), **header}, ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNED)
        written.write(LENGTH.pack(len(text)) + text)
        opened.seek(start)
        shutil.copyfileobj(opened, written, 1 << 24)
        written.flush()
        os.fsync(written.fileno())


def _header(opened: Any) -> dict[str, Any]:
    (length,) = LENGTH.unpack(opened.read(LENGTH.size))
    return json.loads(opened.read(length))
