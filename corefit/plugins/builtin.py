"""The classes that corefit itself offers, through the same hooks as any plugin."""

from __future__ import annotations

from typing import Any

from corefit.data.sources import HfDataset, ImageFolder, Jsonl, Parquet, Text, WebDataset
from corefit.plugins.hookspecs import Offers, hookimpl
from corefit.rollout.noise import CosMap, LogitNormal, Mode, SigmaSqrt, Uniform
from corefit.rollout.samplers import Cps, DanceSde, FlowSde, Ode
from corefit.types import AdamW, NoiseWeighting, Optimizer, Sampler, Source
from corefit.types.objective import Objective, Sum


@hookimpl
def corefit_objectives() -> Offers[Objective[Any]]:
    return {"sum": Sum}


@hookimpl
def corefit_samplers() -> Offers[Sampler]:
    return {"ode": Ode, "flow_sde": FlowSde, "dance_sde": DanceSde, "cps": Cps}


@hookimpl
def corefit_noise_weightings() -> Offers[NoiseWeighting]:
    return {
        "logit_normal": LogitNormal,
        "mode": Mode,
        "uniform": Uniform,
        "cosmap": CosMap,
        "sigma_sqrt": SigmaSqrt,
    }


@hookimpl
def corefit_optimizers() -> Offers[Optimizer]:
    return {"adamw": AdamW}


@hookimpl
def corefit_sources() -> Offers[Source]:
    return {
        "jsonl": Jsonl,
        "imagefolder": ImageFolder,
        "text": Text,
        "webdataset": WebDataset,
        "hf_dataset": HfDataset,
        "parquet": Parquet,
    }
