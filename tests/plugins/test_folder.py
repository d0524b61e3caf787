"""Model folders that a user or a disk spoilt: `corefit check` tells file and remedy, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Project


def value(file: str, **values: Any) -> Callable[[Project], None]:
    """A JSON file of the model with other values."""

    def spoil(project: Project) -> None:
        path = project.own("base") / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def path(text: str) -> Callable[[Project], None]:
    """Another `path` in [backbone]."""
    return lambda project: project.swap(('path = "base"', f"path = {json.dumps(text)}"))


def rank(number: int) -> Callable[[Project], None]:
    return lambda project: project.swap(("rank = 2", f"rank = {number}"))


SCHEDULER = "scheduler/scheduler_config.json"
SPOILT: dict[str, tuple[Callable[[Project], None], str]] = {
    "text for a number": (
        value("transformer/config.json", in_channels="four"),
        "transformer/config.json: in_channels is 'four'; a number is expected",
    ),
    "text for a number of the VAE": (value("vae/config.json", latent_channels="4"), "latent_channels is '4'"),
    "a number for a list": (value("vae/config.json", block_out_channels=0), "block_out_channels is 0"),
    "a negative patch": (value("transformer/config.json", patch_size=-2), "patch_size is -2"),
    "null for a number": (value("transformer/config.json", pos_embed_max_size=None), "pos_embed_max_size is None"),
    "text for layers": (
        value("transformer/config.json", num_layers="two"),
        "transformer/config.json: num_layers is 'two'",
    ),
    "a class of another family": (
        value("vae/config.json", _class_name="AutoencoderKLWan"),
        "vae/config.json: _class_name is AutoencoderKLWan; this family's is AutoencoderKL",
    ),
    "more layers than there are": (value("transformer/config.json", num_layers=10**9), "num_layers is 1000000000"),
    "a shift of 0": (value(SCHEDULER, shift=0), "the scheduler's shift is 0; it must be more than 0"),
    "a scale of 0": (value("vae/config.json", scaling_factor=0), "vae/config.json: scaling_factor is 0"),
    "a scale that is none": (value("vae/config.json", scaling_factor=float("nan")), "scaling_factor is nan"),
    "no limit of tokens": (
        value("tokenizer/tokenizer_config.json", model_max_length=10**30),
        "model_max_length is 1000",
    ),
    "text for a shift": (value(SCHEDULER, shift="three"), f"{SCHEDULER}: shift is 'three'; a number is expected"),
    "a class that is no list": (value("model_index.json", vae="AutoencoderKL"), "vae is 'AutoencoderKL'; [library"),
    "half a class": (value("model_index.json", text_encoder=["transformers"]), "text_encoder is ['transformers'];"),
    "a file": (path("train.jsonl"), "train.jsonl is a file; name the diffusers folder"),
    "nothing": (path(""), "backbone.path: must name a folder"),
    "a name of thousands of characters": (
        path("a" * 5000),
        "backbone.path: must be a path of at most 255 bytes",
    ),
    "a path of thousands of characters": (path("/a" * 5000), "backbone.path: must be a path of at most"),
    "NUL": (path("base\0"), "backbone.path: must be text without NUL"),
    "NUL in an absolute path": (path("/base\0"), "backbone.path: must be text without NUL"),
    "a rank that no memory holds": (rank(10**9), "backbone.train.rank = 1000000000: the widest module"),
    "a rank that no number holds": (rank(10**30), "backbone.train.rank"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_is_told(name: str, project: Project) -> None:
    spoil, said = SPOILT[name]
    spoil(project)
    before = project.tree()
    ended = project.main("check", "pipeline.toml")
    assert (ended.status, ended.out) == (2, "")
    assert said in ended.err
    assert len(ended.err) < 1500
    assert project.tree() == before


def test_settings_that_are_lists_are_no_components(project: Project) -> None:
    value("model_index.json", text_encoder_layers=[9, 18], own=["a"], note="x")(project)
    assert project.main("check", "pipeline.toml").status == 0


def test_a_rank_as_wide_as_the_layers_is_taken(project: Project) -> None:
    rank(32)(project)
    assert project.main("check", "pipeline.toml").status == 0


def test_path_is_named(tmp_path: Path) -> None:
    from corefit.errors import ModelError
    from corefit_backbones.sd3 import Sd3

    with pytest.raises(ModelError, match=r"path = 'a+'\.\.\.: no such folder: File name too long"):
        Sd3("a" * 5000).check()
