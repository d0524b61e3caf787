"""What the file of a LoRA says of itself."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corefit.run.publish import metadata
from corefit.run.publish.output import Output

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def lora(finished_run):
    return finished_run / "02-lora/model" / FILE


def test_it_names_the_model_and_how_it_was_trained(lora):
    with safe_open(lora, "pt") as opened:
        found = opened.metadata()
    expected = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v3-medium/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "tiny lora",
        "modelspec.resolution": "16x16",
        "ss_base_model_version": "sd3_medium",
        "ss_network_dim": "2",
        "ss_network_alpha": "4.0",
        "ss_output_name": "tiny-lora",
        "ss_sd_model_name": "base",
        "ss_steps": "1",
        "ss_seed": "0",
        "ss_num_train_images": "8",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not {"modelspec.date", "modelspec.prediction_type"} & found.keys()
    adapter = json.loads(found["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (2, 4)


def test_its_hash_is_that_of_all_tensors(lora):
    data = lora.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert metadata.read(lora)[metadata.HASH] == f"0x{hashlib.sha256(data[8 + length :]).hexdigest()}"
    assert length % 8 == 0


def test_equal_tensors_give_equal_bytes_and_stay_as_they_are(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}
    for folder, names in (("1", ("x", "y", "z")), ("2", ("z", "y", "x"))):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / FILE, dict.fromkeys(names, "1"))
        metadata.stamp(tmp_path / folder, {"modelspec.title": "ü", "y": "2"})
    first, second = (tmp_path / folder / FILE for folder in "12")
    assert first.read_bytes() == second.read_bytes()
    assert metadata.read(first) | {metadata.HASH: ""} == {
        "modelspec.title": "ü",
        "x": "1",
        "y": "2",
        "z": "1",
        metadata.HASH: "",
    }
    assert all(torch.equal(load_file(first)[name], tensor) for name, tensor in tensors.items())
    assert os.listdir(tmp_path / "1") == [FILE]


def test_what_is_asked_for_is_there(finished_run):
    output = Output.of(finished_run, "lora")
    tables = {
        **output.tables,
        "card": {"title": "T", "license": "mit", "tags": ["a", "b"], "author": "me", "base_model": "org/base"},
        "data": {**output.tables["data"], "trigger": "ohwx"},
    }
    found = metadata.of_lora(tables, "lora", output.base(), steps=7, examples=3)
    assert found["modelspec.title"] == "T"
    assert found["modelspec.license"] == "mit"
    assert found["modelspec.tags"] == "a, b"
    assert found["modelspec.trigger_phrase"] == "ohwx"
    assert found["modelspec.usage_hint"].startswith("Trigger word: ohwx; Set the strength to 2 ")
    assert json.loads(found["ss_tag_frequency"]) == {"corefit": {"ohwx": 3}}
    assert (found["ss_sd_model_name"], found["ss_steps"]) == ("org/base", "7")
    assert all(isinstance(value, str) for value in found.values())


def test_a_backbone_that_says_nothing_of_itself_has_no_architecture(finished_run):
    output = Output.of(finished_run, "lora")
    found = metadata.of_lora(output.tables, "lora", object(), steps=1, examples=1)  # pyright: ignore[reportArgumentType]
    assert "modelspec.architecture" not in found
    assert found["modelspec.title"] == "tiny lora"
