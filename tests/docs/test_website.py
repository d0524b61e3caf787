"""The site of docs/ is built strictly: each link leads to a page of it, or to a file of the repository."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import website
from reading import DOCS, PAGES, ROOT

SETTINGS = '[project]\nsite_name = "few pages"\nrepo_url = "REPOSITORY"\ndocs_dir = "pages"\nsite_dir = "site"\n'


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return website.build(tmp_path_factory.mktemp("site") / "built")


def targets(page: Path) -> list[str]:
    return [html.unescape(target) for target in re.findall(r'(?:href|src)="?([^" >]+)', page.read_text())]


def test_every_page_is_on_it_and_in_its_menu(site: Path) -> None:
    menu = re.findall(r'= "([^"]+\.md)"', (DOCS / "zensical.toml").read_text())
    assert sorted(menu) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES), "adapt nav in zensical.toml"
    assert {path for path in menu if not (site / path.removesuffix(".md") / "index.html").exists()} == {"README.md"}


def test_every_link_leads_somewhere(site: Path) -> None:
    """To a file of the site, or to one of the repository."""
    address, seen = website.repository(), 0
    for page in site.rglob("index.html"):
        for target in targets(page):
            path = target.partition("#")[0]
            if target.startswith(f"{address}/blob/main/"):
                seen += 1
                assert (ROOT / path.removeprefix(f"{address}/blob/main/")).exists(), f"{page}: {target}"
            elif path and not re.match("[a-z]+:", target):
                assert (page.parent / path).exists(), f"{page}: {target}"
    assert seen > 50


def test_it_asks_no_other_host_for_fonts(site: Path) -> None:
    assert "fonts.g" not in (site / "index.html").read_text()


@pytest.fixture
def few(tmp_path: Path) -> Callable[[str], Path]:
    """Builds a site of one page."""

    def few(text: str) -> Path:
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs/zensical.toml").write_text(SETTINGS)
        (tmp_path / "docs/README.md").write_text(text)
        (tmp_path / "code.py").write_text("")
        return website.build(tmp_path / "built", tmp_path / "docs")

    return few


def test_links_out_of_the_docs_lead_to_the_repository_but_code_is_left(few: Callable[[str], Path]) -> None:
    site = few("# One\n\n[code](../code.py#L3)\n\n```python\nx[0](../code.py)\n```\n")
    assert f"{website.repository()}/blob/main/code.py#L3" in targets(site / "index.html")
    assert "](../code.py)" in (site.parent / "pages/README.md").read_text()


def test_a_link_out_of_the_docs_that_leads_nowhere_fails(few: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"README\.md: there is no \.\./none\.py"):
        few("# One\n\n[code](../none.py)\n")


@pytest.mark.parametrize("link", ["none.md", "README.md#none"])
def test_a_link_in_the_docs_that_leads_nowhere_fails(few: Callable[[str], Path], link: str) -> None:
    with pytest.raises(SystemExit, match="the site was not built"):
        few(f"# One\n\n[page]({link})\n")


def test_without_zensical_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(website.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'corefit\[docs\]'"):
        website.build(tmp_path / "built")
    assert not (tmp_path / "built").exists()
