"""Problems that pipelines and evaluations have in common, each as a message that begins with the key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from corefit.data import cache
from corefit.errors import CorefitError
from corefit.pipeline.eval import Eval
from corefit.system.layout import Layout
from corefit.types import Backbone, ContextParallel, Reward, Weighted


def error_of(where: str, attempt: Callable[[], Any]) -> Iterator[str]:
    """Yield the message of the error that `attempt` raises, if it raises one, after the key `where`."""
    try:
        attempt()
    except CorefitError as error:
        yield f"{where}: {error}"


def eval_problems(where: str, eval: Eval, size: Sequence[int]) -> Iterator[str]:
    """Yield a message for each setting of an `[eval]` at `where` that cannot work, and for its prompts."""
    yield from error_of(f"{where}.prompts", lambda: cache.check(eval.data(tuple(size)), media=False))
    for name in repeated(entry.name for entry in eval.reward):
        yield f"{where}.reward: {name!r} is listed twice; remove one, or give one of them another `name`"


def reward_problems(places: Mapping[str, Sequence[Weighted[Reward]]]) -> Iterator[str]:
    """Let the rewards at these places look for what they lack, such as a file or a package."""
    for where, entries in places.items():
        for entry in entries:
            if check := getattr(entry.value, "check", None):  # a reward of version 0.1 has none
                yield from error_of(f"{where}.{entry.name}", check)


def layout_problems(layout: Layout, backbone: Backbone, sizes: Iterable[Sequence[int]]) -> Iterator[str]:
    """Yield a message for each key of processes that cannot work with the backbone and with media of these sizes."""
    if layout.replicate > 1 and not layout.shard:
        yield "replicate: without shards every process has all weights; add shard = true, or remove the key"
    if layout.context > 1 and isinstance(backbone, ContextParallel):
        yield from error_of("context_parallel", lambda: backbone.check_context(layout.context, sizes))
    elif layout.context > 1:
        yield (
            "context_parallel: the backbone cannot split samples (corefit.types.ContextParallel); remove the key, or "
            "use shard = true for its weights"
        )


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that come more than once, sorted."""
    return sorted(name for name, number in Counter(names).items() if number > 1)
