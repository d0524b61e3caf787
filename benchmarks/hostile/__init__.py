"""Hostile cases: what users, disks, schedulers and plugins may do, and what must hold then."""

from benchmarks.hostile.command import hostile

__all__ = ["hostile"]
