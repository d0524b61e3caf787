"""Build the site of these pages: `python docs/website.py`, strict, into build/website/site.

Links to files outside docs/ lead to the repository there. Zensical builds the rest (`pip install 'corefit[docs]'`).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#]+)")


def repository() -> str:
    """Return the address of the repository, from [project.urls]."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def on_site(text: str, page: Path, docs: Path, address: str) -> str:
    """Return the text of a page with links out of `docs` turned into links to the repository.

    Raises ValueError if there is no such file.
    """

    def replaced(link: re.Match[str]) -> str:
        target = (page.parent / link[1]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise ValueError(f"{page}: there is no {link[1]}")
        return f"]({address}/blob/main/{target.relative_to(docs.parent).as_posix()}"

    parts = CODE.split(text)
    return "".join(part if number % 2 else LINK.sub(replaced, part) for number, part in enumerate(parts))


def build(folder: Path, docs: Path = DOCS) -> Path:
    """Build the site of `docs` in `folder`, and return its own folder.

    Raises ValueError for a link out of docs/ that leads nowhere, and SystemExit if zensical has any warning.
    """
    if importlib.util.find_spec("zensical") is None:
        sys.exit("the site needs zensical: pip install 'corefit[docs]'")
    docs, address, pages = docs.resolve(), repository(), folder / "pages"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(docs, pages, ignore=shutil.ignore_patterns("*.py", "*.toml", "__pycache__"))
    for page in docs.rglob("*.md"):
        (pages / page.relative_to(docs)).write_text(on_site(page.read_text(), page, docs, address))
    settings = (docs / "zensical.toml").read_text().replace("REPOSITORY", address)
    (folder / "zensical.toml").write_text(settings)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder)
    if done.returncode:
        sys.exit("the site was not built: see the warnings above")
    return folder / "site"


if __name__ == "__main__":
    print(build(ROOT / "build" / "website"))
