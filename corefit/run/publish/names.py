"""Names of a run's pipeline, read from its tables as Pipeline.record gives them, without its plugins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corefit.pipeline.card import HUB_NAME
from corefit.pipeline.pipeline import BASE

Tables = Mapping[str, Any]
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""The folder that huggingface_hub caches a model in."""


def stage_table(tables: Tables, stage: str) -> Tables:
    """Return the table of a stage."""
    return next(each for each in tables["stage"] if each["name"] == stage)


def mode_of(tables: Tables, stage: str) -> Tables:
    """Return the `train` table of a stage: its own, or that of [backbone]."""
    return stage_table(tables, stage).get("train") or tables["backbone"].get("train") or {"use": "full"}


def objectives_of(tables: Tables, stage: str) -> list[str]:
    """Return the `use` of a stage's objective, or of each term of a sum of them."""
    objective: Tables = stage_table(tables, stage)["objective"]
    terms: list[Tables] = objective["of"] if objective["use"] == "sum" else [objective]
    return [str(each["use"]) for each in terms]


def lineage_of(tables: Tables, stage: str) -> list[str]:
    """Return the names of the stages whose training is in the weights of `stage`, which is the last."""
    names = [BASE, *(each["name"] for each in tables["stage"])]
    found, name = list[str](), stage
    while name != BASE:
        found.insert(0, name)
        name = stage_table(tables, name).get("from") or names[names.index(name) - 1]
    return found


def title_of(tables: Tables, stage: str) -> str:
    """Return the title of a stage's model."""
    return tables.get("card", {}).get("title") or f"{tables['name']} {stage}"


def hub_name_of_base(tables: Tables) -> str | None:
    """Return the base's name on the hub, if it is known: from [card], or from the path of [backbone].

    Where the transformer is read from a file of its own, the path says nothing about it.
    """
    named, path = tables.get("card", {}).get("base_model"), str(tables["backbone"].get("path", ""))
    if tables["backbone"].get("transformer"):
        return named
    cached = next((found for part in Path(path).parts if (found := CACHED.fullmatch(part))), None)
    if named or cached is None:
        return named or _hub_name(path)
    return f"{cached[1]}/{cached[2]}"


def _hub_name(path: str) -> str | None:
    """Return the path of [backbone] if it is no folder; those are seen from the run's folder, and begin with `..`."""
    return path if re.fullmatch(HUB_NAME, path) and not path.startswith(".") else None


def name_of_base(tables: Tables) -> str:
    """Return the base's name on the hub, or else the last name of its folder or file."""
    backbone = tables["backbone"]
    file = Path(backbone.get("transformer") or "").stem
    return hub_name_of_base(tables) or file or Path(backbone.get("path", BASE)).name
