"""How pictures are resized, cropped and normalized for the networks of rewards: in torch, on their device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from corefit.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue for OpenAI's CLIP; HPS and BLIP take the same."""
BICUBIC = 3
"""The number of bicubic interpolation in a preprocessor_config.json."""


@frozen(eq=False)
class Preprocess:
    """Makes the pixels [B, 3, size, size] that a network takes of pictures [B, 3, H, W] in [0, 1], with a graph.

    It is what torchvision does to float tensors: bicubic interpolation with antialiasing, whose overshoot is kept.
    A library that is given pictures of 8 bits rounds, and cuts off the overshoot, which moves pixels by about 1 / 255.

    edge   pixels to which the shorter edge is resized; the longer one where `whole` is true
    size   pixels of the square that is cut out of the middle
    whole  whether the whole picture is shown, with black bars, in place of the square in its middle
    """

    edge: int
    size: int
    mean: Tensor
    std: Tensor
    whole: bool = False

    @staticmethod
    def of(place: torch.device, edge: int, size: int, *, whole: bool = False, config: Any = None) -> Preprocess:
        """Make one whose constants are on the device `place`, with CLIP's mean and std if `config` has none."""
        import torch

        stored: Mapping[str, Sequence[float]] = config or {}
        mean, std = (
            torch.tensor(stored.get(key, default)).reshape(3, 1, 1).to(place)
            for key, default in (("image_mean", MEAN), ("image_std", STD))
        )
        return Preprocess(edge, size, mean, std, whole)

    @staticmethod
    def read(place: torch.device, config: Mapping[str, Any], file: str) -> Preprocess:
        """Make what a CLIP folder's preprocessor_config.json says; ModelError for what is no CLIP's."""
        edge, crop = (_pixels(config.get(key, 224)) for key in ("size", "crop_size"))
        steps = [config.get(f"do_{step}", True) for step in ("resize", "center_crop", "rescale", "normalize")]
        if edge is None or crop is None or not all(steps) or config.get("resample", BICUBIC) != BICUBIC:
            raise ModelError(
                f"{file}: CLIP's resizes by bicubic interpolation, crops a square and normalizes; fetch it"
            )
        return Preprocess.of(place, edge, crop, config=config)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return pixels [B, 3, size, size] in float32."""
        from torchvision.transforms.v2 import InterpolationMode, functional

        scale = self.edge / max(pictures.shape[-2:])
        new = [round(pixels * scale) for pixels in pictures.shape[-2:]] if self.whole else [self.edge]
        resized = functional.resize(pictures.float(), new, InterpolationMode.BICUBIC, antialias=True)
        square = functional.center_crop(resized, [self.size, self.size])  # with black bars where it is smaller
        return (square - self.mean) / self.std


def _pixels(size: Any) -> int | None:
    """Return the edge in pixels of a size as preprocessor_config.json writes it, or None if it is no square's."""
    values = set(size.values()) if isinstance(size, Mapping) else {size}
    only = values.pop() if len(values) == 1 else None
    return only if type(only) is int and 0 < only <= 10_000 else None
