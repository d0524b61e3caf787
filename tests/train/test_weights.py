"""What a stage has trained is what is saved, evaluated and handed on, in the dtype it was trained in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Project
from safetensors.torch import load_file

from corefit.run.evaluation import evaluator as evaluate
from corefit.run.report.table import MISSING
from corefit.train import loop as train

FULL, LORA = "stage.soar.train={use='full'}", "stage.grpo.train={use='lora', rank=2}"
SLOW = "stage.soar.optimizer.lr=2e-6"
"""Steps of which most weights in bfloat16 would not notice."""
FILE = "transformer/diffusion_pytorch_model.safetensors"


def run(project: Project, *keys: str) -> Path:
    args = [word for key in ("precision='bf16'", SLOW, *keys) for word in ("--set", key)]
    done = project.main("run", "pipeline.toml", *args)
    assert done.status == 0, done.err
    (project.folder / "said").write_text(done.out)
    return project.folder / "runs" / "tiny"


def frozen(transformer: Any) -> dict[str, torch.Tensor]:
    """A network's own weights, by their names in a file."""
    tensors = transformer.state_dict().items()
    return {n.replace(".base_layer.", "."): t.clone() for n, t in tensors if ".lora_" not in n}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, list[Any]]:
    """The weights that are evaluated, those that each stage's first step finds, and where autocast was on."""
    seen: dict[str, list[Any]] = {"evaluated": [], "trained": [], "autocast": []}
    score, step = evaluate.Evaluator.score, train.Loop.take_step

    def seen_score(evaluator: Any, backbone: Any, *args: Any) -> Any:
        seen["evaluated"].append(frozen(backbone.transformer))
        backbone.transformer.proj_out.register_forward_hook(
            lambda *_: seen["autocast"].append(torch.is_autocast_enabled("cpu"))
        )
        return score(evaluator, backbone, *args)

    def seen_step(loop: Any, batch: Any) -> None:
        if loop.state.step == 0:
            seen["trained"].append(frozen(loop.state.transformer))
        step(loop, batch)

    monkeypatch.setattr(evaluate.Evaluator, "score", seen_score)
    monkeypatch.setattr(train.Loop, "take_step", seen_step)
    return seen


def test_what_full_training_leaves_is_evaluated_and_adapted_as_it_is(project: Project, held: Any) -> None:
    """In bfloat16 training; rounded, most of a small update would be gone from the score and from the next stage."""
    folder = run(project, FULL, LORA)
    saved = load_file(folder / "01-soar" / "model" / FILE)
    base, after, adapted = held["evaluated"]
    moved = [name for name in saved if not torch.equal(saved[name], base[name])]
    assert len(moved) > len(saved) / 2
    lost = [name for name in moved if torch.equal(saved[name].bfloat16(), base[name].bfloat16())]
    assert lost, "this update is not small enough to show anything"
    for found in (after, held["trained"][1], adapted):
        assert {t.dtype for t in found.values()} == {torch.float32}
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert held["autocast"]
    assert all(held["autocast"]), "evaluated in other arithmetic than it was trained in"


def test_an_adapter_of_the_base_is_evaluated_on_the_weights_that_it_was_trained_on(project: Project, held: Any) -> None:
    run(project)
    assert {t.dtype for found in (*held["evaluated"], *held["trained"]) for t in found.values()} == {torch.bfloat16}
    assert all(held["autocast"])


def test_rounding_that_was_asked_for_is_what_is_evaluated_and_the_table_says_what_it_cost(
    project: Project, held: Any
) -> None:
    folder = run(project, FULL, LORA, "stage.soar.save_dtype='bf16'")
    saved, checkpoint = load_file(folder / "01-soar" / "model" / FILE), folder / "01-soar" / "checkpoints"
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    base, after, _ = held["evaluated"]
    assert all(torch.equal(after[name], saved[name].to(after[name])) for name in saved)
    assert all(torch.equal(held["trained"][1][name], saved[name].to(torch.bfloat16)) for name in saved)
    newest = max(checkpoint.iterdir())
    trained = {n: t for file in newest.glob("*.safetensors") for n, t in load_file(file).items()}
    trained = {n.removeprefix("weights/"): t for n, t in trained.items() if n.startswith("weights/")}
    moved = {name: trained[name] != base[name] for name in trained}
    kept = {name: (saved[name] != base[name].bfloat16()) & moved[name] for name in trained}
    share = sum(int(t.sum()) for t in kept.values()) / sum(int(t.sum()) for t in moved.values())
    assert 0 < share < 0.9
    assert json.loads((folder / "01-soar" / "done.json").read_text())["cost"]["survived"] == pytest.approx(share)
    said = (project.folder / "said").read_text()
    assert "in bf16" in said
    column = [line.split()[-1] for line in said.splitlines() if line.startswith(("base", "grpo "))]
    assert column.count(MISSING) >= 2
    assert f"{100 * share:.1f} %" in said


def test_a_lora_is_saved_as_it_is(project: Project) -> None:
    done = project.main("check", "pipeline.toml", "--set", "stage.grpo.save_dtype='bf16'")
    assert done.status == 2
    assert "stage.grpo.save_dtype: a LoRA is saved in float32; remove the key" in done.err
