"""The digits example: disjoint digits, scenes that are what they say, a judge that can tell, a small base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch

HERE = Path(__file__).parents[2] / "examples" / "digits"


def load(name: str):
    return scripts.load(HERE / f"{name}.py")


digits = load("digits")


def media(pictures) -> torch.Tensor:
    """[B, 3, 16, 16] in [0, 1] of uint8 pictures [16, 16, 3]."""
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def examples():
    return list(digits.DigitScenes(1000, seed=3).examples())


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return [json.loads(line) for line in (HERE / "heldout.jsonl").read_text().splitlines()]


def test_importing_the_plugin_imports_no_torch_and_no_sklearn():
    code = "import sys, digits; sys.exit(any(m in sys.modules for m in ('torch', 'sklearn', 'diffusers')))"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


def test_no_digit_is_in_two_parts():
    parts = ["train", "judge", "judge-test"]
    images = [{i.tobytes() for i in digits.digit_images(part)[0]} for part in parts]
    assert sum(map(len, images)) == len(set().union(*images)) == 1797
    for part in parts:
        assert set(digits.digit_images(part)[1]) == set(range(10))


def test_scenes_depend_on_seed_and_number_alone(examples):
    longer = list(digits.DigitScenes(1010, seed=3).examples())
    assert all((a.media == b.media).all() for a, b in zip(examples, longer, strict=False))
    assert [e.prompt for e in examples] == [e.prompt for e in longer[:1000]]
    other = digits.DigitScenes(1000, seed=4).examples()
    assert sum(a.prompt == b.prompt for a, b in zip(examples, other, strict=True)) < 100


def test_categories_take_turns(examples):
    assert [e.meta["category"] for e in examples] == list(digits.CATEGORIES) * 200


def test_meta_survives_json(examples):
    for e in examples[:20]:
        scene = digits.Scene.of(json.loads(json.dumps(e.meta)))
        assert scene.prompt == e.prompt
        assert scene.meta == e.meta


def test_prompts_use_the_vocabulary_only(examples, held_out):
    prompts = {e.prompt for e in examples} | {row["prompt"] for row in held_out}
    used = {word for prompt in prompts for word in prompt.split()}
    plurals = {f"{d}s" for d in range(10)}
    assert used <= set(digits.WORDS) | plurals


def test_training_never_shows_a_held_out_combination(examples, held_out):
    seen = {digits.Scene.of(e.meta) for e in examples} | set(digits.scenes("two", held_out=False))
    assert not any(scene.held_out for scene in seen)
    asked = {digits.Scene.of(row) for row in held_out}
    for scene in asked:
        assert scene.category == "single" or scene.held_out


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("two", (("red", 3), ("blue", 7)), ""), ("two", (("blue", 7), ("red", 3)), "")),
        (
            ("position", (("red", 3), ("blue", 7)), "left of"),
            ("position", (("blue", 7), ("red", 3)), "right of"),
        ),
        (
            ("position", (("red", 3), ("blue", 7)), "above"),
            ("position", (("blue", 7), ("red", 3)), "below"),
        ),
    ],
)
def test_both_ways_of_saying_it_are_held_out_together(one, other, monkeypatch):
    for share in np.linspace(0, 1, 21):
        monkeypatch.setattr(digits, "HELD_OUT", dict.fromkeys(digits.CATEGORIES, share))
        assert digits.Scene(*one).held_out == digits.Scene(*other).held_out


def test_the_readmes_say_how_many_prompts_there_are_and_which_are_seen(held_out):
    """2050 rows are fewer prompts, and intervals over rows say less than they seem to."""
    distinct: dict[str, set[str]] = {category: set() for category in digits.CATEGORIES}
    for row in held_out:
        distinct[row["category"]].add(row["prompt"])
    seen = {scene.prompt for category in digits.CATEGORIES for scene in digits.scenes(category, held_out=False)}
    assert {category for category, prompts in distinct.items() if prompts & seen} == {"single"}
    assert distinct["single"] <= seen
    count = sum(map(len, distinct.values()))
    for page in (HERE / "README.md", HERE.parent.parent / "README.md"):
        text = " ".join(page.read_text().split())
        assert f"draws of {count} distinct prompts" in text
        assert f"The singles are not held out: training shows all {len(distinct['single'])}." in text
        table = text.index("digits_judge, 2050")
        assert text.index("on the prompts on which the settings were chosen") < table < text.index(" sft 79.7 %", table)
    assert text.index("study/README.md") < text.index("The other objectives"), (
        "what SOAR buys is said where it is shown"
    )
    own = " ".join((HERE / "README.md").read_text().split())
    assert own.index("evaluated once") < own.index("1300 steps: equal compute") < own.index("digits_judge, 2050")


def test_heldout_file_is_what_the_function_writes(held_out, tmp_path):
    digits.write_held_out(tmp_path / "heldout.jsonl")
    assert (tmp_path / "heldout.jsonl").read_bytes() == (HERE / "heldout.jsonl").read_bytes()
    assert len(held_out) >= 1024
    assert [row["category"] for row in held_out[:100]] == list(digits.CATEGORIES) * 20


@pytest.mark.parametrize("part", ["train", "judge-test"])
def test_the_judge_reads_digits_that_it_never_saw(part):
    images, classes = digits.digit_images(part)
    read = digits.read_digits(images.reshape(-1, 64))
    assert np.mean([a == b for a, b in zip(read, classes, strict=True)]) >= 0.97


def test_the_judge_finds_real_scenes_right(examples):
    scores = digits.Evaluator().score(media(e.media for e in examples), [], [e.meta for e in examples])
    assert scores.mean() >= 0.94


def test_the_judge_finds_other_scenes_wrong(examples):
    others = examples[5:] + examples[:5]
    pictures, meta = media(e.media for e in others), [e.meta for e in examples]
    strict = digits.Evaluator().score(pictures, [], meta)
    graded = digits.Evaluator(strict=False).score(pictures, [], meta)
    assert strict.mean() < 0.02
    assert 0.1 < graded.mean() < 0.6
    assert ((graded >= 0) & (graded <= 1)).all()


def test_a_score_does_not_depend_on_the_batch(examples):
    pictures, meta = media(e.media for e in examples[:64]), [e.meta for e in examples[:64]]
    pictures = (pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    judge = digits.Evaluator(strict=False)
    together = judge.score(pictures, [], meta)
    alone = torch.cat([judge.score(pictures[i : i + 1], [], meta[i : i + 1]) for i in range(64)])
    assert torch.equal(together, alone)
    assert torch.equal(judge.score(pictures.flip(0), [], meta[::-1]).flip(0), together)


def found(*cells):
    return {cell: (colour, digit) for cell, colour, digit in cells}


@pytest.mark.parametrize(
    ("cells", "share"),
    [
        ([((0, 0), "red", 3), ((0, 1), "blue", 7)], 1),
        ([((0, 0), "red", 3), ((1, 1), "blue", 7)], 1),
        ([((0, 1), "red", 3), ((0, 0), "blue", 7)], 5 / 6),
        ([((0, 0), "blue", 3), ((0, 1), "red", 7)], 4 / 6),
        ([((0, 0), "red", 3), ((0, 1), "blue", None)], 5 / 6),
        ([((0, 0), "red", 3), ((0, 1), "blue", 7), ((1, 1), None, None)], 5 / 6),
        ([((0, 0), "red", 3)], 2 / 6),
        ([], 0),
    ],
)
def test_graded_credit(cells, share):
    scene = digits.Scene("position", (("red", 3), ("blue", 7)), "left of")
    assert digits.share_right(scene, found(*cells)) == pytest.approx(share)


def test_smudges_and_darkness_are_no_digits():
    noise = np.random.default_rng(0).random((200, 64)).astype(np.float32)
    assert sum(read is not None for read in digits.read_digits(noise)) < 10
    assert digits.look(np.full((2, 16, 16, 3), digits.DARK, np.float32)) == [{}, {}]


def test_media_of_another_size_are_refused():
    with pytest.raises(ValueError, match="16, 16"):
        digits.Evaluator().score(torch.zeros(1, 3, 32, 32), [""], [{}])


def test_the_base_is_small():
    assert sum(f.stat().st_size for f in (HERE / "base").rglob("*") if f.is_file()) <= 8 << 20


def test_the_base_names_no_folder_of_the_machine_that_made_it():
    for config in (HERE / "base").rglob("*.json"):
        assert json.loads(config.read_text()).get("_name_or_path", "") == "", config


@pytest.fixture(scope="module")
def base():
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(str(HERE / "base"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_training_encodes_prompts_as_the_pipeline_does(base, held_out):
    make_base = load("make_base")
    prompts = ["", *(row["prompt"] for row in held_out[:20])]
    model = torch.nn.ModuleDict({name: getattr(base, name) for name in make_base.TRAINED})
    with torch.no_grad():
        ours = make_base.embed(model, make_base.tokens(base, prompts))
        embeddings, _, pooled, _ = base.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=make_base.TEXT_LENGTH
        )
    assert torch.equal(ours[0], embeddings)
    assert torch.equal(ours[1], pooled)


def test_no_prompt_is_cut(base, held_out):
    for row in held_out:
        assert len(base.tokenizer(row["prompt"]).input_ids) <= base.tokenizer.model_max_length


def test_the_base_draws_about_half_of_the_prompts_right(base, held_out):
    wanted = held_out[:100]
    images = base(
        [row["prompt"] for row in wanted],
        num_inference_steps=16,
        guidance_scale=3.5,
        max_sequence_length=10,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    share = digits.Evaluator().score(images, [], wanted).mean()
    assert 0.3 < share < 0.75


def test_a_layout_is_one_more_fact_of_pairs():
    """Pairs of the layout are drawn so and judged so; other scenes are as they are without it."""
    drawn = list(digits.DigitScenes(60, 3, layout="diagonal").examples())
    usual = list(digits.DigitScenes(60, 3).examples())
    media = torch.from_numpy(np.stack([e.media for e in [*drawn, *usual]])).permute(0, 3, 1, 2) / 255
    meta = [e.meta for e in [*drawn, *usual]]
    free, bound = (digits.Evaluator(layout=layout).score(media, [], meta) for layout in digits.LAYOUTS)
    pairs = torch.tensor([digits.Scene.of(m).is_pair for m in meta])
    assert torch.equal(free[~pairs], bound[~pairs])
    first, second = pairs[:60], pairs[60:]
    assert 15 < int(first.sum()) < 35
    assert torch.equal(free[:60][first], bound[:60][first]), "all pairs of this layout are placed so"
    assert free[60:][second].mean() > 0.8
    assert bound[60:][second].mean() < 0.5, "any layout has few"
    assert [e.prompt for e in drawn] == [e.prompt for e in usual]
    plain = [e.media for e, pair in zip(drawn, first, strict=True) if not pair]
    assert all(
        (a == b.media).all()
        for a, b in zip(plain, [e for e, p in zip(usual, first, strict=True) if not p], strict=True)
    )
