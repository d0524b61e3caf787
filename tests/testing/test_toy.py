"""The toy backbone, its data and its contexts."""

import subprocess
import sys

import pytest
import torch

from corefit.errors import ConfigError, ModelError
from corefit.testing import ToyBackbone, toy_batch, toy_context
from corefit.testing.toy import loaded

PROMPTS = ["a red sky", "a blue sea"]


def test_importing_the_kit_does_not_import_torch():
    code = "import corefit.testing, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def toy(shape=(4, 8, 8), kind=ToyBackbone):
    return loaded(kind(shape))


@pytest.mark.parametrize("shape", [(3, 4, 4), (16, 3), (3, 4, 2, 2), (48,)], ids=str)
def test_the_toys_velocity_is_the_same_in_any_layout(shape):
    flat, other = toy((48,)), toy(shape)
    x, sigma = torch.linspace(-2, 2, 96).reshape(2, 48), torch.tensor([0.3, 0.8])
    cond = flat.encode_text(PROMPTS)
    v = other.velocity(x.reshape(2, *shape), sigma, cond)
    torch.testing.assert_close(v.reshape(2, 48), flat.velocity(x, sigma, cond))


def test_the_toy_decodes_what_it_encodes():
    media = torch.rand(2, 3, 4, 4)
    for shape in ((3, 4, 4), (5, 4, 4), (16, 3)):
        torch.testing.assert_close(toy(shape).decode(toy(shape).encode(media)), media)


def test_the_toy_counts_calls_and_reuses_a_known_velocity():
    backbone = toy()
    batch = toy_batch(backbone, 2)
    x, sigma = batch.clean, torch.tensor([0.3, 0.8])
    v = backbone.velocity(x, sigma, batch.cond)
    assert backbone.calls == 1
    guided = backbone.guided(x, sigma, batch.cond, 2.0, v_cond=v)
    assert backbone.calls == 2
    torch.testing.assert_close(guided, 2 * v - backbone.velocity(x, sigma, backbone.null(2)))


def test_the_toy_is_a_function_of_its_seed():
    one, same, other = (loaded(ToyBackbone(seed=seed)) for seed in (0, 0, 1))
    batch = toy_batch(one, 2)
    v = [b.velocity(batch.clean, torch.tensor([0.3, 0.8]), batch.cond) for b in (one, same, other)]
    assert torch.equal(v[0], v[1])
    assert not torch.equal(v[0], v[2])
    assert one.weights_key() == same.weights_key() != other.weights_key()


def test_the_toy_says_what_it_cannot(tmp_path):
    with pytest.raises(ModelError, match="no LoRA"):
        toy().load_lora(tmp_path)
    with pytest.raises(ModelError, match=r"no toy\.safetensors"):
        ToyBackbone().from_saved(tmp_path).check()
    (tmp_path / "toy.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match=r"toy\.safetensors: cannot be read"):
        loaded(ToyBackbone().from_saved(tmp_path))
    with pytest.raises(ConfigError, match=r"media of \[8, 8\]"):
        toy().latent_shape([16, 16])
    with pytest.raises(ConfigError, match="have media"):
        toy((5,)).latent_shape([1, 5])


def test_a_toy_batch_does_not_depend_on_its_size():
    whole, later = toy_batch(toy(), 8, group=2), toy_batch(toy(), 4, group=2, first=4)
    assert torch.equal(whole.clean[4:], later.clean)
    assert whole.prompts[4:] == later.prompts
    assert toy_batch(toy(), 2, media=False).x0 is None


def test_a_toy_context_draws_by_row():
    batch = toy_batch(toy(), 4)
    whole, part = toy_context(toy(), batch.rows), toy_context(toy(), batch.rows[2:])
    assert torch.equal(whole.randn_like(batch.clean)[2:], part.randn_like(batch.clean[2:]))
    assert not torch.equal(whole.rand(4), toy_context(toy(), batch.rows, seed=1).rand(4))
