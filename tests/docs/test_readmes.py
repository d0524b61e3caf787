"""The READMEs tell the truth: their blocks run, their names exist, their links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import attrs
import pytest
import yaml

import corefit
from corefit.cli import cli
from corefit.plugins import Host
from corefit.plugins.host import HOOKS
from corefit.testing import check_objective

ROOT = Path(__file__).parents[2]
OTHERS = {".venv", ".venv-ci", "node_modules", "build"}
PAGES = sorted(
    p
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")
    for p in ROOT.rglob(name)
    if not OTHERS & {*p.relative_to(ROOT).parts}
)
README = (ROOT / "README.md").read_text()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_plugin_of_the_readme_is_a_plugin(tmp_path):
    plugin, check = blocks(README, "python")
    (tmp_path / "huber.py").write_text(plugin)
    host = Host()
    host.add_file(tmp_path / "huber.py")
    huber = host.get("objectives", "huber")
    exec(check, {"Huber": huber, "check_objective": check_objective})


def test_the_pipeline_of_the_readme_is_one(project):
    text, data = blocks(README, "toml")
    tables = tomllib.loads(text)
    assert tables["stage"][0]["objective"]["use"] == "soar"
    project.write(text.replace("stabilityai/stable-diffusion-3.5-medium", "./base"))
    said = project.main("check", "pipeline.toml", "--set", "data.size=[16, 16]")
    assert said.status == 0, said.err
    start, end = project.text.index("[data]"), project.text.index("[[stage]]")
    source = 'source = { use = "jsonl", path = "train.jsonl" }'
    data = data.replace('source = { use = "imagefolder", path = "pictures" }', source)
    project.write(project.text[:start] + data + project.text[end:])
    said = project.main("check", "pipeline.toml", "--set", "data.size=[32, 32]")
    assert said.status == 0, said.err


def test_commands_of_the_readme_exist():
    for command in re.findall(r"corefit (\w+) (?=[a-z/.]*pipeline\.toml)", README):
        assert command in cli.commands
    assert (ROOT / "examples/digits/pipeline.toml").exists()


def test_the_citation_agrees_with_the_project():
    """Fields that the Citation File Format 1.2.0 requires, and what must be as it is elsewhere."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert cited["message"]
    assert cited["title"].startswith(project["name"])
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in project["authors"]]
    assert cited["version"] == corefit.__version__
    assert cited["license"] == project["license"]
    assert cited["repository-code"] == project["urls"]["Repository"]


def test_weaknesses_are_reported_at_the_repository():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert f"({urls['Repository']}/security/" in (ROOT / "SECURITY.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_file_tree_is_the_tree():
    tree = next(block for block in blocks(README, "text") if "loop.py" in block)
    rooms: set[str] = set()
    for name, said in re.findall(r"^  (\w+/|\w+\.py) +(.*)$", tree, re.MULTILINE):
        here = ROOT / "corefit" / name if name.endswith("/") else ROOT / "corefit"
        rooms |= {name.strip("/"), *(re.findall(r"\w+\.py", said) if name.endswith(".py") else [])}
        assert all((here / file).is_file() for file in re.findall(r"\w+\.py", said)), name
        assert all((here / folder).is_dir() for folder in re.findall(r"\w+/", said)), name
    top = {
        path.name for path in (ROOT / "corefit").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert top - rooms == {"__init__.py", "__main__.py", "samplers.py"}, "the last is an alias"
    for folder in re.findall(r"^(\w[\w/]*/) ", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_every_hook_is_in_the_readme():
    assert [hook for hook in HOOKS if hook not in README] == []


@pytest.mark.parametrize("name", ["soar", "flow_grpo", "sft", "dpo", "online_dpo", "reward_gradient", "nft", "awm"])
def test_every_key_of_an_objective_is_in_its_readme(name):
    page = (ROOT / "plugins" / name.removeprefix("online_") / "README.md").read_text()
    for field in attrs.fields(Host().get("objectives", name)):
        assert f"`{field.name}`" in page, field.name


@pytest.mark.parametrize("name", ["geneval", "jpeg_size", "ocr", "sharpness", "vlm_judge"])
def test_every_key_of_a_reward_is_in_its_readme(name):
    page = (ROOT / "plugins" / "rewards" / "README.md").read_text()
    assert f"`{name}`" in page
    for field in attrs.fields(Host().get("rewards", name)):
        assert f"`{field.name}`" in page, field.name
