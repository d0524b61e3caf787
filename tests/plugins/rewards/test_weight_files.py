"""What is wrong with the files of a reward is said by `check`, or else before anything is scored, and names the key."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from published import PROMPTS, pictures, reward
from safetensors.torch import load_file, save_file

from corefit.errors import ModelError

CLIP = "clip_score"


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def score(one: Any) -> torch.Tensor:
    return one.score(pictures(), PROMPTS, [{}] * 3)


@pytest.mark.parametrize("name", ["aesthetic", "clip_score", "hps", "image_reward", "pickscore"])
@pytest.mark.parametrize("path", ["nowhere", "./no/where", "x" * 5000, "/no/where", "a/b/c"])
def test_a_folder_that_is_not_there(name: str, path: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"^path = .*: no such folder"):
        reward(name, folders[name], path=path).check()


@pytest.mark.parametrize(
    ("name", "key"), [("aesthetic", "head"), ("hps", "processor"), ("image_reward", "tokenizer"), (CLIP, "path")]
)
def test_an_empty_folder(name: str, key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no|the folder has no"):
        reward(name, folders[name], **{key: str(tmp_path)}).check()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", "it has no config.json; copy the model's whole folder"),
        ("model.safetensors", "it has no model.safetensors or .*pytorch_model.bin"),
        ("preprocessor_config.json", "it has no preprocessor_config.json"),
    ],
)
def test_a_file_that_is_missing(copied: Callable[[str], Path], file: str, says: str) -> None:
    folder = copied(CLIP)
    (folder / file).unlink()
    for name in (CLIP, "aesthetic", "pickscore"):
        with pytest.raises(ModelError, match=says):
            reward(name, folder).check()


def test_a_tokenizer_that_is_missing(copied: Callable[[str], Path]) -> None:
    folder = copied(CLIP)
    for file in ("tokenizer.json", "vocab.json"):
        (folder / file).unlink(missing_ok=file == "vocab.json")  # transformers 5 writes none
    with pytest.raises(ModelError, match=r"it has no tokenizer.json or vocab.json"):
        reward(CLIP, folder).check()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "config.json: a JSON list, not an object"),
        ('{"model_type": "bert"}', "its model_type is 'bert'; this reward reads a CLIP model"),
    ],
)
def test_a_config_of_something_else(copied: Callable[[str], Path], content: str, says: str) -> None:
    folder = copied(CLIP)
    (folder / "config.json").write_text(content)
    for name in (CLIP, "aesthetic"):
        with pytest.raises(ModelError, match=says):
            reward(name, folder).check()


def test_weights_that_the_file_lacks_are_not_left_random(copied: Callable[[str], Path]) -> None:
    folder = copied(CLIP)
    stored = load_file(folder / "model.safetensors")
    gone = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({key: t for key, t in stored.items() if key != gone}, folder / "model.safetensors", {"format": "pt"})
    for name in (CLIP, "aesthetic"):
        with pytest.raises(ModelError, match=f"its weights lack {gone}"):
            score(reward(name, folder))
    save_file({**stored, gone: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="or have them in another shape than the config says"):
        score(reward(CLIP, folder, dtype="bf16"))


def test_weights_that_are_cut_off(copied: Callable[[str], Path]) -> None:
    folder = copied(CLIP)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="transformers cannot read it"):
        score(reward(CLIP, folder))


@pytest.mark.parametrize(
    "settings",
    [{"do_center_crop": False}, {"resample": 2}, {"size": {"height": 3, "width": 4}}, {"crop_size": "large"}],
    ids=str,
)
def test_preprocessing_that_is_no_clips(copied: Callable[[str], Path], settings: dict[str, Any]) -> None:
    folder = copied(CLIP)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ModelError, match="a CLIP resizes by bicubic interpolation"):
        score(reward(CLIP, folder))


WEIGHTS = {"hps": "HPS_v2.1_compressed.pt", "image_reward": "ImageReward.pt", "aesthetic": "aesthetic-model.pth"}
KEYS = {"aesthetic": "head"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_file_of_something_else(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name if name != "aesthetic" else CLIP)
    file, key = folder / WEIGHTS[name], KEYS.get(name, "path")
    file.write_bytes(b"<html>")
    with pytest.raises(ModelError, match=f"{file.name}: not a file that torch.save wrote"):
        reward(name, folder).check()
    file.rename(safe := file.with_suffix(".safetensors"))
    with pytest.raises(ModelError, match=f"{safe.name}: not a .safetensors file"):
        reward(name, folder, **{key: str(safe)}).check()
    (other := folder / "notes.md").write_text("notes")
    with pytest.raises(ModelError, match=f"{key} must name a file of weights, which end in"):
        reward(name, folder, **{key: str(other)}).check()


@pytest.mark.parametrize("name", WEIGHTS)
def test_other_tensors(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied(name if name != "aesthetic" else CLIP)
    torch.save({"one": torch.zeros(2)}, folder / WEIGHTS[name])
    with pytest.raises(ModelError, match=r"not the tensors of|a head has the tensors"):
        score(reward(name, folder))
    if name != "aesthetic":
        safe = folder / "other.safetensors"
        save_file({"one": torch.zeros(2)}, safe)
        with pytest.raises(ModelError, match=r"other.safetensors: not the tensors of"):
            reward(name, folder, path=str(safe)).check()


@pytest.mark.parametrize("name", WEIGHTS)
def test_code_in_a_pickle_is_not_run(name: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    folder = copied(name if name != "aesthetic" else CLIP)
    torch.save({"state_dict": Evil()}, folder / WEIGHTS[name])
    with pytest.raises(ModelError, match="it holds more than tensors, and to read that would run its code"):
        score(reward(name, folder))
    (folder / WEIGHTS[name]).write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(ModelError):
        score(reward(name, folder))
    assert not (tmp_path / "ran").exists()


def test_a_head_for_another_clip(copied: Callable[[str], Path]) -> None:
    folder = copied(CLIP)
    stored = torch.load(folder / "aesthetic-model.pth", weights_only=True)
    torch.save({**stored, "layers.0.weight": torch.zeros(1024, 768)}, folder / "aesthetic-model.pth")
    with pytest.raises(ModelError, match="a head for features of length 768, and those of this CLIP have 16"):
        score(reward("aesthetic", folder))


def test_a_name_on_the_hub_is_not_looked_up_by_check(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, call, lambda *_, **__: pytest.fail("check must not fetch"))
    for name in ("aesthetic", "clip_score", "hps", "image_reward", "pickscore"):
        reward(name, folders[name], path="some/name").check()


@pytest.mark.parametrize("name", ["aesthetic", "clip_score", "hps", "image_reward", "pickscore"])
def test_what_the_hub_does_not_give_is_said(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"^some/nothing: .*fetch it elsewhere with 'hf download some/nothing'"):
        score(reward(name, folders[name], path="some/nothing"))


def test_checking_imports_no_torch(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from corefit_rewards import corefit_rewards; offers = corefit_rewards();"
        f"offers['clip_score'](path={str(folders[CLIP])!r}).check();"
        f"offers['aesthetic'](path={str(folders[CLIP])!r}, head={str(folders[CLIP])!r}).check();"
        f"offers['hps'](path={str(folders['hps'])!r}, processor={str(folders['hps'])!r}).check();"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
