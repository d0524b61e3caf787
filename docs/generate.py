"""Write what the pages of docs/ take from the code: `python docs/generate.py`, and `--check` to be told instead.

Between `<!-- generated: WHAT ARGUMENT -->` and `<!-- end -->` stands what a function of BLOCKS says; the rest is
written by hand. docs/errors.md is kept by messages.py.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import messages
from click.testing import CliRunner

from corefit.cli import cli
from corefit.data.settings import Data
from corefit.pipeline import Eval, Optimizer, Pipeline, Stage
from corefit.pipeline.pipeline import CHOICES, MODES
from corefit.pipeline.reader import TABLE
from corefit.plugins import KINDS, Host, Offer
from corefit.plugins.kinds import BY_PROTOCOL
from corefit.types import ModelPath, Weighted
from corefit.types.former import FORMER

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (\w+) ?([\w.]*) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    ModelPath: "path or address",
}
LISTED = re.compile(r"^(\w+) {2,}(\S.*(?:\n {4,}\S.*)*)$", re.MULTILINE)
"""A key and what it means, in the docstring of a class."""
WIDTH = 120
PLURALS = {"number": "numbers", "whole number": "whole numbers", "text": "texts"}
SECTIONS: Mapping[Any, str] = {Optimizer: "#stageoptimizer", Data: "#data", Eval: "#eval", Stage: "#stage"}
"""Where the reference describes the table of a class."""


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def filled(page: Path) -> str:
    """The page as it should be."""
    text = page.read_text()
    if page == messages.PAGE:
        return messages.rendered(text)
    if page.name == "cli.md":
        for name in cli.commands:
            if f"<!-- generated: help {name} -->" not in text:
                text += f"\n## corefit {name}\n\n<!-- generated: help {name} -->\n<!-- end -->\n"
    return BLOCK.sub(lambda m: f"{m[1]}\n{BLOCKS[m[2]](m[3]).strip()}\n\n{m[4]}", text)


# signatures


def _class(name: str) -> str:
    """`corefit.types.Sampler`: its attributes and methods as they are declared."""
    module, _, cls = name.rpartition(".")
    node = _found(_tree(module), ast.ClassDef, cls)
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    attributes = [line for child in node.body for line in _attribute(child)]
    methods = [line for child in node.body if getattr(child, "name", "") not in FORMER for line in _method(child)]
    between = [""] if attributes and methods else []
    members = (f"    {line}".rstrip() for line in [*attributes, *between, *methods])
    return _python(f"class {cls}{bases}:", *members)


def _attribute(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
        default = "" if node.value is None or "field(" in ast.unparse(node.value) else f" = {ast.unparse(node.value)}"
        yield f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{default}"


def _method(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and (node.name in {"__len__", "__getitem__"} or not node.name.startswith("_")):
        yield from (f"@{ast.unparse(decorator)}" for decorator in node.decorator_list)
        yield from _signature(node, indent=4)


def _functions(module: str) -> str:
    """The functions of a module, each with the first line of what it says of itself."""
    nodes = [node for node in _tree(module).body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    calls = [f"{node.name}({', '.join(arg.arg for arg in node.args.args)})" for node in nodes]
    said = [_cell((ast.get_docstring(node) or "").partition("\n")[0]) for node in nodes]
    return "\n".join(
        ["| | |", "|---|---|", *(f"| `{call}` | {text} |" for call, text in zip(calls, said, strict=True))]
    )


def _hook(name: str) -> str:
    return _python("@hookimpl", *_signature(_found(_tree("corefit.plugins.hookspecs"), ast.FunctionDef, name)))


def _signature(node: ast.FunctionDef, indent: int = 0) -> list[str]:
    """As ruff formats it."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = re.sub(r"(: [^=,]+)=", r"\1 = ", ast.unparse(node.args))
    whole = f"def {node.name}({arguments}){returns}: ..."
    if indent + len(whole) <= WIDTH:
        return [whole]
    return [f"def {node.name}(", f"    {arguments}", f"){returns}: ..."]


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _tree(module: str) -> ast.Module:
    __import__(module)
    return ast.parse(inspect.getsource(sys.modules[module]))


def _found(tree: ast.AST, kind: type, name: str) -> Any:
    return next(node for node in ast.walk(tree) if isinstance(node, kind) and getattr(node, "name", None) == name)


# offers


def first_party(kind: str) -> list[Offer]:
    """What corefit's own plugins offer, in order of name."""
    offers = Host().offers[kind].values()
    return sorted((offer for offer in offers if offer.owner.split()[0] == "corefit"), key=lambda offer: offer.name)


def _offers(kind: str) -> str:
    rows = [f"| [`{o.name}`](../configuration.md#{_anchor(o)}) | {_summary(o.cls)} |" for o in first_party(kind)]
    return "\n".join(["| `use` | |", "|---|---|", *rows]) if rows else "None: corefit itself offers none of this kind."


def _anchor(offer: Offer) -> str:
    return f"{KINDS[offer.kind].name} {offer.name}".replace(" ", "-")


def _summary(cls: type) -> str:
    first = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return _cell(" ".join(first.split()))


# the configuration reference


