"""What only a GPU shows, on tiny networks: `python -m benchmarks gpu` runs it first.

With GPU_TESTS_ON_CPU=1 all but what CUDA alone has runs on a CPU, so that the tests themselves can be tried there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once; without it sums vary
import attrs
import pytest
import torch
from attrs import frozen
from training import Heard, job_of, trained, worst

from corefit import Reward
from corefit.errors import Stopped
from corefit.samplers import FlowSde
from corefit.system import ranks
from corefit.train import loop as train
from corefit.types import Weighted
from corefit.types.stage import Lora, Optimizer
from corefit_backbones.sd3 import Sd3
from corefit_flow_grpo import FlowGrpo
from corefit_sft import Sft
from corefit_soar.objective import Soar

CUDA = torch.cuda.is_available()
only_cuda = pytest.mark.skipif(not CUDA, reason="only CUDA has this")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not os.environ.get("GPU_TESTS_ON_CPU"), reason="torch finds no GPU"),
]


@frozen
class Bright(Reward):
    """How bright a picture is."""

    def score(self, media: Any, prompts: Any, meta: Any) -> Any:
        return media.flatten(1).mean(1)


GRPO = {"sampler": FlowSde(noise=0.7), "reward": (Weighted("bright", Bright()),), "batch": 8}


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time; attention's backward has others, too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def with_keys(job: train.Job, checkpoint: Path, **keys: Any) -> train.Job:
    """The same training with other keys of the backbone."""
    return attrs.evolve(job, backbone=Sd3(path=str(checkpoint), max_sequence_length=12, **keys))


def optimizer_of(name: str) -> Any:
    """An optimizer of corefit, or of bitsandbytes where that is installed."""
    if name == "AdamW":
        return Optimizer(lr=1e-3)
    pytest.importorskip("bitsandbytes")
    from corefit_optimizers import eight_bit

    return getattr(eight_bit, name)(lr=1e-3)


def logged(job: train.Job, precision: str = "fp32") -> list[Mapping[str, float]]:
    """Train, and return the metrics of every step."""
    found: list[Mapping[str, float]] = []
    heard = Heard(on_logged=lambda _, metrics: found.append(metrics))
    train.train(attrs.evolve(job, listener=heard), ranks.join(precision))
    return found


def test_bf16_computes_nearly_what_float32_does(job) -> None:
    exact, rounded = (logged(job(Soar(points=2), log_every=1, steps=1), precision)[0] for precision in ("fp32", "bf16"))
    for name in ("loss", "grad_norm"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.05)
    assert rounded["loss"] != exact["loss"]


@pytest.mark.parametrize("bits", [None, "bf16", "fp8", "int8", "nf4"])
def test_the_ratio_before_the_first_update_is_exactly_1(job, checkpoint, bits) -> None:
    if bits == "nf4":
        pytest.importorskip("bitsandbytes")
    made = job(FlowGrpo(group=4, steps=3, guidance=2.0), Lora(rank=2), steps=1, log_every=1, micro_batch=4, **GRPO)
    metrics = logged(with_keys(made, checkpoint, frozen=bits), "bf16")[0]
    assert metrics["ratio"] == 1.0
    assert metrics["approx_kl"] == 0.0
    assert metrics["grad_norm"] > 0


@only_cuda
def test_compiled_blocks_compute_what_others_do(job, checkpoint) -> None:
    eager = logged(job(Soar(points=2), log_every=1, steps=2))
    compiled = logged(with_keys(job(Soar(points=2), log_every=1, steps=2), checkpoint, compile=True))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.usefixtures("deterministic")
def test_a_resumed_stage_ends_in_the_same_bits(job, optimizer) -> None:
    keys = optimizer_of(optimizer)
    through = trained(job(Sft(), steps=4, optimizer=keys), ranks.join("bf16"))
    done, interrupted = list[int](), job(Sft(), steps=4, optimizer=keys)
    stopping = attrs.evolve(interrupted, listener=Heard(on_stepped=done.append, asked=lambda: len(done) == 2))
    with pytest.raises(Stopped):
        train.train(stopping, ranks.join("bf16"))
    again = attrs.evolve(interrupted, backbone=Sd3(path=interrupted.backbone.path, max_sequence_length=12))
    assert worst(trained(again, ranks.join("bf16")), through) == 0


@pytest.mark.usefixtures("deterministic")
def test_blocks_in_main_memory_compute_the_same_bits(job, checkpoint) -> None:
    found = [
        trained(with_keys(job(Soar(points=2), Lora(rank=2)), checkpoint, **keys), ranks.join("bf16"))
        for keys in ({"gradient_checkpointing": True}, {"offload": "blocks"})
    ]
    assert worst(*found) == 0


@only_cuda
def test_blocks_in_main_memory_leave_the_device(dataset, tmp_path) -> None:
    from corefit.testing import tiny_sd3

    wide = tiny_sd3(tmp_path / "wide", words=["a", "red", "blue"], layers=12, heads=8, head_width=64)
    peaks = list[int]()
    for number, keys in enumerate(({"gradient_checkpointing": True}, {"offload": "blocks"})):
        made = job_of(wide, dataset, tmp_path / str(number), Sft(), Lora(rank=2), steps=2)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trained(with_keys(made, wide, **keys), ranks.join("bf16"))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del made
    assert peaks[1] < 0.6 * peaks[0]


@only_cuda
@pytest.mark.parametrize("objective", [Sft(), Sft(dropout=0.2), Soar(points=2), Soar(points=4, chunk=2)])
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_no_step_between_logs_waits_for_the_device(job, objective, optimizer) -> None:
    """In CUDA's debug mode, whatever makes the host wait for the device raises an exception."""
    keys = optimizer_of(optimizer)
    loop = train.Loop.build(job(objective, steps=10, log_every=10, optimizer=keys), ranks.join("bf16"))
    with closing(loop.batches()) as batches:
        for _ in range(2):  # the first steps allocate, and make the optimizer's state
            loop.take_step(next(batches))
            loop.report_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                loop.take_step(next(batches))
                loop.report_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@only_cuda
def test_the_debug_mode_sees_a_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_whole_run_ends_with_scores(project) -> None:
    done = project.main("run", "pipeline.toml")
    assert done.status == 0, done.err
    assert (project.folder / "runs/tiny/results.json").exists()
