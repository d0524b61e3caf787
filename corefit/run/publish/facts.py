"""What a model card says of a stage, gathered from the files of the run's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.pipeline.pipeline import BASE
from corefit.run import plan
from corefit.run.plan import CARD, DONE, PICTURE
from corefit.run.publish.names import hub_name_of_base, lineage_of, mode_of, objectives_of, stage_table, title_of
from corefit.run.publish.output import Output
from corefit.run.record import RUN
from corefit.run.report.results import Row
from corefit.system import files
from corefit.system.public import without_places

PUSHED = "pushed.json"
"""Says, in the folder of a stage, where on the hub its model is."""
LICENSE_KEYS = ("license", "license_name", "license_link")


@frozen
class Place:
    """Where a model is: a name on the hub, perhaps with a branch, or a folder as the card's own folder names it."""

    name: str
    revision: str | None = None
    on_hub: bool = True


@frozen(eq=False)
class Facts:
    """The facts of one stage.

    about     run.json
    done      done.json of the stage
    place     where the stage's model is
    """

    output: Output
    about: Mapping[str, Any]
    done: Mapping[str, Any]
    place: Place

    @staticmethod
    def of(output: Output, repo: str | None = None, revision: str | None = None) -> Facts:
        """Read the facts of a stage; `repo` and `revision` tell where its model will be, if it is being pushed."""
        done, _ = plan.read(output.folder / DONE)
        try:
            about = json.loads((output.run / RUN).read_bytes())
        except (OSError, ValueError):
            about = {}
        place = Place(repo, revision) if repo else pushed(output.folder) or Place(".", on_hub=False)
        return Facts(output, about, done, place)

    @property
    def run(self) -> str:
        return self.output.tables["name"]

    @property
    def stage(self) -> str:
        return self.output.stage

    @property
    def card(self) -> Mapping[str, Any]:
        """The table [card] of the pipeline."""
        return self.output.tables.get("card", {})

    @property
    def title(self) -> str:
        return title_of(self.output.tables, self.stage)

    @property
    def lora(self) -> Path | None:
        """The folder of the LoRA, None if the stage trained all weights."""
        return self.output.lora

    @property
    def mode(self) -> Mapping[str, Any]:
        """The `train` table of the stage."""
        return mode_of(self.output.tables, self.stage)

    @property
    def trigger(self) -> str | None:
        return self.output.tables["data"].get("trigger") or None

    @property
    def size(self) -> Sequence[int]:
        """[height, width], or [frames, height, width]."""
        return self.output.tables["data"]["size"]

    @property
    def is_video(self) -> bool:
        return len(self.size) == 3

    @property
    def families(self) -> list[str]:
        return [str(self.output.tables["backbone"]["use"])]

    @cached_property
    def lineage(self) -> list[str]:
        """The stages whose training is in the weights, the stage itself last."""
        return lineage_of(self.output.tables, self.stage)

    def settings(self, stage: str) -> Mapping[str, Any]:
        """Return the table of a stage."""
        return stage_table(self.output.tables, stage)

    def objectives_of(self, stage: str) -> list[str]:
        """Return the `use` of a stage's objective, or of each term of a sum of them."""
        return objectives_of(self.output.tables, stage)

    @property
    def objectives(self) -> list[str]:
        """The objectives of all stages that are in the weights."""
        return [use for stage in self.lineage for use in self.objectives_of(stage)]

    @property
    def picture(self) -> bool:
        return (self.output.model / PICTURE).is_file()

    @cached_property
    def prompt(self) -> str:
        """A prompt for the example: the first held-out one, with the trigger word."""
        scores, _ = plan.read(self.output.folder / plan.SCORES)
        prompt = without_places(next(iter(scores.get("prompts", ())), self.trigger or "a photograph of a lighthouse"))
        lacks = self.trigger and self.trigger.lower() not in prompt.lower()
        return f"{self.trigger}, {prompt}" if lacks else prompt

    @property
    def rows(self) -> list[Row]:
        """The results of the base and of the stages that are in the weights."""
        shown = {BASE, *self.lineage}
        return [row for row in self.output.results() if row["stage"] in shown] if "eval" in self.output.tables else []

    @property
    def versions(self) -> Mapping[str, str]:
        return self.done.get("versions") or self.about.get("versions", {})

    # the base

    @property
    def base(self) -> str | None:
        """The base's name on the hub, None if it is not known."""
        return hub_name_of_base(self.output.tables)

    @property
    def base_path(self) -> str:
        return str(self.output.tables["backbone"].get("path", BASE))

    @property
    def base_name(self) -> str:
        """The base's name on the hub, or else the last name of its folder."""
        return self.base or Path(self.base_path).name

    @property
    def start_stage(self) -> str | None:
        """The stage whose whole weights the LoRA goes on; None if it goes on the base, and without a LoRA."""
        whole = self.output.whole if self.lora else None
        return whole.parent.name.partition("-")[2] if whole else None

    @cached_property
    def start(self) -> Place | None:
        """Where the weights are that the LoRA goes on; None if that cannot be said without a path of this machine."""
        if not self.output.whole:
            return Place(self.base) if self.base else None
        found = pushed(self.output.whole.parent)
        return found or Place(os.path.relpath(self.output.whole, self.output.model), on_hub=False)

    @property
    def base_model(self) -> str | None:
        """The name on the hub of what the LoRA goes on, or what was trained further; None if it has none."""
        if self.start_stage:
            return self.start.name if self.start and self.start.on_hub else None
        return self.base

    @cached_property
    def license_head(self) -> Mapping[str, str]:
        """The license as the card's metadata have it."""
        if given := self.card.get("license"):
            return {"license": given}
        return self.license_of_base or {"license": "unknown"}

    @cached_property
    def license_of_base(self) -> Mapping[str, str]:
        """The license in the base's own card, if that is on this machine."""
        card = self.output.run / self.base_path / CARD
        if self.base and not card.is_file():
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(self.base, CARD)
            card = Path(cached) if isinstance(cached, str) else card
        head = head_of(card.read_text("utf-8", "replace")) if card.is_file() else {}
        found = {key: head[key] for key in LICENSE_KEYS if isinstance(head.get(key), str)}
        return found if found.get("license", "unknown") != "unknown" else {}


def head_of(text: str | None) -> Mapping[str, Any]:
    """Return the metadata of a card; nothing if it has none that can be read, and where there is no card."""
    from huggingface_hub import ModelCard

    if not text or not text.startswith("---"):
        return {}
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever somebody wrote there
        return {}


def pushed(folder: Path) -> Place | None:
    """Return where on the hub the model of a stage's folder is, None if it was not pushed."""
    try:
        found = files.read_json(folder / PUSHED)
    except (FileNotFoundError, files.Damaged):
        return None
    return Place(found["repo"], found["revision"])
