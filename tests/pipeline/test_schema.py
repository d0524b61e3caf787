"""`corefit schema`: it accepts what corefit accepts, and underlines what corefit refuses."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from jsonschema import Draft202012Validator

from corefit.pipeline.schema import schema
from corefit.plugins.host import Host

ROOT = Path(__file__).parents[2]


def validator(project: Project, *files: str) -> Draft202012Validator:
    ended = project.main("schema", *files)
    assert ended.status == 0, ended.err
    described = json.loads(ended.out)
    Draft202012Validator.check_schema(described)
    return Draft202012Validator(described)


def problems(made: Draft202012Validator, text: str) -> list[Any]:
    return list(made.iter_errors(tomllib.loads(text)))


def test_good_pipelines_are_good(project: Project) -> None:
    assert problems(validator(project, "bright.py"), project.text) == []
    digits = ROOT / "examples" / "digits"
    made = validator(project, str(digits / "digits.py"))
    for name in ("pipeline", "two_rewards"):
        assert problems(made, (digits / f"{name}.toml").read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("steps = 2", "stepps = 2"),
        ("steps = 2", "steps = 'two'"),
        ('use = "sd3"', 'use = "sd4"'),
        ("points = 2", "point = 2"),
        ("rank = 2", "ranks = 2"),
        ("weight = 1.0", "normalize = 'group'"),
        ("size = [16, 16]", "size = 16"),
        ('name = "soar"', ""),
    ],
)
def test_what_corefit_refuses_is_underlined(project: Project, old: str, new: str) -> None:
    assert old in project.text
    assert problems(validator(project, "bright.py"), project.text.replace(old, new, 1))


def test_a_plugins_keys_are_in_it(project: Project) -> None:
    said = project.main("schema").out
    assert '"const": "flow_grpo"' in said
    assert '"const": "bright"' not in said
    assert '"const": "bright"' in project.main("schema", "bright.py").out


def test_a_kind_of_which_nothing_is_installed_is_no_fault_of_the_schema() -> None:
    host = Host()
    for kind in ("observers", "rewards"):
        host.offers[kind].clear()
    Draft202012Validator.check_schema(schema(host))


def tables(described: Any) -> Iterator[dict[str, Any]]:
    """Every table in a schema, at any depth."""
    if isinstance(described, dict):
        if "properties" in described:
            yield described
        described = list(described.values())
    if isinstance(described, list):
        for inner in described:
            yield from tables(inner)


def test_every_key_has_a_description_and_what_it_is_by_default(project: Project) -> None:
    described = json.loads(project.main("schema", "bright.py").out)
    keys = [(table, name, key) for table in tables(described) for name, key in table["properties"].items()]
    assert len(keys) > 100
    undescribed = {(table["title"], name) for table, name, key in keys if not {"const", "description"} & key.keys()}
    assert {title for title, _ in undescribed} <= {"Bright"}, "a plugin of the tests, without docstrings"
    stage = described["properties"]["stage"]["items"]["properties"]
    assert stage["steps"]["description"].endswith(".")
    assert stage["optimizer"]["default"]["betas"] == [0.9, 0.999]
    assert described["properties"]["backbone"]["anyOf"][0]["properties"]["train"]["default"] == {"use": "full"}
    assert "default" not in stage["name"]
    assert "default" not in stage["ema"]


def test_defaults_are_values_that_the_schema_accepts(project: Project) -> None:
    described = json.loads(project.main("schema").out)
    for table in tables(described):
        for name, key in table["properties"].items():
            if "default" in key:
                assert Draft202012Validator(key).is_valid(key["default"]), (table["title"], name)
