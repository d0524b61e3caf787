"""The networks beside the one under training: text encoders and VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attrs import define, field

from corefit_backbones import encoders, network, parts
from corefit_backbones.folder import Checkpoint, Settings
from corefit_backbones.turns import Turns, bytes_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Codec(Protocol):
    """Converts media to the latents that a family is trained on, and back: the module `pictures` or `clips`."""

    def encode(self, vae: Any, media: Tensor) -> Tensor: ...
    def decode(self, vae: Any, x0: Tensor) -> Tensor: ...
    def check_tile(self, config: Settings, side: int) -> None: ...
    def tile(self, vae: Any, side: int) -> None: ...


@define(eq=False)
class Beside:
    """The text encoders and the VAE of a checkpoint. Each is read when it is first used.

    kind, vae_kind  names of diffusers' classes of the whole pipeline and of the VAE
    dtype           that of the text encoders; the VAE is in float32
    where           where prompts are encoded: on the "device", also in "int8", or on the "cpu"
    side            of the VAE's tiles in pixels; None for none
    """

    checkpoint: Checkpoint
    kind: str
    vae_kind: str
    device: torch.device
    dtype: torch.dtype
    codec: Codec
    where: Literal["device", "cpu", "int8"]
    side: int | None
    _text: Any = field(init=False, default=None)
    _vae: Any = field(init=False, default=None)
    _is_blank: bool = field(init=False, default=False)
    _turns: Turns = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._turns = Turns.on(self.device)

    @property
    def text_device(self) -> torch.device:
        """Where prompts are encoded."""
        import torch

        return torch.device("cpu") if self.where == "cpu" else self.device

    def text(self) -> Any:
        """The family's diffusers pipeline with only tokenizers and frozen text encoders.

        Each encoder comes to the device when it is called.
        """
        if self._text is None:
            self._text = encoders.read(parts.of_diffusers(self.kind), self.checkpoint, self.dtype)
            for name, part in self._text.components.items():
                if name.startswith("text_encoder") and part is not None:
                    part.requires_grad_(False)
                    if self.where == "int8":
                        encoders.quantize(part)
                    if self.where != "cpu":
                        self._turns.add(name, part)
        return self._text

    def vae(self) -> Any:
        """The VAE in float32, frozen, on the device."""
        import torch

        if self._vae is None:
            vae = network.read(parts.of_diffusers(self.vae_kind), self.checkpoint, "vae", torch.float32)
            self._vae = self._tiled(vae.requires_grad_(False))
        if not self._is_blank:
            self._turns.use("vae", self._vae)
        return self._vae

    def blank_vae(self) -> Any:
        """The VAE without weights, on the meta device, which `vae` returns from now on."""
        import torch

        vae = network.blank(parts.of_diffusers(self.vae_kind), self.checkpoint.config("vae"), torch.float32)
        self._vae, self._is_blank = self._tiled(vae.requires_grad_(False)), True
        return self._vae

    def bytes(self) -> Mapping[str, int]:
        """The bytes of each text encoder and of the VAE on the device, from their configs alone."""
        import torch

        kind, config = parts.of_diffusers(self.vae_kind), self.checkpoint.config("vae")
        found = {"vae": bytes_of(network.blank(kind, config, torch.float32))}
        for name in self.checkpoint.parts:
            if name.startswith("text_encoder"):
                made = encoders.blank(self.checkpoint, name, self.dtype)
                if self.where == "int8":
                    encoders.quantize(made)
                found[name] = 0 if self.where == "cpu" else bytes_of(made)
        return found

    def _tiled(self, vae: Any) -> Any:
        if self.side is not None:
            self.codec.tile(vae, self.side)
        return vae
