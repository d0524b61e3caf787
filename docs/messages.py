"""Read every error message of corefit and its plugins from the syntax trees, and write the page that explains them.

`python docs/generate.py` keeps the causes that docs/errors.md has, drops messages that no code gives any more, and adds
new ones with MISSING as their cause.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from corefit import errors

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
WIDTH = 120
MISSING = "(no cause written yet)"
ENTRY = re.compile(r"^- (?P<ticks>`+) ?(?P<message>.+?) ?(?P=ticks)\\?\n(?P<cause>(?:^  .*\n?)*)", re.MULTILINE)
"""An entry of the page: a list item with the message as code, and its cause, indented below it."""
HEADING = re.compile(r"^## .*`(?P<file>[\w./]+\.py)`$", re.MULTILINE)
ERRORS = {
    *(name for name, it in vars(errors).items() if isinstance(it, type) and issubclass(it, errors.CorefitError)),
    *("ValueError", "BadParameter", "UsageError", "ServiceError"),
}
TELLERS = {"damaged", "_wrong", "_no_meta"}
"""Functions that make an error from a text that is passed to them."""
SPEAKERS = re.compile(r"problems|^_unplaced$|too_many|^_mixed$|^_end$|^_wrong|^_damaged$")
"""Functions that yield or return messages as text."""
SKIPPED = {"testing", "templates"}
"""Folders without messages for users: checks address plugin authors, and templates are not plugins yet."""


@cache
def messages() -> Mapping[str, list[str]]:
    """File -> the messages that it can give, in their order, with fields as <name>; files are sorted by path."""
    files = [*sorted((ROOT / "corefit").rglob("*.py")), *sorted((ROOT / "plugins").rglob("*.py"))]
    found: dict[str, list[str]] = {}
    for path in files:
        if not SKIPPED & {*path.relative_to(ROOT).parts}:
            numbered = sorted(_messages(ast.parse(path.read_text())))
            each = list(dict.fromkeys(text for _, text in numbered if _has_words(text)))
            if each:
                found[path.relative_to(ROOT).as_posix()] = each
    return found


def _has_words(message: str) -> bool:
    return bool(re.search(r"[a-z]{2}", re.sub(r"<[^>]*>", "", message)))


def _messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, message) for each message in the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) in ERRORS | TELLERS:
            yield from ((node.lineno, _text(arg)) for arg in node.args if _is_text(arg))
        elif isinstance(node, ast.FunctionDef) and SPEAKERS.search(node.name):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Yield | ast.Return) and inner.value is not None:
                    yield from ((inner.lineno, _text(value)) for value in _choices(inner.value) if _is_text(value))


def _choices(node: ast.expr) -> list[ast.expr]:
    """The expressions to which `node` may evaluate: the branches of an if, the elements of a tuple."""
    match node:
        case ast.Tuple():
            return node.elts
        case ast.IfExp():
            return [node.body, node.orelse]
        case _:
            return [node]


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.expr) -> str:
    """The text on one line, with its fields as <name>."""
    if isinstance(node, ast.Constant):
        return " ".join(str(node.value).split())
    assert isinstance(node, ast.JoinedStr)
    parts = [str(p.value) if isinstance(p, ast.Constant) else f"<{_name(p.value)}>" for p in node.values]
    return " ".join("".join(parts).split())


def _name(node: ast.AST) -> str:
    """A short name for the expression in a field."""
    match node:
        case ast.Name():
            return node.id.strip("_").lower()
        case ast.Attribute():
            return node.attr.strip("_")
        case ast.Subscript() | ast.Starred() | ast.Await():
            return _name(node.value)
        case ast.Call() if _called(node) in ("near", "type"):
            return {"near": "did you mean", "type": "type"}[_called(node)]
        case ast.Call() if node.args:
            return _name(node.args[0])
        case ast.Call():
            return _name(node.func)
        case ast.BoolOp():
            return _name(node.values[0])
        case ast.IfExp():
            return _name(node.body)
        case ast.BinOp():
            return _name(node.left)
        case ast.GeneratorExp() | ast.ListComp() | ast.SetComp():
            return _name(node.generators[0].iter)
        case ast.Constant(value=str()) if node.value.strip():
            return node.value.strip()
        case _:
            return "..."


def entry(message: str, cause: str = MISSING) -> str:
    """The entry of a message on the page."""
    longest = max((len(run) for run in re.findall(r"`+", message)), default=0)
    ticks = "`" * (longest + 1)
    pad = " " if message.startswith("`") or message.endswith("`") else ""
    wrapped = textwrap.wrap(cause, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return f"- {ticks}{pad}{message}{pad}{ticks}\\\n" + "".join(f"  {line}\n" for line in wrapped)


def explained(page: str) -> Mapping[tuple[str, str], str]:
    """(file, message) -> the cause that the page has."""
    causes: dict[tuple[str, str], str] = {}
    for file, section in _sections(page):
        for found in ENTRY.finditer(section):
            causes[file, found["message"]] = " ".join(found["cause"].split())
    return causes


def _sections(page: str) -> Iterator[tuple[str, str]]:
    heads = list(HEADING.finditer(page))
    for head, after in zip(heads, [*heads[1:], None], strict=True):
        yield head["file"], page[head.end() : after.start() if after else len(page)]


def rendered(page: str) -> str:
    """The page with a section for each file and an entry for each message; causes that it has are kept."""
    causes = explained(page)
    elsewhere = {message: cause for (_, message), cause in causes.items()}  # for messages that moved to another file
    headings = {found["file"]: found[0] for found in HEADING.finditer(page)}
    first = HEADING.search(page)
    parts = [page[: first.start()] if first else page.rstrip() + "\n\n"]
    known = messages()
    order = [*(file for file in headings if file in known), *(file for file in known if file not in headings)]
    for file in order:
        entries = [
            entry(message, causes.get((file, message), elsewhere.get(message, MISSING))) for message in known[file]
        ]
        parts.append(headings.get(file, f"## `{file}`") + "\n\n" + "".join(entries) + "\n")
    return "".join(parts).rstrip() + "\n"


def differences(page: str) -> str:
    """The changes that the page needs, ready to paste; an empty text if it is right."""
    causes = explained(page)
    wanted = {(file, message) for file, each in messages().items() for message in each}
    lines: list[str] = []
    for file, message in sorted(wanted - causes.keys()):
        lines.append(f"add to docs/errors.md, section `{file}`:\n{entry(message, '<why it comes, and what to do>')}")
    for file, message in sorted(causes.keys() - wanted):
        lines.append(f"remove from docs/errors.md, section `{file}`, no code says it now:\n  {message}")
    lines += [f"write the cause in docs/errors.md: {m}" for (_, m), cause in sorted(causes.items()) if cause == MISSING]
    hint = "`python docs/generate.py` adds and removes them; the causes are yours to write"
    return "\n".join([*lines, hint]) if lines else ""
