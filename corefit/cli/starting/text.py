"""Write a pipeline file for what a folder holds, with a comment on every choice."""

from __future__ import annotations

import json
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.cli.starting.choice import Choice, cropped, spread
from corefit.cli.starting.survey import Survey
from corefit.errors import counted

WIDTH = 100
"""Characters of a comment's line."""
OBJECTIVES: Mapping[str, str] = tomllib.loads(
    (Path(__file__).parents[1] / "templates/pipeline/objectives.toml").read_text(encoding="utf-8")
)
"""What is written for each objective that learns from such a folder, with DROPOUT and GUIDANCE for values."""


@frozen(kw_only=True)
class Written:
    """What the file says besides the choice.

    name       the pipeline's
    family     what `use` of [backbone] is
    model      the model's folder, relative to the pipeline file, or its name on the hub
    source     the table of the source, with a path relative to the pipeline file
    trigger    the trigger word, if there is one
    objective  a key of OBJECTIVES
    guidance   scale of classifier-free guidance for samples
    sampling   number of sampling steps
    dropout    share of captions that are dropped
    prompts    prompts for samples, and what is said about them
    memory     what is said about memory
    """

    name: str
    family: str
    model: str
    source: Mapping[str, Any]
    trigger: str | None
    objective: str
    guidance: float
    sampling: int
    dropout: float
    prompts: tuple[Sequence[str], str]
    memory: str

    def text(self, found: Survey, choice: Choice) -> str:
        """Return the text of pipeline.toml."""
        lines = [*self._head(found), *self._backbone(found, choice), *self._data(found, choice)]
        return "\n".join([*lines, *self._stage(found, choice), *self._eval(choice), ""])

    def _head(self, found: Survey) -> Iterator[str]:
        yield "#:schema pipeline.schema.json"
        yield from comment(
            f"A LoRA for {counted(found.count, found.noun)}, written by `corefit new pipeline --from-folder`. Every "
            "value is a choice that you may change; the comments say where it comes from. The line above lets editors "
            "complete and check this file."
        )
        yield from ("", f"name = {quoted(self.name)}", "seed = 0", "")

    def _backbone(self, found: Survey, choice: Choice) -> Iterator[str]:
        yield "[backbone]"
        yield f"use = {quoted(self.family)}"
        yield f"path = {quoted(self.model)}"
        yield from comment(
            "A LoRA is a small file to be used with the model, and training one takes little memory besides the "
            f"model's. Rank {choice.rank} is usual for so many {found.noun}s; a higher one holds more detail, and "
            "learns by heart sooner."
        )
        yield f'train = {{ use = "lora", rank = {choice.rank} }}'
        yield from comment(self.memory)
        yield (
            f"gradient_checkpointing = {str(choice.recompute).lower()}"
            if choice.recompute
            else ("# gradient_checkpointing = true # less memory, about a third more time")
        )
        if choice.keys:
            yield from comment("The cheapest keys with which this model fits, as `corefit check --fit` finds them.")
            yield from choice.keys
        yield ""

    def _data(self, found: Survey, choice: Choice) -> Iterator[str]:
        yield "[data]"
        yield from comment(self._captions(found))
        for note in found.notes:
            yield from comment(f"Note: {note}.")
        yield f"source = {{ {', '.join(f'{key} = {quoted(str(value))}' for key, value in self.source.items())} }}"
        if self.trigger is not None:
            yield from comment("Put before each caption that lacks it; write it in your prompts, too.")
            yield f"trigger = {quoted(self.trigger)}"
        yield from comment(self._size(found, choice))
        yield f"size = {list(choice.size)}"
        if choice.fps:
            yield from comment(f"All clips have more than {choice.fps} frames a second, which is what Wan makes.")
            yield f"fps = {choice.fps}"
        if choice.aspects:
            named = ", ".join(f"{aspect} {count}" for aspect, count in spread(found, choice))
            yield from comment(
                f"Width to height: each goes to the nearest ({named}), so cropping removes "
                f"{cropped(found, choice.aspects):.0%} of a {found.noun} on average, in place of "
                f"{cropped(found, ()):.0%} with squares alone."
            )
            yield f"aspects = {json.dumps(list(choice.aspects))}"
        yield from comment("Encoded at once, before training; lower it if that runs out of memory.")
        yield f"encode_batch = {choice.at_once}"
        yield ""

    def _captions(self, found: Survey) -> str:
        said = f"{counted(found.count, found.noun)}, "
        if found.bare == found.count:
            return f"{said}none with a caption: the trigger word is the prompt of all."
        if found.bare:
            return f"{said}{found.bare} without a caption, whose prompt is the trigger word."
        return f"{said}each with a caption."

    def _size(self, found: Survey, choice: Choice) -> str:
        *number, height, width = choice.size
        sizes = sorted(found.sizes, key=lambda size: size[0] * size[1])
        (low, high), middle = (sizes[0], sizes[-1]), sizes[len(sizes) // 2]
        smaller = sum(h * w < height * width for h, w in sizes)
        frames = (
            f"[frames, height, width]; the shortest clip has {min(n for n, _ in found.frames)} frames. "
            if number
            else ""
        )
        enlarged = f"{smaller} are smaller and will be enlarged, which blurs." if smaller else "None is enlarged."
        return (
            f"{frames}The {found.noun}s have from {low[1]} x {low[0]} to {high[1]} x {high[0]} pixels, in the middle "
            f"{middle[1]} x {middle[0]}. {enlarged} A model is not asked for more than it was made for. "
            "Half the size takes about a quarter of the time."
        )

    def _stage(self, found: Survey, choice: Choice) -> Iterator[str]:
        values = {"DROPOUT": f"{self.dropout:g}", "GUIDANCE": f"{self.guidance:g}"}
        objectives = {
            name: re.sub("|".join(values), lambda found: values[found[0]], text) for name, text in OBJECTIVES.items()
        }
        yield "[[stage]]"
        yield f"name = {quoted(self.objective)}"
        yield from comment(
            f"Each {found.noun} is seen about {choice.seen / found.count:.3g} times: a rule of thumb ({EACH_SAID}). "
            "If the samples copy what you gave, fewer steps; if they ignore it, more."
        )
        yield f"steps = {choice.steps}"
        yield from comment("Over all GPUs. Few pictures want a small batch, many a steadier gradient.")
        yield f"batch = {choice.batch}"
        yield from comment("What a GPU computes at once, as much as fits; results do not depend on it.")
        yield f"micro_batch = {choice.micro}"
        yield from comment(
            "SFT learns to make such media. SOAR also learns to return to them from its own mistakes, and a step takes "
            "about 7 times as long: at equal time, SFT has gained more so far (README, What comes out)."
        )
        yield f"objective = {objectives[self.objective]}"
        yield from (f"# objective = {text}" for name, text in objectives.items() if name != self.objective)
        if self.dropout:
            yield from comment(f"dropout: {self.dropout:.0%} of the captions are dropped, which guidance needs.")
        yield 'noise = { use = "logit_normal" }'
        yield from comment("1e-4 is usual for a LoRA; it falls to 0, so that the end is calm.")
        yield 'optimizer = { lr = 1e-4, schedule = "cosine" }'
        yield from comment("Samples on the way, on the page of the run: `corefit watch` shows it.")
        yield f"sample_every = {max(1, choice.steps // 4)}"
        yield ""

    def _eval(self, choice: Choice) -> Iterator[str]:
        prompts, said = self.prompts
        yield "[eval]"
        yield from comment(f"Sampled from the same noise by the base and by what is trained. {said}")
        yield "prompts = ["
        yield from (f"    {quoted(prompt)}," for prompt in prompts)
        yield "]"
        yield f"guidance = {self.guidance:g}"
        yield f"steps = {self.sampling}"
        yield f"batch = {choice.at_once}"


EACH_SAID = "100 times each of 20, and the root of the number as many more of a larger folder"


def comment(text: str) -> list[str]:
    """Return a comment, wrapped to lines."""
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH)]


def quoted(text: str | Path) -> str:
    """Return text as a TOML string: JSON's, whose escapes TOML knows, but for DEL, which TOML wants escaped."""
    return json.dumps(str(text), ensure_ascii=False).replace("\x7f", "\\u007f")
