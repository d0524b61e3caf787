"""What any objective must hold, and what this one does."""

from __future__ import annotations

import torch
from corefit_reflexflow import ReflexFlow

from corefit.testing import ToyBackbone, check_objective, toy_batch, toy_context


def test_it_is_an_objective():
    check_objective(ReflexFlow())


def loss(objective: ReflexFlow) -> float:
    backbone = ToyBackbone()
    backbone.load(torch.device("cpu"), torch.float32)
    (term,) = objective.terms(toy_batch(backbone, 8), toy_context(backbone, range(8)))
    return float(term.total.detach())


def test_without_its_parts_it_is_flow_matching():
    from corefit_sft import Sft

    plain = ReflexFlow(reach=0, rectify=0, alpha=0)
    assert abs(loss(plain) - loss(Sft())) < 1e-4  # type: ignore[arg-type]
    assert loss(ReflexFlow(reach=0.5, rectify=0, alpha=0)) != loss(plain)
