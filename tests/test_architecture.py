"""Who may import whom, and how large a piece may be. Read from the syntax trees; nothing is imported.

Each rule is one test over all files, and names every file that breaks it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / "corefit/cli/templates").rglob("*.py"))
CORE = sorted({*(ROOT / "corefit").rglob("*.py")} - {*TEMPLATES})
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
FIRST_PARTY = {path.name for path in (ROOT / "plugins").glob("*/corefit_*")}

FLOORS = (
    {"errors", "flow", "rng"},
    {"system", "types"},
    {"rollout", "data"},
    {"plugins", "samplers"},
    {"pipeline"},
    {"train"},
    {"run", "testing"},
    {"cli"},
    {"__main__"},
)
"""The rooms of corefit/. A room imports from the floors below its own, never from its own floor or from above."""
FACE = "__init__"
"""The package itself hands on what plugins import; it may name types and plugins, and core code asks it for nothing
but versions."""
MOST_ENTRIES = 14
"""Modules and folders at the top of corefit/, beside __init__, __main__ and py.typed."""
OFFERED = {
    "corefit",
    "corefit.errors",
    "corefit.flow",
    "corefit.rng",
    "corefit.rollout",
    "corefit.samplers",
    "corefit.testing",
    "corefit.types",
}
"""What plugins may import of the core; submodules included."""
ONLY = {
    "streaming": {"data/mds"},
    "accelerate": {"system/ranks"},
    "filelock": {"system/files"},
    "fsspec": {"data/sources/remote"},
    "peft": {"train/weights", "testing"},
    "diffusers": {"testing"},
    "transformers": {"testing"},
}
"""Packages that only these modules or rooms of the core import."""
FILE, FUNCTION = 400, 60
"""Lines of a file, blank ones not counted, and of a function's body, docstring not counted."""


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def place(path: Path) -> str:
    """A file of the core as seen from corefit/: "train/loop"."""
    return path.relative_to(ROOT / "corefit").with_suffix("").as_posix()


def room(name: str) -> str:
    """The room of "train/loop", or of "corefit.train.loop"; a module at the top is one by itself."""
    return name.removeprefix("corefit.").replace(".", "/").partition("/")[0]


@cache
def imports(path: Path, *, types: bool = False) -> frozenset[str]:
    """Whole names of what a file imports, in functions too; `if TYPE_CHECKING:` is left out unless types=True."""
    return frozenset(_imports(ast.parse(path.read_text()), types))


def _imports(node: ast.AST, types: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative imports hide who imports whom"
        yield from (_named(str(node.module), alias.name) for alias in node.names)
    children = node.orelse if _for_types(node) and not types else ast.iter_child_nodes(node)
    for child in children:
        yield from _imports(child, types)


def _named(package: str, name: str) -> str:
    """`from corefit.train import loop` is the module; `from corefit import Batch` is the package."""
    folder = ROOT / package.replace(".", "/") / name
    return f"{package}.{name}" if folder.is_dir() or folder.with_suffix(".py").exists() else package


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def top(name: str) -> str:
    return name.partition(".")[0]


def of_core(path: Path) -> set[str]:
    """The modules of the core that a file imports, for types too."""
    return {name for name in imports(path, types=True) if name.startswith("corefit.")}


def test_the_house_has_few_rooms_and_each_has_its_floor():
    rooms = {room(place(path)) for path in CORE} - {FACE}
    assert rooms == set().union(*FLOORS)
    assert len(rooms - {"__main__"}) <= MOST_ENTRIES
    assert len(FLOORS) < 10


def test_rooms_import_downwards():
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{short(path)} imports {name}"
        for path in CORE
        for name in sorted(of_core(path))
        if room(place(path)) != FACE
        and room(name) != room(place(path))
        and height[room(name)] >= height[room(place(path))]
    ]
    assert wrong == []


def test_no_files_import_each_other():
    """Imports for types count: who needs another's type to be understood needs the other."""
    files = {module(path): path for path in CORE}
    graph = {name: [found for used in of_core(path) if (found := _file(used, files))] for name, path in files.items()}
    try:
        TopologicalSorter({name: set(used) - {name} for name, used in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def module(path: Path) -> str:
    return f"corefit.{place(path).replace('/', '.')}".removesuffix(".__init__")


def _file(name: str, files: Mapping[str, Path]) -> str | None:
    return name if name in files else None


def test_core_names_no_plugin():
    wrong: list[str] = []
    for path in CORE:
        named = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        found = {top(name) for name in imports(path)} & FIRST_PARTY | named & {*FIRST_PARTY, "soar", "flow_grpo", "sd3"}
        wrong += [f"{short(path)} names {name}" for name in sorted(map(str, found))]
    assert wrong == []


def test_core_leaves_packages_to_one_module():
    wrong = [
        f"{short(path)} imports {name}"
        for path in CORE
        for name in sorted(imports(path))
        if not {place(path), room(place(path))} & ONLY.get(top(name), {place(path)})
    ]
    assert wrong == []


def test_plugins_import_what_is_offered_and_no_other_plugin():
    wrong: list[str] = []
    for path in PLUGINS:
        own = path.relative_to(ROOT / "plugins").parts[1]
        wrong += [f"{short(path)} imports {name}" for name in sorted(imports(path)) if top(name) in FIRST_PARTY - {own}]
        wrong += [f"{short(path)} imports {name}" for name in not_offered(path, OFFERED)]
    assert wrong == []


def test_what_is_written_for_others_imports_what_is_offered():
    modules = [path for path in TEMPLATES if path.parent.name != "tests"]
    assert modules
    assert [f"{short(path)} imports {name}" for path in modules for name in not_offered(path, OFFERED)] == []
    assert not {top(name) for path in modules for name in imports(path)} & FIRST_PARTY


def not_offered(path: Path, offered: Collection[str]) -> list[str]:
    core = {name for name in imports(path) if top(name) == "corefit"}
    return sorted(name for name in core if ".".join(name.split(".")[:2]) not in offered)


def test_nothing_heavy_is_imported_with_a_module():
    """What every start of the command line would pay for is imported inside functions, or with a few late modules."""
    heavy = {"torch", "diffusers", "transformers", "streaming", "accelerate", "peft", "matplotlib", "huggingface_hub"}
    heavy |= {"cv2", "httpx", "rapidocr_onnxruntime", "fsspec", "pyarrow"}
    wrong: list[str] = []
    for path in [*CORE, *PLUGINS, *TEMPLATES]:
        if not {"report", "loop", "run", "experts", "lowbit", "tests"} & {path.stem, path.parent.name}:
            body = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
            found = {top(name) for node in body for name in _imports(node, types=False)} & heavy
            wrong += [f"{short(path)} imports {name}" for name in found]
    assert wrong == []


def test_no_shape_is_assumed():
    """`like(sigma, x)` serves images, video and tokens; a list of ones in a view serves one of them."""
    wrong = [
        f"{short(path)}:{node.lineno}"
        for path in [*CORE, *PLUGINS, *TEMPLATES]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("view", "reshape")
        and ast.unparse(node).endswith("(-1, 1, 1, 1)")
    ]
    assert wrong == []


def test_files_and_functions_stay_short():
    wrong: list[str] = []
    for path in [*CORE, *PLUGINS, *TEMPLATES]:
        text = path.read_text()
        lines = sum(bool(line.strip()) for line in text.splitlines())
        wrong += [f"{short(path)} has {lines} lines"] if lines >= FILE else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                if (node.end_lineno or 0) - body[0].lineno >= FUNCTION:
                    wrong.append(f"{short(path)}:{node.lineno} {node.name}")
    assert wrong == []
