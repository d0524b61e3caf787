"""What is counted on fake tensors: few frames and few blocks tell what many take, and the count ends where it may."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from conftest import BRIGHT, WORDS, Project
from torch import nn

from corefit.errors import ConfigError
from corefit.pipeline import read
from corefit.pipeline.pipeline import Pipeline, read_unchecked
from corefit.testing import tiny_flux, tiny_wan
from corefit.train import blocks, fake
from corefit.train.estimate import Device, depth, estimates, held, refuse, show
from corefit.train.estimate.forwards import Forwards
from corefit.train.frozen import Frozen
from corefit.types import ModelPath
from corefit_backbones.wan import Wan
from corefit_flow_grpo import FlowGrpo
from corefit_reward_gradient import RewardGradient

HERE = Device("this one", 1e12, gpu=False)
GRADIENT = "stage.grpo.objective={use='reward_gradient', method='draft', steps=4, guidance=1.0, truncation=1}"


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Wan, Forwards, Frozen]:
    """A blank network of clips, what is to be known of it, and its decoder."""
    backbone = Wan(path=ModelPath(str(tiny_wan(tmp_path / "base", words=WORDS))))
    backbone.load_blank(torch.float32)
    beside = Frozen(backbone.load_blank_decoder(), [], [])
    return backbone, Forwards(backbone=backbone, key="wan", half=False, gpu=False, most=math.inf), beside


def test_frames_that_are_left_out_count(clips: tuple[Wan, Forwards, Frozen]) -> None:
    """What few frames tell is what all of them take, to the byte."""
    backbone, forwards, beside = clips
    shape = (4, 6, 4, 4)
    assert forwards.decoding(1, shape, beside) == fake.decoding_peak(backbone, beside.decoder, (1, *shape))


@pytest.mark.slow
def test_frames_that_are_left_out_of_a_gradient_count(clips: tuple[Wan, Forwards, Frozen]) -> None:
    backbone, forwards, beside = clips
    shape = (4, 8, 4, 4)
    assert forwards.gradient(1, shape, beside) == fake.gradient_peak(backbone, (1, *shape), beside, math.inf)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_gradient_that_is_far_too_large_is_not_counted_to_its_end(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.folder / "bright.py").write_text(BRIGHT.replace("    gain:", "    differentiable = True\n    gain:", 1))
    project.swap(('sampler = { use = "flow_sde", noise = 0.7 }\n', ""))
    pipeline = read(project.file, ["data.size=[64,64]", GRADIENT])
    alone, small = evolve(pipeline, stage=pipeline.stage[1:]), Device("a small one", 1 << 19, gpu=False)
    ended: list[int | None] = []
    counted = fake.gradient_peak
    monkeypatch.setattr(fake, "gradient_peak", lambda *given: ended.append(counted(*given)) or ended[-1])
    found = estimates(alone, small)
    assert ended[0] is not None
    assert 1 << 20 < ended[0] < 3 << 19, "of more than 2 MiB"
    assert found[0].beyond
    fitting = Device("a small one", found[0].certain, gpu=False)  # for all but the graph
    with pytest.raises(ConfigError, match="the graph of a reward's gradient takes more than "):
        refuse(alone, found, fitting)
    show(alone, found, small)
    said = re.findall(r"^(.*?) +more than ", capsys.readouterr().out, re.MULTILINE)
    assert {"activations, about", "while training"} <= set(said)


def test_each_kind_of_block_is_counted_for_itself(project: Project) -> None:
    """The largest blocks wait in main memory and are few; those that follow them are many, and keep their inputs.

    With the few blocks that tell, the most is taken while the largest compute; with all of them, it is later.
    """
    (project.folder / "base").unlink()
    tiny_flux(project.folder / "base", words=WORDS, layers=2, single_layers=10, heads=3, head_width=32)
    project.write(project.text.rpartition("[[stage]]")[0])
    project.swap(('use = "sd3"', 'use = "flux"'))
    pipeline = read_unchecked(Pipeline, project.file, ["data.size=[128,128]", "backbone.offload='blocks'"])
    told = estimates(pipeline, HERE)[0].activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "LEAST", 100)
        assert told == pytest.approx(estimates(pipeline, HERE)[0].activations, rel=0.005)


class Two(nn.Module):
    """A network of two kinds of blocks, of 4 and 12 frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
        self.second = nn.ModuleList(nn.Linear(2, 6, bias=False) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x: Any) -> Any:
        for each in self.first:
            x = each(x)
        return self.second[1](self.second[0](x)[:, :2])


def test_the_weights_of_a_block_and_of_one_beside_it_are_there() -> None:
    found: list[float] = []
    network = Two()
    with blocks.noted(network, lambda place, fetched: found.append(fetched)):
        network(torch.zeros(1, 2))
    network(torch.zeros(1, 2))
    assert [each // 4 for each in found] == [4 + 12, 4 + 12, 12 + 12, 12 + 12]


@pytest.mark.parametrize(("guidance", "rows"), [(4.5, 2), (1.0, 1)])
def test_guidance_doubles_the_rows_of_a_graph_and_not_of_its_loss(guidance: float, rows: int) -> None:
    class Plain:
        distilled = False

    grpo = FlowGrpo(guidance=guidance)
    assert (held.graph_rows(grpo, Plain), held.loss_rows(grpo)) == (rows, 1)
    draft = RewardGradient(method="draft", truncation=3, guidance=guidance)
    assert (held.graph_rows(draft, Plain), held.loss_rows(draft)) == (3 * rows, 3)
