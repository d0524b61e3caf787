"""Held-out prompts, generated and scored: the same prompts from the same noise for every stage."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.data.dataset import Dataset
from corefit.pipeline.eval import Eval
from corefit.rng import Rng
from corefit.rollout.loop import generate
from corefit.run import report
from corefit.system import files, memory
from corefit.system.ranks import Ranks
from corefit.types import Backbone, Condition, rewards

if TYPE_CHECKING:
    from torch import Tensor

KEPT = "last.safetensors"


@frozen(eq=False)
class Evaluator:
    """Generates and scores the held-out prompts; every row's noise depends on the seed and its number alone."""

    eval: Eval
    prompts: Dataset
    seed: int
    ranks: Ranks

    @property
    def count(self) -> int:
        """Prompts that are used."""
        return min(len(self.prompts), self.eval.limit or len(self.prompts))

    def media(self, backbone: Backbone, rows: Sequence[int]) -> Tensor:
        """Media [n, 3, H, W], of a video model [n, 3, T, H, W], in [0, 1] of prompts `rows`."""
        import torch

        device = self.ranks.device
        batch = self.prompts.batch(rows, rows)
        noise = Rng((self.seed, "eval"), rows).randn((len(rows), *batch.shape)).to(device)
        with torch.no_grad(), _empty_prompt(backbone, self.prompts.null.to(device)):
            x0 = generate(backbone, noise, batch.cond.to(device), steps=self.eval.steps, guidance=self.eval.guidance)
            return backbone.decode(x0)

    def score(
        self, backbone: Backbone, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, Any]:
        """{"values": metric -> [n], "categories": [n]} of all prompts; every rank does its share."""
        world, rank = self.ranks.world, self.ranks.rank
        rows = range(self.count * rank // world, self.count * (rank + 1) // world)
        values: dict[str, list[float]] = {entry.name: [] for entry in self.eval.reward}
        categories: list[str] = []
        for first in range(0, len(rows), self.eval.batch):
            chunk = rows[first : first + self.eval.batch]
            with memory.explain_exhaustion(f"evaluation, prompts {chunk[0] + 1} to {chunk[-1] + 1}", self._helps()):
                batch, made = self.prompts.batch(chunk, chunk), self.media(backbone, chunk)
                scores = {e.name: rewards.score(e, made, batch.prompts, batch.meta) for e in self.eval.reward}
            rewards.refuse_non_finite(scores, batch.prompts)
            for name, scored in scores.items():
                values[name] += scored.tolist()
            categories += [str(m.get("category", "")) for m in batch.meta]
            progress(len(categories), len(rows))
        self._keep_up(backbone, len(rows))
        parts = self.ranks.all_gather_object((values, categories))
        return {
            "values": {name: [v for part, _ in parts for v in part[name]] for name in values},
            "categories": [c for _, part in parts for c in part],
        }

    def _keep_up(self, backbone: Backbone, done: int) -> None:
        """Generate as often as the rank with most rows: sharded weights are gathered on all ranks, or on none."""
        if self.ranks.sharded:
            most = -(-self.count // self.ranks.world)
            for _ in range(-(-most // self.eval.batch) - -(-done // self.eval.batch)):
                self.media(backbone, range(1))

    def _helps(self) -> list[str]:
        return [f"eval.batch = {self.eval.batch // 2} (now {self.eval.batch})"] if self.eval.batch > 1 else []

    def samples(self, backbone: Backbone) -> tuple[Sequence[str], Tensor]:
        """The first prompts, and what the backbone makes of them, on the CPU."""
        import torch

        rows = range(min(self.eval.samples, self.count))
        firsts = rows[:: self.eval.batch]
        made = [self.media(backbone, rows[first : first + self.eval.batch]).cpu() for first in firsts]
        return self.prompts.batch(rows, rows).prompts, torch.cat(made)

    def keep_samples(self, samples: tuple[Sequence[str], Tensor], folder: Path) -> None:
        """Write last.png, of clips last.webp too, and last.safetensors for `compare`: what last.png shows."""
        from safetensors.torch import save

        prompts, media = samples
        kept = save({"media": (report.shown(media) * 255).round().byte().contiguous()})
        files.write_whole(folder / KEPT, kept)  # save_file would write for the owner alone
        report.grid(media, prompts, folder / "last.png")
        if media.ndim == 5:
            report.animation(media, prompts, folder / "last.webp")

    def compare(self, stages: Sequence[str], folders: Sequence[Path], png: Path) -> None:
        """One row of kept samples a stage."""
        from safetensors.torch import load_file

        media = [load_file(folder / KEPT)["media"] / 255 for folder in folders]
        shown = range(min(len(m) for m in media))
        prompts = self.prompts.batch(shown, shown).prompts
        report.comparison([(s, m[: len(shown)]) for s, m in zip(stages, media, strict=True)], prompts, png)


@contextmanager
def _empty_prompt(backbone: Backbone, empty: Condition) -> Generator[None]:
    """Let the backbone have the prompts' own empty prompt; training goes on with that of its data, to the bit."""
    former, backbone.empty = backbone.empty, empty
    try:
        yield
    finally:
        backbone.empty = former
