"""Plugins: the hooks, the host that finds and checks plugins, and the plugins of corefit itself."""

from corefit.plugins.host import Host, Offer
from corefit.plugins.kinds import KINDS, Kind

__all__ = ["KINDS", "Host", "Kind", "Offer"]
