"""What of a stage's model goes to the hub, without secrets and without absolute paths.

Cards, results and metadata are written without them. Configs and headers that came with the base are cleaned on the way
up; the files on disk stay as they are. A text that somebody has written by hand is refused, with the place to mend.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

from corefit.errors import ConfigError, CorefitError
from corefit.run.plan import CARD, RESULTS
from corefit.run.publish import metadata
from corefit.run.publish.facts import Facts
from corefit.run.publish.output import Output
from corefit.system.public import leaks, tokens

Contents = dict[str, Path | bytes]
"""Name in the repository -> the file, or what is uploaded in its place."""
CONFIG = re.compile(r"(.*config|model_index)\.json")
Say = Callable[[str], None]


def contents(output: Output, card: str, scratch: Path, say: Say) -> Contents:
    """Return what goes to the hub: the files of `model/`, with `card`, and the run's results.json.

    scratch  an empty folder for files that are written anew
    """
    files = sorted(file for file in output.model.rglob("*") if file.is_file() and not _is_hidden(file, output.model))
    found: Contents = {file.relative_to(output.model).as_posix(): file for file in files}
    found[CARD] = card.encode()
    if (output.run / RESULTS).is_file() and "eval" in output.tables:
        found[RESULTS] = (output.run / RESULTS).read_bytes()
    for name in (CARD, RESULTS):
        if name in found:
            _refuse_leaks(output.model / name, cast(bytes, found[name]).decode("utf-8", "replace"))
    lora = _lora_metadata(output)
    for name, file in found.items():
        if isinstance(file, Path) and CONFIG.fullmatch(file.name):
            found[name] = _config(file, name, say)
        elif isinstance(file, Path) and file.suffix == ".safetensors":
            found[name] = _weights(file, name, lora if file.parent == output.model else {}, scratch, say)
    return found


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _refuse_leaks(file: Path, text: str) -> None:
    if found := leaks(text):
        raise ConfigError(f"{file} has {', '.join(found[:3])}, which is not for others to read; remove it there")


def _lora_metadata(output: Output) -> Mapping[str, str]:
    """Return what the pipeline says now of a LoRA: [card] may have changed since it was trained."""
    if not output.lora:
        return {}
    facts = Facts.of(output)
    steps = facts.done.get("alarm", {}).get("step", facts.settings(output.stage)["steps"])
    try:
        backbone = output.base()
        examples = facts.about.get("data", {}).get("examples", 0)
        return metadata.of_lora(output.tables, output.stage, backbone, steps=steps, examples=examples)
    except (CorefitError, OSError):  # the plugin or the base is not on this machine; the file says what it said
        return {}


def _config(file: Path, name: str, say: Say) -> Path | bytes:
    """Return a config, anew if it has absolute paths, such as transformers' `_name_or_path`."""
    text = file.read_text("utf-8", "replace")
    if found := tokens(text):
        raise ConfigError(f"{file} has {', '.join(found[:3])}, which is not for others to read; remove it there")
    try:
        before = json.loads(text)
    except ValueError:
        return file
    after = _without_places(before)
    if after == before:
        return file
    say(f"{name} goes up without the absolute paths in it")
    return (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()


def _without_places(value: Any) -> Any:
    """Return a config in which the last name stands for a text that is an absolute path as a whole."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in cast(list[Any], value)]
    if not isinstance(value, str) or len(value.split()) != 1:
        return value
    paths = (kind(value) for kind in (PurePosixPath, PureWindowsPath))
    return next((path.name for path in paths if path.is_absolute() and len(path.parts) > 2), value)


def _weights(file: Path, name: str, lora: Mapping[str, str], scratch: Path, say: Say) -> Path:
    """Return a file of weights, anew if its header tells of this machine, or is not what the pipeline says now."""
    before = metadata.read(file)
    kept = {key: value for key, value in before.items() if not leaks(value)}
    if len(kept) < len(before):
        say(f"{name} goes up without {', '.join(sorted(before.keys() - kept.keys()))} in its header")
    after = {**{key: value for key, value in kept.items() if not (lora and metadata.is_ours(key))}, **lora}
    if after == {key: value for key, value in before.items() if not (lora and key == metadata.HASH)}:
        return file
    target = scratch / name.replace("/", "--")
    metadata.write(file, target, after)
    return target
