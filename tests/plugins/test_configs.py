"""The configs of published models that are included: their numbers of parameters are those that were published."""

import pytest

from corefit.errors import ModelError
from corefit_backbones import FAMILIES, configs

PUBLISHED = {
    "SD3.5-medium": ("sd3", 2.24),
    "SD3.5-large": ("sd3", 8.06),
    "FLUX.1-dev": ("flux", 11.90),
    "Wan2.1-T2V-1.3B": ("wan", 1.42),
    "Wan2.1-T2V-14B": ("wan", 14.29),
    "Wan2.2-T2V-A14B": ("wan", 28.58),
}
"""The family, and billions of parameters of the networks that train (A14B has two of 14.29)."""


@pytest.mark.parametrize("name", configs.NAMES)
def test_a_published_model_has_its_number_of_parameters(name: str) -> None:
    import torch

    use, billions = PUBLISHED[name]
    backbone = FAMILIES[use](path=configs.folder(name))  # pyright: ignore[reportArgumentType]
    backbone.check_settings()
    backbone.load_blank(torch.bfloat16)
    assert round(sum(p.numel() for p in backbone.transformer.parameters()) / 1e9, 2) == billions
    assert all(size > 0 for shape in backbone.condition_shapes().values() for size in shape)
    assert len(backbone.latent_shape(backbone.usual().size)) in (3, 4)


def test_other_names_are_refused_with_a_list() -> None:
    with pytest.raises(ModelError, match=r"no configs of .FLUX\.2. are included; there are: SD3\.5-medium"):
        configs.folder("FLUX.2")
