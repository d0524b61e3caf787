"""Makes the pictures of `corefit sample`: prompts encoded, noise as in evaluation, one picture a prompt and seed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from corefit.data.coding import Coder, smaller
from corefit.data.encode import chunks
from corefit.errors import ConfigError, counted
from corefit.rollout.loop import generate
from corefit.run import report
from corefit.run.evaluation.evaluator import noise_of
from corefit.run.prepare import precision, text_dtype
from corefit.run.sampling import pictures
from corefit.run.sampling.subject import Sampled, Subject
from corefit.system import files, memory
from corefit.system.display import Display
from corefit.system.ranks import Ranks, join
from corefit.train import weights
from corefit.types import Backbone, Condition

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 64
"""How many pictures a sheet shows at most."""
LORA = "pytorch_lora_weights.safetensors"
"""What diffusers, and so a backbone's `load_lora`, calls the file of a LoRA."""
LARGER = ["a device with more memory"]


@frozen
class Picture:
    """A picture to make from the noise of (seed, row), and the stem of its file's name."""

    prompt: str
    seed: int
    row: int
    stem: str


@define(eq=False)
class Sampling:
    """The pictures of a request, made one model after the other.

    each      how many pictures of each prompt, with the seeds from that of [eval] on
    negative  what guidance leads away from, in place of the empty prompt
    out       a file for one picture, a folder, or None for a new one
    made      the files that are written so far
    """

    sampled: Sampled
    each: int = 1
    negative: str | None = None
    out: Path | None = None
    display: Display = field(factory=Display.on)
    made: list[Path] = field(factory=list[Path])
    where: Path = field(init=False)
    """The file, or the folder that the files are in; known once everything is checked."""
    _ranks: Ranks = field(init=False)

    def execute(self) -> Path:
        """Make all pictures; return the only one's file, or the folder that they are in. Raises CorefitError."""
        sampled, wanted = self.sampled, self._wanted()
        subjects = [each for each in (sampled.base, sampled.subject) if each]
        for each in subjects:
            each.backbone.check()
        shape = sampled.subject.backbone.latent_shape(sampled.settings.size)
        self._check_negative()
        self.where = pictures.place(self.out, sampled.subject.name, len(wanted) * len(subjects))
        self._ranks = join(sampled.settings.precision)
        if self._ranks.world > 1:
            raise ConfigError("corefit sample runs in one process; start it without torchrun or accelerate launch")
        with self.display, files.explain_write_errors(self.where):
            self._say_what_is_odd(wanted)
            shown = [(each.name, self._pictures(each, wanted, shape)) for each in subjects]
            self._draw_sheet(shown, wanted[:SHOWN])
        return self.made[0] if len(self.made) == 1 else self.where

    def _wanted(self) -> list[Picture]:
        """List each prompt with each seed. Its row is its place in the file, or else among those of [eval], or 0."""
        eval, held_out = self.sampled.settings.eval, self.sampled.held_out or ()
        source = eval.data(self.sampled.settings.size).raw_source
        places = {prompt: row for row, prompt in reversed([*enumerate(held_out)])}
        prompts = [each.prompts[0] for each in source.examples()]
        width, found = len(str(len(prompts))), list[Picture]()
        for number, prompt in enumerate(prompts):
            row = number if isinstance(eval.prompts, Path) else places.get(prompt, 0)
            words = f"{number + 1:0{width}d}-{pictures.in_words(prompt)}"
            seeds = range(eval.seed, eval.seed + self.each)
            found += [Picture(prompt, seed, row, f"{words}-seed{seed}") for seed in seeds]
        return found

    def _check_negative(self) -> None:
        if self.negative is None:
            return
        if self.sampled.subject.backbone.distilled:
            raise ConfigError("--negative: guidance is an input of this network, which takes no second prompt; drop it")
        if self.sampled.settings.eval.guidance == 1:
            raise ConfigError("--negative: guidance alone reads it, and guidance is 1; raise --guidance")

    def _say_what_is_odd(self, wanted: Sequence[Picture]) -> None:
        trigger = self.sampled.trigger
        if trigger and (without := {p.prompt for p in wanted if trigger.lower() not in p.prompt.lower()}):
            self.display.print(f"{counted(len(without), 'prompt')} without {trigger!r}, the pipeline's trigger word")
        if self.sampled.held_out is None:
            self.display.print("the file of [eval] prompts is gone: the noise of those prompts is not known")

    def _pictures(self, subject: Subject, wanted: Sequence[Picture], shape: Sequence[int]) -> Tensor:
        """Write the pictures of one model; return [n, 3, H, W], or frames of clips, of those that are shown."""
        import torch

        settings, backbone, shown = self.sampled.settings.eval, subject.backbone, list["Tensor"]()
        coder = Coder(backbone, self.display.print)
        condition_of = self._encoded(subject, [each.prompt for each in wanted])
        self._load(subject)
        with self.display.task(f"{subject.name}: {counted(len(wanted), 'picture')}") as progress:
            for number, batch in enumerate(chunks(wanted, settings.batch), 1):
                with memory.explain_exhaustion("sampling", self._remedies(backbone)), torch.no_grad():
                    noise = torch.cat([noise_of(each.seed, each.row, shape) for each in batch]).to(self._ranks.device)
                    cond = condition_of([each.prompt for each in batch]).to(self._ranks.device)
                    x0 = generate(backbone, noise, cond, steps=settings.steps, guidance=settings.guidance)
                    media = coder.decode(x0).float().cpu()
                for each, medium in zip(batch, media, strict=True):
                    self._write(subject, each, medium)
                shown += [*report.visible_frames(media)][: SHOWN - len(shown)]
                progress(min(number * settings.batch, len(wanted)), len(wanted))
        self._ranks.accelerator.free_memory()
        backbone.release()
        backbone.transformer = None
        return torch.stack(shown)

    def _encoded(self, subject: Subject, prompts: Sequence[str]) -> Callable[[Sequence[str]], Condition]:
        """Encode the prompts as evaluation does, and return what gives the conditions of some of them."""
        import torch

        backbone, distinct, settings = subject.backbone, list(dict.fromkeys(prompts)), self.sampled.settings
        size = settings.eval.data(settings.size).encode_batch  # other numbers at once round in other ways
        backbone.place(self._ranks.device, text_dtype(self._ranks))
        with torch.no_grad(), memory.explain_exhaustion("encoding prompts", LARGER):
            found = Condition.cat([backbone.encode_text(batch).to("cpu") for batch in chunks(distinct, size)])
            backbone.empty = None if self.negative is None else backbone.encode_text([self.negative])
            backbone.null(1)  # which keeps it: the encoders are dropped now
        backbone.release()
        places = {prompt: number for number, prompt in enumerate(distinct)}
        return lambda wanted: found[[places[prompt] for prompt in wanted]]

    def _load(self, subject: Subject) -> None:
        """Read the weights as evaluation does."""
        backbone, ranks = subject.backbone, self._ranks
        with ExitStack() as held:
            lora = _folder_of(subject.lora, held) if subject.lora else None
            half = subject.half and precision(ranks) == "bf16"
            with memory.explain_exhaustion("reading the weights", LARGER):
                weights.load(backbone, ranks, frozen_in_bf16=half, adapter=lora)
        weights.prepare(backbone, ranks, evaluation=True)

    def _remedies(self, backbone: Backbone) -> list[str]:
        size, batch = self.sampled.settings.size, self.sampled.settings.eval.batch
        fewer = [f"--batch {batch // 2} (now {batch})"] if batch > 1 else []
        return [*fewer, *smaller(backbone, size), f"a --size smaller than {','.join(map(str, size))}"]

    def _write(self, subject: Subject, picture: Picture, medium: Tensor) -> None:
        still = medium[:, 0] if medium.ndim == 4 and medium.shape[1] == 1 else medium
        file = self.where
        if file.suffix.lower() not in pictures.ENDINGS:
            beside = "" if subject is self.sampled.subject else "-base"
            file = file / f"{picture.stem}{beside}{pictures.ENDINGS[still.ndim == 4]}"
        pictures.write(still, file, self._facts(subject, picture))
        self.made.append(file)

    def _facts(self, subject: Subject, picture: Picture) -> Mapping[str, Any]:
        """Return what a picture's file says of it: enough to make it again, and nothing of this machine."""
        sampled, eval = self.sampled, self.sampled.settings.eval
        settings = {
            "backbone": sampled.kind,
            "size": list(sampled.settings.size),
            "guidance": eval.guidance,
            "steps": eval.steps,
            "sampler": "Euler",
            "precision": precision(self._ranks),
            "row": picture.row,
            **({} if self.negative is None else {"negative": self.negative}),
        }
        return {"prompt": picture.prompt, "seed": picture.seed, "model": subject.name, "settings": settings}

    def _draw_sheet(self, shown: Sequence[tuple[str, Tensor]], wanted: Sequence[Picture]) -> None:
        """Draw the pictures on one sheet: grid.png, or comparison.png with a row for each model."""
        captions = [each.prompt if self.each == 1 else f"{each.prompt} (seed {each.seed})" for each in wanted]
        if len(shown) > 1:
            report.comparison(shown, captions, self.where / "comparison.png")
        elif len(wanted) > 1:
            report.grid(shown[0][1], captions, self.where / "grid.png")


def _folder_of(lora: Path, held: ExitStack) -> Path:
    """Return a folder in which a LoRA's file has the name that `load_lora` looks for, for as long as `held` is open."""
    if lora.is_dir():
        return lora
    if lora.name == LORA:
        return lora.parent
    folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
    (folder / LORA).symlink_to(lora.absolute())
    return folder
