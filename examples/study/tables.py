"""Write the tables of README.md from the data in `results/`, as `corefit compare --seeds` computes them.

    python tables.py

Every row has a name, such as U.soar or u.guidance-1, by which the verdict cites it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STARTS = {"under": ("U", "digits_judge"), "saturated": ("S", "digits_judge"), "curated": ("C", "curated")}
"""Starting point -> the letter of its rows, and its primary measure."""
OVER = "sft_compute"
MEASURED = ("soar", "matched", "sft")
"""Arms whose other measures are shown, where they were run."""
SETTINGS = ("steps", "guidance 1")
"""How the names of metrics end that have other settings than [eval]."""
Row = Mapping[str, Any]


def main() -> None:
    page = HERE / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """Return the page with its tables made anew."""
    results = {start: computed(start) for start in STARTS}
    for name, lines in (("arms", arms(results)), ("measures", measures(results))):
        table = "\n".join(lines)
        block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.S)
        text = block.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


def computed(start: str) -> Sequence[Row]:
    """Return results.json of a starting point."""
    if not (HERE / "results" / start / "data.json.gz").is_file():
        return []
    with tempfile.TemporaryDirectory() as out:
        words = ["compare", "--seeds", f"results/{start}", "--over", OVER, "--out", out]
        subprocess.run([sys.executable, "-m", "corefit", *words], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))


def arms(results: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield a table for each starting point: its arms by the primary measure."""
    for start, (letter, primary) in STARTS.items():
        rows = [row for row in results[start] if (row["metric"], row["category"]) == (primary, "all")]
        if not rows:
            continue
        yield f"\n**`{start}`**, `{primary}`, {rows[0]['n']} prompts\n"
        yield f"| arm | seeds | {primary} | gain over the base | gain over `{OVER}` |"
        yield "|---|---|---|---|---|"
        for row in rows:
            cells = [f"`{letter}.{row['stage']}`", str(row.get("seeds", "")), value(row)]
            yield f"| {' | '.join([*cells, gain(row, 'base_gain'), gain(row, 'over_gain')])} |"


def measures(results: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield a table for each starting point: what some arms gain over SFT of equal compute by all other measures."""
    for start, (letter, primary) in STARTS.items():
        rows = [row for row in results[start] if row["stage"] in MEASURED]
        there = [arm for arm in MEASURED if any(row["stage"] == arm for row in rows)]
        by_key = {(row["stage"], row["metric"], row["category"]): row for row in rows}
        keys = [key for key in dict.fromkeys((row["metric"], row["category"]) for row in rows) if shown(*key, primary)]
        if not keys:
            continue
        yield f"\n**`{start}`**, gain over `{OVER}`\n"
        yield f"| measure | {' | '.join(f'`{arm}`' for arm in there)} |"
        yield f"|---|{'---|' * len(there)}"
        for key in keys:
            cells = [gain(by_key[arm, *key], "over_gain") if (arm, *key) in by_key else "" for arm in there]
            yield f"| `{letter.lower()}.{named(*key, primary)}` | {' | '.join(cells)} |"


def named(metric: str, category: str, primary: str) -> str:
    """Return the name of a measure: of the primary one only the category, or the steps and the guidance."""
    name = metric.removeprefix(f"{primary}, ") if category == "all" else category
    return name.replace(", ", "-").replace(" ", "-")


def shown(metric: str, category: str, primary: str) -> bool:
    """Whether a measure has a row: categories, other steps and other guidance have one of the primary measure alone."""
    if metric in ("distance", "drift, last level") or (metric, category) == (primary, "all"):
        return False
    if category != "all":
        return metric == primary
    return metric.startswith(primary) or not metric.endswith(SETTINGS)


def value(row: Row) -> str:
    return written(row, "value", "low", "high")


def gain(row: Row, key: str) -> str:
    return written(row, key, f"{key}_low", f"{key}_high", "+") if key in row else ""


def written(row: Row, key: str, low: str, high: str, sign: str = "") -> str:
    """Return a number and its interval: percent of a share, or three decimals; in bold where a gain excludes 0."""
    factor, places = (100, 1) if row.get("unit") == "share" else (1, 3)
    number, *ends = (f"{factor * row[name]:{sign}.{places}f}" for name in (key, low, high) if name in row)
    text = f"{number} [{', '.join(ends)}]" if ends else number
    certain = bool(sign) and len(ends) == 2 and float(ends[0]) * float(ends[1]) > 0
    return f"**{text}**" if certain else text


if __name__ == "__main__":
    main()
