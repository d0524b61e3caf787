"""Observers that send a run's metrics and samples to trackers, and a note when it ends."""

from __future__ import annotations

from corefit import Observer, Offers, hookimpl
from corefit_trackers.notify import Notify
from corefit_trackers.others import OtherTracker
from corefit_trackers.tensorboard import TensorBoard
from corefit_trackers.trackio import Trackio
from corefit_trackers.wandb import Wandb


@hookimpl
def corefit_observers() -> Offers[Observer]:
    return {
        "tensorboard": TensorBoard,
        "wandb": Wandb,
        "trackio": Trackio,
        "accelerate": OtherTracker,
        "notify": Notify,
    }
