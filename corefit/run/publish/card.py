"""The model card (README.md) of a finished stage and its picture, in the stage's `model/`.

A card is made from the files of the run's folder alone, so a run, a later run and a push write the same text. It has no
date and no times, so a stage that was killed and trained on leaves the same card.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corefit.pipeline.pipeline import BASE
from corefit.run import plan
from corefit.run.evaluation.evaluator import SAMPLES
from corefit.run.plan import CARD, PICTURE
from corefit.run.publish.facts import Facts
from corefit.run.publish.output import Output
from corefit.run.publish.text import body
from corefit.run.report.sheets import compared
from corefit.system import files

MARK = re.compile(r"\n<!-- written by corefit, sha256 ([0-9a-f]{64}) -->\n$")
"""The last line of a card: the hash of the text above it, which tells whether somebody has edited the card."""
COLUMNS, LARGEST, QUALITY = 4, 1280, 85
"""Of the picture: prompts side by side, pixels on a side at most, and JPEG quality. It is a few 100 kB at most."""


def keep(run: Path, stage: str, say: Callable[[str], None]) -> None:
    """Write the card and the picture of a finished stage unless they are up to date. Where that fails, it is said.

    A card that somebody has edited stays as it is.
    """
    try:
        output = Output.of(run, stage)
        _keep_picture(output)
        text = render(output)
        _write(output, text, say)
    except Exception as error:  # a card is worth no run
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        say(f"{stage}: its model card cannot be written ({problem}); the run goes on")


def render(output: Output, repo: str | None = None, revision: str | None = None) -> str:
    """Return the text of a stage's card.

    repo, revision  where on the hub the model will be; by default where it was pushed to
    """
    facts = Facts.of(output, repo, revision)
    text = f"---\n{_head(facts)}\n---\n\n{body(facts)}"
    return f"{text}\n<!-- written by corefit, sha256 {_digest(text)} -->\n"


def is_edited(text: str) -> bool:
    """Return whether a card is not as corefit wrote it."""
    found = MARK.search(text)
    return found is None or found[1] != _digest(text[: found.start()])


def _write(output: Output, text: str, say: Callable[[str], None]) -> None:
    file = output.model / CARD
    former = file.read_text("utf-8") if file.is_file() else None
    if former == text:
        return
    if former is None or not is_edited(former):
        files.write_whole(file, text.encode())
    elif not _same_mark(former, text):
        say(f"{output.folder.name}/model/{CARD} was edited and stays as it is; for a new card, move it away")


def _same_mark(former: str, text: str) -> bool:
    """Return whether an edited card was made from the same text as the new one."""
    marks = [MARK.search(each) for each in (former, text)]
    return all(marks) and len({mark[1] for mark in marks if mark}) == 1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _head(facts: Facts) -> str:
    """Return the card's metadata for the hub, as YAML."""
    from huggingface_hub import ModelCardData

    tags = ["corefit", *facts.families, *(["lora", "template:sd-lora"] if facts.lora else []), *facts.objectives]
    widget = [{"text": facts.prompt, "output": {"url": PICTURE}}] if facts.picture else None
    kind: Any = ModelCardData
    data = kind(
        base_model=facts.base_model,
        base_model_relation=facts.base_model and ("adapter" if facts.lora else "finetune"),
        library_name="diffusers",
        pipeline_tag="text-to-video" if facts.is_video else "text-to-image",
        tags=list(dict.fromkeys([*tags, *facts.card.get("tags", ())])),
        instance_prompt=facts.trigger,
        widget=widget,
        corefit={"run": facts.run, "stage": facts.stage},
        **facts.license_head,
    )
    return data.to_yaml()


# the picture


def _keep_picture(output: Output) -> None:
    """Write the samples of the base above those of the stage, if there are samples."""
    if not (found := _samples(output)):
        return
    prompts, rows = found
    sheet, data = compared(rows, prompts, columns=COLUMNS), io.BytesIO()
    sheet.thumbnail((LARGEST, LARGEST))
    sheet.save(data, "jpeg", quality=QUALITY)
    file = output.model / PICTURE
    if not file.is_file() or file.read_bytes() != data.getvalue():
        files.write_whole(file, data.getvalue())


def _samples(output: Output) -> tuple[list[str], list[tuple[str, Any]]] | None:
    """Return prompts, and the kept media of the base and of the stage; None if the stage was not evaluated."""
    from safetensors import safe_open

    scores, problem = plan.read(output.folder / plan.SCORES)
    folders = {BASE: output.run / f"00-{BASE}", output.stage: output.folder}
    kept = {name: folder / "samples" / SAMPLES for name, folder in folders.items()}
    if problem or "eval" not in output.tables or not kept[output.stage].is_file():
        return None
    rows: list[tuple[str, Any]] = []
    for name, file in kept.items():
        if file.is_file():
            with safe_open(file, "np") as opened:
                media = opened.get_slice("media")
                first = min(COLUMNS, media.get_shape()[0])  # a slice past the end is an error in safetensors
                rows.append((name, media[:first].astype("float32") / 255))
    count = min(len(media) for _, media in rows)
    return scores.get("prompts", [""] * count)[:count], [(name, media[:count]) for name, media in rows]
