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
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STARTS = {
    "under": ("U", "digits_judge"),
    "saturated": ("S", "digits_judge"),
    "saturated_first": ("G", "digits_judge"),
    "curated": ("C", "curated"),
    "curated_first": ("F", "curated"),
    "curated_lora": ("L", "curated"),
    "words": ("W", "right"),
}
"""Folder of results/ -> the letter of its rows, and its primary measure."""
REPEATED = ("saturated_first", "curated_first")
"""Starting points that ran again from another base; their other measures are in results/ alone."""
OVER = "sft_compute"
"""SFT with as much compute as SOAR."""
STEPWISE = ("sft", "sft_rate")
"""SFT with as many steps as SOAR: with a rate of its own, and with SOAR's."""
MEASURED = ("soar", "matched", "sft", "soar_defaults", "soar_published", "reflexflow", "perturbed")
"""Arms whose other measures are shown, where they were run."""
CONTROL = "matched"
BESIDE = (CONTROL, "sft_items", "sft_compute_rate", "soar_defaults", "soar_published")
"""Arms that are compared with SOAR, too, beside those with one key changed."""
METHODS = ("grpo", "nft", "dpo", "nft_time", "dpo_time")
"""What SFT and SOAR are followed by."""
SETTINGS = ("steps", "guidance 1")
"""How the names of metrics end that have other settings than [eval]."""
Row = Mapping[str, Any]


def main() -> None:
    page = HERE / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """Return the page with its tables made anew."""
    for name, table in TABLES.items():
        lines = "\n".join(line for start in STARTS for line in table(start))
        block = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.S)
        text = block.sub(lambda found, lines=lines: found[1] + lines + found[2], text)
    return text


@cache
def computed(start: str, over: str = OVER) -> Sequence[Row]:
    """Return results.json of a starting point, with gains over an arm; nothing where it has not been run."""
    if not (HERE / "results" / start / "data.json.gz").is_file():
        return []
    with tempfile.TemporaryDirectory() as out:
        words = ["compare", "--seeds", f"results/{start}", "--over", over, "--out", out]
        subprocess.run([sys.executable, "-m", "corefit", *words], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))


def primary(start: str, over: str = OVER) -> Mapping[str, Row]:
    """Return the row of each arm by the primary measure."""
    measure = (STARTS[start][1], "all")
    return {row["stage"]: row for row in computed(start, over) if (row["metric"], row["category"]) == measure}


def is_key(stage: str) -> bool:
    """Whether an arm is SOAR with a key changed."""
    return stage.startswith("soar_") and "_then_" not in stage and stage not in ("soar_defaults", "soar_published")


def arms(start: str) -> Iterator[str]:
    """Yield the table of the arms by the primary measure, without those of the other tables."""
    rows = [row for stage, row in primary(start).items() if not is_key(stage) and "_then_" not in stage]
    letter, measure = STARTS[start]
    if not rows:
        return
    yield f"\n**`{start}`**, `{measure}`, {rows[0]['n']} prompts\n"
    yield f"| arm | seeds | {measure} | gain over the base | gain over `{OVER}` |"
    yield "|---|---|---|---|---|"
    for row in rows:
        cells = [f"`{letter}.{row['stage']}`", str(row.get("seeds", "")), value(row)]
        yield f"| {' | '.join([*cells, gain(row, 'base_gain'), gain(row, 'over_gain')])} |"


def equal_steps(start: str) -> Iterator[str]:
    """Yield the table of what SOAR and its control gain over SFT at equal steps, also by category."""
    letter, measure = STARTS[start]
    there = [over for over in STEPWISE if over in primary(start)]
    if not there:
        return
    categories = list(dict.fromkeys(row["category"] for row in computed(start) if row["metric"] == measure))
    yield f"\n**`{start}`**\n"
    yield f"| gain | seeds | {measure} | {' | '.join(f'`{name}`' for name in categories[1:])} |"
    yield f"|---|---|{'---|' * len(categories)}"
    for over in there:
        rows = {(row["stage"], row["category"]): row for row in computed(start, over) if row["metric"] == measure}
        for stage in ("soar", CONTROL):
            cells = [f"`{letter}.{stage}_over_{over}`", str(rows[stage, "all"]["seeds"])]
            yield f"| {' | '.join([*cells, *(gain(rows[stage, name], 'over_gain') for name in categories)])} |"


