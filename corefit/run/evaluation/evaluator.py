"""Evaluation: media are generated for the held-out prompts, from the same noise for every stage, and scored."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import numpy as np
from attrs import field, frozen

from corefit.data.coding import Coder, smaller
from corefit.data.dataset import Dataset
from corefit.data.sources import category
from corefit.pipeline.eval import Eval
from corefit.rng import Rng
from corefit.rollout.loop import generate
from corefit.run import report
from corefit.run.evaluation import diversity, drift, extremes
from corefit.run.evaluation.partial import PartialScores, RowScores
from corefit.system import files, memory
from corefit.system.ranks import Ranks
from corefit.train.sharding import Sharding
from corefit.types import Backbone, Batch, Condition, rewards

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SAMPLES, LAST = "last.safetensors", "last.png"
Media = tuple[Sequence[str], "Tensor"]
"""Prompts, and the media [n, 3, H, W] or [n, 3, T, H, W] that were generated for them, on the CPU."""
Progress = Callable[[int, int], None]
"""Is told how many of how many are done."""


def _silent(done: int, total: int) -> None:
    """Show no progress."""


def _unsaid(text: str) -> None:
    """Say nothing."""


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
    say: Callable[[str], None] = _unsaid
    _coders: dict[int, Coder] = field(init=False, factory=dict[int, Coder])

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
        seed = self.eval.seed
        if draws is None:
            each = [noise_of(seed, row, batch.shape) for row in rows]
        else:
            keys = zip(rows, draws, strict=True)
            each = [Rng((seed, "diversity", draw), [row]).randn((1, *batch.shape)) for row, draw in keys]
        noise = torch.cat(each).to(device)
        with torch.no_grad(), _empty_prompt(backbone, self.prompts.null.to(device)):
            cond, settings = batch.cond.to(device), self.eval
            with Sharding.of(backbone.transformer, self.ranks).step():
                x0 = generate(backbone, noise, cond, steps=settings.steps, guidance=settings.guidance)
            return self._decode(backbone, x0)

    def _decode(self, backbone: Backbone, x0: Tensor) -> Tensor:
        """Decode latents in parts that fit; what fits is found once for a backbone."""
        return self._coders.setdefault(id(backbone), Coder(backbone, self.say)).decode(x0)

    def score(
        self, backbone: Backbone, progress: Progress = _silent, partial: PartialScores | None = None
    ) -> tuple[dict[str, Any], Media | None]:
        """Score all prompts; every rank scores its share. Without a reward only the samples are generated.

        Return {"values": metric -> [n], "categories": [n], "prompts": [n]}, and on rank 0 the samples: the media of the
        first prompts. With `partial`, the scores that a killed evaluation has left are used, and new ones are written.
        """
        world, first = self.ranks.data_world, self.num_samples
        before = self.ranks.from_main(partial.read) if partial else {}
        found = {row: each for row, each in before.items() if row >= first}  # the samples themselves are not kept
        rows = range(self.count if self.eval.reward else first)
        size = min(self.eval.batch, -(-len(rows) // world))  # the same batches after a kill give the same bytes
        whole = [rows[start : start + size] for start in range(0, len(rows), size)]
        # whole, even if few of its rows are missing: in a smaller batch they would be rounded otherwise
        left = [each for each in whole if any(row not in found for row in each)]
        mine, scored, kept = left[self.ranks.data_rank :: world], dict[int, RowScores](), dict[int, Any]()
        for number, batch in enumerate(mine, 1):
            new, media = self._scores(backbone, batch)
            if partial and new:
                partial.add(new)
            scored |= new
            kept |= {row: medium.cpu() for row, medium in zip(batch, media, strict=True) if row < first}
            progress(min(len(rows), size * (len(whole) - len(left) + number * world)), len(rows))
        self._join_forwards(backbone, len(mine), -(-len(left) // world))
        for share, samples in self.ranks.all_gather_object((scored, kept) if self.ranks.leads else ({}, {})):
            found, kept = found | share, kept | samples
        return self._joined(found), self._first(kept) if self.ranks.main else None

    def _joined(self, found: Mapping[int, RowScores]) -> dict[str, Any]:
        """Return the scores of all rows, in their order."""
        if not self.eval.reward:
            return {"values": {}, **self.texts()}
        ordered = [found[row] for row in range(self.count)]
        return {
            "values": {e.name: [each["values"][e.name] for each in ordered] for e in self.eval.reward},
            "categories": [each["category"] for each in ordered],
            "prompts": [each["prompt"] for each in ordered],
        }

    @property
    def num_samples(self) -> int:
        """The number of prompts whose samples are shown."""
        return min(self.eval.samples, self.count)

    def _first(self, kept: Mapping[int, Tensor]) -> Media:
        """Return the samples, given the media of the first rows."""
        import torch

        rows = range(self.num_samples)
        return self.prompts.batch(rows, rows).prompts, torch.stack([kept[row] for row in rows])

    def _scores(self, backbone: Backbone, rows: Sequence[int]) -> tuple[dict[int, RowScores], Tensor]:
        """Generate media for some prompts and score them; return the scores of each row, and the media."""
        with memory.explain_exhaustion(
            f"evaluation, prompts {rows[0] + 1} to {rows[-1] + 1}", lambda: self._remedies(backbone)
        ):
            batch, media = self.prompts.batch(rows, rows), self.media(backbone, rows)
            if not self.ranks.leads:  # the first of the processes that share these rows scores them
                return {}, media
            scores = {e.name: rewards.score(e, media, batch.prompts, batch.meta) for e in self.eval.reward}
        rewards.refuse_non_finite(scores, batch.prompts)
        found: dict[int, RowScores] = {}
        for index, (row, prompt, meta) in enumerate(zip(rows, batch.prompts, batch.meta, strict=True)):
            values = {name: float(scored[index]) for name, scored in scores.items()}
            found[row] = {"values": values, "category": category(meta), "prompt": prompt}
        return found, media

    def texts(self) -> dict[str, list[str]]:
        """Return {"categories": [n], "prompts": [n]} of the prompts that are used."""
        categories, prompts = list[str](), list[str]()
        for start in range(0, self.count, self.eval.batch):
            chunk = range(self.count)[start : start + self.eval.batch]
            batch = self.prompts.batch(chunk, chunk)
            categories += [category(meta) for meta in batch.meta]
            prompts += batch.prompts
        return {"categories": categories, "prompts": prompts}

    def diversity(self, backbone: Backbone, prompts: Sequence[str], progress: Progress = _silent) -> dict[str, Any]:
        """Return {"rows": [n], "values": metric -> [n]} of n of the held-out `prompts`; every rank does its share."""
        settings = self.eval.diversity
        assert settings is not None, "[eval] diversity is not set"
        rows, world, rank = diversity.spread(prompts, settings.prompts), self.ranks.data_world, self.ranks.data_rank
        mine = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
        pairs = [(row, draw) for row in mine for draw in range(settings.samples)]
        features: list[Any] = []
        for start in range(0, len(pairs), self.eval.batch):
            chunk, draws = zip(*pairs[start : start + self.eval.batch], strict=True)
            with memory.explain_exhaustion("evaluation, diversity", lambda: self._remedies(backbone)):
                features += [*diversity.features(self.media(backbone, chunk, draws), self.eval.featured)]
            progress(len(features), len(pairs))
        size = self.eval.batch
        most = -(-len(rows) // world) * settings.samples
        self._join_forwards(backbone, -(-len(pairs) // size), -(-most // size))
        starts = range(0, len(pairs), settings.samples)
        found = [diversity.measure(np.stack(features[start : start + settings.samples])) for start in starts]
        measured = [each for share in self._by_share(found) for each in share]
        return {"rows": rows, "values": {name: [each[name] for each in measured] for name in diversity.METRICS}}

    def also(self, backbone: Backbone, prompts: Sequence[str], progress: Progress = _silent) -> dict[str, Any]:
        """Return {"rows": [n], "values": metric -> [n]} of n of the held-out `prompts`, with the settings of `also`.

        A metric's name is that of the reward and of the settings, such as "ocr, 8 steps". Every rank does its share.
        """
        assert self.eval.also is not None, "[eval] also is not set"
        rows, world = diversity.spread(prompts, self.eval.also.prompts), self.ranks.data_world
        size = min(self.eval.batch, -(-len(rows) // world))
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        mine, others = chunks[self.ranks.data_rank :: world], self.eval.others
        values: dict[str, list[float]] = {}
        for number, (name, settings) in enumerate(others.items()):
            changed, scored = attrs.evolve(self, eval=settings), dict[int, RowScores]()
            for done, chunk in enumerate(mine, 1):
                scored |= changed._scores(backbone, chunk)[0]
                progress(number * len(mine) + done, len(others) * len(mine))
            changed._join_forwards(backbone, len(mine), -(-len(chunks) // world))
            found: dict[int, RowScores] = {}
            for share in self._by_share(scored):
                found |= share
            for entry in self.eval.reward:
                values[f"{entry.name}, {name}"] = [found[row]["values"][entry.name] for row in rows]
        return {"rows": rows, "values": values}

    def drift(self, backbone: Backbone, progress: Progress = _silent) -> dict[str, Any]:
        """Return what `drift.Drifts` holds, measured on examples of the training data; every rank does its share."""
        settings, data, world, rank = self.eval.drift, self.data, self.ranks.data_world, self.ranks.data_rank
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
            if mine or self.ranks.forwards_together:
                batch = data.batch(chunk := chunks[turn * world + rank if mine else 0], chunk)
                with memory.explain_exhaustion("evaluation, drift", lambda: self._remedies(backbone)):
                    grid, values = self._drift_of(backbone, batch, settings.start)
                found += [(values, batch.prompts)] if mine else []
            progress(turn + 1, turns)
        gathered = self._by_share((grid, found))
        parts = [gathered[number % world][1][number // world] for number in range(len(chunks))]
        return {
            "sigmas": gathered[0][0],
            "values": [value for values, _ in parts for value in values],
            "prompts": [prompt for _, prompts in parts for prompt in prompts],
        }

    def _by_share(self, value: T) -> list[T]:
        """Return the values of the processes that lead the others of their share, in the order of the shares."""
        return self.ranks.all_gather_object(value)[:: self.ranks.layout.context]

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
        """Generate until this rank has generated `most` batches, where every forward needs all ranks."""
        if self.ranks.forwards_together:
            for _ in range(most - done):
                self.media(backbone, range(1))

    def _remedies(self, backbone: Backbone) -> list[str]:
        fewer = [f"eval.batch = {self.eval.batch // 2} (now {self.eval.batch})"] if self.eval.batch > 1 else []
        return [*fewer, *smaller(backbone, self.prompts.manifest.sizes[0])]

    def samples(self, backbone: Backbone) -> Media:
        """Return the first prompts, and the media that the backbone generates for them, on the CPU."""
        import torch

        rows = range(self.num_samples)
        starts = rows[:: self.eval.batch]
        media = [self.media(backbone, rows[start : start + self.eval.batch]).cpu() for start in starts]
        return self.prompts.batch(rows, rows).prompts, torch.cat(media)

    def extremes(self, backbone: Backbone, values: Mapping[str, Sequence[float]]) -> tuple[list[int], Tensor | None]:
        """Return the rows of the best and worst scores, and on the main process their media, generated once more.

        The first rows are left out, for `samples` has them.
        """
        import torch

        rows = extremes.choose(values, self.eval.samples)
        if not rows or not (self.ranks.main or self.ranks.forwards_together):
            return rows, None
        starts = range(0, len(rows), self.eval.batch)
        media = [self.media(backbone, rows[start : start + self.eval.batch]).cpu() for start in starts]
        return rows, report.visible_frames(torch.cat(media))

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


def noise_of(seed: int, row: int, shape: Sequence[int]) -> Tensor:
    """Return the noise [1, ...] that the sample of the prompt `row` is generated from, on the CPU."""
    return Rng((seed, "eval"), [row]).randn((1, *shape))


@contextmanager
def _empty_prompt(backbone: Backbone, empty: Condition) -> Generator[None]:
    """Give the backbone the empty prompt that was encoded with [eval], and afterwards its former one, bit for bit."""
    former, backbone.empty = backbone.empty, empty
    try:
        yield
    finally:
        backbone.empty = former
