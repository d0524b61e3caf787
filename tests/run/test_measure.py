"""`corefit check --measure`: what a frozen format costs, on the pipeline's own data and noise levels."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Project

from corefit.pipeline.pipeline import read
from corefit.rollout.noise import LogitNormal
from corefit.run import measure as measuring
from corefit.run.measure import Measured, measure
from corefit.train import weights
from corefit_backbones.sd3 import Sd3

PROMPTS_ONLY = "stage.soar.objective={use='flow_grpo', group=2, steps=2}"
NO_NOISE = ('noise = { use = "logit_normal" }\n', "")
ROLLOUTS = ("stage.soar.sampler={use='flow_sde'}", "stage.soar.reward=[{use='bright'}]")


def measured(project: Project, *keys: str) -> Measured:
    return measure(read(project.file, keys))


def test_it_is_the_loss_of_training_on_the_first_examples(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed here once more, one noise level at a time, from what the encoded data hold."""
    examples: list[Any] = []
    kind: Any = Sd3
    plain = measuring.first_examples

    def seen(*args: Any) -> Any:
        examples.extend(plain(*args))
        return examples

    monkeypatch.setattr(measuring, "first_examples", seen)
    found = measured(project, "backbone.frozen='nf4'", "stage.soar.noise={use='logit_normal', mean=1.0}")
    assert found.names == ("fp32", "nf4")
    assert found.prompts[:2] == ["a picture of a red sky", "a picture of a green sky"]
    assert found.moved.shape == (8, 5)
    for network, bits in enumerate((None, "nf4")):
        backbone = kind(str(project.folder / "base"), max_sequence_length=16, frozen=bits)
        backbone.load(torch.device("cpu"), torch.float32)
        assert found.bytes[network] == sum(p.nbytes for p in backbone.transformer.parameters())
        cond = backbone.encode_text([found.prompts[3]])
        for level in (0, 4):
            sigma, x0, noise = found.sigmas[3, level], examples[3].x0[:1], examples[3].noise[:1]
            x = (1 - sigma) * x0 + sigma * noise
            v = backbone.velocity(x.float(), torch.tensor([sigma]).float(), cond)
            assert float((v - (noise - x0)).square().mean()) == pytest.approx(found.losses[network][3, level], rel=1e-4)
    draws = LogitNormal(mean=1.0).time(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    shifted = 3 * draws / (1 + 2 * draws)
    assert np.allclose(found.sigmas[0], torch.quantile(shifted, torch.tensor(measuring.QUANTILES)), atol=0.03)


def test_fewer_bits_move_the_velocity_more(project: Project) -> None:
    moved = [measured(project, f"backbone.frozen='{bits}'").moved.mean() for bits in ("int8", "nf4")]
    assert 0 < moved[0] < moved[1] < 0.1


def test_what_the_precision_holds_anyway_changes_nothing(project: Project) -> None:
    found = measured(project, "backbone.frozen='bf16'", "precision='bf16'")
    assert found.names == ("bf16", "bf16")
    assert (found.losses[0] == found.losses[1]).all()
    assert (found.moved == 0).all()


def test_prompts_alone_are_measured_on_what_the_whole_network_generates(project: Project) -> None:
    project.swap(NO_NOISE)
    found = measured(project, "backbone.frozen='fp8'", PROMPTS_ONLY, *ROLLOUTS)
    assert found.moved.shape == (8, 5)
    assert (found.moved > 0).all()
    assert np.isfinite(found.losses).all()


def test_as_it_is_typed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks are in memory one after the other."""
    alive: list[int] = []
    held: list[Any] = []
    plain = weights.load

    def seen(backbone: Any, *args: Any, **keys: Any) -> Any:
        alive.append(sum(one() is not None for one in held))
        found = plain(backbone, *args, **keys)
        held.append(weakref.ref(backbone.transformer))
        return found

    monkeypatch.setattr(weights, "load", seen)
    monkeypatch.setattr("quick.uncollected", contextlib.nullcontext)  # networks go when they are looked for
    monkeypatch.setattr("corefit.train.estimate.estimates", lambda *args, **keys: [])  # takes seconds
    done = project.main("check", "pipeline.toml", "--measure", "--set", "backbone.frozen=int8")
    assert done.status == 0, done.err
    assert alive == [0, 0]
    lines = [line.split() for line in done.out.splitlines()]
    header = lines.index(["noise", "level", "loss,", "fp32", "loss,", "int8", "change", "95", "%", "velocity"])
    rows = lines[header + 2 : header + 8]
    assert [len(row) for row in rows] == [8] * 6
    assert rows[-1][0] == "all"
    assert [float(row[0]) for row in rows[:-1]] == sorted(float(row[0]) for row in rows[:-1])
    assert "8 examples at 5 noise levels" in done.out


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ((), "backbone.frozen is not set; try one with --set backbone.frozen=nf4"),
        (("backbone.frozen='fp8'", PROMPTS_ONLY, *ROLLOUTS), "the stages train on prompts alone; add [eval]"),
    ],
)
def test_where_there_is_nothing_to_measure(project: Project, keys: tuple[str, ...], said: str) -> None:
    project.swap(*[NO_NOISE][: len(keys)])
    project.write(project.text.partition("\n[eval]")[0])
    done = project.main("check", "pipeline.toml", "--measure", *(word for key in keys for word in ("--set", key)))
    assert done.status == 2
    assert said in done.err
    assert not list(Path(project.folder).glob(".corefit/cache/*"))
