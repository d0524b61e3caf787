"""The parts of docs/ that come from the code agree with it, and everything in the code that belongs there is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import attrs
import generate
import messages
import pytest
import torch
from reading import DOCS, GENERATED, KINDS_OF_PAGES, PAGES, ROOT, anchors, by_hand, name, prose

import corefit
import corefit.testing
from corefit.cli import cli
from corefit.pipeline import Data, Eval, Full, Lora, Optimizer, Pipeline, Stage
from corefit.pipeline.meanings import meanings
from corefit.plugins import KINDS
from corefit.plugins.host import HOOKS
from corefit.rollout.samplers import Cps, DanceSde, FlowSde
from corefit.types import key_of
from corefit_backbones import schedule

PAGE_OF = {key: kind.word for key, kind in KINDS.items()}
TABLES = (Pipeline, Data, Stage, Optimizer, Full, Lora, Eval)
OFFERS = [offer for kind in KINDS for offer in generate.first_party(kind)]


@pytest.mark.parametrize("page", [page for page in PAGES if page != messages.PAGE], ids=name)
def test_generated_parts_are_as_the_code_is(page: Path) -> None:
    assert generate.filled(page).splitlines() == page.read_text().splitlines(), (
        f"{name(page)} differs from the code: run python docs/generate.py, then adapt what is written by hand around it"
    )


def test_every_error_message_has_its_cause() -> None:
    differences = messages.differences(messages.PAGE.read_text())
    assert not differences, differences


def test_the_noise_that_samplers_leave_is_as_the_page_says() -> None:
    """The std is that of the last step on each checkpoint's own grid; 512 and 1024 pixels are 1024 and 4096 patches."""
    euler = {"_class_name": schedule.EULER, "num_train_timesteps": 1000, "shift": 3.0}
    unipc = {"_class_name": schedule.UNIPC, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    flux = {**euler, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096}
    wans = [({**unipc, "flow_shift": shift}, 0) for shift in (3.0, 5.0)]
    columns = [(euler, 1024), (flux, 1024), (flux, 4096), *wans]
    samplers = {"flow_sde": FlowSde, "dance_sde": DanceSde, "cps": Cps}
    text = (DOCS / "plugins" / "sampler.md").read_text()
    rows = re.findall(r"^\| `(\w+)`, noise ([\d.]+) \| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert {row[0] for row in rows} == set(samplers)
    for use, noise, steps, told in rows:
        ends = [schedule.grid(c, int(steps), n, linear=c is flux)[-2:] for c, n in columns]
        zero = torch.zeros(1, 1)
        stds = [float(samplers[use](noise=float(noise)).step(zero, zero, s[:1], s[1:]).std) for s in ends]
        assert told.split(" | ") == [f"{std:.3f}" for std in stds]


def test_messages_are_found_in_all_forms() -> None:
    """Messages that are raised, made by a helper, yielded or returned are found, with short names of fields."""
    tree = ast.parse(
        'def _problems(x):\n    yield f"key {x.name!r}: bad"\n'
        "def f():\n"
        '    raise ConfigError(f"no {sorted(names)[0]} {near(a, b)}; there "\n        f"are: {join(x)}") from None\n'
        '    raise mds.damaged(file, "it is gone")\n    raise KeyError("not for users")\n'
        'def too_many(n):\n    return f"{len(n)} are too many"\n'
    )
    found = [text for _, text in sorted(messages._messages(tree))]
    assert found == [
        "key <name>: bad",
        "no <names> <did you mean>; there are: <x>",
        "it is gone",
        "<n> are too many",
    ]


def test_the_page_of_errors_keeps_its_causes_and_says_what_to_add() -> None:
    page = messages.rendered(messages.PAGE.read_text())
    assert messages.rendered(page) == page
    (file, message), cause = next(iter(messages.explained(page).items()))
    changed = page.replace(messages.entry(message, cause), messages.entry("old words", "Its cause."))
    differences = messages.differences(changed)
    assert f"add to docs/errors.md, section `{file}`:\n- `{message}`" in differences
    assert "no code says it now:\n  old words" in differences
    mended = messages.rendered(changed)
    assert messages.entry(message, messages.MISSING) in mended
    assert "old words" not in mended
    assert f"write the cause in docs/errors.md: {message}" in messages.differences(mended)


@pytest.mark.parametrize("cls", [*TABLES, *(offer.cls for offer in OFFERS)], ids=lambda cls: cls.__name__)
def test_every_key_has_a_meaning(cls: type) -> None:
    texts = meanings(cls)
    missing = [f.name for f in attrs.fields(cls) if f.init and not texts.get(f.name) and f.name != "train"]
    assert not missing, f"{cls.__name__}: write a docstring below {', '.join(missing)}"


def test_what_the_page_of_the_house_names_is_where_it_says() -> None:
    """`Loop.take_step` in [...](file): the class or function is defined in the file."""
    rows = re.findall(r"^\|.*?`([\w.]+)` in \[[^]]+\]\(([^)]+)\)", (DOCS / "house.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for named, file in rows:
        tree: ast.AST = ast.parse((DOCS / file).read_text())
        for part in named.split("."):
            children = {getattr(node, "name", ""): node for node in ast.iter_child_nodes(tree)}
            assert part in children, f"{file} has no {named}"
            tree = children[part]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_its_signature_on_one_page(hook: str) -> None:
    pages = [page.name for page in KINDS_OF_PAGES if f"<!-- generated: hook {hook} -->" in page.read_text()]
    kind = hook.removeprefix("corefit_")
    assert pages == [f"{PAGE_OF.get(kind, 'observer')}.md"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_lists_who_implements_it(kind: str) -> None:
    text = (DOCS / "plugins" / f"{PAGE_OF[kind]}.md").read_text()
    assert f"<!-- generated: offers {kind} -->" in text
    for offer in generate.first_party(kind):
        assert f"[`{offer.name}`](../configuration.md#" in text
        assert f"### {KINDS[kind].name} `{offer.name}`" in (DOCS / "configuration.md").read_text()


def test_every_key_of_every_offer_is_in_the_reference() -> None:
    text = (DOCS / "configuration.md").read_text()
    for offer in OFFERS:
        section = text.split(f"### {KINDS[offer.kind].name} `{offer.name}`\n")[1].split("\n#")[0]
        listed = re.findall(r"^\| `(\w+)` \|", section, re.M)
        assert listed == [key_of(f.name) for f in attrs.fields(offer.cls) if f.init]


@pytest.mark.parametrize("page", KINDS_OF_PAGES, ids=name)
def test_every_argument_is_explained(page: Path) -> None:
    """The text of a page names every attribute, method and argument of the declarations that it shows."""
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", prose(page)))))
    for block in GENERATED.finditer(page.read_text()):
        if block[1] in ("class", "hook"):
            code = re.search(r"```python\n(.*?)```", block[0], re.S)
            assert code is not None
            missing = _names(ast.parse(code[1])) - words
            assert not missing, f"{name(page)}: say what {', '.join(sorted(missing))} of {block[2]} is"


def _names(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found |= {a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]} - {"self"}
            found |= {node.name} if not node.name.startswith(("__", "corefit_")) else set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize("check", [name for name in corefit.testing.__all__ if name.startswith("check_")])
def test_every_check_is_on_a_page(check: str) -> None:
    assert any(f"{check}(" in by_hand(page) for page in KINDS_OF_PAGES)


def test_every_command_is_on_its_page() -> None:
    text = (DOCS / "cli.md").read_text()
    assert [command for command in cli.commands if f"\n## corefit {command}\n" not in text] == []


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    assert [
        name(p) for p in PAGES if p.name != "README.md" and f"({p.relative_to(DOCS).as_posix()})" not in index
    ] == []
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


def test_the_version_of_the_interface_is_the_one_there_is() -> None:
    for page in PAGES:
        for version in re.findall(r'COREFIT_API = "([\d.]+)"', page.read_text()):
            assert version == corefit.API_VERSION, name(page)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_links_and_anchors_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`\|", "", page.read_text(), flags=re.S)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)}: {target}"


def test_keys_of_the_migration_tables_exist() -> None:
    """`objective.points` in the second column is a key of an objective; `name`, without a dot, of the file."""
    offered = {
        group: {f.name for offer in OFFERS if offer.kind == kind for f in attrs.fields(offer.cls) if f.init}
        for group, kind in (
            ("backbone", "backbones"),
            ("source", "sources"),
            ("objective", "objectives"),
            ("sampler", "samplers"),
            ("noise", "noise_weightings"),
        )
    }
    own = {"": Pipeline, "data": Data, "stage": Stage, "optimizer": Optimizer, "eval": Eval}
    known = offered | {group: {f.name for f in attrs.fields(cls) if f.init} for group, cls in own.items()}
    known["backbone"].add("train")
    rows = re.findall(r"^\| [^|\n]+ \| ([^|\n]*) \|", prose(DOCS / "migrating.md"), re.M)
    keys = [key for row in rows for key in re.findall(r"`([a-z_.]+)`", row)]
    assert len(keys) > 60
    for key in keys:
        group, _, last = key.rpartition(".")
        assert last in known[group], key
