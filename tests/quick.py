"""What makes runs quick in a process that does many of them."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corefit.plugins import Host

IMPORTED = (
    "corefit.cli:main",
    "corefit.run.run:run",
    "corefit.run.report:curves",
    "corefit_backbones.sd3:Sd3",
    "corefit_flow_grpo:FlowGrpo",
    "corefit_sft:Sft",
    "corefit_soar:Soar",
    "accelerate:Accelerator",
    "diffusers:StableDiffusion3Pipeline",
    "matplotlib.backends.backend_agg:FigureCanvasAgg",
    "peft:LoraConfig",
    "streaming:MDSWriter",
    "torch.distributed.checkpoint:save",
    "torch.distributed.fsdp:fully_shard",
)
"""What runs import, also within functions."""


def named(target: str) -> tuple[Any, str]:
    """The module or class that "module:name" is in, and the last part of its name."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), name


def without_waiting_for_the_disk() -> None:
    """Leave it to the system when files reach the disk: all processes of a test see them at once, killed ones too.

    Waiting is a tenth of the time of tests with runs. `tests/system/test_files.py` checks that files are waited for.
    """
    os.fsync = lambda file: None


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Let runs inside free their networks when Python does: searching for them is a quarter of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda generation=2: 0)
        yield


def ready() -> None:
    """Import all of IMPORTED and all plugins, and keep them from the garbage collector."""
    for target in IMPORTED:
        getattr(*named(target))
    Host()
    gc.collect()
    gc.freeze()


def blank(metrics_jsonl: Path, png: Path) -> None:
    """Leave an empty picture where `corefit.run.report.curves` draws, which takes half of a tiny run's time."""
    Image.new("RGB", (8, 8), "white").save(png)
