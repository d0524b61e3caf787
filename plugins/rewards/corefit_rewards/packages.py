"""Packages of the extra `rewards`, which are imported when a reward is used and not before."""

from __future__ import annotations

from importlib.util import find_spec

from corefit.errors import ConfigError


def require(module: str) -> None:
    """Raise ConfigError, with what to install, if a module of the extra cannot be imported."""
    if find_spec(module) is None:
        name = module.replace("_", "-")
        raise ConfigError(f"the package {name} is not installed; a reward needs it: pip install 'corefit[rewards]'")
