"""Evaluation: media are generated for the held-out prompts, from the same noise for every stage, and scored."""

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

SAMPLES, LAST = "last.safetensors", "last.png"
Media = tuple[Sequence[str], "Tensor"]
"""Prompts, and the media [n, 3, H, W] or [n, 3, T, H, W] that were generated for them, on the CPU."""


@frozen(eq=False)
class Evaluator:
    """Generates media for the held-out prompts and scores them.

    The noise of a prompt depends on the seed of [eval] and on its row alone.
    """

    eval: Eval
    prompts: Dataset
    ranks: Ranks

    @property
    def count(self) -> int:
        """The number of prompts that are used."""
        return self.eval.count(len(self.prompts))

    def media(self, backbone: Backbone, rows: Sequence[int]) -> Tensor:
        """Generate media [n, 3, H, W], or clips [n, 3, T, H, W], in [0, 1] for the prompts `rows`."""
        import torch

        device = self.ranks.device
        batch = self.prompts.batch(rows, rows)
        noise = Rng((self.eval.seed, "eval"), rows).randn((len(rows), *batch.shape)).to(device)
        with torch.no_grad(), _empty_prompt(backbone, self.prompts.null.to(device)):
            x0 = generate(backbone, noise, batch.cond.to(device), steps=self.eval.steps, guidance=self.eval.guidance)
            return backbone.decode(x0)

    def score(
        self, backbone: Backbone, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[dict[str, Any], Media | None]:
        """Score all prompts; every rank scores its share. Without a reward only the samples are generated.

        Return {"values": metric -> [n], "categories": [n]}, and on rank 0 the samples: the media of the first prompts.
        """
        world, rank = self.ranks.world, self.ranks.rank
        rows = range(self.count * rank // world, self.count * (rank + 1) // world)
        values: dict[str, list[float]] = {entry.name: [] for entry in self.eval.reward}
        categories: list[str] = []
        kept: list[Tensor] = []
        for start in range(0, len(rows), self.eval.batch):
            chunk = rows[start : start + self.eval.batch]
            with memory.explain_exhaustion(f"evaluation, prompts {chunk[0] + 1} to {chunk[-1] + 1}", self._remedies()):
                batch, media = self.prompts.batch(chunk, chunk), self.media(backbone, chunk)
                scores = {e.name: rewards.score(e, media, batch.prompts, batch.meta) for e in self.eval.reward}
            rewards.refuse_non_finite(scores, batch.prompts)
            for name, scored in scores.items():
                values[name] += scored.tolist()
            categories += [str(m.get("category", "")) for m in batch.meta]
            if chunk[0] < self.num_samples:
                kept.append(media[: self.num_samples - chunk[0]].cpu())
            progress(len(categories), len(rows))
        self._join_forwards(backbone, len(rows))
        gathered = self.ranks.all_gather_object((values, categories))
        found = {
            "values": {name: [v for found, _ in gathered for v in found[name]] for name in values},
            "categories": [c for _, found in gathered for c in found],
        }
        return found, self._first(kept)

    @property
    def num_samples(self) -> int:
        """The number of prompts whose samples are shown."""
        return min(self.eval.samples, self.count)

    def _first(self, kept: list[Tensor]) -> Media | None:
        """Return on rank 0 the samples of all ranks, each of which has kept those of its share; None elsewhere."""
        import torch

        media = [each for found in self.ranks.all_gather_object([] if self.ranks.main else kept) for each in found]
        rows = range(self.num_samples)
        return (self.prompts.batch(rows, rows).prompts, torch.cat([*kept, *media])) if self.ranks.main else None

    def _join_forwards(self, backbone: Backbone, done: int) -> None:
        """Generate as often as the rank with most rows, since every forward of sharded weights needs all ranks."""
        if self.ranks.sharded:
            most = -(-self.count // self.ranks.world)
            for _ in range(-(-most // self.eval.batch) - -(-done // self.eval.batch)):
                self.media(backbone, range(1))

    def _remedies(self) -> list[str]:
        return [f"eval.batch = {self.eval.batch // 2} (now {self.eval.batch})"] if self.eval.batch > 1 else []

    def samples(self, backbone: Backbone) -> Media:
        """Return the first prompts, and the media that the backbone generates for them, on the CPU."""
        import torch

        rows = range(self.num_samples)
        starts = rows[:: self.eval.batch]
        media = [self.media(backbone, rows[start : start + self.eval.batch]).cpu() for start in starts]
        return self.prompts.batch(rows, rows).prompts, torch.cat(media)

    def keep_samples(self, samples: Media, folder: Path) -> None:
        """Write last.png, for clips also last.webp, and the media of last.png as last.safetensors, for `compare`."""
        from safetensors.torch import save

        prompts, media = samples
        data = save({"media": (report.visible_frames(media) * 255).round().byte().contiguous()})
        files.write_whole(folder / SAMPLES, data)  # save_file would make a file that only its owner can read
        report.grid(media, prompts, folder / LAST)
        if media.ndim == 5:
            report.animation(media, prompts, folder / "last.webp")

    def compare(self, stages: Sequence[str], folders: Sequence[Path], png: Path) -> None:
        """Draw the kept samples of all stages, a row for each."""
        from safetensors.torch import load_file

        media = [load_file(folder / SAMPLES)["media"] / 255 for folder in folders]
        rows = range(min(len(m) for m in media))
        prompts = self.prompts.batch(rows, rows).prompts
        report.comparison([(s, m[: len(rows)]) for s, m in zip(stages, media, strict=True)], prompts, png)


@contextmanager
def _empty_prompt(backbone: Backbone, empty: Condition) -> Generator[None]:
    """Give the backbone the empty prompt that was encoded with [eval], and afterwards its former one, bit for bit."""
    former, backbone.empty = backbone.empty, empty
    try:
        yield
    finally:
        backbone.empty = former
