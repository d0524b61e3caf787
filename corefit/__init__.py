"""corefit: pluggable post-training objectives for flow-matching image and video models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corefit.plugins.hookspecs import API_VERSION, Offers, hookimpl
    from corefit.types import (
        ROUNDING,
        Backbone,
        Batch,
        Condition,
        Example,
        Moving,
        NoiseWeighting,
        Observer,
        Optimizer,
        Reward,
        Sampler,
        Scores,
        Source,
        Step,
        Term,
    )
    from corefit.types.objective import Context, Objective, Supervised

__version__ = "0.1.0"
__all__ = [
    "API_VERSION",
    "ROUNDING",
    "Backbone",
    "Batch",
    "Condition",
    "Context",
    "Example",
    "Moving",
    "NoiseWeighting",
    "Objective",
    "Observer",
    "Offers",
    "Optimizer",
    "Reward",
    "Sampler",
    "Scores",
    "Source",
    "Step",
    "Supervised",
    "Term",
    "hookimpl",
]
_MODULES = {
    **dict.fromkeys(("API_VERSION", "Offers", "hookimpl"), "corefit.plugins.hookspecs"),
    **dict.fromkeys(("Context", "Objective", "Supervised"), "corefit.types.objective"),
}
"""Where names lie that are not in corefit.types."""
_FOLDERS = ("errors", "plugins", "types")


def __getattr__(name: str) -> Any:
    """A name of `__all__`, imported when it is first asked for: `corefit --help` needs none of them."""
    if name in _FOLDERS:
        return import_module(f"corefit.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'corefit' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_MODULES.get(name, "corefit.types")), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
