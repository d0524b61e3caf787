"""What the trainer costs: steps of SFT from the cache, logged as a run logs them, against a bare torch loop."""

from __future__ import annotations

from pathlib import Path

from benchmarks import comparing, plain, subject
from benchmarks.comparing import Comparison, Floor, Side
from corefit.types.stage import Optimizer, Stage
from corefit_sft import Sft

TARGET = 1.03
STEPS, BATCH, LOGGED = 4, 8, 2


def build(folder: Path, quick: bool) -> Comparison:
    """Make both loops over one network; each run takes STEPS steps."""
    backbone = subject.backbone(folder, quick)
    data = subject.dataset(folder, backbone, subject.Pictures(64))
    stage = Stage(
        name="benchmark",
        steps=10**6,
        objective=Sft(),
        batch=BATCH,
        optimizer=Optimizer(lr=subject.LR),
        log_every=LOGGED,
    )
    loop = subject.loop(folder, backbone, data, stage)
    batches = loop.batches()
    first = next(batches)
    network = plain.Network(backbone.transformer, plain.adamw(list(backbone.transformer.parameters()), subject.LR))
    x0, cond, shift = first.clean, first.cond.tensors, backbone.shift(tuple(first.clean.shape[1:]))

    def trained() -> None:
        for _ in range(STEPS):
            loop.take_step(next(batches))
            loop.report_step()

    def bare() -> None:
        for _ in range(STEPS):
            plain.sft_step(network, x0, cond, shift)

    return Comparison(
        sides={
            "bare": Side("a plain loop on one batch in memory", bare),
            "trainer": Side(f"the trainer: from the cache, a log every {LOGGED} steps", trained),
        },
        floors=[Floor("trainer", "bare", TARGET)],
        of=f"{STEPS} steps of SFT",
        size={"parameters": sum(p.numel() for p in backbone.transformer.parameters()), "batch": BATCH},
        amount=STEPS * BATCH,
    )


trainer = comparing.command(
    "trainer", build, "Steps of SFT by the trainer against a bare torch loop (1 minute).", rounds=12
)
