"""The counter of bytes: a SOAR step exchanges what an SFT step does, where weights stay gathered."""

from __future__ import annotations

import json
from pathlib import Path

import forks
import torch

from benchmarks import communication
from benchmarks.communication import MOST, QUICK, counted, project, total

DRAWN = 1000
"""Bytes at most of what else is exchanged: counts, drawn numbers."""
SHORT = [f"stage.{name}.steps=1" for name in ("sft", "soar", "grpo")]


def test_a_soar_step_exchanges_what_an_sft_step_does(tmp_path: Path) -> None:
    """On two processes. The first step, which is counted here, compares some drawn numbers as well."""
    project(tmp_path, QUICK)
    told = {name: [*keys, *SHORT] for name, keys in communication.variants() if name == "full-step"}
    worker = ("-m", "benchmarks.communication", str(tmp_path), json.dumps(told))
    for rank in forks.ranks(worker, worker, cwd=Path(communication.__file__).parents[1]):
        assert rank.wait() == 0, rank.communicate()[1]
    sft, soar, grpo = json.loads((tmp_path / "exchanged-1.json").read_text())["full-step"].values()
    assert soar["kept"]
    assert total(soar) <= MOST * total(sft)
    for step, times in ((sft, 1), (soar, 1), (grpo, 2)):  # GRPO's reference policy is gathered, too
        assert 0 <= step["gathered"] - times * step["weights"] < DRAWN
        assert 0 <= step["reduced"] - step["trained"] < DRAWN


def test_the_counter_sees_nothing_where_nothing_is_exchanged() -> None:
    with counted() as found:
        torch.ones(2).sum()
    assert (found.gathered, found.reduced) == (0, 0)
