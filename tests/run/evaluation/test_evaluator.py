"""Scores belong to their own prompts, and the evaluator keeps its samples, of pictures and clips."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from corefit.pipeline.eval import Also
from corefit.rng import Rng
from corefit.rollout import generate
from corefit.run.evaluation.evaluator import Eval, Evaluator
from corefit.run.evaluation.partial import PartialScores
from corefit.system import ranks
from corefit.testing import ToyBackbone
from corefit.testing.toy import loaded
from corefit.types import Batch, Condition, Meta, Reward, Weighted


def evaluator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, shape: tuple[int, ...], **keys: Any
) -> tuple[Evaluator, list]:
    """One whose media of row n are n / 10 everywhere, and the numbers of rows it was asked for."""
    prompts = [f"prompt {n}" for n in range(7)]
    asked: list[int] = []

    def media(self: Evaluator, backbone: Any, rows: Any) -> Tensor:
        asked.append(len(rows))
        return torch.tensor(rows).reshape(-1, *(1 for _ in shape)).expand(-1, *shape) / 10

    class Prompts:
        def __len__(self) -> int:
            return len(prompts)

        def batch(self, rows: Any, turns: Any) -> Any:
            meta = [{"n": row, "category": "ab"[row % 2]} for row in rows]
            return Batch(None, Condition({}), [prompts[row] for row in rows], meta, rows, shape)

    monkeypatch.setattr(Evaluator, "media", media)
    made: Any = Prompts()
    ranks: Any = None
    return Evaluator(Eval(prompts=tmp_path / "p.txt", **{"reward": (), **keys}), made, ranks), asked


def test_samples_are_made_a_batch_at_a_time(monkeypatch, tmp_path):
    """Sixteen clips at once take a memory that nobody planned for."""
    of, asked = evaluator(monkeypatch, tmp_path, (3, 5, 8, 8), batch=2, samples=5)
    prompts, media = of.samples(None)
    assert asked == [2, 2, 1]
    assert prompts == [f"prompt {n}" for n in range(5)]
    assert torch.allclose(media[:, 0, 0, 0, 0], torch.arange(5) / 10)


class Told(Reward):
    """The number of a row where its media, prompt and metadata all say the same one, and -1 elsewhere."""

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        told = zip((media[:, 0, 0, 0] * 10).round().tolist(), prompts, meta, strict=True)
        return torch.tensor([n if (p, m["n"]) == (f"prompt {n:.0f}", n) else -1 for n, p, m in told])


@pytest.mark.parametrize(("limit", "world"), [(None, 1), (5, 1), (None, 2), (None, 3)])
def test_scores_and_categories_are_of_their_own_prompts(monkeypatch, tmp_path, limit, world):
    """In the prompts' order, whatever number of ranks shares them."""
    reward = (Weighted("told", Told()),)
    of, _ = evaluator(monkeypatch, tmp_path, (3, 4, 4), reward=reward, batch=2, limit=limit, samples=4)
    sent: list[Any] = []
    """What each rank gives to the others."""

    def scored(rank: int, gather: Any) -> Any:
        ranks: Any = SimpleNamespace(
            data_world=world,
            data_rank=rank,
            leads=True,
            main=rank == 0,
            forwards_together=False,
            all_gather_object=gather,
        )
        return attrs.evolve(of, ranks=ranks).score(None)

    def gather(part: Any) -> list[Any]:
        sent.append(part)
        return sent

    for rank in range(1, world):
        with suppress(KeyError):  # this rank would wait for those that have not scored yet
            scored(rank, gather)
    made, samples = scored(0, gather)
    numbers = range(limit or 7)
    assert made == {
        "values": {"told": [*numbers]},
        "categories": ["ab"[n % 2] for n in numbers],
        "prompts": [f"prompt {n}" for n in numbers],
    }
    assert of.texts() == {name: made[name] for name in ("categories", "prompts")}
    prompts, media = samples
    assert prompts == [f"prompt {n}" for n in range(4)]
    assert torch.allclose(media[:, 0, 0, 0], torch.arange(4) / 10), "those that were scored, of whichever rank"


