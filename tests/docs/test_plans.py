"""The plans of docs/memory.md are those that `corefit check --fit` finds now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import plans
import pytest

KEPT: Mapping[str, Any] = {each["task"]: each for each in json.loads(plans.FILE.read_text())}
QUICK = "Wan2.1-T2V-14B, SOAR LoRA"
TASKS = {task.name: task for task in plans.tasks()}


def test_there_is_a_plan_for_each_model_and_task() -> None:
    assert set(KEPT) == set(TASKS)
    for each in KEPT.values():
        room = 0.9 * TASKS[each["task"]].gpus[1] * 2**30
        assert each["fits"] == (max(each["phases"].values()) <= room)


def test_no_plan_trains_something_else() -> None:
    for each in KEPT.values():
        assert not [key for key in each["keys"] if key.startswith("backbone.train")], each["task"]


def test_what_a_plan_takes_is_what_is_estimated_now() -> None:
    compare(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name != QUICK])
def test_what_every_plan_takes_is_what_is_estimated_now(name: str) -> None:
    compare(name)


def compare(name: str) -> None:
    kept = KEPT[name]
    found = plans.figures(TASKS[name], kept["keys"])
    assert found["phases"] == pytest.approx(kept["phases"], rel=0.03)  # other versions of torch keep a little more
    assert found["host"] == pytest.approx(kept["host"], rel=0.03)
