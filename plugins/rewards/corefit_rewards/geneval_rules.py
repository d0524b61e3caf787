"""GenEval's rules (arXiv 2310.11513): which objects count, and whether they are what a prompt's metadata ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from corefit.errors import DataError, near, short_repr
from corefit.types import Meta

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
SAME: Mapping[str, str] = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}
"""Names of COCO's classes that detectors use, and GenEval's names of the same."""


@frozen(eq=False)
class Found:
    """An object that a detector found.

    box   left, top, right and bottom edge, in pixels
    mask  its pixels, a bool array [H, W], or None from a detector of boxes
    """

    box: tuple[float, float, float, float]
    score: float
    mask: Any = None


@frozen
class Clause:
    """`count` objects of class `name`, of this color, and where they are relative to those of an earlier clause."""

    name: str
    count: int
    color: str = ""
    relation: str = ""
    target: int = -1


@frozen
class Wanted:
    """What a prompt asks for: all clauses of `include`, and none of `exclude`, which are met by `count` or more."""

    tag: str
    include: Sequence[Clause]
    exclude: Sequence[Clause] = field(default=())


Objects = Mapping[str, Sequence[Found]]
"""The objects of a picture by their class, the most certain first."""
Colors = Callable[[str, Sequence[Found]], Sequence[str]]
"""Names the color of each of several objects of a class."""


# what is asked for


def class_name(label: str) -> str:
    """Return GenEval's name of a class."""
    plain = " ".join(label.lower().replace("_", " ").split())
    return SAME.get(plain, plain)


def wanted(prompt: str, meta: Meta, known: Collection[str]) -> Wanted:
    """Read metadata in the form of GenEval's evaluation_metadata.jsonl; DataError names the prompt and what is wrong.

    known  the classes that the detector can find
    """
    try:
        tag = meta.get("tag")
        if not isinstance(tag, str):
            raise ValueError('have no "tag", such as "counting"')
        include = _clauses(meta.get("include") or (), known)
        if not include:
            raise ValueError('have no "include", a list such as [{"class": "dog", "count": 1}]')
        return Wanted(tag, include, _clauses(meta.get("exclude") or (), known))
    except ValueError as error:
        raise DataError(
            f"reward 'geneval': the metadata of {short_repr(prompt)} {error}; they must be as in GenEval's "
            "evaluation_metadata.jsonl"
        ) from None


def _clauses(entries: Any, known: Collection[str]) -> list[Clause]:
    if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"have {short_repr(entries)} where a list of objects is expected")
    return [_clause(entry, number, known) for number, entry in enumerate(entries)]


def _clause(entry: Mapping[str, Any], number: int, known: Collection[str]) -> Clause:
    """Read an entry of a list; ValueError says what is wrong. `number` is its place, before which targets are."""
    name, count, color, position = (entry.get(key) for key in ("class", "count", "color", "position"))
    if not isinstance(name, str) or class_name(name) not in known:
        hint = near(class_name(name), known) if isinstance(name, str) else ""
        raise ValueError(f"ask for the class {short_repr(name)}, which the detector does not know{hint}")
    if type(count) is not int or count < 1:
        raise ValueError(f"have the count {short_repr(count)} of {name!r}, which is no positive whole number")
    if color is not None and color not in COLORS:
        raise ValueError(f"have the color {short_repr(color)}, which is none of {', '.join(COLORS)}")
    if position is None:
        return Clause(class_name(name), count, color or "")
    fine = isinstance(position, Sequence) and len(position) == 2
    relation, target = position if fine else ("", None)
    if relation not in RELATIONS or type(target) is not int or not 0 <= target < number:
        raise ValueError(
            f'have the position {short_repr(position)}, which is not like ["left of", 0]: one of '
            f"{', '.join(RELATIONS)}, and the number of an earlier entry"
        )
    return Clause(class_name(name), count, color or "", relation, target)


# what was found