def _configuration(_: str) -> str:
    parts = [
        *("## The file", _table(Pipeline)),
        *("## [backbone]", "One table with `use`, and beside the backbone's own keys `train`."),
        *_sections("backbones"),
        *("### train", "Also a key of a stage, which then says otherwise than `[backbone]`."),
        *(part for use, cls in MODES.items() for part in (f"#### train `{use}`", _summary(cls), _table(cls))),
        *("## [data]", _table(Data), *_sections("sources")),
        *("## [[stage]]", _table(Stage), "## [stage.optimizer]", _table(Optimizer)),
        *("## Objectives", *_sections("objectives")),
        *("## Samplers", *_sections("samplers")),
        *("## Noise weightings", *_sections("noise_weightings")),
        *("## Rewards", "corefit offers none. Beside a reward's own keys: `weight`, a number, 1.0 by default."),
        *("## [eval]", _table(Eval)),
    ]
    return "\n\n".join(parts)


def _sections(kind: str) -> Iterator[str]:
    for offer in first_party(kind):
        yield f"### {KINDS[kind].name} `{offer.name}`"
        yield _summary(offer.cls)
        yield _table(offer.cls)


def _table(cls: type) -> str:
    """A row for each key that the table of `cls` may set."""
    attrs.resolve_types(cls, include_extras=True)
    said = meanings(cls)
    fields = [f for f in attrs.fields(cls) if f.init and TABLE not in f.metadata]
    rows = [f"| `{f.name}` | {_type(f.type)} | {_default(f.default)} | {_cell(said.get(f.name, ''))} |" for f in fields]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) if rows else "It has no keys."


def meanings(cls: type) -> Mapping[str, str]:
    """Key -> its attribute docstring, or its line in the class's, of the class or what it is derived from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("corefit"):
            node = _found(_tree(base.__module__), ast.ClassDef, base.__name__)
            found |= {key: _sentence(said) for key, said in LISTED.findall(ast.get_docstring(node) or "")}
            for one, after in pairwise(node.body):
                if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr):
                    found[ast.unparse(one.target)] = ast.literal_eval(after.value)
    return {key: " ".join(str(text).split()) for key, text in found.items()}


def _sentence(text: str) -> str:
    first = text.partition(" ")[0]
    return (text.capitalize()[0] if first.isalpha() else text[0]) + text[1:] + ("" if text.endswith(".") else ".")


def _type(kind: Any) -> str:
    """In words of TOML."""
    if any(known == kind for known in CHOICES):
        return "[table with `use`](#train)"
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_type(arg) for arg in args if arg is not NoneType)
    if origin is Literal:
        return " or ".join(f'`"{arg}"`' for arg in args)
    if origin in (tuple, list):
        return _list(args)
    if (origin or kind) in BY_PROTOCOL:
        plugin = BY_PROTOCOL[origin or kind]
        return f"[{plugin.name}](plugins/{plugin.word}.md)"
    if origin is Weighted:
        return _type(args[0])
    if kind in SECTIONS:
        return f"[table]({SECTIONS[kind]})"
    return WORDS.get(kind, _cell(str(kind)))


def _list(args: tuple[Any, ...]) -> str:
    one = _type(args[0])
    if one.startswith("["):
        return f"list of {one.replace(']', 's]', 1)}"
    return f"list of {PLURALS.get(one, one + 's')}" if args[-1] is Ellipsis else f"list of {len(args)} {PLURALS[one]}"


def _default(default: Any) -> str:
    if default is attrs.NOTHING:
        return "required"
    if isinstance(default, attrs.Factory):  # pyright: ignore[reportArgumentType]
        made = default.factory()
        return "full" if type(made) is MODES["full"] else "all defaults"
    if default is None or default == ():
        return "none"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    plain = {True: "true", False: "false"}[default] if isinstance(default, bool) else default
    return f'`"{plain}"`' if isinstance(default, str) else f"`{plain}`"


def _cell(text: str) -> str:
    """Text that a table's cell may hold."""
    return re.sub(r"(?<!`)([<*])", r"\\\1", text.replace("|", r"\|"))


# the command line


def _help(name: str) -> str:
    arguments = [name, "--help"] if name else ["--help"]
    done = CliRunner().invoke(cli, arguments, prog_name="corefit", terminal_width=100)
    assert done.exit_code == 0, done.output
    return f"```text\n{done.output.strip()}\n```"


BLOCKS: Mapping[str, Callable[[str], str]] = {
    "class": _class,
    "functions": _functions,
    "hook": _hook,
    "offers": _offers,
    "configuration": _configuration,
    "help": _help,
}


def stale() -> list[Path]:
    """Pages that are not as the code is."""
    return [page for page in pages() if filled(page) != page.read_text()]


def main() -> int:
    wrong = stale()
    for page in wrong:
        if "--check" not in sys.argv:
            page.write_text(filled(page))
        print(f"{'changed' if '--check' not in sys.argv else 'not as the code is'}: {page.relative_to(DOCS.parent)}")
    told = messages.differences(messages.PAGE.read_text())
    print(told, end="\n" if told else "")
    return int(bool(told) or (bool(wrong) and "--check" in sys.argv))


if __name__ == "__main__":
    sys.exit(main())
