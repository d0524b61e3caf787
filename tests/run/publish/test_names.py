"""Names in a run's pipeline."""

from __future__ import annotations

import pytest

from corefit.pipeline import read
from corefit.run.publish import names

STAGES = [
    {"name": "soar", "objective": {"use": "soar"}},
    {"name": "grpo", "objective": {"use": "sum", "of": [{"use": "flow_grpo"}, {"use": "sft", "weight": 0.1}]}},
    {"name": "other", "from": "base", "objective": {"use": "sft"}, "train": {"use": "lora", "rank": 2}},
]
TABLES = {"name": "r", "backbone": {"path": "../../base", "train": {"use": "full"}}, "stage": STAGES}


def test_stages_and_their_objectives():
    assert names.objectives_of(TABLES, "grpo") == ["flow_grpo", "sft"]
    assert names.lineage_of(TABLES, "grpo") == ["soar", "grpo"]
    assert names.lineage_of(TABLES, "other") == ["other"]
    assert names.mode_of(TABLES, "other")["rank"] == 2
    assert names.mode_of(TABLES, "grpo") == {"use": "full"}


@pytest.mark.parametrize(
    ("path", "named", "hub", "shown"),
    [
        ("../../base", None, None, "base"),
        ("../../base", "org/base", "org/base", "org/base"),
        ("org/model-1.0", None, "org/model-1.0", "org/model-1.0"),
        ("../../hub/models--org--model-1.0/snapshots/0123", None, "org/model-1.0", "org/model-1.0"),
    ],
)
def test_the_base(path, named, hub, shown):
    tables = {**TABLES, "backbone": {"path": path}, "card": {"base_model": named} if named else {}}
    assert names.hub_name_of_base(tables) == hub
    assert names.name_of_base(tables) == shown


def test_a_sum_of_objectives_is_written_as_it_is_read_here(project):
    """What a pipeline records of a sum has the form that is expected above."""
    old = 'objective = { use = "soar", points = 2 }'
    project.swap((old, 'objective = { use = "sum", of = [{ use = "soar" }, { use = "sft", weight = 0.5 }] }'))
    assert names.objectives_of(read(project.file).record(), "soar") == ["soar", "sft"]
