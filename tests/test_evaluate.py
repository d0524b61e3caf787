"""What the judge keeps of its samples, pictures and clips."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from corefit.evaluate import Eval, Judge


def judge(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, shape: tuple[int, ...], **keys: Any) -> tuple[Judge, list]:
    """One whose media of row n are n / 10 everywhere, and the numbers of rows it was asked for."""
    prompts = [f"prompt {n}" for n in range(7)]
    asked: list[int] = []

    def media(self: Judge, backbone: Any, rows: Any) -> Tensor:
        asked.append(len(rows))
        return torch.tensor(rows).reshape(-1, *(1 for _ in shape)).expand(-1, *shape) / 10

    class Prompts:
        def __len__(self) -> int:
            return len(prompts)

        def batch(self, rows: Any, turns: Any) -> Any:
            return SimpleNamespace(prompts=[prompts[row] for row in rows])

    monkeypatch.setattr(Judge, "media", media)
    made: Any = Prompts()
    ranks: Any = None
    return Judge(Eval(prompts=tmp_path / "p.txt", reward=(), **keys), made, 0, ranks), asked


def test_samples_are_made_a_batch_at_a_time(monkeypatch, tmp_path):
    """Sixteen clips at once take a memory that nobody planned for."""
    of, asked = judge(monkeypatch, tmp_path, (3, 5, 8, 8), batch=2, samples=5)
    prompts, media = of.samples(None)
    assert asked == [2, 2, 1]
    assert prompts == [f"prompt {n}" for n in range(5)]
    assert torch.allclose(media[:, 0, 0, 0, 0], torch.arange(5) / 10)


@pytest.mark.parametrize(("shape", "kept"), [((3, 8, 8), (3, 8, 8)), ((3, 9, 8, 8), (3, 4, 8, 8))])
def test_kept_samples_are_compared_as_they_were_drawn(monkeypatch, tmp_path, shape, kept):
    of, _ = judge(monkeypatch, tmp_path, shape, limit=3)
    for stage in ("base", "soar"):
        of.keep_samples(of.samples(None), tmp_path / stage)
    media = load_file(tmp_path / "base" / "last.safetensors")["media"]
    assert (media.shape[1:], media.dtype) == (kept, torch.uint8)
    clips = len(shape) == 4
    names = {"last.safetensors", "last.png", *(["last.webp"] if clips else [])}
    assert {path.name for path in (tmp_path / "base").iterdir()} == names
    of.compare(["base", "soar"], [tmp_path / "base", tmp_path / "soar"], tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").exists()
