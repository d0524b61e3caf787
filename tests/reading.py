"""Read the pages of docs/ for the tests: blocks of code, anchors, and the text that is written by hand."""

from __future__ import annotations

import re
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
KINDS_OF_PAGES = sorted((DOCS / "plugins").glob("*.md"))
FENCED = re.compile(
    r"(?:^<!-- (?P<note>file|not run): (?P<what>.+?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.M | re.S
)
GENERATED = re.compile(r"<!-- generated: (\w+) ?([\w.-]*) -->\n.*?<!-- end -->", re.S)


@frozen
class Block:
    """Code on a page: `file` is the name of the file that it shows, `skipped` the reason why it is not run."""

    kind: str
    text: str
    file: str = ""
    skipped: str = ""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def by_hand(page: Path) -> str:
    """The page without its generated parts."""
    return GENERATED.sub("", page.read_text())


def blocks(page: Path, *kinds: str) -> list[Block]:
    """The blocks of code that are written by hand, in order."""
    found = [
        Block(
            m["kind"], m["text"], **{{"file": "file", "not run": "skipped"}[m["note"]]: m["what"]} if m["note"] else {}
        )
        for m in FENCED.finditer(by_hand(page))
    ]
    return [block for block in found if block.kind in kinds]


def prose(page: Path) -> str:
    """The text that is written by hand, without blocks of code."""
    return FENCED.sub("", by_hand(page))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    text = FENCED.sub("", page.read_text())
    return {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def _slug(heading: str) -> str:
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.strip().replace(" ", "-")
