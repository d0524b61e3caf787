"""Where memory runs out, the step is taken again in smaller pieces, with the same result; ranks do it together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import attrs
import forks
import pytest
import torch
from attrs import field, frozen
from processes import ended
from training import Heard, job_of, prepared, trained, worst

from corefit import Reward
from corefit.errors import TrainingError
from corefit.rollout.samplers import FlowSde
from corefit.system import memory, ranks
from corefit.system.layout import Layout
from corefit.train import loop as train
from corefit.train.retry import Retry
from corefit.train.sizes import Sizes, conditions
from corefit.types import Weighted
from corefit.types.objective import Sum
from corefit.types.stage import Optimizer, Stage
from corefit_awm import Awm
from corefit_backbones.sd3 import Sd3
from corefit_flow_grpo import FlowGrpo
from corefit_sft import Sft
from corefit_soar import Soar


@frozen
class Red(Reward):
    """How red a picture is, and how often it was asked."""

    asked: list[int] = field(factory=list[int], eq=False, init=False)

    def score(self, media, prompts, meta):
        self.asked.append(len(media))
        return media[:, 0].flatten(1).mean(1)


class Threaded(Red):
    """The same in a thread."""

    concurrent: ClassVar[bool] = True


class Limit:
    """A device on which a forward of more than `rows` rows runs out of memory, with a graph or without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, *, graph: bool = True, after: int = 0) -> None:
        self.exceeded, self.calls, real = 0, 0, Sd3.velocity

        def velocity(backbone: Sd3, x: torch.Tensor, *args: Any) -> torch.Tensor:
            counts = torch.is_grad_enabled() or not graph
            self.calls += counts
            if counts and len(x) > rows and self.calls > after:
                self.exceeded += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
            return real(backbone, x, *args)

        monkeypatch.setattr(Sd3, "velocity", velocity)


RL: Mapping[str, Any] = {"group": 2, "steps": 3, "guidance": 2.0}
SDE: Mapping[str, Any] = {"sampler": FlowSde(), "reward": (Weighted("red", Red()),)}
SUM = Sum(of=(Weighted("soar", Soar(points=3)), Weighted("sft", Sft(), 0.5)))


