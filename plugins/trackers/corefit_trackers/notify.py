"""A note when a run ends: on the desktop, by mail, to a chat, or to a webhook, through apprise."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from attrs import define, field

from corefit import Observer
from corefit.errors import ConfigError
from corefit.types import PipelineView, Scored
from corefit_trackers.base import require

DESKTOP = ("dbus", "glib", "gnome", "kde", "macosx", "qt", "windows")
"""The schemes of apprise's addresses of desktops, which hold no secret."""


@define(kw_only=True, slots=False)
class Notify(Observer):
    """Sends a note when a run has finished, failed or was stopped: how it ended, how long it took, what it scored.

    Addresses are those of apprise, such as json://host/path, mailto://... or slack://...; they hold secrets, so they
    stand in a variable of the environment and not in a pipeline file.
    """

    optional: ClassVar[bool] = True

    env: str = "APPRISE_URLS"
    """The environment variable that holds the addresses, separated by spaces or commas."""
    urls: tuple[str, ...] = ()
    """Addresses of this machine's desktop, such as "gnome://", "macosx://" or "windows://", besides those of `env`."""
    only_failures: bool = False
    """Whether a run that ends well, or that a signal stops, is not worth a note."""
    _started: float = field(init=False, default=0.0)
    _rows: dict[str, Sequence[Mapping[str, Any]]] = field(init=False, factory=dict[str, "Sequence[Mapping[str, Any]]"])

    def __attrs_post_init__(self) -> None:
        for scheme in (url.partition("://")[0] for url in self.urls):
            if scheme not in DESKTOP:
                raise ValueError(
                    f"'urls' may hold {', '.join(f'{each}://' for each in DESKTOP)}, which have no secret in them; put "
                    f"the address that begins with {scheme}:// into the environment variable {self.env}"
                )

    def check(self) -> None:
        """Raise ConfigError if apprise is missing, no address is given, or one cannot be read."""
        require("apprise")
        if not self._addresses:
            raise ConfigError(
                f"nobody would get a note: the environment variable {self.env} is not set; set it to addresses of "
                'apprise, or name a desktop in urls, such as urls = ["gnome://"]'
            )
        import apprise

        for number, url in enumerate(self._addresses, 1):
            if apprise.Apprise.instantiate(url) is None:
                raise ConfigError(
                    f"address {number} of {len(self._addresses)}, from urls and then from {self.env}, is none that "
                    "apprise can use here; see its list of services"
                )

    @property
    def _addresses(self) -> list[str]:
        return [*self.urls, *os.environ.get(self.env, "").replace(",", " ").split()]

    def run_started(self, pipeline: PipelineView, folder: Path) -> None:
        """Begin the clock."""
        self._started, self._rows = time.monotonic(), {}

    def scored(self, scored: Scored) -> None:
        """Keep the results for the note."""
        self._rows[scored.name] = scored.rows

    def run_finished(self, pipeline: PipelineView, folder: Path, error: BaseException | None) -> None:
        """Send the note; raise RuntimeError if it did not arrive everywhere."""
        stopped = isinstance(error, KeyboardInterrupt)
        if self.only_failures and (error is None or stopped):
            return
        import apprise

        end = "was stopped" if stopped else "has failed" if error else "is finished"
        kind = apprise.NotifyType.SUCCESS if error is None else apprise.NotifyType.FAILURE
        sender = apprise.Apprise()
        for url in self._addresses:
            sender.add(url)
        body = "\n".join(self._lines(error, stopped=stopped))
        if not sender.notify(title=f"corefit: {pipeline.name} {end}", body=body, notify_type=kind):
            raise RuntimeError(f"the note that {pipeline.name} {end} did not arrive everywhere")

    def _lines(self, error: BaseException | None, *, stopped: bool) -> Iterator[str]:
        minutes, seconds = divmod(round(time.monotonic() - self._started), 60)
        yield f"It ran for {minutes // 60} h {minutes % 60} min {seconds} s."
        if error and not stopped:
            yield f"{type(error).__name__}: {error}"
        for name, rows in self._rows.items():
            for row in rows:
                if row["category"] == "all":
                    gain = f", gain {row['gain']:+.4g}" if "gain" in row else ""
                    yield f"{name}: {row['metric']} {row['value']:.4g}{gain}"
