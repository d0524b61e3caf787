"""What is reported of a logged step; nothing else in training waits for the device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

from corefit.system import memory
from corefit.system.ranks import Ranks
from corefit.train import remedies
from corefit.train.job import Job, Metrics
from corefit.train.state import State
from corefit.types.stage import Stage


def take_metrics(stage: Stage, state: State, ranks: Ranks) -> Metrics:
    """Return the metrics of a logged step, with means over all ranks and steps since the last log, and begin anew.

    Raises NonFinite where too many steps were skipped.
    """
    state.guard.refuse(stage.name, ranks)
    samples, seconds = state.unreported
    state.unreported = (0, 0.0)
    return {
        **state.means.take(ranks),
        **({"skipped": float(state.guard.skipped)} if stage.skips else {}),
        "lr": stage.optimizer.rate(state.step - 1, stage.steps),
        "samples_per_second": samples / max(seconds, 1e-9),
        "seconds": state.seconds,
    }


def alarm(state: State, metrics: Metrics, ranks: Ranks) -> str:
    """Return what the alarm says of a logged step, "" if it does not sound; the ranks agree on the metrics."""
    return state.watch.see(state.step, ranks.broadcast_object(metrics)) if state.watch else ""


def announce_alarm(stage: Stage, ranks: Ranks) -> None:
    """Say where a stage has held-out rewards and logs too few steps for an alarm."""
    if stage.watch and stage.logged_steps < stage.watch.window:
        ranks.accelerator.print(
            f"stage {stage.name}: no alarm can sound: it looks at {stage.watch.window} logged steps, and the stage "
            f"logs {stage.logged_steps}; lower log_every or alarm.window"
        )


def explain_exhaustion(job: Job, state: State, gather: str, what: str) -> AbstractContextManager[None]:
    """Say in which stage and step memory ran out, while `what` was computed.

    gather  how long sharded weights stay gathered: "step" or "term"
    """
    ranks, sizes = state.ranks, state.sizes
    gpu = ranks.device.type != "cpu"
    helps = functools.partial(remedies.step_helps, sharded=ranks.sharded, gather=gather, gpu=gpu)
    kept = remedies.ALONE + remedies.KEPT if sizes.can_lower and ranks.forwards_together else remedies.KEPT
    return memory.explain_exhaustion(
        f"stage {job.stage.name}, step {state.step + 1}, {what}",
        lambda: helps(sizes.sized, job.mode, job.backbone, ranks.data_world),
        kept,
    )
