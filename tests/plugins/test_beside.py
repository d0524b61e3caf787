"""Text encoders and VAE: where they are, who leaves for whom, in how many bits, and in which tiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from torch import nn

from corefit.errors import ModelError
from corefit.system import memory
from corefit.testing import tiny_flux, tiny_sd3, tiny_wan
from corefit_backbones import turns
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.turns import Turns, bytes_of
from corefit_backbones.wan import Wan

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
PROMPTS = ["a red sky", "a sea"]


def placed(folder: Path, kind: type[Any] = Sd3, device: torch.device = CPU, **keys: Any) -> Any:
    backbone = kind(str(folder), max_sequence_length=16, **keys)
    backbone.place(device, torch.float32)
    return backbone


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("sd3") / "base", words=WORDS, layers=1)


def test_networks_leave_for_one_that_would_be_too_many() -> None:
    networks = {name: nn.Linear(width, 1, bias=False) for name, width in (("small", 10), ("large", 100), ("vae", 20))}
    places = {name: network.weight.data_ptr() for name, network in networks.items()}
    taken, present = Turns(CPU, limit=4 * 115), list[list[str]]()
    for name in ("small", "large", "small", "vae", "small", "large"):
        taken.use(name, networks[name])
        present.append([*taken.present])
    assert present == [["small"], ["small", "large"], ["small", "large"], ["vae"], ["vae", "small"], ["large"]]
    taken.clear()
    assert places == {name: network.weight.data_ptr() for name, network in networks.items()}


def test_where_all_fit_none_leaves_and_where_not_the_largest_is_the_peak() -> None:
    sizes = {"clip": 2, "t5": 9, "vae": 1}
    assert turns.most(sizes, 24.0) == 12
    assert turns.most(sizes, 23.0) == 11
    assert turns.most(sizes, 16.0) == 9


def test_encoders_come_one_after_the_other_and_results_are_equal(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = placed(sd3), placed(sd3)
    expected = together.encode_text(PROMPTS).tensors
    alone._beside()._turns.limit = 0
    present: list[set[str]] = []
    use = Turns.use
    monkeypatch.setattr(Turns, "use", lambda self, *args: (use(self, *args), present.append({*self.present}))[0])
    found = alone.encode_text(PROMPTS).tensors
    alone.encode(torch.rand(1, 3, 32, 32))
    assert present == [{"text_encoder"}, {"text_encoder_2"}, {"text_encoder_3"}, {"vae"}]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("make", "kind"), [(tiny_sd3, Sd3), (tiny_flux, Flux), (tiny_wan, Wan)])
def test_prompts_can_be_encoded_on_the_cpu(make: Callable[..., Path], kind: type[Any], tmp_path: Path) -> None:
    folder = make(tmp_path / "base", words=WORDS)
    expected = placed(folder, kind).encode_text(PROMPTS).tensors
    backbone = placed(folder, kind, DEVICE, text_encoders="cpu")
    assert {t.device.type for t in backbone.encode_text(PROMPTS).tensors.values()} == {"meta"}
    found = placed(folder, kind, text_encoders="cpu").encode_text(PROMPTS).tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(backbone.encoder_bytes().values()) == backbone.encoder_bytes()["vae"]


def round_linear_weights(encoder: nn.Module) -> None:
    """Round the weights of linear layers as torchao's int8 does: 256 levels a row, from -128 to 127 steps."""
    for linear in (m for m in encoder.modules() if type(m) is nn.Linear):
        step = linear.weight.detach().abs().amax(1, keepdim=True) / 127.5
        linear.weight.data = (linear.weight.detach() * (1 / step)).round().clamp(-128, 127) * step


