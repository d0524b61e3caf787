"""Who may import whom, and how large a piece may be. Read from the syntax trees; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / "corefit/templates").rglob("*.py"))
CORE = sorted({*(ROOT / "corefit").rglob("*.py")} - {*TEMPLATES})
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
FIRST_PARTY = {path.name for path in (ROOT / "plugins").glob("*/corefit_*")}

LAYERS = (
    {"text"},
    {"flow", "errors", "rng", "memory", "display", "signals", "completion"},
    {"ranks", "blame", "disk"},
    {"types", "mds", "report", "order", "curate"},
    {"digests"},
    {"state"},
    {"objective"},
    {"hookspecs", "contract"},
    {"rewards"},
    {"corefit"},  # the package itself: the names that plugins import
    {"samplers", "noise", "sources", "plugins", "buckets"},
    {"builtin", "rollout", "stage", "config", "listing", "testing", "data"},
    {"encode", "survey"},
    {"exhausted"},
    {"evaluate", "cache", "weights", "observers", "meters"},
    {"gradients"},
    {"train", "pipeline", "fake", "agreement"},
    {"identity", "prepare", "estimate", "schema"},
    {"plan", "show", "new"},
    {"run"},
    {"cli"},
    {"__main__"},
)
"""A module imports from the lines above its own, never from its own or from below. A new one gets a place here."""
UPWARD = {("pipeline", "run")}
"""Pipeline.run, inside the method: a pipeline that was read can be run."""
OFFERED = {
    "corefit",
    "corefit.errors",
    "corefit.rewards",
    "corefit.flow",
    "corefit.rng",
    "corefit.rollout",
    "corefit.testing",
    "corefit.types",
}
"""What plugins may import of the core; submodules included."""
ONLY = {
    "streaming": {"mds"},
    "accelerate": {"ranks"},
    "filelock": {"disk"},
    "peft": {"weights", "testing"},
    "diffusers": {"testing"},
    "transformers": {"testing"},
}
"""Packages that only these modules of the core import."""
FILE, FUNCTION = 400, 60
"""Lines of a file, blank ones not counted, and of a function's body, docstring not counted."""


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    """Of the core: the file's name, a folder's for what is in it."""
    first = path.relative_to(ROOT / "corefit").parts[0].removesuffix(".py")
    return "corefit" if first == "__init__" else first


@cache
def imports(path: Path) -> frozenset[str]:
    """Whole names of what a file imports when it runs, in functions too, `if TYPE_CHECKING:` left out."""
    return frozenset(_imports(ast.parse(path.read_text())))


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative imports hide who imports whom"
        yield from (_named(str(node.module), alias.name) for alias in node.names)
    children = node.orelse if _for_types(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from _imports(child)


def _named(package: str, name: str) -> str:
    """`from corefit import cache` is the module; `from corefit import Batch` is the package."""
    folder = ROOT / package.replace(".", "/") / name
    return f"{package}.{name}" if folder.is_dir() or folder.with_suffix(".py").exists() else package


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_has_one_place():
    placed = [name for layer in LAYERS for name in layer]
    assert len(placed) == len(set(placed))
    assert {module(path) for path in CORE} == set(placed)


@pytest.mark.parametrize("path", CORE, ids=short)
def test_core_imports_downwards(path):
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    mine = module(path)
    used = {name.removeprefix("corefit.").partition(".")[0] for name in imports(path) if top(name) == "corefit"}
    upward = {other for other in used - {mine} if height[other] >= height[mine] and (mine, other) not in UPWARD}
    assert not upward, f"{short(path)} imports {upward}"


@pytest.mark.parametrize("path", CORE, ids=short)
def test_core_names_no_plugin(path):
    assert not {top(name) for name in imports(path)} & FIRST_PARTY
    named = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not named & {*FIRST_PARTY, "soar", "flow_grpo", "sd3"}


@pytest.mark.parametrize("path", CORE, ids=short)
def test_core_leaves_packages_to_one_module(path):
    wrong = {name for name in imports(path) if module(path) not in ONLY.get(top(name), {module(path)})}
    assert not wrong, f"{short(path)} imports {wrong}"


@pytest.mark.parametrize("path", PLUGINS, ids=short)
def test_plugins_import_what_is_offered_and_no_other_plugin(path):
    own = path.relative_to(ROOT / "plugins").parts[1]
    assert not {top(name) for name in imports(path)} & (FIRST_PARTY - {own})
    core = {name for name in imports(path) if top(name) == "corefit"}
    wrong = {name for name in core if name != "corefit" and ".".join(name.split(".")[:2]) not in OFFERED}
    assert not wrong, f"{short(path)} imports {wrong}"


@pytest.mark.parametrize("path", [path for path in TEMPLATES if path.parent.name != "tests"], ids=short)
def test_what_is_written_for_others_imports_what_is_offered(path):
    assert not {top(name) for name in imports(path)} & FIRST_PARTY
    wrong = {name for name in imports(path) if top(name) == "corefit" and name != "corefit" and name not in OFFERED}
    assert not wrong, f"{short(path)} imports {wrong}"


@pytest.mark.parametrize("path", [*CORE, *PLUGINS, *TEMPLATES], ids=short)
def test_nothing_heavy_is_imported_with_a_module(path):
    """What every start of the command line would pay for is imported inside functions, or with a few late modules."""
    heavy = {"torch", "diffusers", "transformers", "streaming", "accelerate", "peft", "matplotlib", "huggingface_hub"}
    if {"report", "train", "run", "experts", "tests"} & {path.stem, path.parent.name}:
        return
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {top(name) for node in body for name in _imports(node)} & heavy


@pytest.mark.parametrize("path", [*CORE, *PLUGINS, *TEMPLATES], ids=short)
def test_no_shape_is_assumed(path):
    """`like(sigma, x)` serves images, video and tokens; a list of ones in a view serves one of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("view", "reshape")
        ):
            assert not ast.unparse(node).endswith("(-1, 1, 1, 1)"), f"{short(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [*CORE, *PLUGINS, *TEMPLATES], ids=short)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) < FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert (node.end_lineno or 0) - body[0].lineno < FUNCTION, f"{short(path)}:{node.lineno} {node.name}"
