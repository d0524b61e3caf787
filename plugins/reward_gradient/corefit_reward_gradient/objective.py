"""The objective reward_gradient: rollouts without a graph, then a few velocities with one, which raise rewards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen, validators

from corefit import Batch, Context, Objective, Term
from corefit.flow import denoised, expand_like, interpolate, per_sample
from corefit.rollout import sample_states
from corefit.rollout.samplers import Ode

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "refl": {"steps": 40, "guidance": 1.0},
    "draft": {"steps": 50, "guidance": 7.5, "truncation": 1},
    "draft_lv": {"steps": 50, "guidance": 7.5, "noised": 2},
    "leap_align": {"steps": 25, "guidance": 3.5, "discount": 0.3, "tau": 0.1},
}
"""The settings of each method's paper."""
READERS: Mapping[str, tuple[str, ...]] = {
    "last": ("refl",),
    "truncation": ("draft",),
    "noised": ("draft_lv",),
    "discount": ("leap_align",),
    "tau": ("leap_align",),
    "threshold": ("refl", "leap_align"),
}
"""The methods that read each of the keys that not all of them read."""
count = validators.optional([validators.ge(1), validators.le(10_000)])
above_zero = validators.optional(validators.gt(0))


@frozen(eq=False)
class States:
    """The states of rollouts from which velocities with a graph start.

    batch   the rows' conditions, prompts and metadata
    states  [B, n, ...], float32
    sigmas  [B, n], their noise levels
    """

    batch: Batch
    states: Tensor
    sigmas: Tensor

    @property
    def rows(self) -> Sequence[int]:
        return self.batch.rows

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        return {}

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, rows: slice) -> States:
        return States(self.batch[rows], self.states[rows], self.sigmas[rows])