def test_encoders_in_8_bits_are_those_with_rounded_weights_smaller_and_of_another_cache(sd3: Path) -> None:
    exact, rounded = placed(sd3), placed(sd3, text_encoders="int8")
    plain, found = exact.encode_text(PROMPTS).tensors, rounded.encode_text(PROMPTS).tensors
    by_hand = placed(sd3)
    for name, part in by_hand._beside().text().components.items():
        if name.startswith("text_encoder"):
            round_linear_weights(part)
    for name, t in by_hand.encode_text(PROMPTS).tensors.items():
        assert not torch.equal(found[name], plain[name])
        assert (found[name] - t).norm() < 1e-6 * t.norm()
    assert rounded.encoding_key() == {**exact.encoding_key(), "text_bits": "int8"}
    for backbone in (exact, rounded):
        parts = backbone._beside().text().components
        held = {name: bytes_of(part) for name, part in parts.items() if name.startswith("text_encoder")}
        assert backbone.encoder_bytes() == {**held, "vae": bytes_of(backbone.vae())}
    assert rounded.encoder_bytes()["text_encoder_3"] < 0.6 * exact.encoder_bytes()["text_encoder_3"]


TILED: dict[str, tuple[Callable[..., Path], type[Any], list[int]]] = {
    "pictures": (tiny_flux, Flux, [96, 96]),
    "clips": (tiny_wan, Wan, [5, 96, 96]),
}


@pytest.mark.parametrize("kind_of", TILED)
def test_tiles_change_little_and_their_overlap_hides_seams(kind_of: str, tmp_path: Path) -> None:
    """The bounds are for random weights and tiles of 64 pixels; docs/large-models.md states them."""
    make, kind, size = TILED[kind_of]
    folder = make(tmp_path / "base", words=WORDS)
    whole, tiled = placed(folder, kind), placed(folder, kind, tile=64)
    noise = torch.rand(1, 3, *[max(1, n // 16) for n in size], generator=torch.Generator().manual_seed(0))
    media = nn.functional.interpolate(noise, size)
    x0 = whole.encode(media)
    y, y_tiled = whole.decode(x0), tiled.decode(x0)
    assert 0 < (tiled.encode(media) - x0).norm() < 0.3 * x0.norm()
    assert 0 < (y - y_tiled).abs().mean() < 0.05
    small = media[..., :64, :64]
    assert torch.equal(tiled.encode(small), whole.encode(small))
    vae = tiled.vae()
    if kind_of == "pictures":
        vae.tile_overlap_factor = 0.0
    else:
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 64
    assert _seam(y_tiled - y) < 0.5 * _seam(tiled.decode(x0) - y)


def _seam(change: torch.Tensor) -> torch.Tensor:
    """The largest jump of a change from one column to the next, as a mean over rows."""
    return (change[..., 1:] - change[..., :-1]).abs().flatten(0, -2).mean(0).max()


def test_a_reward_gradient_goes_through_tiles_and_is_recomputed(tmp_path: Path) -> None:
    folder = tiny_flux(tmp_path / "base", words=WORDS)
    whole, backbone = placed(folder, Flux), placed(folder, Flux, tile=64)
    x0 = torch.randn(1, *backbone.latent_shape([96, 96]), generator=torch.Generator().manual_seed(0)).requires_grad_()
    found: list[Any] = []
    for again in (False, True):
        x0.grad = None
        backbone.decode(x0, checkpoint=again).square().mean().backward()
        found.append(x0.grad)
    assert found[0].norm() > 0
    assert torch.equal(*found)
    peaks: list[int] = []
    for each in (whole, backbone):
        each.vae()
        with memory.track_live_bytes() as held:
            each.decode(x0, checkpoint=True).square().mean().backward()
        peaks.append(held.peak)
    assert peaks[1] < 0.6 * peaks[0]  # a tile has 4/9 of the pixels
    assert not any("forward" in vars(module) for module in backbone.vae().modules())


def test_tiles_are_whole_latents_and_of_another_cache(sd3: Path) -> None:
    with pytest.raises(ModelError, match=r"tile = 66: must be a multiple of 8, .* nearest: 64"):
        placed(sd3, tile=66).check()
    with pytest.raises(ValueError, match="tile"):
        placed(sd3, tile=0)
    backbone = placed(sd3, tile=64)
    backbone.check()
    assert backbone.encoding_key() == {**placed(sd3).encoding_key(), "vae_tile": "64"}
