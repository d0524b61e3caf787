"""Evaluation: media are generated for the held-out prompts, from the same noise for every stage, and scored."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from corefit.data.dataset import Dataset
from corefit.pipeline.eval import Eval
from corefit.rng import Rng
from corefit.rollout.loop import generate
from corefit.run import diversity, drift, report
from corefit.system import files, memory
from corefit.system.ranks import Ranks
from corefit.types import Backbone, Batch, Condition, rewards

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES = "last.safetensors"
Progress = Callable[[int, int], None]
"""Is told how many of how many are done."""


def _silent(done: int, total: int) -> None:
    """Show no progress."""


@frozen(eq=False)
class Evaluator:
    """Generates media for the held-out prompts and scores them.

    The noise of a prompt depends on the seed of [eval] and on its row alone.
    """

    eval: Eval
    prompts: Dataset
    ranks: Ranks
    data: Dataset | None = None
    """The training data, for `drift`."""

    @property
    def count(self) -> int:
        """The number of prompts that are used."""
        return self.eval.count(len(self.prompts))

    def media(self, backbone: Backbone, rows: Sequence[int], draws: Sequence[int] | None = None) -> Tensor:
        """Generate media [n, 3, H, W], or clips [n, 3, T, H, W], in [0, 1] for the prompts `rows`.

        draws  for each row which of its samples for diversity to generate; by default the one that is scored
        """
        import torch

        device = self.ranks.device
        batch = self.prompts.batch(rows, rows)
        keys = (
            [(self.eval.seed, "eval")] * len(rows)
            if draws is None
            else [(self.eval.seed, "diversity", d) for d in draws]
        )
        each = [Rng(key, [row]).randn((1, *batch.shape)) for key, row in zip(keys, rows, strict=True)]
        noise = torch.cat(each).to(device)
        with torch.no_grad(), _empty_prompt(backbone, self.prompts.null.to(device)):
            x0 = generate(backbone, noise, batch.cond.to(device), steps=self.eval.steps, guidance=self.eval.guidance)
            return backbone.decode(x0)

    def score(self, backbone: Backbone, progress: Progress = _silent) -> dict[str, Any]:
        """Return {"values": metric -> [n], "categories": [n], "prompts": [n]}; every rank scores its share.

        Without a reward nothing is generated, and there are no values.
        """
        if not self.eval.reward:
            return {"values": {}, **self.texts()}
        world, rank = self.ranks.world, self.ranks.rank
        rows = range(self.count * rank // world, self.count * (rank + 1) // world)
        values: dict[str, list[float]] = {entry.name: [] for entry in self.eval.reward}
        categories, prompts = list[str](), list[str]()
        for start in range(0, len(rows), self.eval.batch):
            chunk = rows[start : start + self.eval.batch]
            with memory.explain_exhaustion(f"evaluation, prompts {chunk[0] + 1} to {chunk[-1] + 1}", self._remedies()):
                batch, media = self.prompts.batch(chunk, chunk), self.media(backbone, chunk)
                scores = {e.name: rewards.score(e, media, batch.prompts, batch.meta) for e in self.eval.reward}
            rewards.refuse_non_finite(scores, batch.prompts)
            for name, scored in scores.items():
                values[name] += scored.tolist()
            categories += [str(m.get("category", "")) for m in batch.meta]
            prompts += batch.prompts
            progress(len(categories), len(rows))
        self._join_forwards(backbone, len(rows), -(-self.count // self.ranks.world))
        gathered = self.ranks.all_gather_object((values, categories, prompts))
        return {
            "values": {name: [v for found, _, _ in gathered for v in found[name]] for name in values},
            "categories": [c for _, found, _ in gathered for c in found],
            "prompts": [p for _, _, found in gathered for p in found],
        }

    def texts(self) -> dict[str, list[str]]:
        """Return {"categories": [n], "prompts": [n]} of the prompts that are used."""
        categories, prompts = list[str](), list[str]()
        for start in range(0, self.count, self.eval.batch):
            chunk = range(self.count)[start : start + self.eval.batch]
            batch = self.prompts.batch(chunk, chunk)
            categories += [str(m.get("category", "")) for m in batch.meta]
            prompts += batch.prompts
        return {"categories": categories, "prompts": prompts}

    def diversity(self, backbone: Backbone, prompts: Sequence[str], progress: Progress = _silent) -> dict[str, Any]:
        """Return {"rows": [n], "values": metric -> [n]} of n of the held-out `prompts`; every rank does its share."""
        settings = self.eval.diversity
        assert settings is not None, "[eval] diversity is not set"
        rows, world, rank = diversity.spread(prompts, settings.prompts), self.ranks.world, self.ranks.rank
        mine = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
        pairs = [(row, draw) for row in mine for draw in range(settings.samples)]
        features: list[Any] = []
        for start in range(0, len(pairs), self.eval.batch):
            chunk, draws = zip(*pairs[start : start + self.eval.batch], strict=True)
            with memory.explain_exhaustion("evaluation, diversity", self._remedies()):
                features += [*diversity.features(self.media(backbone, chunk, draws), self.eval.featured)]
            progress(len(features), len(pairs))
        self._join_forwards(backbone, len(pairs), -(-len(rows) // world) * settings.samples)
        starts = range(0, len(pairs), settings.samples)
        found = [diversity.measure(np.stack(features[start : start + settings.samples])) for start in starts]
        measured = [each for share in self.ranks.all_gather_object(found) for each in share]
        return {"rows": rows, "values": {name: [each[name] for each in measured] for name in diversity.METRICS}}

    def drift(self, backbone: Backbone, progress: Progress = _silent) -> dict[str, Any]:
        """Return what `drift.Drifts` holds, measured on examples of the training data; every rank does its share."""
        settings, data, world, rank = self.eval.drift, self.data, self.ranks.world, self.ranks.rank
        assert settings is not None, "[eval] drift is not set"
        assert data is not None, "there are no data to measure drift on"
        rows = drift.examples(data, settings.samples)
        size = min(self.eval.batch, -(-len(rows) // world))
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        found: list[tuple[list[list[float]], Sequence[str]]] = []
        grid: list[float] = []
        turns = -(-len(chunks) // world)
        for turn in range(turns):
            mine = turn * world + rank < len(chunks)
            if mine or self.ranks.sharded:  # every forward of sharded weights needs all ranks
                batch = data.batch(chunk := chunks[turn * world + rank if mine else 0], chunk)
                with memory.explain_exhaustion("evaluation, drift", self._remedies()):
                    grid, values = self._drift_of(backbone, batch, settings.start)
                found += [(values, batch.prompts)] if mine else []
            progress(turn + 1, turns)
        gathered = self.ranks.all_gather_object((grid, found))
        parts = [gathered[number % world][1][number // world] for number in range(len(chunks))]
        return {
            "sigmas": gathered[0][0],
            "values": [value for values, _ in parts for value in values],
            "prompts": [prompt for _, prompts in parts for prompt in prompts],
        }

    def _drift_of(self, backbone: Backbone, batch: Batch, start: float) -> tuple[list[float], list[list[float]]]:
        """Return the noise levels [levels] and the drift of each example there, [B, levels]."""
        import torch

        assert batch.x0 is not None
        assert self.data is not None
        device, rows = self.ranks.device, batch.rows
        x0, noise = batch.x0.to(device).float(), Rng((self.eval.seed, "drift"), rows).randn(batch.x0.shape).to(device)
        grid = drift.levels(backbone, self.eval.steps, batch.shape, start)
        with torch.no_grad(), _empty_prompt(backbone, self.data.null.to(device)):
            cond, scale = batch.cond.to(device), self.eval.guidance
            found = drift.measure(backbone, x0, noise, cond, grid, guidance=scale)
        return grid[1:].tolist(), found.double().cpu().tolist()

    def _join_forwards(self, backbone: Backbone, done: int, most: int) -> None:
        """Generate as often as the rank with `most` rows, since every forward of sharded weights needs all ranks."""
        if self.ranks.sharded:
            for _ in range(-(-most // self.eval.batch) - -(-done // self.eval.batch)):
                self.media(backbone, range(1))

    def _remedies(self) -> list[str]:
        return [f"eval.batch = {self.eval.batch // 2} (now {self.eval.batch})"] if self.eval.batch > 1 else []

    def samples(self, backbone: Backbone) -> tuple[Sequence[str], Tensor]:
        """Return the first prompts, and the media that the backbone generates for them, on the CPU."""
        import torch

        rows = range(min(self.eval.samples, self.count))
        starts = rows[:: self.eval.batch]
        media = [self.media(backbone, rows[start : start + self.eval.batch]).cpu() for start in starts]
        return self.prompts.batch(rows, rows).prompts, torch.cat(media)

    def keep_samples(self, samples: tuple[Sequence[str], Tensor], folder: Path) -> None:
        """Write last.png, for clips also last.webp, and the media of last.png as last.safetensors, for `compare`."""
        from safetensors.torch import save

        prompts, media = samples
        data = save({"media": (report.visible_frames(media) * 255).round().byte().contiguous()})
        files.write_whole(folder / SAMPLES, data)  # save_file would make a file that only its owner can read
        report.grid(media, prompts, folder / "last.png")
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
