"""What evaluation costs: held-out prompts sampled, decoded and scored by corefit, against a bare loop that does it."""

from __future__ import annotations

from pathlib import Path

from benchmarks import comparing, subject
from benchmarks.comparing import Comparison, Floor, Side
from corefit.pipeline.eval import Eval

TARGET = 1.03
PROMPTS, BATCH, STEPS, GUIDANCE = 8, 4, 6, 4.5
AGREE = 1e-4
"""Of a score: the mean of pixels in [0, 1]."""


def build(folder: Path, quick: bool) -> Comparison:
    """Make both, over one network and VAE; each run evaluates all prompts."""
    import torch

    from benchmarks import plain
    from corefit.rng import Rng
    from corefit.run.evaluation.evaluator import Evaluator
    from corefit.system.ranks import join

    backbone = subject.backbone(folder, quick)
    prompts = subject.dataset(folder, backbone, subject.Prompts(PROMPTS), media=False)
    backbone.load(torch.device("cpu"), torch.float32)
    backbone.transformer.eval()
    settings = Eval(prompts=("a",), reward=subject.BRIGHT, steps=STEPS, guidance=GUIDANCE, batch=BATCH, samples=BATCH)
    evaluator = Evaluator(settings, prompts, join("fp32"))
    network = plain.Network(backbone.transformer, torch.optim.SGD(backbone.transformer.parameters()))
    vae, shape = backbone.vae(), prompts.shape
    sigmas, null = backbone.sigmas(STEPS, shape), prompts.null.tensors
    batches = [prompts.batch(rows, rows) for rows in (range(n, n + BATCH) for n in range(0, PROMPTS, BATCH))]
    conds = [plain.joined(batch.cond.tensors, null) for batch in batches]

    def noise(batch: int) -> torch.Tensor:
        rows = range(batch * BATCH, (batch + 1) * BATCH)
        return torch.cat([Rng((settings.seed, "eval"), [row]).randn((1, *shape)) for row in rows])

    drawn = [noise(n) for n in range(len(conds))]

    @torch.no_grad()
    def bare() -> list[float]:
        scores = list[float]()
        for x, both in zip(drawn, conds, strict=True):
            x0 = plain.ode(network, x, both, sigmas, GUIDANCE)
            media = vae.decode(x0 / vae.config.scaling_factor + vae.config.shift_factor).sample
            scores += (media / 2 + 0.5).clamp(0, 1).flatten(1).mean(1).tolist()
        return scores

    def evaluated() -> list[float]:
        return evaluator.score(backbone)[0]["values"]["bright"]

    far = max(abs(a - b) for a, b in zip(evaluated(), bare(), strict=True))
    return Comparison(
        sides={
            "bare": Side("a plain loop: sampled, decoded, scored", bare),
            "evaluator": Side("corefit's, prompts read from the cache", evaluated),
        },
        floors=[Floor("evaluator", "bare", TARGET)],
        of=f"{PROMPTS} held-out prompts, {STEPS} steps with guidance",
        size={"batch": BATCH, "latents": list(shape)},
        agrees={"scores": (far, AGREE)},
        amount=PROMPTS,
    )


evaluation = comparing.command(
    "evaluation", build, "Held-out prompts scored by corefit against a bare sampling loop (2 minutes).", rounds=12
)