class Dies(Told):
    """Ends the process, so to speak, once it has scored some rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        self.left -= len(prompts)
        if self.left < 0:
            raise KeyboardInterrupt
        return super().score(media, prompts, meta)


def single() -> Any:
    return SimpleNamespace(
        data_world=1,
        data_rank=0,
        leads=True,
        main=True,
        forwards_together=False,
        all_gather_object=lambda part: [part],
        from_main=lambda ask: ask(),
    )


def test_an_evaluation_that_was_killed_goes_on_where_it_was(monkeypatch, tmp_path):
    of, asked = evaluator(monkeypatch, tmp_path, (3, 4, 4), reward=(Weighted("told", Told()),), batch=2, samples=1)
    of = attrs.evolve(of, ranks=single())
    whole, _ = of.score(None)
    partial = PartialScores(tmp_path / "scores.partial", "abc")
    dies = attrs.evolve(of, eval=attrs.evolve(of.eval, reward=(Weighted("told", Dies(5)),)))
    with pytest.raises(KeyboardInterrupt):
        dies.score(None, partial=partial)
    assert sorted(partial.read()) == [0, 1, 2, 3], "whole batches are kept"
    asked.clear()
    assert of.score(None, partial=partial)[0] == whole
    assert asked == [2, 2, 1], "the batch that has the sample, whole, and what was left"
    assert of.score(None, partial=PartialScores(partial.folder, "other"))[0] == whole
    assert asked == [2, 2, 1, 2, 2, 2, 1], "scores of anything else are not used"


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("last", [3, 5])
def test_a_kill_changes_no_bit_where_the_size_of_a_batch_does(monkeypatch, tmp_path, samples, last):
    """Networks round otherwise in batches of another size, so that what is generated again is a batch as it was."""

    class Rounded(Reward):
        def score(self, media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
            if any(m["n"] == killed for m in meta):
                raise KeyboardInterrupt
            return media[:, 0, 0, 0] + len(media) * 1e-6

    reward, killed = (Weighted("rounded", Rounded()),), -1
    of, _ = evaluator(monkeypatch, tmp_path, (3, 4, 4), reward=reward, batch=2, samples=samples)
    of = attrs.evolve(of, ranks=single())
    whole, _ = of.score(None)
    partial, killed = PartialScores(tmp_path / "scores.partial", "abc"), last
    with pytest.raises(KeyboardInterrupt):
        of.score(None, partial=partial)
    killed = -1
    assert of.score(None, partial=partial)[0] == whole


def test_a_damaged_file_of_partial_scores_is_scored_again(tmp_path):
    partial = PartialScores(tmp_path, "abc")
    each = {"values": {"told": 0.1 + 0.2}, "category": "", "prompt": "p"}
    partial.add({0: each, 1: each})
    partial.add({2: each})
    assert partial.read() == {0: each, 1: each, 2: each}
    file = tmp_path / "rows-0000000.json"
    file.write_bytes(file.read_bytes()[:-9])
    assert partial.read() == {2: each}


def test_media_are_of_their_own_prompt_and_noise(tmp_path):
    """Row by row what a batch of rows gives; other rows, seeds, steps and scales give others."""
    backbone, prompts = loaded(ToyBackbone((3, 4, 4))), [f"prompt {n}" for n in range(3)]

    def batch(rows: Any, turns: Any) -> Batch:
        texts = [prompts[row] for row in rows]
        return Batch(None, backbone.encode_text(texts), texts, [{}] * len(rows), rows, backbone.shape)

    def media(rows: Any, **keys: Any) -> Tensor:
        ranks: Any = SimpleNamespace(device=torch.device("cpu"), forwards_together=False)
        dataset: Any = SimpleNamespace(batch=batch, null=backbone.encode_text([""]))
        eval = Eval(prompts=tmp_path / "p.txt", reward=(), **{"steps": 3, "guidance": 2.0, **keys})
        return Evaluator(eval, dataset, ranks).media(backbone, rows)

    whole = media(range(3))
    for row in range(3):
        torch.testing.assert_close(media([row]), whole[row : row + 1])
    noise = Rng((0, "eval"), [2]).randn((1, *backbone.shape))
    x0 = generate(backbone, noise, backbone.encode_text(prompts[2:]), steps=3, guidance=2.0)
    torch.testing.assert_close(whole[2:], backbone.decode(x0).detach())
    others = [media(range(3), **keys) for keys in ({"seed": 1}, {"steps": 4}, {"guidance": 3.0})]
    assert all(float((other - whole).abs().max()) > 1e-3 for other in others)


@pytest.mark.parametrize(("shape", "kept"), [((3, 8, 8), (3, 8, 8)), ((3, 9, 8, 8), (3, 4, 8, 8))])
def test_kept_samples_are_compared_as_they_were_drawn(monkeypatch, tmp_path, shape, kept):
    of, _ = evaluator(monkeypatch, tmp_path, shape, limit=3)
    for stage in ("base", "soar"):
        of.keep_samples(of.samples(None), tmp_path / stage)
    media = load_file(tmp_path / "base" / "last.safetensors")["media"]
    assert (media.shape[1:], media.dtype) == (kept, torch.uint8)
    clips = len(shape) == 4
    names = {"last.safetensors", "last.png", *(["last.webp"] if clips else [])}
    assert {path.name for path in (tmp_path / "base").iterdir()} == names
    of.compare(["base", "soar"], [tmp_path / "base", tmp_path / "soar"], tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").exists()


def test_drawing_leaves_training_its_own_empty_prompt(job, dataset, tmp_path):
    """The prompts may have been encoded on another machine than the data; guidance must not change midway."""
    backbone = job().backbone
    backbone.load(torch.device("cpu"), torch.float32)
    keys: Any = {"prompts": tmp_path / "p.txt", "reward": (), "steps": 2, "samples": 2}
    evaluator = Evaluator(Eval(**keys), dataset, ranks.join("fp32"))
    backbone.empty = dataset.null
    _, usual = evaluator.samples(backbone)
    backbone.empty = own = Condition({name: t + 1 for name, t in dataset.null.tensors.items()})
    _, media = evaluator.samples(backbone)
    assert backbone.empty is own
    assert torch.equal(media, usual)


@pytest.mark.parametrize("world", [1, 2])
def test_other_settings_are_scored_on_their_own_prompts(monkeypatch, tmp_path, world):
    reward = (Weighted("told", Told()),)
    also = Also(prompts=5, steps=(6, 12), guidance=(1.0,))
    of, _ = evaluator(monkeypatch, tmp_path, (3, 4, 4), reward=reward, batch=2, steps=12, guidance=3.0, also=also)
    used: list[tuple[int, float]] = []
    shown = Evaluator.media

    def media(self: Evaluator, backbone: Any, rows: Any) -> Tensor:
        used.append((self.eval.steps, self.eval.guidance))
        return shown(self, backbone, rows)

    monkeypatch.setattr(Evaluator, "media", media)
    sent: list[list[Any]] = [[], []]

    def also_of(rank: int, gather: Any) -> dict[str, Any]:
        layout = SimpleNamespace(context=1)
        keys = {"data_world": world, "data_rank": rank, "leads": True, "forwards_together": False, "layout": layout}
        ranks: Any = SimpleNamespace(all_gather_object=gather, **keys)
        return attrs.evolve(of, ranks=ranks).also(None, [f"prompt {n}" for n in range(7)])

    for rank in range(world):
        with suppress(KeyError):  # alone, a rank has not the scores of the others

            def gather(part: Any, rank: int = rank) -> list[Any]:
                sent[rank].append(part)
                return [part]

            also_of(rank, gather)
    settings = list(dict.fromkeys(used))
    assert settings == ([(6, 1.0), (12, 1.0)] if world == 1 else [(6, 1.0)])
    if world == 1:
        rows = [0, 1, 2, 4, 5]
        assert also_of(0, lambda part: [part]) == {
            "rows": rows,
            "values": {"told, 6 steps, guidance 1": rows, "told, guidance 1": rows},
        }
    else:
        assert sorted([*sent[0][0], *sent[1][0]]) == [0, 1, 2, 4, 5], "each row by one rank"


def test_settings_that_are_those_of_eval_are_not_scored_twice(tmp_path):
    settings = Eval(prompts=("a",), steps=12, guidance=3.0, also=Also(steps=(6, 12, 1), guidance=(1.0, 3.0)))
    assert {name: (each.steps, each.guidance) for name, each in settings.others.items()} == {
        "6 steps, guidance 1": (6, 1.0),
        "6 steps": (6, 3.0),
        "guidance 1": (12, 1.0),
        "1 step, guidance 1": (1, 1.0),
        "1 step": (1, 3.0),
    }
    assert Eval(prompts=("a",)).others == {}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "name 'steps' or 'guidance'"),
        ({"steps": (6, 6)}, "'steps' names 6 twice"),
        ({"steps": (0,)}, "must be > 0"),
    ],
)
def test_other_settings_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Also(**keys)
