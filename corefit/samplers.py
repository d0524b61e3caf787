"""The samplers, under the name that version 0.1 documents; they live in corefit.rollout.samplers."""

from corefit.rollout.samplers import Cps, DanceSde, FlowSde, Ode

__all__ = ["Cps", "DanceSde", "FlowSde", "Ode"]
