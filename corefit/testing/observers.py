"""The check of observers: a rehearsal of a run that is stopped, continued, finished and started once more."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from corefit.rng import Rng
from corefit.testing.checks import expect
from corefit.testing.keys import check_keys
from corefit.testing.toy import ToyBackbone
from corefit.types import Batch, Observer, Scored, Term, TrainState
from corefit.types.objective import Context, Supervised
from corefit.types.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

Event = tuple[str, dict[str, Any]]
"""The name of an observer's method, and its arguments."""
PROMPTS = ("a red circle", "a blue square")
STEPS, EVERY = 20, 10


def check_observer(observer: Observer, folder: Path | None = None) -> None:
    """Raise an AssertionError that names the problem unless `observer` goes through a run and changes nothing.

    The observer is told of a run as the trainer tells it: the run is stopped in the middle of its stage, continued,
    finished, and started once more when nothing is left to do. Metrics, scores, samples and weights must stay as they
    are.

    folder  the run's folder; a temporary one by default
    """
    name = type(observer).__name__
    try:
        check_keys(type(observer), Observer)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
    optional: object = observer.optional
    expect(isinstance(optional, bool), f"{name}: optional is {optional!r}; make it True or False")
    observer.check()
    with tempfile.TemporaryDirectory() as temporary:
        run = Rehearsal(folder or Path(temporary))
        for event, arguments in run.events():
            before = run.content(arguments)
            result = getattr(observer, event)(**arguments)
            expect(result is None, f"{name}: {event} returns {result!r}, which nothing reads; return nothing")
            changed = sorted(what for what, value in run.content(arguments).items() if value != before[what])
            expect(
                not changed,
                f"{name}: {event} changes {' and '.join(changed)} in place; an observer changes nothing, make copies",
            )


@frozen
class _Toy(Supervised):
    """The objective of a stage that only observers are told of."""

    def terms(self, part: Batch, ctx: Context, /) -> Iterator[Term]:
        raise NotImplementedError


@define(eq=False)
class Rehearsal:
    """Tells of a run, in `run_folder`, whose one stage is stopped after 10 of 20 steps and continued.

    It has what observers may read of a pipeline.
    """

    run_folder: Path
    name: str = "rehearsal"
    seed: int = 0
    stage: tuple[Stage, ...] = (Stage(name="toy", steps=STEPS, log_every=EVERY, sample_every=EVERY, objective=_Toy()),)
    media: Tensor = field(init=False)
    backbone: ToyBackbone = field(init=False)

    def __attrs_post_init__(self) -> None:
        import torch

        self.media = Rng((self.seed, "rehearsal"), range(len(PROMPTS))).randn((len(PROMPTS), 3, 32, 32)).sigmoid()
        self.backbone = ToyBackbone()
        self.backbone.load(torch.device("cpu"), torch.float32)

    def tables(self) -> Mapping[str, Any]:
        """Return the tables of a pipeline file that might say this."""
        return {"name": self.name, "seed": self.seed, "stage": [{"name": "toy", "steps": STEPS}]}

    def events(self) -> Iterator[Event]:
        """Yield what the trainer would tell, in order."""
        stopped = KeyboardInterrupt()
        yield from self._run([self._scored("base"), *self._trained(0, EVERY)], stopped)
        last = [*self._trained(EVERY, STEPS), self._told("stage_finished", STEPS), self._scored("toy")]
        yield from self._run([self._scored("base", earlier=True), *last], None)
        yield from self._run([self._scored("base", earlier=True), self._scored("toy", earlier=True)], None)

    def content(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an observer can reach of the run and must leave as it is, by a name for messages."""
        scored: Any = arguments.get("scored")
        weights = [parameter.flatten().tolist() for parameter in self.backbone.transformer.parameters()]
        return {
            "the metrics": dict(arguments.get("metrics", {})),
            "the samples": self.media.flatten().tolist(),
            "the weights": weights,
            "the scores": json.dumps([scored.values, scored.rows]) if scored else "",
        }

    def _run(self, between: list[Event], error: BaseException | None) -> Iterator[Event]:
        run: dict[str, Any] = {"pipeline": self, "folder": self.run_folder}
        yield "run_started", run
        yield from between
        yield "run_finished", {**run, "error": error}

    def _trained(self, start: int, end: int) -> Iterator[Event]:
        yield self._told("stage_started", start)
        metrics = {"loss": 1 / end, "grad_norm": 0.5, "lr": 1e-4, "samples_per_second": 4.0, "seconds": float(end)}
        yield self._told("step_finished", end, metrics=metrics)
        yield self._told("checkpoint_saved", end, path=self._folder("toy") / "checkpoints" / f"step-{end:06d}")

    def _told(self, event: str, step: int, **rest: Any) -> Event:
        folder, due = self._folder("toy"), event == "step_finished" and step < STEPS
        grid = self._drawn(folder, f"step-{step:06d}.png") if due else None
        state = TrainState(step, folder, self.backbone, lambda: (PROMPTS, self.media), grid)
        return event, {"stage": self.stage[0], "state": state, **rest}

    def _scored(self, name: str, *, earlier: bool = False) -> Event:
        folder, values = self._folder(name), [0.25, 0.75]
        row = {"stage": name, "metric": "toy", "category": "all", "value": 0.5, "low": 0.25, "high": 0.75, "n": 2}
        scored = Scored(
            name=name,
            folder=folder,
            step=0 if name == "base" else STEPS,
            values={"toy": values},
            categories=["", ""],
            rows=[row],
            samples=None if earlier else (PROMPTS, self.media),
            grid=self._drawn(folder, "last.png"),
            earlier=earlier,
        )
        return "scored", {"scored": scored}

    def _folder(self, name: str) -> Path:
        folder = self.run_folder / f"{'00' if name == 'base' else '01'}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _drawn(self, folder: Path, name: str) -> Path:
        """Return a sample grid in a stage's folder, drawn now if it is not there."""
        from PIL import Image

        png = folder / "samples" / name
        if not png.exists():
            png.parent.mkdir(exist_ok=True)
            rows = (self.media * 255).byte().permute(0, 2, 3, 1).flatten(0, 1)
            Image.fromarray(rows.numpy()).save(png)
        return png
