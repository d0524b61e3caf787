"""The base of rewards that are published networks: which is loaded when, on which device, and how it is called."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import evolve, field, fields, frozen

from corefit.errors import ConfigError
from corefit.types import ROUNDING, Meta
from corefit_rewards import files
from corefit_rewards.frames import FrameReward
from corefit_rewards.pictures import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SCALE = 1024.0
"""What a gradient is multiplied by while it passes through a network in float16, where small numbers become 0."""
USED = ("pool", "frames", "device")
"""Keys that change how a loaded network is used, and not which one is loaded."""
HEAD = "head"
"""The name of the part of a network that stays in float32: the few layers that make a score of features."""


@frozen(eq=False)
class Loaded:
    """A network in evaluation mode whose weights are frozen, and what prepares its inputs.

    tokenizer  the tokenizer of its prompts, or None
    length     the number of tokens to which prompts are cut and padded
    """

    network: nn.Module
    preprocess: Preprocess
    tokenizer: Any = None
    length: int = 0

    def tokens(self, prompts: Sequence[str]) -> Any:
        """Return "input_ids" and "attention_mask" [B, length] of prompts, on the CPU."""
        return self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )


def _check_device(_: Any, attribute: Any, value: str | None) -> None:
    if value is not None and not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", value):
        raise ValueError(f'\'{attribute.name}\' must be "cpu", "cuda", "cuda:1" or "mps", not {value!r}')


@frozen(slots=False, kw_only=True)
class NetworkReward(FrameReward):
    """Base of rewards that are published networks.

    A subclass has further keys that name files, and writes `load`, `blank` and `compute`. Equal keys share one network.
    """

    differentiable: ClassVar[bool] = True

    device: str | None = field(default=None, validator=_check_device, metadata=ROUNDING)
    """Where the network is: "cpu", or a GPU such as "cuda:1". By default it is on the device of the media."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The dtype of the network's weights, in which it computes. Scores are float32."""

    @abstractmethod
    def load(self, place: torch.device) -> Loaded:
        """Read the network's files; the caller freezes the network and moves it to the device `place`.

        Raises ModelError for files that cannot be used.
        """

    @abstractmethod
    def blank(self) -> nn.Module:
        """Return the network on the meta device, without reading weights."""

    @abstractmethod
    def compute(self, network: nn.Module, pixels: Tensor, tokens: Any) -> Tensor:
        """Return scores [B] in float32.

        pixels  [B, 3, size, size], normalized, in the dtype of the network
        tokens  what `Loaded.tokens` gives, on the network's device; None for a network without a tokenizer
        """

    @abstractmethod
    def sizes(self, network: Any) -> tuple[int, int]:
        """Return the edge in pixels of the pictures that the network takes, and its number of tokens, 0 for none."""

    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return scores [B] in float32, on the device of the pictures and with a graph where those have one."""
        import torch

        place = pictures.device if self.device is None else torch.device(self.device)
        loaded = self.loaded(place)
        tokens = None
        if loaded.tokenizer is not None:
            found = loaded.tokens(prompts)
            tokens = {name: _moved(found[name], place) for name in ("input_ids", "attention_mask")}
        return self._scored(loaded.network, loaded.preprocess, pictures.to(place), tokens).to(pictures.device)

    def loaded(self, place: torch.device) -> Loaded:
        """Return the network on the device `place`; it is read when this is first called with equal keys."""
        return _loaded(self._network_keys(), place)

    def load_blank(self) -> Any:
        """Return the network on the meta device, in the dtypes that it is held in, or None if no GPU will hold it."""
        if self.device in ("cpu", "mps"):
            return None
        return _blank(self._network_keys())

    def config_key(self) -> str:
        """Hash of the names, sizes and times of all files that the keys name; a model on the hub stays the same."""
        paths = [value for each in fields(type(self)) if isinstance(value := getattr(self, each.name), str)]
        return hashlib.sha256(repr([files.stamps(path) for path in paths]).encode()).hexdigest()

    def _network_keys(self) -> NetworkReward:
        """Return the reward that stands for all that share its network."""
        used = {each.name: each.default for each in fields(type(self)) if each.name in USED}
        return evolve(self, **used)

    def score_blank(self, network: Any, media: Tensor) -> Tensor:
        """Score media as `score` does, with the network of `load_blank`, whose tensors are fake, and any prompts."""
        import torch

        size, length = self.sizes(network)
        preprocess, clips = Preprocess.of(media.device, size, size), media.ndim == 5
        pictures = self.chosen(media).transpose(1, 2).flatten(0, 1) if clips else media
        names = ("input_ids", "attention_mask")
        tokens = {name: torch.ones(len(pictures), length, dtype=torch.long) for name in names} if length else None
        scores = self._scored(network, preprocess, pictures, tokens)
        return self.pooled(scores.reshape(len(media), -1)) if clips else scores

    def _scored(self, network: nn.Module, preprocess: Preprocess, pictures: Tensor, tokens: Any) -> Tensor:
        import torch

        with torch.autocast(pictures.device.type, enabled=False):
            pixels = preprocess(pictures)
            if self.dtype == "fp16" and pixels.requires_grad:
                pixels.register_hook(_down)
            scores = self.compute(network, pixels.to(_dtype(self.dtype)), tokens)
            if self.dtype == "fp16" and scores.requires_grad:
                scores.register_hook(_up)
        return scores

    def _held(self, network: nn.Module) -> nn.Module:
        """Return the network frozen, in evaluation mode and in the dtypes that it is held in."""
        for name, part in network.named_children():
            if name != HEAD:
                part.to(_dtype(self.dtype))
        return network.requires_grad_(False).eval()


@cache
def _loaded(reward: NetworkReward, place: torch.device) -> Loaded:
    """Return the network of all rewards with these keys in this process."""
    import torch

    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        first = str(error).partition("\n")[0]
        raise ConfigError(f'device = "{place}": this machine has no such device ({first})') from None
    loaded = reward.load(place)
    return evolve(loaded, network=reward._held(loaded.network).to(place))  # pyright: ignore[reportPrivateUsage]


@cache
def _blank(reward: NetworkReward) -> nn.Module:
    return reward._held(reward.blank())  # pyright: ignore[reportPrivateUsage]


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _moved(tensor: Tensor, place: torch.device) -> Tensor:
    """Return a tensor of the CPU on another device, for which the CPU does not wait."""
    if place.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(place, non_blocking=True)


def _up(gradient: Tensor) -> Tensor:
    return gradient * SCALE


def _down(gradient: Tensor) -> Tensor:
    return gradient / SCALE
