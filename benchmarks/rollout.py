"""What sampling costs beyond the network: corefit's loop against a bare one, for the ODE and with log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from benchmarks import comparing, subject
from benchmarks.comparing import Comparison, Floor, Side
from corefit.types.stage import Optimizer, Stage

if TYPE_CHECKING:
    from corefit.types import Batch
    from corefit.types.objective import Context

TARGET = 1.03
BATCH, STEPS, GUIDANCE, NOISE = 4, 6, 4.5, 0.7
AGREE = 1e-4
"""Of latents, whose standard deviation is about 1."""


def context(folder: Path, quick: bool) -> tuple[Context, Batch]:
    """Return what an objective samples with: a context, and a batch of prompts."""
    from corefit.samplers import FlowSde
    from corefit_flow_grpo import FlowGrpo

    backbone = subject.backbone(folder, quick)
    data = subject.dataset(folder, backbone, subject.Prompts(16), side=32, media=False)
    stage = Stage(
        name="benchmark",
        steps=10**6,
        objective=FlowGrpo(group=2, steps=STEPS, guidance=GUIDANCE),
        sampler=FlowSde(noise=NOISE),
        reward=subject.BRIGHT,
        batch=BATCH,
        optimizer=Optimizer(lr=subject.LR),
    )
    loop = subject.loop(folder, backbone, data, stage)
    return loop.ctx, subject.first_batch(loop)


def build(folder: Path, quick: bool) -> Comparison:
    """Make the loops, over one network and from equal noise; each run samples a batch."""
    import torch

    from benchmarks import plain
    from corefit.rng import Rng
    from corefit.rollout import generate, initial_noise, record

    ctx, batch = context(folder, quick)
    backbone, key = ctx.backbone, (0, "benchmark")
    network = plain.Network(backbone.transformer, torch.optim.SGD(backbone.transformer.parameters()))
    sigmas = backbone.sigmas(STEPS, batch.shape)
    both = plain.joined(batch.cond.tensors, backbone.null(1).tensors)

    def at() -> Context:
        return attrs.evolve(ctx, rng=Rng(key, batch.rows))

    noise = initial_noise(batch, at())

    def bare_ode() -> torch.Tensor:
        return plain.ode(network, noise, both, sigmas, GUIDANCE)

    def generated() -> torch.Tensor:
        with torch.no_grad():
            return generate(backbone, noise, batch.cond, steps=STEPS, guidance=GUIDANCE)

    def bare_sde() -> torch.Tensor:
        draws = Rng(key, batch.rows)
        x = draws.randn(noise.shape)
        return plain.sde(network, x, both, sigmas, GUIDANCE, NOISE, lambda: draws.randn(noise.shape)).states[-1]

    def drawn_by_torch() -> torch.Tensor:
        x = torch.randn_like(noise)
        return plain.sde(network, x, both, sigmas, GUIDANCE, NOISE, lambda: torch.randn_like(noise)).states[-1]

    def recorded() -> torch.Tensor:
        return record(batch, at(), steps=STEPS, length=STEPS - 1, guidance=GUIDANCE).x0

    return Comparison(
        sides={
            "bare ode": Side("Euler's method in a plain loop", bare_ode),
            "generate": Side("corefit's, as evaluation samples", generated),
            "bare sde": Side("Flow-SDE in a plain loop, noise by torch", drawn_by_torch),
            "record": Side("corefit's, as Flow-GRPO samples: keyed noise", recorded),
        },
        floors=[Floor("generate", "bare ode", TARGET), Floor("record", "bare sde", TARGET)],
        of=f"{STEPS} sampling steps with guidance",
        size={"batch": BATCH, "latents": list(batch.shape)},
        agrees={
            "generate and bare ode": (float((generated() - bare_ode()).abs().max()), AGREE),
            "record and bare sde": (float((recorded() - bare_sde()).abs().max()), AGREE),
        },
        amount=BATCH,
    )


rollout = comparing.command(
    "rollout", build, "Sampling by corefit's loop against a bare one, with and without noise (1 minute).", rounds=12
)
