"""Write the prompts of the study: heldout.jsonl, which nothing is chosen on, and validation.jsonl, for all choices.

    python prompts.py

The pairs and positions are combinations that no training scene shows; so few combinations of the other categories are
held out that those are taken which training may show. No arrangement of things is in both files. No pair and no
position has the words of a prompt in ../digits/heldout.jsonl, on which the settings of the digits example were chosen;
some have its things in the other order, and the singles are the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "digits"))

from digits import RELATIONS, Scene, held_out_prompts, scenes  # noqa: E402

HELD_OUT = {"two": 200, "position": 200, "counting": 90, "colours": 110, "single": 30}
VALIDATION = {"two": 60, "position": 60, "counting": 40, "colours": 40, "single": 30}


def arrangement(scene: Scene) -> object:
    """What two prompts have in common if they ask for the same things in the same places."""
    if not scene.relation:
        return sorted(scene.things)
    turned = scene.relation in RELATIONS[1::2]
    things = scene.things[::-1] if turned else scene.things
    return things, scene.relation in RELATIONS[:2]


def choose(rng: np.random.Generator) -> Iterator[tuple[str, Scene]]:
    """Yield ("heldout" or "validation", scene) for all rows of both files, each category in an order of its own."""
    used = {row["prompt"] for row in held_out_prompts()}
    for category in HELD_OUT:
        held_out = category in ("two", "position")
        free = [scene for scene in scenes(category, held_out) if not held_out or scene.prompt not in used]
        groups: dict[str, list[Scene]] = {}
        for index in rng.permutation(len(free)):
            groups.setdefault(repr(arrangement(free[index])), []).append(free[index])
        wanted = {"validation": VALIDATION[category], "heldout": HELD_OUT[category]}
        for group in groups.values():
            name = "validation" if wanted["validation"] > 0 else "heldout"
            for scene in group[: wanted[name]]:
                yield name, scene
            wanted[name] -= len(group)
        assert wanted["heldout"] <= 0, f"too few scenes of {category}"


def main() -> None:
    rng = np.random.Generator(np.random.Philox(15))
    rows: Mapping[str, list[Scene]] = {"heldout": [], "validation": []}
    for name, scene in choose(rng):
        rows[name].append(scene)
    for name, found in rows.items():
        mixed = [found[index] for index in rng.permutation(len(found))]
        lines = [json.dumps({"prompt": scene.prompt, **scene.meta}) for scene in mixed]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
