"""One Flow-GRPO step of corefit against the network's calls alone, and against the published loop, written plainly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import comparing, subject
from benchmarks.comparing import Comparison, Floor, Side
from corefit.types.stage import Optimizer, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

TARGET = 1.03
BATCH, GROUP, STEPS, GUIDANCE = 8, 4, 4, 4.5
AGREE = 1e-3
"""Of each tensor's largest entry: advantages are small differences of rewards."""


def build(folder: Path, quick: bool) -> Comparison:
    """Make the steps over one network; each run takes one."""
    from benchmarks import plain, soar_step
    from benchmarks.grpo_variants import Plain, Settings
    from corefit.samplers import FlowSde
    from corefit_flow_grpo import FlowGrpo

    settings = Settings(group=GROUP, steps=STEPS, guidance=GUIDANCE)
    backbone = subject.backbone(folder, quick)
    data = subject.dataset(folder, backbone, subject.Prompts(16), media=False)
    stage = Stage(
        name="benchmark",
        steps=10**6,
        objective=FlowGrpo(group=GROUP, steps=STEPS, guidance=GUIDANCE),
        sampler=FlowSde(noise=settings.noise),
        reward=subject.BRIGHT,
        batch=BATCH,
        optimizer=Optimizer(lr=subject.LR),
    )
    loop = subject.loop(folder, backbone, data, stage)
    batch = subject.first_batch(loop)
    parameters = list(backbone.transformer.parameters())
    network = plain.Network(backbone.transformer, plain.adamw(parameters, subject.LR))
    written = Plain.of(network, settings, batch, backbone, (0, stage.name, 0, "experience", 0))

    def step() -> None:
        loop.take_step(batch)
        loop.report_step()

    found, expected = gradient(step, parameters), gradient(written.published, parameters)
    return Comparison(
        sides={
            "floor": Side("the network's calls alone, in a plain loop", written.floor),
            "grpo": Side("corefit's step", step),
            "published": Side("the published loop, written plainly", written.published),
        },
        floors=[Floor("grpo", "floor", TARGET), Floor("grpo", "published"), Floor("published", "floor")],
        of="one step of Flow-GRPO",
        size={"batch": BATCH, "group": GROUP, "sampling steps": STEPS, "latents": list(batch.shape)},
        agrees={"gradients of grpo and published": (soar_step.difference(found, expected), AGREE)},
        amount=BATCH,
    )


def gradient(step: Callable[[], None], parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Run a step; return the gradient that its optimizer was about to use."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[torch.Tensor] = []

    def copy(*_: object) -> None:
        seen.extend(torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters)

    hook = register_optimizer_step_pre_hook(copy)
    step()
    hook.remove()
    return seen


grpo_step = comparing.command(
    "grpo_step", build, "A Flow-GRPO step against the network's calls alone and the published loop (3 minutes).", 8
)
