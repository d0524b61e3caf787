"""The golden vectors, numbers that published reference code produced, and the analytic model they were made with.

They lie in tests/golden/, with a README that says how each was made and how near it must be met.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, frozen
from safetensors.torch import load_file
from torch import Tensor

from corefit import Batch, Condition
from corefit.flow import expand_like
from corefit.rollout.noise import LogitNormal
from corefit.types import NoiseWeighting

FOLDER = Path(__file__).parent / "golden"
DTYPES = {"f32": torch.float32, "f64": torch.float64}


@frozen(eq=False)
class Golden:
    """One golden file: `file["img.mean.f32"]` is a tensor, `file.check(name, actual)` compares with it."""

    name: str
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]
    tolerances: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def inputs(self, prefix: str, names: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
        """Inputs of one case, cast: the `.f64` vectors are the float64 run on the float32 inputs."""
        return [self.tensors[f"{prefix}.{name}"].to(dtype) for name in names]

    def check(self, name: str, actual: Tensor, rows: Sequence[int] | None = None) -> None:
        """Fail unless `actual` has the dtype, shape and, within the file's own tolerance, the values of `name`.

        rows: only those rows of the golden tensor, for files that list samples in another order.
        """
        expected = self.tensors[name] if rows is None else self.tensors[name][list(rows)]
        actual = actual.detach()
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), f"{self.name}: {name}"
        worst = self.excess(name, actual, expected)
        assert worst <= 1, f"{self.name}: {name} is off by {worst:.3g} x its tolerance ({self.tolerances[name]})"

    def excess(self, name: str, actual: Tensor, expected: Tensor) -> float:
        """The largest error in units of its tolerance."""
        if not expected.is_floating_point():
            return 0.0 if torch.equal(actual, expected) else float("inf")
        rtol, atol = tolerance(self.tolerances[name], name)
        if "f64" in self.tolerances[name] and rtol and not atol:
            # a difference of numbers of order 1 is exact to about 1e-16 of them, not of its own tiny size
            atol = 1e-12 * float(expected.abs().max())
        error, allowed = (actual.double() - expected.double()).abs(), atol + rtol * expected.double().abs()
        error = error.where(actual != expected, 0)  # equal infinities
        return float((error / allowed).where(error != 0, 0).nan_to_num(nan=float("inf")).max())


def tolerance(text: str, name: str) -> tuple[float, float]:
    """(rtol, atol) that a tensor's JSON entry allows; remarks in brackets are looser only where they say so."""
    stated = re.sub(r"\(.*?\)", "", text)
    if "exact" in text:
        return 0.0, 0.0
    found = {key: float(value) for key, value in re.findall(r"(rtol|atol) ([\d.e-]+\d)", stated)}
    if name.startswith("sigma_sqrt") and "sigma_sqrt" in text:
        found["rtol"] = float(re.findall(r"sigma_sqrt ([\d.e-]+\d)", text)[0])
    assert found, f"cannot read the tolerance {text!r}"
    return found.get("rtol", 0.0), found.get("atol", 0.0)


@cache
def golden(name: str) -> Golden:
    """The golden file `name`."""
    info = json.loads((FOLDER / f"{name}.json").read_text())
    tolerances = {key: entry["tolerance"] for key, entry in info["tensors"].items()}
    return Golden(name, load_file(FOLDER / f"{name}.safetensors"), info["meta"], tolerances)


@define(eq=False)
class Analytic:
    """A backbone with three parameters: v = tanh(a x + b sigma + k cond), the empty prompt is cond = 0.

    Works on latents of any rank; `calls` notes the rows of each forward.
    """

    params: Tensor = field(factory=lambda: torch.tensor([0.7, -0.4, 0.3]))
    shift_by: float = 3.0
    calls: list[int] = field(factory=list)
    asked: list[Tensor] = field(factory=list)
    """The sigmas of each forward."""
    distilled = False

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        a, b, k = self.params
        self.calls.append(len(x))
        self.asked.append(sigma)
        return torch.tanh(a * x + expand_like(b * sigma.to(x.dtype) + k * cond.tensors["c"], x))

    def null(self, n: int) -> Condition:
        return Condition({"c": torch.zeros(n, dtype=self.params.dtype)})

    def guided(self, x: Tensor, sigma: Tensor, cond: Condition, scale: float, v_cond: Tensor | None = None) -> Tensor:
        v_cond = self.velocity(x, sigma, cond) if v_cond is None else v_cond
        if scale == 1:
            return v_cond
        return self.combine(v_cond, self.velocity(x, sigma, self.null(len(x))), scale)

    def combine(self, v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
        return v_null + scale * (v_cond - v_null)

    def shift(self, shape: Sequence[int]) -> float:
        return self.shift_by

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        t = torch.linspace(1, 0, steps + 1)
        return self.shift_by * t / (1 + (self.shift_by - 1) * t)

    def decode(self, x0: Tensor) -> Tensor:
        return x0


@define
class Draws:
    """Stands for an Rng: hands out given tensors in the order in which an objective draws."""

    normal: list[Tensor] = field(factory=list)
    uniform: list[Tensor] = field(factory=list)

    def randn(self, shape: Sequence[int]) -> Tensor:
        return _shaped(self.normal.pop(0), shape)

    def rand(self, n: int) -> Tensor:
        return _shaped(self.uniform.pop(0), (n,))

    @property
    def spent(self) -> bool:
        return not self.normal and not self.uniform


def _shaped(draw: Tensor, shape: Sequence[int]) -> Tensor:
    assert draw.shape == tuple(shape)
    return draw


@frozen(eq=False)
class Given:
    """A noise weighting that samples given levels and weighs as another one."""

    sigma: Tensor
    weighting: NoiseWeighting = field(factory=LogitNormal)

    def sample(self, n: int, shift: float, rng: object) -> Tensor:
        return _shaped(self.sigma, (n,))

    def weight(self, sigma: Tensor) -> Tensor:
        return self.weighting.weight(sigma)


def batch_of(x0: Tensor, c: Tensor, rows: Sequence[int] | None = None) -> Batch:
    """A batch for `Analytic`: clean latents [B, ...] and one conditioning scalar a row."""
    rows = range(len(x0)) if rows is None else rows
    return Batch(x0, Condition({"c": c}), [f"prompt {r}" for r in rows], [{}] * len(x0), rows, tuple(x0.shape[1:]))