def keys(start: str) -> Iterator[str]:
    """Yield the table of gains over SOAR, of drift, too: one key changed, its control, others of as much compute."""
    letter, measure = STARTS[start]
    if "soar" not in primary(start) or not any(is_key(stage) or stage in BESIDE for stage in primary(start)):
        return
    yield f"\n**`{start}`**\n"
    yield f"| arm | seeds | {measure} | gain over the base | gain over `soar` | drift over `soar` |"
    yield "|---|---|---|---|---|---|"
    drift = {row["stage"]: row for row in computed(start, "soar") if row["metric"] == "drift"}
    for stage, row in primary(start, "soar").items():
        if is_key(stage) or stage in BESIDE:
            name = f"{stage}_over_soar" if stage in BESIDE else stage
            cells = [f"`{letter}.{name}`", str(row["seeds"]), value(row), gain(row, "base_gain")]
            yield f"| {' | '.join([*cells, gain(row, 'over_gain'), gain(drift[stage], 'over_gain')])} |"


def reinforced(start: str) -> Iterator[str]:
    """Yield the table of reinforcement after SFT and after SOAR, with what it gains and with their difference."""
    letter, measure = STARTS[start]
    there = [method for method in METHODS if {f"sft_then_{method}", f"soar_then_{method}"} <= {*primary(start)}]
    if not there:
        return
    yield f"\n**`{start}`**\n"
    yield f"| arm | seeds | {measure} | gain by reinforcement | gain over the same after `{OVER}` |"
    yield "|---|---|---|---|---|"
    for method in there:
        for stage, parent in ((f"sft_then_{method}", OVER), (f"soar_then_{method}", "soar")):
            row = primary(start, parent)[stage]
            after = gain(primary(start, f"sft_then_{method}")[stage], "over_gain") if parent == "soar" else ""
            cells = [f"`{letter}.{stage}`", str(row["seeds"]), value(row), gain(row, "over_gain"), after]
            yield f"| {' | '.join(cells)} |"


def measures(start: str) -> Iterator[str]:
    """Yield the table of all other measures: SFT of equal compute, and what some arms gain over it."""
    letter, measure = STARTS[start]
    rows = [row for row in computed(start) if row["stage"] in (OVER, *MEASURED)]
    there = [arm for arm in MEASURED if any(row["stage"] == arm for row in rows)]
    by_key = {(row["stage"], row["metric"], row["category"]): row for row in rows}
    found = [key for key in dict.fromkeys((row["metric"], row["category"]) for row in rows) if shown(*key, measure)]
    if start in REPEATED or not found:
        return
    yield f"\n**`{start}`**, gain over `{OVER}`\n"
    yield f"| measure | `{OVER}` | {' | '.join(f'`{arm}`' for arm in there)} |"
    yield f"|---|---|{'---|' * len(there)}"
    for key in found:
        cells = [gain(by_key[arm, *key], "over_gain") if (arm, *key) in by_key else "" for arm in there]
        own = value(by_key[OVER, *key])
        yield f"| `{letter.lower()}.{named(*key, measure)}` | {own} | {' | '.join(cells)} |"


def named(metric: str, category: str, primary: str) -> str:
    """Return the name of a measure: of the primary one only the category, or the steps and the guidance."""
    name = metric.removeprefix(f"{primary}, ") if category == "all" else category
    return name.replace(", ", "-").replace(" ", "-")


def shown(metric: str, category: str, primary: str) -> bool:
    """Whether a measure has a row: categories, other steps and other guidance have one of the primary measure alone."""
    if metric == "distance" or (metric, category) == (primary, "all"):
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
    certain = bool(sign) and len(ends) == 2 and row[low] * row[high] > 0
    return f"**{text}**" if certain else text


TABLES = {"arms": arms, "steps": equal_steps, "keys": keys, "reinforced": reinforced, "measures": measures}
"""What stands between `<!-- NAME -->` and `<!-- end -->`."""

if __name__ == "__main__":
    main()
