"""The words of a model card, below its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import tomli_w

from corefit.errors import counted
from corefit.run import report
from corefit.run.plan import PICTURE
from corefit.run.publish.example import example
from corefit.run.publish.facts import Facts
from corefit.run.publish.metadata import strength_of
from corefit.system.public import without_places

LEFT_OUT = ("observer", "out")
"""Tables and keys of a pipeline on which no weights depend, and which name accounts and folders of its user."""
FENCE = re.compile("`{3,}")


def body(facts: Facts) -> str:
    """Return a card without its metadata."""
    parts = [
        f"# {facts.title}",
        *_what(facts),
        *([f"![Samples of the base and of this model, from the same noise]({PICTURE})"] if facts.picture else []),
        *_use(facts),
        *_results(facts),
        *_training(facts),
        *_license(facts),
        *_pipeline(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _what(facts: Facts) -> Iterator[str]:
    """Yield what the model is, and what it is trained from."""
    how = ", then ".join(" + ".join(facts.objectives_of(stage)) for stage in _own_stages(facts))
    if not facts.lora:
        yield f"All weights of the transformer of {_base(facts)}, post-trained by corefit with {how}."
        return
    what = f"A LoRA of rank {facts.mode['rank']}, trained by corefit with {how}."
    if facts.start_stage is None:
        yield f"{what} It goes on {_base(facts)}."
        return
    where = "which are on no hub yet"
    if facts.start and facts.start.on_hub:
        where = f"which are [{facts.start.name}](https://huggingface.co/{facts.start.name})"
    yield (
        f"{what} It does not go on {_base(facts)} itself, but on the weights that stage `{facts.start_stage}` of the "
        f"same run has made of it, {where}. Both must be loaded, as below."
    )


def _own_stages(facts: Facts) -> list[str]:
    """Return the stages that trained what the card is of: those of a LoRA, without those that made what it goes on."""
    names = facts.lineage
    return names[names.index(facts.start_stage) + 1 :] if facts.start_stage in names else names


def _base(facts: Facts) -> str:
    return f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else f"`{facts.base_name}`"


def _use(facts: Facts) -> Iterator[str]:
    yield "## Use"
    if facts.trigger:
        yield f"The captions that it was trained on have the trigger word `{facts.trigger}`; prompts need it, too."
    yield f"```python\n{example(facts)}```"
    if facts.lora and (strength := strength_of(facts.mode)):
        yield (
            f"Its alpha is not its rank. diffusers reads it from the file; in programs that do not, such as ComfyUI, "
            f"set the strength to {strength:g}."
        )


def _results(facts: Facts) -> Iterator[str]:
    yield "## Results"
    if not facts.rows:
        yield "It was not evaluated."
        return
    yield (
        "Means over held-out prompts, from the same noise for every model, with 95 % intervals; gains are paired, "
        "prompt by prompt."
    )
    yield report.markdown(facts.rows).strip()


def _training(facts: Facts) -> Iterator[str]:
    yield "## Training"
    data, about = facts.about.get("data", {}), facts.about
    size = " x ".join(map(str, facts.size))
    lines = [f"{stage}: {_steps(facts, stage)}" for stage in facts.lineage]
    if "examples" in data:
        held = f", {counted(data['prompts'], 'held-out prompt')}" if "prompts" in data else ""
        lines.append(f"data: {counted(data['examples'], 'example')} at {size}{held}")
    if about.get("precision"):
        lines.append(f"precision {about['precision']}, seed {facts.output.tables['seed']}")
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    lines += [f"versions: {versions}"] if versions else []
    lines += [f"author: {facts.card['author']}"] if facts.card.get("author") else []
    yield "\n".join(f"- {line}" for line in lines)


def _steps(facts: Facts, stage: str) -> str:
    settings = facts.settings(stage)
    mode = settings.get("train") or facts.output.tables["backbone"].get("train", {})
    kind = f"a LoRA of rank {mode['rank']}" if "rank" in mode else "all weights"
    alarm = facts.done.get("alarm", {}).get("step") if stage == facts.stage else None
    ended = f", ended by its alarm after {alarm}" if alarm else ""
    with_ = " + ".join(facts.objectives_of(stage))
    return (
        f"{counted(settings['steps'], 'step')} of {with_}, {kind}, learning rate {settings['optimizer']['lr']}{ended}"
    )


def _license(facts: Facts) -> Iterator[str]:
    yield "## License"
    if facts.card.get("license"):
        yield f"{facts.card['license']}. The terms of {_base(facts)}, from which it was trained, apply as well."
    elif found := facts.license_of_base:
        name = found.get("license_name", found["license"])
        link = f"[{name}]({found['license_link']})" if found.get("license_link", "").startswith("http") else name
        yield f"That of {_base(facts)}, from which it was trained: {link}."
    else:
        yield f"Not known: look up that of {_base(facts)}, from which it was trained."


def _pipeline(facts: Facts) -> Iterator[str]:
    """Yield the pipeline in a block that opens at a click."""
    tables = {key: value for key, value in facts.output.tables.items() if key not in LEFT_OUT}
    text = tomli_w.dumps(cast(Mapping[str, Any], _without_folders(tables)))
    fence = "`" * max([3, *(len(found) + 1 for found in FENCE.findall(text))])
    yield f"<details>\n<summary>pipeline.toml</summary>\n\n{fence}toml\n{text}{fence}\n\n</details>"


def _without_folders(value: Any) -> Any:
    """Return tables in which "…/name" stands for every path that leads out of the run's folder."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in cast(Mapping[str, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(inner) for inner in cast(list[Any], value)]
    if isinstance(value, str) and value.startswith("../"):
        return f"…/{value.rstrip('/').rpartition('/')[2]}"
    return without_places(value)
