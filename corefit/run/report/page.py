"""report.html: results, figures and samples of a run in one file, with the images embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from corefit.run.report.results import Row, read_results
from corefit.run.report.table import MISSING, Numbers, direction, names
from corefit.system.files import write_whole

WIDEST, LARGEST = 2400, 3 * 2**20
"""Images wider (pixels) or larger (bytes) than this are scaled down, so that the page opens quickly."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1400px;
       margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: #666; font-weight: 600; border-bottom: 2px solid #ccc; }
tbody tr { border-bottom: 1px solid #eee; }
small { display: block; color: #777; font-weight: normal; }
td span { display: block; margin-top: .25rem; }
.up { color: #17703a; } .down { color: #b3261e; }
figure { margin: 1rem 0; } figcaption, .note { color: #777; font-size: .87rem; }
img { max-width: 100%; height: auto; }
pre { background: #f6f6f4; border: 1px solid #e4e4e0; border-radius: 4px; padding: 1rem; overflow-x: auto;
      font: 13px/1.45 ui-monospace, monospace; }
"""


def page(folder: Path) -> None:
    """Write report.html into a run's folder from the files in it; missing files are left out.

    It shows results.json, comparison.png, <stage>/metrics.png, the last of <stage>/samples/*.png (for clips also
    last.webp) and pipeline.toml.
    """
    name = escape(folder.resolve().name)
    parts = [
        f"<h1>{name}</h1>",
        *_results(folder),
        *_comparison(folder),
        *_stages(folder),
        *_pipeline(folder),
    ]
    if len(parts) == 1:
        parts.append('<p class="note">Nothing has been written here yet.</p>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    body = "\n".join(parts)
    html = f'<html lang="en">\n<head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>'
    write_whole(folder / "report.html", f"<!doctype html>\n{html}\n".encode())


def _results(folder: Path) -> Iterator[str]:
    path = folder / "results.json"
    rows = read_results(path) if path.exists() else []
    if not rows:
        return
    yield "<h2>Held-out results</h2>"
    for metric in names(rows, "metric"):
        yield f"<h3>{escape(metric)}</h3>"
        yield _table([row for row in rows if row["metric"] == metric])
    yield (
        '<p class="note">Below each value is its 95 % interval, then the gain over what the stage starts from, paired '
        "on the same prompts and noise, with its interval. A gain is colored if its interval excludes 0.</p>"
    )


def _table(rows: Sequence[Row]) -> str:
    """Return the table of one metric, with a row for each stage and a column for each category."""
    numbers = Numbers.of(rows)
    cells = {(row["stage"], row["category"]): _cell(row, numbers) for row in rows}
    counts = {row["category"]: row["n"] for row in rows}
    head = "".join(f"<th>{escape(c)}<small>n = {n}</small></th>" for c, n in counts.items())
    starts = {row["stage"]: f"<small>from {escape(row['start'])}</small>" for row in rows if "start" in row}
    body = "".join(
        f"<tr><th>{escape(stage)}{starts.get(stage, '')}</th>"
        f"{''.join(cells.get((stage, c), '<td></td>') for c in counts)}</tr>\n"
        for stage in names(rows, "stage")
    )
    table = f"<table><thead><tr><th>stage</th>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(row: Row, numbers: Numbers) -> str:
    value, interval = numbers.value(row)
    gain, around = numbers.gain(row)
    below = "" if gain == MISSING else f'<span class="{direction(row, numbers)}">{gain}</span><small>{around}</small>'
    return f"<td><b>{value}</b><small>{interval}</small>{below}</td>"


def _comparison(folder: Path) -> Iterator[str]:
    path = folder / "comparison.png"
    if path.exists():
        yield "<h2>Same prompts, same noise</h2>"
        yield _figure(path, "")


def _stages(folder: Path) -> Iterator[str]:
    for stage in sorted(path for path in folder.iterdir() if path.is_dir()):
        samples = sorted(stage.glob("samples/*.png"), key=lambda path: (len(path.name), path.name))
        curves = stage / "metrics.png"
        if samples or curves.exists():
            yield f"<h2>{escape(stage.name)}</h2>"
        if curves.exists():
            yield _figure(curves, "")
        if samples:
            yield _figure(samples[-1], samples[-1].stem)
        moving = stage / "samples" / "last.webp"
        if moving.exists() and moving.stat().st_size <= LARGEST:
            yield _figure(moving, "last, moving")


def _pipeline(folder: Path) -> Iterator[str]:
    path = folder / "pipeline.toml"
    if path.exists():
        yield f"<h2>Pipeline</h2>\n<pre>{escape(path.read_text(encoding='utf-8'))}</pre>"


def _figure(path: Path, caption: str) -> str:
    source = f"{path.parent.name}/{path.name}"
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(source)}" src="{_embedded(path)}">{below}</figure>'


def _embedded(path: Path) -> str:
    """Return the image as a data URL: a JPEG of at most WIDEST pixels if the PNG is too large for a page."""
    from PIL import Image

    data, kind = path.read_bytes(), path.suffix.removeprefix(".")
    with Image.open(io.BytesIO(data)) as image:
        if len(data) > LARGEST or image.width > WIDEST:
            smaller, kind = io.BytesIO(), "jpeg"
            image.thumbnail((WIDEST, 100 * WIDEST))
            image.convert("RGB").save(smaller, "jpeg", quality=88)
            data = smaller.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
