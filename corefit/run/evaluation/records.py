"""data.json.gz: everything from which a comparison of several seeds is made, small enough to be committed.

The same content gives the same bytes: no times, a fixed order, and numbers with six digits at most.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from corefit.errors import DataError
from corefit.run import report
from corefit.run.evaluation import comparable
from corefit.run.evaluation.comparable import Evaluated
from corefit.run.evaluation.replicates import Replicate, Source
from corefit.run.report.page.folder import StageFiles
from corefit.system import files

DATA = "data.json.gz"
FORMAT = 1


def write(folder: Path, source: Source, metrics: Sequence[str]) -> None:
    """Write those metrics of the replicates, which lie in the order of their stages, with what they share once."""
    first = source.replicates[0].evaluated
    drift = next((each.evaluated.drift for each in source.replicates if each.evaluated.drift), {})
    blocks = [*zip(*(each.evaluated.blocks for each in source.replicates), strict=True)]
    rows = [next((block.rows for block in each if block.values), ()) for each in blocks]
    content = {
        "format": FORMAT,
        "base": source.base,
        "units": source.units,
        "prompts": [*first.prompts],
        "categories": [*first.categories],
        "rows": {key: [*each] for key, each in zip(report.BLOCKS, rows, strict=True)},
        "drift": {key: drift[key] for key in ("sigmas", "prompts") if drift},
        "stages": [
            _stage([*group], metrics) for _, group in groupby(source.replicates, key=lambda replicate: replicate.name)
        ],
    }
    text = json.dumps({**content, files.DIGEST: files.json_digest(content)}, ensure_ascii=False, separators=(",", ":"))
    files.write_whole(folder / DATA, gzip.compress(text.encode(), 9, mtime=0))


def _stage(replicates: Sequence[Replicate], metrics: Sequence[str]) -> dict[str, Any]:
    first = replicates[0]
    return {
        "name": first.name,
        "start": first.start,
        "settings": first.settings,
        "code": first.code,
        "parts": {key: part for key, part in first.evaluated.parts.items() if key != "model"},
        "seeds": [_seed(each, metrics) for each in replicates],
    }


def _seed(replicate: Replicate, metrics: Sequence[str]) -> dict[str, Any]:
    evaluated = replicate.evaluated

    def chosen(columns: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        return {name: [*column] for name, column in columns.items() if name in metrics}

    return {
        "seed": replicate.seed,
        "costs": replicate.costs,
        "values": chosen(evaluated.values),
        **{key: chosen(block.values) for key, block in zip(report.BLOCKS, evaluated.blocks, strict=True)},
        "drift": evaluated.drift.get("values", []),
    }


def read(folder: Path) -> Source:
    """Read what `write` wrote. Raises DataError for anything else."""
    file = folder / DATA
    try:
        content = json.loads(gzip.decompress(file.read_bytes()))
        found = content.pop(files.DIGEST)
        if content["format"] != FORMAT:
            raise DataError(f"{file} has format {content['format']}, and this version of corefit reads {FORMAT}")
        if found != files.json_digest(content):
            raise files.Damaged("its content does not have the digest that is in it")
        return _source(file, content)
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{comparable.shown(file.resolve())} is damaged ({error}); make it again from the runs, or take it from "
            "where it was committed"
        ) from error


def _source(file: Path, content: Mapping[str, Any]) -> Source:
    replicates: list[Replicate] = []
    for stage in content["stages"]:
        for each in stage["seeds"]:
            place = StageFiles("", stage["name"], "", stage["start"], file.resolve(), 0, {}, {}, {}, ())
            blocks = [report.Block(content["rows"][key], each[key]) for key in report.BLOCKS]
            drift = {**content["drift"], "values": each["drift"]} if each["drift"] else {}
            parts = {**stage["parts"], **({} if stage["start"] else {"model": content["base"].get("model")})}
            evaluated = Evaluated(
                place, each["values"], content["categories"], content["prompts"], parts, blocks=blocks, drift=drift
            )
            replicates.append(Replicate(evaluated, each["seed"], stage["settings"], stage["code"], each["costs"]))
    return Source(file.parent, replicates, content["base"], content["units"])
