"""Plugins: the hooks, the host that finds and checks them, and what corefit itself offers."""

from corefit.plugins.host import Host, Offer
from corefit.plugins.kinds import KINDS, Kind

__all__ = ["KINDS", "Host", "Kind", "Offer"]
