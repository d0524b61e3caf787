"""Observers that send a run's metrics and samples to trackers, and a note when it ends."""

from __future__ import annotations
