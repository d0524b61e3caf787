"""Plans for published models, for docs/memory.md: `python docs/plans.py` searches them anew, which takes minutes.

They are what `corefit check --fit` finds, from the configs that corefit ships. docs/generate.py writes plans.json as a
table, and a test compares some of them with what is found now.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.pipeline.pipeline import Pipeline, read_unchecked
from corefit.train.estimate import Device, Estimate, Search, estimates
from corefit_backbones import configs

FILE = Path(__file__).parent / "plans.json"
FAMILIES: Mapping[str, str] = {"SD3.5": "sd3", "FLUX.1": "flux", "Wan2.1": "wan", "Wan2.2": "wan"}
CARD, CARDS = (1, 24), (8, 80)
"""Numbers of GPUs, and GiB of each."""
REWARD = '''\
"""A reward that takes none of the device's memory, as a service does."""

from attrs import frozen

from corefit import Offers, Reward, hookimpl


@frozen
class Service(Reward):
    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1)


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {"service": Service}
'''
SOAR = """\
name = "soar"
steps = 1000
batch = 32
objective = { use = "soar" }
"""
GRPO = """\
name = "grpo"
steps = 300
batch = 32
objective = { use = "flow_grpo", group = 8, steps = 10 }
sampler = { use = "flow_sde" }
reward = [{ use = "service" }]
"""


@frozen(kw_only=True)
class Task:
    """What is to be planned: a model, what trains it, on which GPUs, and the size of its media."""

    model: str
    what: str
    gpus: tuple[int, int]
    size: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.what}"

    def write(self, folder: Path) -> Path:
        """Write the pipeline file as a user would begin it, and return its path."""
        (folder / "service.py").write_text(REWARD)
        train = "full" if self.what.startswith("full") else "lora"
        lines = [
            'name = "plan"\nplugins = ["service.py"]',
            f'[backbone]\nuse = "{FAMILIES[self.model.partition("-")[0]]}"\npath = "{configs.folder(self.model)}"',
            f'train = {{ use = "{train}" }}',
            f'[data]\nsource = {{ use = "jsonl", path = "train.jsonl" }}\nsize = {list(self.size)}',
            f"[[stage]]\n{GRPO if 'GRPO' in self.what else SOAR}",
        ]
        file = folder / "pipeline.toml"
        file.write_text("\n".join(lines))
        return file


def tasks() -> Sequence[Task]:
    """Return all tasks: two on one card and one on eight, for each model."""
    found: list[Task] = []
    for model in configs.NAMES:
        clips = model.startswith("Wan")
        sizes = ((33, 480, 832), (33, 240, 416), (81, 480, 832)) if clips else ((1024, 1024),) * 3
        kinds = (("SOAR LoRA", CARD), ("GRPO LoRA", CARD), ("full SOAR", CARDS))
        found += [
            Task(model=model, what=what, gpus=gpus, size=size) for (what, gpus), size in zip(kinds, sizes, strict=True)
        ]
    return found


def plan(task: Task) -> dict[str, Any]:
    """Search the keys of a task, as `corefit check --fit` does."""
    number, each = task.gpus
    device = Device.of(each * 2**30)
    with tempfile.TemporaryDirectory() as folder:
        file = task.write(Path(folder))
        found = Search(lambda more: read_unchecked(Pipeline, file, more), device, number).fit()
    return {
        "task": task.name,
        "gpus": f"{number} x {each} GiB" if number > 1 else f"{each} GiB",
        "size": list(task.size),
        "fits": found.fits,
        "keys": found.settings,
        "without": round(max(e.peak for e in found.before)),
        **_figures(found.found),
    }


def figures(task: Task, keys: Sequence[str]) -> dict[str, Any]:
    """Return what the phases of a task take with these keys."""
    number, each = task.gpus
    with tempfile.TemporaryDirectory() as folder:
        pipeline = read_unchecked(Pipeline, task.write(Path(folder)), keys)
        return _figures(estimates(pipeline, Device.of(each * 2**30), number))


def _figures(found: Sequence[Estimate]) -> dict[str, Any]:
    (only,) = found
    return {"phases": {phase.name: round(phase.total) for phase in only.phases}, "host": round(only.host)}


def main(wanted: Sequence[str]) -> None:
    """Search the plans of all tasks, or of those whose names hold one of these texts, and write plans.json."""
    known = {each["task"]: each for each in json.loads(FILE.read_text())} if FILE.exists() else {}
    for task in tasks():
        if not wanted or any(text in task.name for text in wanted):
            known[task.name] = plan(task)
            print(task.name, known[task.name]["keys"], "" if known[task.name]["fits"] else "DOES NOT FIT", flush=True)
            FILE.write_text(json.dumps([known[t.name] for t in tasks() if t.name in known], indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
