"""Several processes that differ, or of which one fails."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

from benchmarks.hostile.case import RUN, Case, Project, nothing

Inside = Callable[[], object]


def cases() -> list[Case]:
    """All of this area."""
    return [*_alike(), *_differing(), *_failing()]


def _case(name: str, *says: str, spoil: Callable[[Project], object] = nothing, **rest: Any) -> Case:
    return Case(name=name, area="ranks", spoil=spoil, typed=RUN, says=says, ranks=2, timeout=90.0, **rest)


def _alike() -> list[Case]:
    return [
        _case("two that are alike", status=(0,)),
        _case("two go on where one stopped", status=(0,), start="interrupted"),
        _case("two read a finished run", status=(0,), start="finished", equal=True),
        _case("a damaged picture", "2.png", spoil=lambda p: p.write("pictures/2.png", "x")),
        _case(
            "a damaged checkpoint",
            spoil=lambda p: p.path("runs/demo/01-sft/checkpoints/step-000002/manifest.json").write_text("x"),
            start="interrupted",
            status=(0,),
        ),
        _case("a reward that raises on all", "mine", spoil=_raising, theirs="bright.py"),
        _case(
            "a batch that does not divide",
            "batch",
            spoil=lambda p: p.replace("batch = 2\nobjective", "batch = 3\nobjective"),
        ),
    ]


def _raising(project: Project) -> None:
    project.replace("return media", "raise ValueError('mine')\n        return media", "bright.py")


def _differing() -> list[Case]:
    """The last rank's pipeline is another one; who trains on with it spoils weights without a word."""

    def of(name: str, *settings: str, says: tuple[str, ...]) -> Case:
        odd = tuple(text for setting in settings for text in ("--set", setting))
        return _case(f"another {name} on one", "rank", *says, odd=odd)

    return [
        of("seed", "seed=1", says=("seed",)),
        of("lr", "stage.sft.optimizer.lr=0.5", says=("lr",)),
        of("number of steps", "stage.sft.steps=3", says=("steps",)),
        of("precision", "precision=bf16", says=("precision",)),
        of("guidance", "stage.grpo.objective.guidance=3.0", says=("guidance",)),
        of("data", "data.source.path=heldout.jsonl", says=("data",)),
        _case(
            "another plugin file on one",
            "bright.py",
            "rank",
            spoil=_other_plugin,
            odd=("--set", 'plugins=["other/bright.py"]'),
        ),
        _case("another version on one", "version", "rank", inside=_on(1, _older)),
    ]


def _other_plugin(project: Project) -> None:
    source = project.path("bright.py").read_text()
    project.write("other/bright.py", source.replace("mean(1)", "mean(1) * -1"))


def _older() -> None:
    import corefit

    corefit.__version__ = "0.0.1"


def _failing() -> list[Case]:
    """One rank ends, is killed, is stopped or cannot read."""

    def at(name: str, act: Inside, *says: str, rank: int = 1, status: tuple[int, ...] = (2,)) -> Case:
        return _case(name, *says, inside=_on(rank, _before_step(act)), status=status)

    def sent(number: int) -> Inside:
        return lambda: os.kill(os.getpid(), number)

    return [
        at("the last is killed", sent(signal.SIGKILL), "rank 1", status=(-9, 2)),
        at("the first is killed", sent(signal.SIGKILL), "rank 0", rank=0, status=(-9, 2)),
        at("SIGTERM to one", sent(signal.SIGTERM), "continue", status=(130,)),
        at("SIGINT to one", sent(signal.SIGINT), "continue", status=(130,)),
        at("SIGHUP to one", sent(signal.SIGHUP), "continue", status=(130,)),
        at("one is out of memory", _out_of_memory, "memory"),
        at("one ends with status 0", _raise(SystemExit(0)), "rank 1"),
        _case("one cannot read the data", "train.jsonl", inside=_on(1, _unreadable), status=(0, 2)),
    ]


def _on(rank: int, act: Inside) -> Inside:
    """What happens in one of the processes alone."""
    return lambda: act() if os.environ["RANK"] == str(rank) else None


def _before_step(act: Inside, call: int = 2) -> Inside:
    """Before the `call`-th step of AdamW."""

    def inside() -> None:
        import torch

        real, calls = torch.optim.AdamW.step, itertools.count(1)

        def step(self: Any, *args: Any, **keys: Any) -> Any:
            if next(calls) == call:
                act()
            return real(self, *args, **keys)

        torch.optim.AdamW.step = step

    return inside


def _raise(error: BaseException) -> Inside:
    def act() -> None:
        raise error

    return act


def _out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")


def _unreadable() -> None:
    import io

    real = io.open

    def refusing(file: Any, *args: Any, **keys: Any) -> Any:
        if str(file).endswith("train.jsonl"):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return real(file, *args, **keys)

    io.open = refusing
