"""The page in Chromium: what it draws, and that slider, scrubber, curves, enlarging and live reload work."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import BASE, GRPO, SFT, SOAR, Stage, write_run

from corefit.run.evaluation.compare import compare
from corefit.run.report import MetricsLog, comparison_page, page
from corefit.run.watch import serve
from corefit.system.display import Display

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
WIDTHS = (1440, 390)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A finished run with branches, one in its middle, both on one page, and stages of both compared."""
    folder = tmp_path_factory.mktemp("runs")
    done = write_run(folder / "done", [BASE, SFT, SOAR, GRPO])
    middle = write_run(folder / "middle", [BASE, SOAR, Stage("grpo", 0.7, 20, "soar", 120, 64)], "running")
    for run in (done, middle):
        page(run)
    comparison_page([("first", done), ("second", middle)], folder / "both.html")
    compared = compare([done / "03-grpo", middle], folder / "compared", Display.on(visible=False))
    return {
        "done": done / "report.html",
        "middle": middle / "report.html",
        "both": folder / "both.html",
        "compared": compared / "report.html",
    }


@pytest.fixture
def opened(browser) -> Iterator[object]:
    """Open a page; at the end nothing may have been asked for besides it, and nothing complained."""
    contexts, asked, said = [], [], []

    def at(address: str, width: int = 1440, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(address)
        return tab

    yield at
    for context in contexts:
        context.close()
    allowed = [url for url in asked if not url.startswith("data:")]
    assert {url.partition("?")[0] for url in allowed if not url.endswith("/version")} <= set(allowed[:1])
    assert said == []


def inked(tab, selector: str) -> int:
    """How many pixels a canvas has that are not transparent."""
    return tab.evaluate(
        """(selector) => {
          const c = document.querySelector(selector);
          const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
          return d.filter((v, i) => i % 4 === 3 && v > 0).length;
        }""",
        selector,
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["done", "middle", "both", "compared"])
def test_pages_fit_and_draw_their_curves(opened, pages, name, width):
    tab = opened(pages[name].as_uri(), width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("#first .u-over").count() >= 3
    assert inked(tab, "#first canvas") > 500
    assert tab.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    if name == "middle":
        assert "it may have been killed" in tab.locator(".status").inner_text()
    heads = tab.locator("#results table").first.locator("tbody th").first
    before = heads.bounding_box()
    tab.locator("#results .wide").first.evaluate("(element) => { element.scrollLeft = 200; }")
    assert abs(heads.bounding_box()["x"] - before["x"]) < 1, "the first column stays"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_slider_moves_the_divider_between_two_stages(opened, pages, width):
    tab = opened(pages["done"].as_uri(), width)
    first = tab.locator("#pairs .pair").first
    left = first.locator(".left")
    shown = left.get_attribute("src")
    clip = "(image) => getComputedStyle(image).clipPath"
    assert "50%" in left.evaluate(clip)
    tab.locator("#split").fill("80")
    assert "20%" in first.locator(".left").evaluate(clip)
    tab.locator("#left").select_option(label="soar")
    assert first.locator(".left").get_attribute("src") != shown
    assert "soar" in first.locator(".left").get_attribute("alt")
    assert tab.locator(".left-name").inner_text() == "soar"


@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_enlarge_with_prompt_and_score(opened, pages, width):
    tab = opened(pages["done"].as_uri(), width)
    tile = tab.locator("#pairs .tile").nth(1)
    small = tile.bounding_box()["width"]
    tile.click()
    zoom = tab.locator("#zoom")
    assert zoom.locator(".pair").bounding_box()["width"] > 1.5 * small
    assert zoom.locator(".prompt").inner_text() == "one red <b>dog</b>"
    assert zoom.locator("thead th").all_inner_texts() == ["stage", "ocr", "pickscore"]
    scores = json.loads((pages["done"].parent / "03-grpo" / "scores.json").read_text())["values"]["ocr"]
    assert zoom.locator("tbody tr").nth(1).locator("td").first.inner_text() == f"{scores[1]:g}"
    tab.keyboard.press("ArrowRight")
    assert zoom.locator(".prompt").inner_text() == "one blue cat"
    zoom.locator("input").fill("10")
    assert "90%" in zoom.locator(".left").evaluate("(image) => getComputedStyle(image).clipPath")
    tab.keyboard.press("Escape")
    assert not zoom.is_visible()


def test_best_and_worst_are_ordered_by_the_chosen_metric(opened, pages):
    tab = opened(pages["done"].as_uri())
    tab.locator("#metric").select_option("pickscore")
    best, worst = ([float(t) for t in tab.locator(f"#{id} .scores").all_inner_texts()] for id in ("best", "worst"))
    assert best == sorted(best, reverse=True)
    assert worst == sorted(worst)
    assert min(best) >= max(worst)
    tab.locator("#best .tile").first.click()
    assert tab.locator("#zoom").is_visible()


def test_the_scrubber_goes_through_the_checkpoints_of_a_stage(opened, pages):
    tab = opened(pages["done"].as_uri())
    picture, seen = tab.locator("#sheet img"), set()
    tab.locator("#trained").select_option(label="soar")
    for value, step in ((0, 50), (1, 100), (3, 200)):
        tab.locator("#scrub").fill(str(value))
        assert tab.locator("#step").inner_text() == f"step {step} of 200"
        seen.add(picture.get_attribute("src"))
    assert len(seen) == 3
    tab.locator("#sheet").click()
    assert tab.locator("#zoom img").get_attribute("src") == picture.get_attribute("src")


def test_curves_answer_the_cursor_together_and_unfold(opened, pages):
    tab = opened(pages["done"].as_uri())
    over = tab.locator("#first .u-over").first
    over.scroll_into_view_if_needed()
    over.hover(position={"x": 0.8 * over.bounding_box()["width"], "y": 50})
    values = tab.locator("#first .chart .u-legend .u-series:first-child .u-value").all_inner_texts()
    assert len({*values}) == 1, "one time on all charts"
    assert 120 < 60 * float(values[0].removesuffix(" min")) < 135
    said = tab.locator("#first [data-metric=loss] .u-legend").inner_text()
    assert re.search(r"grpo\s*0\.\d+", said)
    assert re.search(r"soar\s*-", said), "it has ended"
    assert tab.locator("#further canvas").count() == 0
    tab.locator("#further summary").click()
    tab.locator("#further canvas").first.wait_for()
    assert tab.locator("#further canvas").count() == tab.locator("#further .chart").count()
    lines = tab.evaluate("document.querySelectorAll('#first .u-series').length")
    tab.locator("#smooth").uncheck()
    assert tab.evaluate("document.querySelectorAll('#first .u-series').length") < lines


def test_the_page_is_dark_where_that_is_asked_for_and_light_on_paper(opened, pages):
    tab = opened(pages["done"].as_uri(), color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(paper) == "rgb(20, 23, 26)"
    tab.emulate_media(media="print")
    assert tab.evaluate(paper) == "rgb(255, 255, 255)"
    assert not tab.locator("nav").is_visible()
    assert len(tab.pdf()) > 50_000


def test_everything_has_a_name_for_those_who_do_not_see_it(opened, pages):
    tab = opened(pages["both"].as_uri())
    nameless = """[...document.querySelectorAll("img, button, select, input, .plot, dialog")].filter((element) =>
      !(element.alt || element.ariaLabel || element.textContent.trim() || (element.labels || [])[0]))"""
    assert tab.evaluate(f"{nameless}.map((element) => element.outerHTML.slice(0, 200))") == []
    assert tab.evaluate("document.documentElement.lang") == "en"
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len({*ids})


def test_without_scripts_the_page_still_tells_its_results(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(pages["done"].as_uri())
    assert "soar gains" in tab.locator(".verdict").inner_text()
    assert tab.locator("#pairs img").first.is_visible()
    assert not tab.locator("#split").is_visible()
    context.close()


def test_watch_follows_a_run_and_keeps_the_place(opened, pages, tmp_path):
    run = Path(shutil.copytree(pages["middle"].parent, tmp_path / "middle"))
    server = serve(run, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        tab = opened(f"http://127.0.0.1:{server.server_address[1]}/")
        tab.locator("#split").fill("30")
        tab.evaluate("scrollTo({top: 700, behavior: 'instant'})")
        about = json.loads((run / "run.json").read_text())
        about["stages"][-1]["step"] = 66
        MetricsLog(run / "02-grpo" / "metrics.jsonl").append(66, {"loss": 1.0, "seconds": 33.0})
        (run / "run.json").write_text(json.dumps(about))
        tab.get_by_text("step 66 of 120").wait_for(timeout=8000)
        assert tab.locator("#split").input_value() == "30"
        assert tab.evaluate("scrollY") > 600
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
