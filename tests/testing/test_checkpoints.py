"""Tiny checkpoints: equal bytes from equal arguments, and real diffusers pipelines."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corefit.testing import checkpoints
from corefit.testing.checkpoints import clip_pieces, t5_pieces, tiny_sd3

WORDS = ("a", "red", "green", "blue", "dog", "dogs", "7")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("tiny"), words=WORDS)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path):
    from diffusers import StableDiffusion3Pipeline

    loaded = StableDiffusion3Pipeline.from_pretrained(checkpoint)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


ALL = ("tiny_sd3", "tiny_flux", "tiny_chroma", "tiny_wan")
THERE = f"""
import sys, pathlib
from corefit.testing import checkpoints
for name in {ALL}:
    getattr(checkpoints, name)(pathlib.Path(sys.argv[1], name), words={WORDS!r})
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The folder of checkpoints that another process wrote, whose hashes of Python differ."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-c", THERE, folder], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    return folder


@pytest.mark.parametrize("name", ALL)
def test_another_process_writes_the_same_bytes(name, elsewhere, tmp_path):
    here = hashes(getattr(checkpoints, name)(tmp_path / "here", words=WORDS))
    assert hashes(elsewhere / name) == here
    assert len(here) > 8  # transformers 5 writes fewer files of a tokenizer


def test_the_seed_changes_the_weights_and_nothing_else(checkpoint, tmp_path):
    state = torch.get_rng_state()
    other = hashes(tiny_sd3(tmp_path, words=WORDS, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    changed = {name for name, digest in hashes(checkpoint).items() if other[name] != digest}
    assert changed == {name for name in other if name.endswith(".safetensors")}


def test_it_is_small(checkpoint):
    assert sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()) < 1 << 20


def test_the_pipeline_generates(pipeline):
    def images(prompt: str):
        rng = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=2, generator=rng, output_type="pt").images

    red = images("a red dog")
    assert red.shape == (1, 3, 16, 16)
    assert torch.isfinite(red).all()
    assert not torch.equal(red, images("a blue dog"))


@pytest.mark.parametrize("other", ["a blue dog", "a red dogs", "red a dog", "a red dog 7", ""])
def test_other_words_give_other_embeddings(pipeline, other):
    def embeddings(prompt: str):
        encoded = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return encoded[0], encoded[2]

    for one, two in zip(embeddings("a red dog"), embeddings(other), strict=True):
        assert (one - two).abs().max() > 1e-3


def test_every_word_is_one_token(pipeline):
    prompt = " ".join(WORDS)
    clip = pipeline.tokenizer(prompt).input_ids
    assert len(clip) == len(WORDS) + 2
    assert (clip[0], clip[-1]) == (
        pipeline.text_encoder.config.bos_token_id,
        pipeline.text_encoder.config.eos_token_id,
    )
    assert pipeline.tokenizer_3(prompt).input_ids[-1] == pipeline.text_encoder_3.config.eos_token_id
    assert len(pipeline.tokenizer_3(prompt).input_ids) == len(WORDS) + 1


def test_other_text_falls_into_characters(pipeline):
    unknown = pipeline.tokenizer_3.unk_token_id
    assert unknown not in pipeline.tokenizer_3("Zebra, 42!").input_ids
    clip = pipeline.tokenizer("zebra, 42! é").input_ids
    assert clip.count(pipeline.tokenizer.eos_token_id) == 1
    assert pipeline.tokenizer.decode(clip, skip_special_tokens=True).replace(" ", "") == "zebra,42!é"


def test_a_later_word_leaves_earlier_ones_whole():
    vocabulary, merges = clip_pieces(["the", "then", "theme", "other", "he"])
    assert {"the</w>", "then</w>", "theme</w>", "other</w>", "he</w>"} <= set(vocabulary)
    assert len(set(merges)) == len(merges)
    assert clip_pieces(["the", "then"])[1] == merges[: len(clip_pieces(["the", "then"])[1])]


def test_t5_has_no_piece_twice():
    names = [piece for piece, _ in t5_pieces(("a", "red", "red", "7"))]
    assert len(set(names)) == len(names)


def test_dual_attention_as_in_sd35_medium(tmp_path):
    from diffusers import SD3Transformer2DModel

    folder = tiny_sd3(tmp_path, words=WORDS, dual_attention_layers=(0,))
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    assert any(".attn2." in name for name, _ in transformer.named_parameters())


def test_a_narrow_t5_is_refused(tmp_path):
    with pytest.raises(ValueError, match="t5_width 8"):
        tiny_sd3(tmp_path, words=WORDS, t5_width=8)