@frozen(kw_only=True)
class RewardGradient(Objective[States]):
    """Raise differentiable rewards of the model's own samples by gradients through a part of their generation.

    It needs prompts and rewards that are `differentiable`, but no media. Rollouts take the steps of the ODE.
    """

    method: Literal["refl", "draft", "draft_lv", "leap_align"]
    """Where the gradient flows: through one of the last steps (ReFL), through the last `truncation` steps (DRaFT-K),
    through the last step of several noised copies (DRaFT-LV), or through two leaps across any steps (LeapAlign)."""
    steps: int | None = field(default=None, validator=count)
    """Number of sampling steps of a rollout; by default the paper's: 40 for refl, 50 for draft and draft_lv, 25 for
    leap_align."""
    guidance: float | None = field(default=None, validator=above_zero)
    """Scale of classifier-free guidance, in the rollout and in training; by default the paper's: 1 for refl, 7.5 for
    draft and draft_lv, 3.5 for leap_align."""
    last: int | None = field(default=None, validator=count)
    """refl: the step with a gradient is drawn among this many last steps, T2 of the paper; by default a quarter of
    `steps`, as there (10 of 40)."""
    truncation: int | None = field(default=None, validator=count)
    """draft: the number of last steps with a gradient, K of the paper, 1 by default; `steps` is all of them."""
    noised: int | None = field(default=None, validator=count)
    """draft_lv: the number of noised copies of each sample, n of the paper, 2 by default."""
    discount: float | None = field(default=None, validator=validators.optional([validators.ge(0), validators.le(1)]))
    """leap_align: the factor of the nested gradient, alpha of the paper, 0.3 by default; 0 removes it, 1 keeps it."""
    tau: float | None = field(default=None, validator=above_zero)
    """leap_align: distances of leaps below tau count as tau, so that no sample's weight exceeds 1 / (2 tau); 0.1 by
    default."""
    threshold: float | None = None
    """refl, leap_align: samples whose reward is above it have no loss. It is in the reward's unit; the papers take 2
    for ImageReward (refl) and 0.55 for HPSv2.1 (leap_align). By default there is none."""

    def __attrs_post_init__(self) -> None:
        for key, methods in READERS.items():
            if getattr(self, key) is not None and self.method not in methods:
                others = " or ".join(f'"{each}"' for each in methods)
                raise ValueError(
                    f"'{key}' is not read by method = \"{self.method}\": remove it, or set method = {others}"
                )
        for key in ("last", "truncation"):
            if (getattr(self, key) or 1) > self._steps:
                raise ValueError(
                    f"'{key}' must be at most 'steps': there are no {getattr(self, key)} last steps of {self._steps}"
                )
        if self.method == "leap_align" and self._steps < 2:
            raise ValueError("'steps' must be at least 2 for method = \"leap_align\", which leaps twice")

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"reward_gradient"})

    @property
    def num_terms(self) -> int:
        return 1 + int(self._value("noised")) if self.method == "draft_lv" else 1

    @property
    def rows_per_graph(self) -> int:
        velocities = int(self._value("truncation")) if self.method == "draft" else 1 + (self.method == "leap_align")
        return velocities * (1 if self._guidance == 1 else 2)

    def experience(self, batch: Batch, ctx: Context) -> Iterable[States]:
        index = self._index(ctx)
        states = sample_states(batch, ctx, index, sampler=Ode(), steps=self._steps, guidance=self._guidance)
        sigmas = ctx.backbone.sigmas(self._steps, batch.shape)[index]
        yield States(batch, states, sigmas.to(states.device, non_blocking=True))

    def terms(self, part: States, ctx: Context) -> Iterator[Term]:
        if self.method == "leap_align":
            yield self._leap_align(part, ctx)
        elif self.method == "refl":
            x, sigma = part.states[:, 0], part.sigmas[:, 0]
            yield self._term(denoised(x, self._velocity(x, sigma, part, ctx), sigma), part, ctx)
        else:
            yield self._term(self._last_steps(part, ctx), part, ctx)
            for _ in range(1, self.num_terms):
                yield self._term(self._noised(part, ctx), part, ctx)

    def _index(self, ctx: Context) -> Tensor:
        """Return the positions [B, n] in the grid of the states that `terms` needs."""
        import torch

        rows, steps = len(ctx.rng.rows), self._steps
        draws = ctx.rng.of("steps")
        if self.method == "refl":
            return steps - 1 - draws.integers(0, self.last or max(1, steps // 4))[:, None]
        if self.method == "leap_align":
            one, other = draws.integers(0, steps), draws.integers(0, steps - 1)
            other = other + (other >= one)  # any other step than `one`, all equally likely
            return torch.stack([one.minimum(other), one.maximum(other), torch.full((rows,), steps)], 1)
        first = steps - (int(self._value("truncation")) if self.method == "draft" else 1)
        return torch.arange(first, steps + 1).expand(rows, -1)

    def _last_steps(self, part: States, ctx: Context) -> Tensor:
        """Repeat the last steps of the rollout with a graph (DRaFT-K, algorithm 1); return x0 [B, ...]."""
        x, sigmas = part.states[:, 0], part.sigmas.unbind(1)
        for sigma, sigma_next in pairwise(sigmas):
            x = Ode().step(x, self._velocity(x, sigma, part, ctx), sigma, sigma_next).mean
        return x

    def _noised(self, part: States, ctx: Context) -> Tensor:
        """Noise the rollout's x0 to the level of the last step, and denoise it in one step (DRaFT-LV)."""
        x0, sigma = part.states[:, -1], part.sigmas[:, 0]
        x = interpolate(x0, ctx.randn_like(x0), sigma)
        return denoised(x, self._velocity(x, sigma, part, ctx), sigma)

    def _leap_align(self, part: States, ctx: Context) -> Term:
        """Leap from x_k to x_j and from x_j to x_0, whose values are those of the rollout (LeapAlign, eq. 4 to 13)."""
        (x_k, x_j, x_0), (k, j, _) = part.states.unbind(1), part.sigmas.unbind(1)
        leap_j = x_k - expand_like(k - j, x_k) * self._velocity(x_k, k, part, ctx)
        connected = _connect(leap_j, x_j)
        alpha = self._value("discount")
        v_j = self._velocity(alpha * connected + (1 - alpha) * x_j, j, part, ctx)
        leap_0 = denoised(connected, v_j, j)
        tau = self._value("tau")
        apart_j, apart_0 = (per_sample((leap - x).detach().abs()) for leap, x in ((leap_j, x_j), (leap_0, x_0)))
        weight = 1 / (apart_j.clamp(min=tau) + apart_0.clamp(min=tau))
        return self._term(_connect(leap_0, x_0), part, ctx, weight)

    def _velocity(self, x: Tensor, sigma: Tensor, part: States, ctx: Context) -> Tensor:
        return ctx.backbone.guided(x, sigma, part.batch.cond, self._guidance)

    def _term(self, x0: Tensor, part: States, ctx: Context, similarity: Tensor | None = None) -> Term:
        """Return the loss of samples x0 [B, ...]: minus their reward, or what it lacks to the threshold."""
        scores = ctx.score(x0, part.batch)
        loss = -scores.total if self.threshold is None else (self.threshold - scores.total).relu()
        if similarity is None:
            return Term.of(loss, 1.0, **scores.metrics)
        return Term.of(similarity * loss, 1.0, **scores.metrics, similarity=similarity)

    def _value(self, key: str) -> float:
        """Return the value of a key, or its default for the method."""
        given = getattr(self, key)
        return DEFAULTS[self.method][key] if given is None else given

    @property
    def _steps(self) -> int:
        return int(self._value("steps"))

    @property
    def _guidance(self) -> float:
        return self._value("guidance")


def _connect(leap: Tensor, x: Tensor) -> Tensor:
    """Return the value of the real state x with the gradient of the leap to it (LeapAlign, eq. 6 and 7)."""
    return leap + (x - leap).detach()