def most_certain(found: Sequence[Found], threshold: float, most: int, overlap: float) -> list[Found]:
    """Return the objects of one class that count, the most certain first.

    threshold  objects must be more certain than this
    most       how many there are at most
    overlap    an object that overlaps a more certain one by at least this (the area of the intersection divided by that
               of the union) is the same object; 1 for objects that never are
    """
    certain = sorted((one for one in found if one.score > threshold), key=lambda one: -one.score)
    kept: list[Found] = []
    for one in certain[:most]:
        if overlap >= 1 or all(shared_area(one.box, other.box) < overlap for other in kept):
            kept.append(one)
    return kept


def shared_area(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the intersection of two boxes, as a share of their union; both edges of a box belong to it."""
    first, last = map(max, one[:2], other[:2]), map(min, one[2:], other[2:])
    both = _area([*first, *last])
    union = _area(one) + _area(other) - both
    return both / union if union else 0.0


def _area(box: Sequence[float]) -> float:
    left, top, right, bottom = box
    return max(right - left + 1, 0) * max(bottom - top + 1, 0)


def relations(one: Sequence[float], other: Sequence[float], threshold: float) -> set[str]:
    """Return where one box is relative to another, by their centers; empty if they are too close.

    threshold  the share of both sizes by which the centers must be apart, in x or in y
    """
    apart = [(one[i] + one[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(one[i + 2] - one[i]) + abs(other[i + 2] - other[i]) for i in (0, 1)]
    clear = [math.copysign(max(abs(d) - threshold * size, 0), d) for d, size in zip(apart, sizes, strict=True)]
    if all(abs(d) < 1e-3 for d in clear):
        return set()
    x, y = (d / math.hypot(*apart) for d in clear)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


# the score


def is_correct(objects: Objects, what: Wanted, colors: Colors, threshold: float, *, strict: bool = False) -> bool:
    """Return whether a picture shows what is asked for.

    Color and position are looked for in the most certain objects, as many as are asked for.

    threshold  that of `relations`
    strict     whether more objects than asked for are wrong; `exclude`, which says the same of some, is not read then
    """
    groups: list[Sequence[Found] | None] = []
    for clause in what.include:
        found = objects.get(clause.name, ())
        found = found if strict else found[: clause.count]
        fine = (
            len(found) == clause.count
            and _right_colors(found, clause, colors) == clause.count
            and _in_position(found, clause, groups, threshold)
        )
        groups.append(found if fine else None)
    excluded = not strict and any(len(objects.get(clause.name, ())) >= clause.count for clause in what.exclude)
    return None not in groups and not excluded


def share(objects: Objects, what: Wanted, colors: Colors, threshold: float) -> float:
    """Return how much of what is asked for a picture shows, from 0 to 1 (Flow-GRPO, section 4.1).

    Each clause adds 1 - |found - count| / count, at least 0, for its objects. If it asks for a color, it adds the share
    of objects that have it, and if for a position, 1 or 0; both only if the number of objects is right, and the
    position only if the colors are, too. The result is the mean.
    """
    parts: list[float] = []
    groups: list[Sequence[Found] | None] = []
    for clause in what.include:
        found = objects.get(clause.name, ())
        parts.append(max(0.0, 1 - abs(clause.count - len(found)) / clause.count))
        fine = len(found) == clause.count
        if not fine and (clause.color or clause.relation):
            parts.append(0.0)
        if fine and clause.color:
            right = _right_colors(found, clause, colors)
            parts.append(right / clause.count)
            fine = right == clause.count
        if fine and clause.relation:
            fine = _in_position(found, clause, groups, threshold)
            parts.append(float(fine))
        groups.append(found if fine else None)
    return sum(parts) / len(parts)


def _right_colors(found: Sequence[Found], clause: Clause, colors: Colors) -> int:
    """Return how many of the objects have the clause's color, or all if it asks for none."""
    return list(colors(clause.name, found)).count(clause.color) if clause.color else len(found)


def _in_position(
    found: Sequence[Found], clause: Clause, groups: Sequence[Sequence[Found] | None], threshold: float
) -> bool:
    """Return whether each object is where it should be, relative to each target; False if the target is wrong."""
    if not clause.relation:
        return True
    targets = groups[clause.target]
    return targets is not None and all(
        clause.relation in relations(one.box, target.box, threshold) for one in found for target in targets
    )
