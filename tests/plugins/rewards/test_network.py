"""What all rewards that are networks share: gradients, dtypes, devices, one copy, and no waiting for the device."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from published import PROMPTS, pictures, reward

from corefit.errors import ConfigError
from corefit.testing import check_reward
from corefit.testing.syncs import watched
from corefit.types import Configured, Featured, KeyedReward, SizedReward, SizedScore
from corefit_rewards.hps import Hps
from corefit_rewards.image_reward import ImageReward

NAMES = ("aesthetic", "clip_score", "hps", "image_reward", "pickscore")
META: list[dict[str, Any]] = [{}] * 3
CPU = torch.device("cpu")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, folders: dict[str, Path]) -> Path:
    return folders[name]


def gradient(one: Any, weight: float = 1.0) -> torch.Tensor:
    media = pictures().requires_grad_(True)
    (weight * one.score(media, PROMPTS, META).sum()).backward()
    assert media.grad is not None
    return media.grad


def test_the_kit_finds_nothing(name: str, folder: Path) -> None:
    one = reward(name, folder)
    assert one.differentiable
    one.check()
    check_reward(one)
    check_reward(reward(name, folder, pool="min"), media=pictures().unsqueeze(2).expand(-1, -1, 3, -1, -1).clone())


def test_the_gradient_is_that_of_finite_differences(name: str, folder: Path) -> None:
    one, media = reward(name, folder), pictures()
    found = gradient(one)
    for seed in range(3):
        way = torch.randn(media.shape, generator=torch.Generator().manual_seed(seed)) + found / found.std()
        way *= 2e-3
        with torch.no_grad():
            high, low = (one.score(media + sign * way, PROMPTS, META).double().sum() for sign in (1, -1))
        assert float(high - low) == pytest.approx(2 * float((found * way).sum()), rel=0.02)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_changes_scores_and_gradients_little(name: str, folder: Path, dtype: str) -> None:
    whole, half = reward(name, folder), reward(name, folder, dtype=dtype)
    scores, expected = (one.score(pictures(), PROMPTS, META) for one in (half, whole))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, expected)
    torch.testing.assert_close(scores, expected, rtol=0.02, atol=0.02)
    for weight in (1.0, 1e-4):  # a small gradient would be 0 in float16
        one, other = (gradient(each, weight).flatten() for each in (half, whole))
        assert torch.cosine_similarity(one, other, 0) > 0.98
        assert one.norm() == pytest.approx(float(other.norm()), rel=0.1)


def test_autocast_around_it_changes_nothing(name: str, folder: Path) -> None:
    one = reward(name, folder)
    expected = one.score(pictures(), PROMPTS, META)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(one.score(pictures(), PROMPTS, META), expected)


def test_nothing_waits_for_the_device(name: str, folder: Path) -> None:
    one, media = reward(name, folder), pictures()
    network = one.loaded(CPU)
    tensors = [network.preprocess.mean, network.preprocess.std, *network.network.parameters()]
    with watched([media, *tensors, *network.network.buffers()]) as reads, torch.no_grad():
        scores = one.score(media, PROMPTS, META)
    reads.expect_none("scores are tensors on the device")
    assert not scores.requires_grad


def test_equal_keys_share_one_network_and_others_do_not(name: str, folder: Path) -> None:
    one = reward(name, folder)
    shared = (reward(name, folder, frames=3, pool="first"), reward(name, folder, device="cpu"))
    assert all(other.loaded(CPU) is one.loaded(CPU) for other in shared)
    assert one.load_blank() is shared[0].load_blank()
    assert reward(name, folder, dtype="bf16").loaded(CPU) is not one.loaded(CPU)


def test_scores_depend_on_the_files_and_not_on_where_they_are(name: str, folder: Path, tmp_path: Path) -> None:
    one = reward(name, folder)
    assert isinstance(one, KeyedReward)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert reward(name, moved).scores_key() == one.scores_key()
    weights = {"aesthetic": "aesthetic-model.pth", "hps": "HPS_v2.1_compressed.pt", "image_reward": "ImageReward.pt"}
    file = moved / weights.get(name, "model.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert reward(name, moved).scores_key() != one.scores_key()


def test_features_tell_pictures_apart(name: str, folder: Path) -> None:
    one = reward(name, folder)
    assert isinstance(one, Featured) == (name != "image_reward")
    if isinstance(one, Featured):
        media = pictures()
        with torch.no_grad():
            found = one.features(torch.cat([media, media[:1]]))
            clips = one.features(media.unsqueeze(2).expand(-1, -1, 3, -1, -1))
        alike = torch.cosine_similarity(found[:1], found)
        assert alike[3] == pytest.approx(1, abs=1e-5)
        assert alike[1:3].max() < 0.9999
        torch.testing.assert_close(clips, found[:3], rtol=1e-4, atol=1e-4)


def test_its_weights_stay_as_they_are(name: str, folder: Path) -> None:
    one = reward(name, folder)
    network = one.loaded(CPU).network
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    gradient(one)
    assert not network.training
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_weights_it_has_the_same_shapes(name: str, folder: Path, dtype: str) -> None:
    one = reward(name, folder, dtype=dtype)
    assert isinstance(one, SizedReward)
    assert isinstance(one, Configured)
    blank, loaded = one.load_blank(), one.loaded(CPU).network
    shapes = [{key: (tuple(p.shape), p.dtype) for key, p in n.named_parameters()} for n in (blank, loaded)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in blank.parameters())
    assert reward(name, folder, device="cpu").load_blank() is None


def test_it_scores_without_weights_with_the_same_graph(name: str, folder: Path) -> None:
    """What fake tensors hold is what real ones do."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from corefit.system.memory import track_live_bytes
    from corefit.train.fake import materialize

    one = reward(name, folder)
    assert isinstance(one, SizedScore)
    gradient(one)
    with track_live_bytes() as real:
        media = pictures().requires_grad_(True)
        one.score(media, PROMPTS, META).sum().backward()
    with FakeTensorMode():
        network = one.load_blank()
        materialize(network)
        with track_live_bytes() as fake:
            media = torch.empty(pictures().shape, requires_grad=True)
            scores = one.score_blank(network, media)
            scores.sum().backward()
    assert scores.shape == (3,)
    assert fake.peak == pytest.approx(real.peak, rel=0.15)


@pytest.mark.parametrize(
    ("one", "parameters"),
    [(Hps(), 986_109_441), (ImageReward(), 446_206_689)],
    ids=["hps", "image_reward"],
)
def test_published_sizes_are_known_without_the_hub(one: Any, parameters: int) -> None:
    """986.11 M as open_clip says of ViT-H-14; the other is what the published classes have."""
    found = one.load_blank()
    assert sum(p.numel() for p in found.parameters()) == parameters
    held = 2 if one.dtype == "fp16" else 4
    assert sum(p.nbytes for p in found.parameters()) == pytest.approx(held * parameters, rel=1e-6)


def test_a_device_that_is_not_there_is_said(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r'device = "cuda:99": this machine has no such device'):
        reward("clip_score", folders["clip_score"], device="cuda:99").score(pictures(), PROMPTS, META)
    with pytest.raises(ValueError, match=r"'device' must be \"cpu\", \"cuda\", \"cuda:1\" or \"mps\", not 'gpu'"):
        reward("clip_score", folders["clip_score"], device="gpu")
