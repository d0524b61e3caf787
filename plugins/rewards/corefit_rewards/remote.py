"""A reward that a service computes, such as `corefit serve-reward`, in a process and an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import field, frozen, validators

from corefit import ROUNDING
from corefit.errors import ConfigError, short_repr
from corefit.types import Meta, Reward, wire
from corefit_rewards.http import ServiceError, check_url, get_json, post_json, shown
from corefit_rewards.packages import require

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "run the same command again, which continues"


def _url(_: object, __: object, url: str) -> None:
    check_url(url)


@frozen(slots=False)
class Remote(Reward):
    """Scores that a service computes, such as `corefit serve-reward`, in a process and an environment of its own.

    Media are sent as PNG, which rounds them to 8 bits. Whatever goes wrong stops the run; no sample is left without the
    score that the service gave it.
    """

    concurrent: ClassVar[bool] = True

    url: str = field(validator=_url, metadata=ROUNDING)
    """Address of the service, such as "http://127.0.0.1:8123". Another address with the same reward behind it changes
    nothing: what counts is the version that the service tells."""
    unit: Literal["", "share"] = ""  # pyright: ignore[reportIncompatibleVariableOverride] - a key here
    """"share" where the scores are shares from 0 to 1, which reports show as percentages."""
    batch: int = field(default=16, validator=[validators.ge(1), validators.le(100_000)], metadata=ROUNDING)
    """How many samples are sent in one request."""
    timeout: float = field(default=120.0, validator=[validators.gt(0), validators.le(86_400)], metadata=ROUNDING)
    """Seconds that a request may take. The first one may wait until the service has loaded its weights."""
    retries: int = field(default=8, validator=[validators.ge(0), validators.le(100)], metadata=ROUNDING)
    """How often a request is sent again when the service cannot be reached, is too slow, or answers with an error of
    its own (status 500 and above). The pauses are 0.5, 1, 2, ... and at most 30 seconds: 92 seconds in all for 8."""
    token_env: str = field(default="", metadata=ROUNDING)
    """Environment variable with the token that the service asks for; empty for none."""

    def check(self) -> None:
        """Raise CorefitError unless the service answers, is a reward service and is ready."""
        require("httpx")
        health = self._health
        if not health.ready:
            raise ConfigError(f"{shown(self.url)} is not ready yet, it says; wait until it is")

    def scores_key(self) -> str:
        """Return the version of the reward that the service tells."""
        return self._health.version

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return the service's scores [B]; NaN for media that are not finite, which have no picture to send."""
        import torch

        scores = torch.full((len(media),), float("nan"), dtype=torch.float64)
        rows: list[int] = media.flatten(1).isfinite().all(1).nonzero().flatten().tolist()
        for first in range(0, len(rows), self.batch):
            sent = rows[first : first + self.batch]
            found = self._scores(media[sent], [prompts[row] for row in sent], [meta[row] for row in sent])
            scores[sent] = torch.tensor(found, dtype=torch.float64)
        return scores

    def _scores(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> list[float]:
        """Send one request, and return a finite score for each sample."""
        version = self._health.version
        try:
            ids, request = wire.write_request(media, prompts, meta)
        except wire.Malformed as error:
            raise ServiceError(f"{shown(self.url)} was sent nothing: {error}") from None
        try:
            content = post_json(
                self._address("score"), request, timeout=self.timeout, retries=self.retries, headers=self._headers
            )
            answer = wire.read_answer(content, ids)
        except ServiceError as error:
            raise ServiceError(f"{error}; then {AGAIN}") from None
        except wire.Malformed as error:
            raise ServiceError(
                f"{shown(self.url)} gave an answer that cannot be used ({error}): correct the service; then {AGAIN}"
            ) from None
        if answer.version != version:
            raise ServiceError(
                f"{shown(self.url)} serves another reward since this run began (version {short_repr(answer.version)}, "
                f"not {short_repr(version)}): start the former one; then {AGAIN}. With the new one, stages that learn "
                "from it begin anew"
            )
        wrong = [(prompt, one.error) for prompt, one in zip(prompts, answer.results, strict=True) if one.error]
        for prompt, error in wrong[:1]:
            raise ServiceError(
                f"{shown(self.url)} could not score {len(wrong)} of {len(ids)} samples, the first of "
                f"{short_repr(prompt)}: {error}; correct that; then {AGAIN}"
            )
        return [one.score for one in answer.results if one.score is not None]

    @cached_property
    def _health(self) -> wire.Health:
        """What the service said when it was first asked."""
        content = get_json(self._address("health"), headers=self._headers)
        try:
            return wire.read_health(content)
        except wire.Malformed as error:
            raise ServiceError(f"{shown(self.url)} is no reward service, {error}: correct 'url'") from None

    @cached_property
    def _headers(self) -> Mapping[str, str]:
        if not self.token_env:
            return {}
        token = os.environ.get(self.token_env, "")
        if not token:
            raise ConfigError(f"'token_env' names the environment variable {self.token_env}, which is not set; set it")
        return {"Authorization": f"Bearer {token}"}

    def _address(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}"