def logs(job: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The weights, and what was logged but for times."""
    lines: list[dict[str, float]] = []
    left = trained(attrs.evolve(job, listener=Heard(on_logged=lambda step, found: lines.append(dict(found)))))
    times = {"seconds", "samples_per_second"}
    return left, [{name: value for name, value in line.items() if name not in times} for line in lines]


@pytest.mark.parametrize(
    ("objective", "keys", "limit", "rows"),
    [
        (Sft(), {}, {"rows": 3}, 2),
        (Soar(points=3), {}, {"rows": 4, "after": 2}, 4),
        (SUM, {}, {"rows": 4, "after": 4}, 4),
        (FlowGrpo(**RL), SDE, {"rows": 4, "graph": False}, 2),
        (Awm(**RL, train_timesteps=1), SDE, {"rows": 2}, 2),
    ],
    ids=["sft", "soar", "sum", "grpo's rollouts", "awm"],
)
def test_the_result_is_that_of_the_micro_batch_that_fits(job, monkeypatch, capsys, objective, keys, limit, rows):
    """To the bit, metrics too: the step is taken again from its beginning, and draws what it drew.

    What other terms and another objective have added until memory runs out is taken back.
    """
    keys = {"steps": 2, "log_every": 1, **keys}
    expected = logs(job(objective, micro_batch=rows, **keys))
    assert not capsys.readouterr().out
    device = Limit(monkeypatch, **limit)
    found = logs(job(objective, **keys))
    assert device.exceeded > 0
    assert worst(found[0], expected[0]) == 0
    assert found[1] == expected[1]
    assert f"stage s, step 1: out of memory; from here on micro_batch = {rows}" in capsys.readouterr().out


def test_chunks_are_lowered_before_rows(job, monkeypatch, capsys):
    sizes = Sizes.of(Stage(name="s", steps=1, batch=8, objective=Soar(points=6)), 2)
    assert (sizes.rows, sizes.objective, sizes.can_lower) == (4, Soar(points=6, chunk=1), True)
    sizes.choose(100)
    assert (sizes.rows, sizes.objective) == (4, Soar(points=6, chunk=6))
    sizes.choose(14)
    assert (sizes.rows, sizes.objective) == (4, Soar(points=6, chunk=3))
    assert sizes.lower() == "chunk = 2"
    assert sizes.lower() == "chunk = 1"
    assert [sizes.lower(), sizes.lower()] == ["micro_batch = 2 (before: 4)", "micro_batch = 1 (before: 2)"]
    assert not sizes.can_lower
    monkeypatch.setattr(Sizes, "of", classmethod(_of_all_points(Sizes.of)))
    device = Limit(monkeypatch, 8)
    found = trained(job(Soar(points=3), steps=1))
    assert "from here on chunk = 1" in capsys.readouterr().out
    assert device.exceeded == 2
    assert worst(found, trained(job(Soar(points=3, chunk=1), steps=1))) == 0


def _of_all_points(real: Callable[..., Sizes]) -> Callable[..., Sizes]:
    """Sizes that a GPU of much memory would begin with."""

    def of(_: object, stage: Stage, world: int, on: Mapping[str, str]) -> Sizes:
        sizes = real(stage, world, on)
        sizes.choose(1 << 20)
        return sizes

    return of


def test_what_the_pipeline_sets_stays(job, monkeypatch):
    stage = Stage(name="s", steps=1, batch=8, objective=Soar(points=6, chunk=4), micro_batch=3)
    sizes = Sizes.of(stage, 1)
    sizes.choose(1)
    assert (sizes.rows, sizes.objective, sizes.can_lower) == (3, stage.objective, False)
    Limit(monkeypatch, 2)
    with pytest.raises(TrainingError, match=r"step 1, term 0: out of memory; 2.50 GiB.*s.micro_batch = 1 \(now 3\)"):
        trained(job(micro_batch=3))


def test_sharded_ranks_do_not_try_again_and_the_message_names_the_key(job, monkeypatch):
    Limit(monkeypatch, 3)
    made = job()
    loop = train.Loop.build(made, ranks.join("fp32"))
    loop.retry.ranks = attrs.evolve(loop.ranks, world=2)
    monkeypatch.setattr(Retry, "begin", lambda self, shape: None)
    monkeypatch.setattr(ranks.Ranks, "forwards_together", property(lambda self: True))
    with pytest.raises(TrainingError, match=r"s.micro_batch = 4 \(now 8\).*the others wait for it: set micro_batch"):
        loop.take_step(next(loop.batches()))


def test_the_exchange_of_gradients_is_explained_too(job, monkeypatch):
    def exchange(retry: Retry) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")

    monkeypatch.setattr(Retry, "exchange", exchange)
    with pytest.raises(TrainingError, match=r"stage s, step 1, the exchange of gradients: out of memory; 2.50 GiB"):
        trained(job(micro_batch=3))


def test_where_one_row_does_not_fit_the_error_names_other_keys(job, monkeypatch):
    Limit(monkeypatch, 0)
    with pytest.raises(TrainingError, match=r"term 0: out of memory; 2.50 GiB") as error:
        trained(job())
    assert "micro_batch" not in str(error.value)
    assert "gradient_checkpointing = true" in str(error.value)


def test_a_later_step_and_a_later_part_are_taken_again_too(job, monkeypatch, capsys):
    """In a later part weights have changed: that part alone is trained on again, and rewards are not asked again."""
    keys = {"steps": 2, "optimizer": Optimizer(lr=1e-3, eps=1e-3), **SDE}
    red = Red()
    expected = trained(job(FlowGrpo(**RL, updates=2), **{**keys, "reward": (Weighted("red", red),)}))
    asked = len(red.asked)
    red.asked.clear()
    # a step is 2 parts of 2 terms; the third forward is that of the second part
    device = Limit(monkeypatch, 6, after=2)
    found = trained(job(FlowGrpo(**RL, updates=2), **{**keys, "reward": (Weighted("red", red),)}))
    assert device.exceeded == 2
    assert "stage s, step 1: out of memory; from here on micro_batch = 2" in capsys.readouterr().out
    assert len(red.asked) == asked + 3, "the second step rolls out in four slices"
    assert worst(found, expected) < 1e-6
    device.calls, device.exceeded = -8, 0
    trained(job(Sft(), steps=12))
    assert device.exceeded == 1
    assert "step 11: out of memory; from here on micro_batch = 4" in capsys.readouterr().out


def test_a_resumed_run_begins_with_what_was_found(checkpoint, dataset, tmp_path, monkeypatch, capsys):
    Limit(monkeypatch, 3)
    whole = trained(job_of(checkpoint, dataset, tmp_path / "whole", steps=3))
    trained(job_of(checkpoint, dataset, tmp_path / "parts", steps=2))
    assert "from here on micro_batch = 2" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "parts/checkpoints/step-000002/manifest.json").read_text())
    found = manifest["info"]["sizes"]
    assert found == {"rows": 2, "chunks": {}, "proven": {"(4, 8, 8)": 2}, "on": found["on"]}
    resumed = trained(job_of(checkpoint, dataset, tmp_path / "parts", steps=3))
    assert "out of memory" not in capsys.readouterr().out
    assert worst(resumed, whole) == 0


def _go_on(job: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> Sizes:
    """The sizes with which a stage goes on under other keys, after a step in which a row at a time fitted."""
    loop = train.Loop.build(job(Soar(points=2), **before), ranks.join("fp32"))
    loop.state.sizes.choose(1)
    loop.state.sizes.fitted((4, 8, 8))
    loop.state.step = 1
    loop.save()
    later = attrs.evolve(job(Soar(points=2), **after), folder=loop.job.folder)
    resumed = train.Loop.resume(later, ranks.join("fp32"))
    assert resumed.state.step == 1
    return resumed.state.sizes


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [({}, {}, 1), ({"micro_batch": 2}, {}, 8), ({}, {"micro_batch": 4}, 4), ({}, {"copies": "cpu"}, 8)],
    ids=["nothing changed", "micro_batch was removed", "micro_batch was added", "copies were moved"],
)
def test_sizes_are_found_anew_where_a_key_has_changed(job, before, after, rows):
    sizes = _go_on(job, before, after)
    stays = before == after
    assert (sizes.rows, sizes.chosen, sizes.proven) == (rows, stays, {"(4, 8, 8)": 1} if stays else {})


def test_sizes_are_found_anew_on_other_devices(job, monkeypatch):
    """Also with another layout of the processes, and where a checkpoint of an earlier version does not say."""
    loop = train.Loop.build(job(), ranks.join("fp32"))
    here, backbone = loop.state.sizes, loop.job.backbone
    here.choose(2)
    kept = json.loads(json.dumps(here.state()))

    def goes_on(state: Mapping[str, Any], on: ranks.Ranks) -> bool:
        again = Sizes.of(here.stage, 1, conditions(here.stage, backbone, on))
        again.restore(state)
        assert again.rows == (here.rows if again.chosen else 8)
        return again.chosen

    assert goes_on(kept, loop.ranks)
    assert not goes_on(kept, attrs.evolve(loop.ranks, layout=Layout(replicate=2)))
    assert not goes_on({name: value for name, value in kept.items() if name != "on"}, loop.ranks)
    monkeypatch.setattr(memory, "described", lambda device: "NVIDIA H100, 79.6 GiB")
    assert not goes_on(kept, loop.ranks)


def test_on_a_gpu_rewards_in_threads_score_while_the_next_rows_are_sampled(job, monkeypatch):
    """A share that is sampled at once would leave nothing to overlap with; other rewards cut nothing."""
    red, threaded = Red(), Threaded()
    monkeypatch.setattr(memory, "room", lambda device: 1 << 40)
    for reward in (red, threaded):
        trained(job(FlowGrpo(**RL), steps=1, batch=24, sampler=FlowSde(), reward=(Weighted("red", reward),)))
    assert (red.asked, threaded.asked) == ([24], [8, 8, 8])


RANK = """\
import os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from attrs import frozen
from training import job_of, prepared, trained

from corefit.train.gradients import Gradients
from corefit_sft import Sft


@frozen
class Narrow(Sft):
    where: str = "terms"

    def experience(self, batch, ctx):
        for first in range(0, len(batch), ctx.micro_batch):
            self.full(batch[first : first + ctx.micro_batch], "experience")
        assert len(ctx.gather(torch.tensor(batch.rows))) == 4
        yield batch

    def terms(self, batch, ctx):
        self.full(batch, "terms")
        yield from super().terms(batch, ctx)

    def full(self, batch, where):
        if self.where == where and os.environ["RANK"] == "1" and len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")


def complete(gradients):
    real(gradients)
    if where == "exchange" and os.environ["RANK"] == "1" and not asked:
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")


real, asked, Gradients.complete = Gradients.complete, [], complete
checkpoint, folder = map(Path, sys.argv[2:])
dataset = prepared(checkpoint, folder / "cache")
for where in ("terms", "experience", "exchange"):
    made = job_of(checkpoint, dataset, folder / where, Narrow(where=where), steps=3, batch=4)
    torch.save(trained(made), folder / f"{where}-{os.environ['RANK']}.pt")
"""


def test_all_ranks_try_again_where_one_ran_out(job, checkpoint, tmp_path):
    """In a term, before a gather of the experience, or before gradients are exchanged; else the others would wait.

    The first two steps are exchanged once all ranks agree, and the third one in DDP's backward.
    """
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = (str(script), str(Path(__file__).parents[1]), str(checkpoint), str(tmp_path))
    prepared(checkpoint, tmp_path / "cache")
    alone = trained(job(steps=3, batch=4))
    done = ended(*forks.ranks(command, command, cwd=tmp_path))
    assert done.status == 0, done.err
    said = "stage s, step 1: out of memory; from here on micro_batch = 1 (before: 2)\n"
    assert done.out.count(said) == 3
    for where in ("terms", "experience", "exchange"):
        first, second = (torch.load(tmp_path / f"{where}-{rank}.pt") for rank in (0, 1))
        assert worst(first, second) == 0
        assert worst(first, alone) < 1e-5


@pytest.mark.parametrize(("objective", "batch"), [(Sft(), 64), (Soar(points=6), 16)], ids=["rows", "points"])
def test_a_gpu_begins_with_what_it_has_room_for(job, monkeypatch, objective, batch):
    """What was chosen fits into the room, and fills more than half of it; on a CPU nothing is measured."""
    keys = {"steps": 1, "batch": batch, "optimizer": Optimizer(lr=1e-3, eps=1e-3)}
    plain = trained(job(objective, **keys))
    loop = train.Loop.build(job(objective, **keys), ranks.join("fp32"))
    given = next(loop.batches())
    room = 8 << 20
    monkeypatch.setattr(memory, "room", lambda device: room)
    with memory.track_live_bytes() as live:
        loop.take_step(given)
    sizes = loop.state.sizes
    rows = sizes.rows * sizes.objective.rows_per_graph
    assert sizes.chosen
    assert 16 <= rows < 64, (rows, live.peak)
    assert room / 2 < live.peak < room
    assert worst(plain, dict(loop.state.trainable)) < 1e-6


@pytest.mark.parametrize(("room", "rows"), [(1 << 30, 8), (1 << 10, 1)], ids=["room for all", "for one row"])
def test_sharded_ranks_try_two_rows_only_where_they_fit(job, monkeypatch, room, rows):
    """A rank that ran out of memory in a forward would leave the others waiting; all of them go on with one row."""
    loop = train.Loop.build(job(), ranks.join("fp32"))
    monkeypatch.setattr(memory, "room", lambda device: room)
    monkeypatch.setattr(ranks.Ranks, "forwards_together", property(lambda self: True))
    device = Limit(monkeypatch, rows)
    loop.take_step(next(loop.batches()))
    assert (device.exceeded, loop.state.sizes.rows) == (0, rows)
